"""Faults in local data sets: each is found before any work and says its file and row."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from evaluation_data import CEVAL_ROW, MMLU_ROW, ceval_row, lines, only, put, refusal, write_sets, write_table

from ascend_kit.evaluation.datasets import find_tasks
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.rows import passage_of

pytest.importorskip("lm_eval")


# --- contents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": None}, "answer is None"),
        ({"answer": 4}, "answer is 4, expected 0 to 3"),
        ({"answer": -1}, "answer is -1"),
        ({"choices": ["a", "b", "c"]}, "choices are ['a', 'b', 'c'], expected four"),
        ({"choices": ["a", "b", "c", None]}, "choices are"),
        ({"question": None}, "question is None"),
        ({"question": " \n"}, "question is empty"),
    ],
)
def test_a_fault_in_mmlu_names_file_and_row(tmp_path: Path, change: dict, words: str) -> None:
    path = write_table(tmp_path / "mmlu" / "anatomy" / "test.parquet", [MMLU_ROW, {**MMLU_ROW, **change}, MMLU_ROW])

    assert f"mmlu_anatomy: {path} row 2: {words}" in refusal(tmp_path, "mmlu")


@pytest.mark.parametrize("answer", ["", "b", "B ", "E", "AB", None])
def test_a_fault_in_ceval_names_file_and_row(tmp_path: Path, answer: str | None) -> None:
    path = write_table(tmp_path / "ceval" / "law" / "val.parquet", [CEVAL_ROW, {**CEVAL_ROW, "answer": answer}])

    assert f"{path} row 2: answer is {answer!r}, expected one of the letters" in refusal(tmp_path, "ceval")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "Z"}, "gold is 'Z'"),
        ({"label": "D"}, "gold is [3], expected places 0 to 1"),
        ({"label": None}, "gold is None"),
        ({"label": []}, "gold is []"),
        ({"options": ["(A)x", None]}, "choices are"),
        ({"options": ["(A)x"]}, "expected two to seven"),
        ({"question": ""}, "query is empty"),
        ({"question": None}, "query is None"),
    ],
)
def test_a_fault_in_agieval_names_file_and_row(tmp_path: Path, change: dict, words: str) -> None:
    row = {"passage": "P.", "question": "Which?", "options": ["(A)x", "(B)y"], "label": "A"}
    path = put(tmp_path / "agieval" / "lsat-rc.jsonl", lines(row, {**row, **change}))

    text = refusal(tmp_path, "agieval")

    assert f"{path} row 2" in text and words in text


def test_a_fault_in_the_shots_is_found_too(tmp_path: Path) -> None:
    rnd = random.Random(0)
    write_table(tmp_path / "ceval" / "law" / "val.parquet", [ceval_row(rnd, 0)])
    dev = write_table(
        tmp_path / "ceval" / "law" / "dev.parquet",
        [ceval_row(rnd, n) for n in range(4)] + [{**ceval_row(rnd, 4), "answer": ""}],
    )

    with pytest.raises(DataError, match=rf"{dev} row 5: answer is ''"):
        find_tasks(tmp_path, ["ceval"])


def test_the_passage_of_a_question() -> None:
    first = {"query": "A long text.Q: One? Answer Choices: (A)x (B)y\nA: Among A through B, the answer is"}
    second = {"query": "A long text.Q: Two? Answer Choices: (A)u (B)v\nA: Among A through B, the answer is"}
    chinese = {"query": "一段文字。问题：哪个? 选项：(A)x (B)y\n答案：从A到B, 我们应选择"}
    history = {"question": "This question refers to the following information.\nA letter.\nWho wrote it?"}

    quoting = {"query": "A long text.Q: Why 'Q: Who?'? Answer Choices: (A)x (B)Q: Who?\nA: Among A through B"}

    assert passage_of(first) == passage_of(second) == passage_of(quoting) != passage_of(chinese)
    assert passage_of(chinese) is not None and passage_of(history) is not None
    assert passage_of({"query": "Q: One? Answer Choices: (A)x\nA: Among"}) is None
    assert passage_of({"question": "What is 2+2?"}) is None and passage_of(CEVAL_ROW) is None


def test_the_sample_sets_are_found_as_they_are(tmp_path: Path) -> None:
    write_sets(tmp_path)

    assert len(find_tasks(tmp_path, ["mmlu", "ceval", "agieval", "wikitext"])) == 8


def test_a_name_may_tell_of_any_number_of_parts(tmp_path: Path) -> None:
    write_table(tmp_path / "mmlu" / "anatomy" / "test-00000-of-99999999999.parquet", [MMLU_ROW])
    write_table(tmp_path / "ceval" / "law" / "val-00003-of-00001.parquet", [CEVAL_ROW])

    assert "of 99999999999 parts; missing: part 1, 2, 3" in refusal(tmp_path, "mmlu")
    assert "a part beyond the 1" in refusal(tmp_path, "ceval")


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.arrow"])
def test_a_state_json_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mmlu" / "anatomy" / "test"
    put(folder.parent / "outside.arrow", "x")
    state = put(folder / "state.json", json.dumps({"_data_files": [{"filename": name}]}))

    assert f"{state} lists {name}" in refusal(tmp_path, "mmlu")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "mmlu" / "anatomy").mkdir(parents=True)
    os.mkfifo(tmp_path / "mmlu" / "anatomy" / "test.jsonl")

    assert "test.jsonl cannot be read as jsonl (it is a pipe or a device" in refusal(tmp_path, "mmlu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "q", "answer": 1, "answer": 2}', "a field stands twice"),
        ("[" * 100_000, "nested too deeply"),
        (lines({**MMLU_ROW, "question": "half \ud83d"}).replace("\ud83d", "\\ud83d"), "row 1: question holds"),
        (lines({**MMLU_ROW, "choices": ["a", "b", "c", "\0"]}), "row 1: choices holds a NUL"),
        (lines({**MMLU_ROW, "choices": ["", " ", "", ""]}), "row 1: all choices are empty"),
        (lines(MMLU_ROW, {**MMLU_ROW, "subject": "astronomy"}), "row 2 is about astronomy"),
    ],
)
def test_jsonl_that_could_be_misread_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = put(tmp_path / "mmlu" / "anatomy" / "test.jsonl", text)

    assert f"{path} " in refusal(tmp_path, "mmlu") and words in refusal(tmp_path, "mmlu")


def test_a_damaged_file_of_all_subjects_is_said_once(tmp_path: Path) -> None:
    path = put(tmp_path / "mmlu" / "all" / "test.parquet", "x")

    assert refusal(tmp_path, "mmlu").count(str(path)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,question,A,B,C,D,answer,answer\n0,q,1,2,3,4,B,C\n", "has the column answer twice"),
        ("question,answer,A,B,C,D\nq,A,1,2\n", "row 1 has 4 columns"),
        ('question,A,B,C,D,answer\n"q,1,2,3,4,B\n', "unexpected end of data"),
        ("question,A,B,C,D,answer\nq,,,,,B\n", "row 1: all choices are empty"),
    ],
)
def test_csv_that_could_be_misread_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = put(tmp_path / "ceval" / "val" / "law_val.csv", text)

    assert str(path) in refusal(tmp_path, "ceval") and words in refusal(tmp_path, "ceval")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"passage": ["x"]}, "query is ['x']"),
        ({"options": "(A)x (B)y"}, "choices are '(A)x (B)y'"),
        ({"options": [*"abcdefgh"]}, "gold is 'A'"),
        ({"options": 5}, "choices are 5"),
        ({"label": "AA"}, "gold is [0, 0]"),
        ({"label": "b"}, "gold is 'b'"),
        ({"query": "q", "choices": ["a", "b"], "gold": [0.0]}, "gold is [0.0]"),
        ({"query": "q", "choices": ["a", "b"], "gold": [[0]]}, "gold is [[0]]"),
    ],
)
def test_agieval_values_of_other_kinds_are_refused_by_row(tmp_path: Path, change: dict, words: str) -> None:
    row = {"passage": None, "question": "Which?", "options": ["(A)x", "(B)y"], "label": "A", **change}
    path = put(tmp_path / "agieval" / "lsat-rc.jsonl", lines(row))

    assert f"{path} row 1: {words}" in refusal(tmp_path, "agieval")


def test_running_text_without_any_word_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "wikitext" / "wikitext-2-raw-v1" / "test.parquet", [{"page": ""}, {"page": " "}])

    assert f"{path} holds no text" in refusal(tmp_path, "wikitext")


def test_a_readme_nested_without_end_takes_no_time(tmp_path: Path) -> None:
    write_table(tmp_path / "mmlu" / "anatomy" / "test.parquet", [MMLU_ROW])
    put(tmp_path / "mmlu" / "README.md", "---\nx: " + "[" * 5000 + "\n---\n")
    start = time.process_time()

    assert only(tmp_path, "mmlu").num_documents == 1
    assert time.process_time() - start < 2
