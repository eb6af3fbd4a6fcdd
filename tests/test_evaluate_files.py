"""Which files are a set's data, and what is wrong with their rows: the layouts people hold."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_data import MMLU_ROW, lines, mmlu_row, only, put, refusal, write_table

from ascend_kit.evaluation.datasets import find_tasks

pytest.importorskip("lm_eval")
# --- layouts --------------------------------------------------------------------------------------------------


def test_mmlu_csv_of_its_authors_has_no_header_and_keeps_quotes_and_none(tmp_path: Path) -> None:
    text = '"A ""set"", if\nopen?",I only,"II, and III",None,NA,C\nWhat is 2+2?,1,2,3,4,D\n'
    put(tmp_path / "data" / "mmlu" / "data" / "test" / "abstract_algebra_test.csv", text)
    put(tmp_path / "data" / "mmlu" / "data" / "dev" / "abstract_algebra_dev.csv", "q,a,b,c,d,A\n" * 5)
    put(tmp_path / "data" / "mmlu" / "data" / "val" / "abstract_algebra_val.csv", "q,a,b,c,d,A\n")

    (task,) = find_tasks(tmp_path / "data", ["mmlu"])

    assert task.rows["test"] == [
        {"question": 'A "set", if\nopen?', "choices": ["I only", "II, and III", "None", "NA"], "answer": 2},
        {"question": "What is 2+2?", "choices": ["1", "2", "3", "4"], "answer": 3},
    ]
    assert len(task.rows["dev"]) == 5


@pytest.mark.parametrize("folder", ["ceval/formal_ceval", "ceval-exam", "ceval"])
def test_ceval_csv_of_its_authors(tmp_path: Path, folder: str) -> None:
    text = 'id,question,A,B,C,D,answer\r\n0,"第一行\n第二行____",甲,乙,"丙, 丁",,C\r\n'
    put(tmp_path / folder / "val" / "law_val.csv", text, "utf-8-sig")
    put(tmp_path / folder / "test" / "law_test.csv", "id,question,A,B,C,D\n0,x,1,2,3,4\n")

    task = only(tmp_path, "ceval")

    assert task.task == "ceval-valid_law"
    assert task.rows == {
        "val": [{"question": "第一行\n第二行____", "A": "甲", "B": "乙", "C": "丙, 丁", "D": "", "answer": "C"}]
    }


def test_agieval_rows_of_its_authors_become_their_zero_shot_queries(tmp_path: Path) -> None:
    rows = {
        "lsat-rc": {"passage": "A text.", "question": "Which?", "options": ["(A)x", "(B)y"], "label": "B"},
        "jec-qa-kd": {"passage": None, "question": "哪些?", "options": ["(A)x", "(B)y", "(C)z"], "label": ["A", "C"]},
        "gaokao-physics": {"passage": None, "question": "哪些?", "options": ["(A)x", "(B)y", "(C)z"], "label": "BC"},
        "gaokao-mathcloze": {"passage": None, "question": "求", "options": None, "label": None, "answer": "3"},
        "math": {"passage": None, "question": "What?", "options": None, "label": None, "answer": "7"},
    }
    for name, row in rows.items():
        put(tmp_path / "AGIEval" / "data" / "v1" / f"{name}.jsonl", lines(row))

    found = {task.task: task.rows["test"][0] for task in find_tasks(tmp_path, ["agieval"])}

    assert found == {
        "agieval_lsat_rc": {
            "query": "A text.Q: Which? Answer Choices: (A)x (B)y\nA: Among A through B, the answer is",
            "choices": ["(A)x", "(B)y"],
            "gold": [1],
        },
        "agieval_jec_qa_kd": {
            "query": "问题：哪些? 选项：(A)x (B)y (C)z\n答案：从A到C, 我们应选择",
            "choices": ["(A)x", "(B)y", "(C)z"],
            "gold": [0, 2],
        },
        "agieval_gaokao_physics": {
            "query": "问题：哪些? 选项：(A)x (B)y (C)z\n答案：从A到C, 我们应选择",
            "choices": ["(A)x", "(B)y", "(C)z"],
            "gold": [1, 2],
        },
        "agieval_gaokao_mathcloze": {"query": "问题：求\n答案：", "answer": "3"},
        "agieval_math": {"query": "Q: What?\nA: The answer is", "answer": "7"},
    }
    assert {task.task for task in find_tasks(tmp_path / "AGIEval" / "data" / "v1", ["agieval"])} == set(found)


@pytest.mark.parametrize(
    "path", ["mmlu/all/test-00000-of-00001.parquet", "mmlu/test.parquet", "mmlu/data/test.parquet"]
)
def test_one_file_for_all_subjects_is_told_apart_by_its_column(tmp_path: Path, path: str) -> None:
    subjects = ["anatomy", "abstract_algebra", "anatomy", "something_else"]
    write_table(tmp_path / path, [{**MMLU_ROW, "question": s, "subject": s} for s in subjects])

    tasks = find_tasks(tmp_path, ["mmlu"], num_fewshot=0)

    assert {task.task: task.num_documents for task in tasks} == {"mmlu_abstract_algebra": 1, "mmlu_anatomy": 2}


def test_json_lines_keep_unicode_line_separators(tmp_path: Path) -> None:
    put(tmp_path / "mmlu" / "anatomy" / "test.jsonl", "\ufeff" + lines({**MMLU_ROW, "question": "a\u2028b\u0085c"}))

    assert only(tmp_path, "mmlu").rows["test"][0]["question"] == "a\u2028b\u0085c"


def test_a_copy_in_another_layout_is_the_same_data(tmp_path: Path) -> None:
    rnd = random.Random(4)
    rows = [mmlu_row(rnd, "anatomy") for _ in range(3)]
    write_table(tmp_path / "a" / "mmlu" / "anatomy" / "test.parquet", rows)
    put(tmp_path / "b" / "mmlu" / "anatomy" / "test.jsonl", lines(*rows))
    table = [",".join([row["question"], *row["choices"], "ABCD"[row["answer"]]]) for row in rows]
    put(tmp_path / "c" / "mmlu" / "test" / "anatomy_test.csv", "\n".join(table) + "\n")

    hashes = {only(tmp_path / name, "mmlu").data_hash for name in "abc"}

    assert len(hashes) == 1
    rows[1]["answer"] = (rows[1]["answer"] + 1) % 4
    write_table(tmp_path / "a" / "mmlu" / "anatomy" / "test.parquet", rows)
    assert only(tmp_path / "a", "mmlu").data_hash not in hashes


@pytest.mark.parametrize(
    "kinds",
    [
        {"choices": pa.large_list(pa.large_string()), "answer": pa.uint8()},
        {"choices": pa.list_(pa.string(), 4)},
        {"question": pa.string_view()},
        {"question": pa.dictionary(pa.int8(), pa.string())},
    ],
    ids=["large", "fixed", "view", "category"],
)
def test_columns_as_pandas_and_polars_write_them(tmp_path: Path, kinds: dict[str, Any]) -> None:
    schema = {"question": pa.string(), "choices": pa.list_(pa.string()), "answer": pa.int64(), **kinds}
    path = tmp_path / "mmlu" / "anatomy" / "test.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([MMLU_ROW] * 2, schema=pa.schema(schema)), path)

    assert only(tmp_path, "mmlu").rows["test"] == [MMLU_ROW] * 2


def test_a_saved_dataset_is_what_its_state_lists(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "mmlu" / "anatomy"
    datasets.DatasetDict({"test": datasets.Dataset.from_list([MMLU_ROW] * 3)}).save_to_disk(str(folder))
    write_table(folder / "test" / "data-00000-of-00002.arrow", [MMLU_ROW])  # left by an earlier save

    assert only(tmp_path, "mmlu").num_documents == 3
    (folder / "test" / "data-00000-of-00001.arrow").unlink()
    assert "state.json lists data-00000-of-00001.arrow, which is not there" in refusal(tmp_path, "mmlu")


def test_a_csv_header_says_where_the_columns_are(tmp_path: Path) -> None:
    text = ",question,A,B,C,D,answer\n0,What is 2+2?,1,2,3,4,D\n"  # as pandas writes a table with its index
    put(tmp_path / "mmlu" / "test" / "anatomy_test.csv", text)

    assert only(tmp_path, "mmlu").rows["test"] == [
        {"question": "What is 2+2?", "choices": ["1", "2", "3", "4"], "answer": 3}
    ]


# --- families -------------------------------------------------------------------------------------------------


@pytest.fixture
def anatomy(tmp_path: Path) -> Path:
    folder = tmp_path / "mmlu" / "anatomy"
    for shard in range(3):
        write_table(folder / f"test-{shard:05d}-of-00003.parquet", [{**MMLU_ROW, "question": f"q{shard}"}])
    return folder


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path, anatomy: Path) -> None:
    assert [row["question"] for row in only(tmp_path, "mmlu").rows["test"]] == ["q0", "q1", "q2"]


def test_half_a_download_names_what_is_missing(tmp_path: Path, anatomy: Path) -> None:
    (anatomy / "test-00001-of-00003.parquet").unlink()

    text = refusal(tmp_path, "mmlu")

    assert "half a download" in text and "missing: part 1" in text and "test-00002-of-00003.parquet" in text


@pytest.mark.parametrize("missing", [0, 1])
def test_numbered_parts_without_a_total_may_have_no_gap(tmp_path: Path, missing: int) -> None:
    for part in range(3):
        write_table(tmp_path / "mmlu" / "anatomy" / "test" / f"{part:04d}.parquet", [MMLU_ROW])
    assert only(tmp_path, "mmlu").num_documents == 3

    (tmp_path / "mmlu" / "anatomy" / "test" / f"{missing:04d}.parquet").unlink()

    assert f"missing: part {missing}" in refusal(tmp_path, "mmlu")


@pytest.mark.parametrize(
    "second",
    [
        "mmlu/anatomy/test.parquet",
        "mmlu/old/anatomy/test.parquet",
        "cais___mmlu/anatomy/test.parquet",
        "mmlu/anatomy/test-00000-of-00003 (1).parquet",  # downloaded twice with a browser
        "mmlu/anatomy/test - Copy.parquet",  # Windows
        "mmlu/anatomy/test copy 2.parquet",  # macOS
    ],
)
def test_a_second_copy_is_named(tmp_path: Path, anatomy: Path, second: str) -> None:
    write_table(tmp_path / second, [MMLU_ROW])

    text = refusal(tmp_path, "mmlu")

    assert "two copies of the test split" in text and second in text and "test-00000-of-00003.parquet" in text


def test_two_downloads_of_one_shard_are_named(tmp_path: Path) -> None:
    for digest in ("1ba5fe2d4fbe4f1a", "2ba5fe2d4fbe4f1a"):
        write_table(tmp_path / "mmlu" / "anatomy" / f"test-00000-of-00001-{digest}.parquet", [MMLU_ROW])

    text = refusal(tmp_path, "mmlu")

    assert "a part is there twice" in text and "1ba5fe2d4fbe4f1a" in text and "2ba5fe2d4fbe4f1a" in text


def test_links_are_followed_and_hidden_files_and_caches_are_not_data(tmp_path: Path, anatomy: Path) -> None:
    for name in ("._test-00000-of-00003.parquet", "cache-12ab.arrow", ".test.parquet"):
        (anatomy / name).write_bytes(b"\0\5\x16\7Mac OS X")
    write_table(tmp_path / "mmlu" / "__MACOSX" / "anatomy" / "test.parquet", [MMLU_ROW])
    (anatomy / "loop").symlink_to(tmp_path / "mmlu")
    elsewhere = tmp_path / "view"
    elsewhere.mkdir()
    (elsewhere / "mmlu").symlink_to(tmp_path / "mmlu")
    (elsewhere / "cais___mmlu").symlink_to(tmp_path / "mmlu")  # the same folder once more
    (elsewhere / "gone").symlink_to(tmp_path / "nowhere")

    assert only(elsewhere, "mmlu").num_documents == 3


def test_a_sibling_that_cannot_be_read_is_ignored(tmp_path: Path, anatomy: Path, monkeypatch) -> None:

    listdir = os.listdir
    (tmp_path / "lost+found").mkdir()

    def guarded(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", guarded)

    assert only(tmp_path, "mmlu").num_documents == 3


def test_the_home_directory_is_expanded(tmp_path: Path, anatomy: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    (task,) = find_tasks("~", ["mmlu"], num_fewshot=0)

    assert task.num_documents == 3


@pytest.mark.parametrize(
    "card",
    [
        "数据\n".encode("gbk"),
        b"---\na rule\n---\n",
        b"---\n- a\n---\n",
        b"---\nconfigs: 7\n---\n",
        b"---\nconfigs:\n- config_name: anatomy\n  data_files:\n  - split: test\n    path: /data/test.parquet\n---\n",
        b"---\nconfigs:\n- config_name: anatomy\n  data_files:\n  - split: test\n    path: hf://datasets/x/test*\n---\n",
        b"---\nconfigs:\n- config_name: anatomy\n  data_files:\n  - path: anatomy/test*\n---\n",
        b"---\nconfigs:\n- config_name: anatomy\n  data_files:\n  - split: [test]\n    path: {}\n---\n",
        b"---\nconfigs:\n- data_files:\n    test: anatomy/test*\n---\n",
        b"\xef\xbb\xbf---\r\nconfigs:\r\n- config_name: anatomy\r\n  data_dir: x\r\n---\r\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
    ],
)
def test_a_readme_of_any_kind_does_no_harm(tmp_path: Path, anatomy: Path, card: bytes) -> None:
    (tmp_path / "mmlu" / "README.md").write_bytes(card)

    assert only(tmp_path, "mmlu").num_documents == 3


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    for name in ("test.xlsx", "anatomy.tsv", "data.zip"):
        put(tmp_path / "mmlu" / name, "x")

    text = refusal(tmp_path, "mmlu")

    assert all(name in text for name in ("test.xlsx", "anatomy.tsv", "data.zip"))


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    for suffix in ("parquet", "arrow", "csv", "jsonl"):
        path = put(tmp_path / suffix / "mmlu" / "anatomy" / f"test.{suffix}", pointer)
        assert str(path) in refusal(tmp_path / suffix, "mmlu")
    gbk = put(
        tmp_path / "gbk" / "ceval" / "val" / "law_val.csv", "id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,A\n", "gbk"
    )
    assert f"{gbk} cannot be read as csv" in refusal(tmp_path / "gbk", "ceval")
