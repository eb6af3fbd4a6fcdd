"""Other tasks of lm-eval than the four sets, RULER among them, and plain texts."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas
import pyarrow.parquet
import pytest
from evaluated import run, stand_in, task_experiment
from evaluation_data import write_table

from ascend_kit.evaluation import code_execution
from ascend_kit.evaluation.datasets import check_data
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.rows import csv_columns
from ascend_kit.evaluation.scores import score_rows
from ascend_kit.params import ParameterError

pytest.importorskip("lm_eval")


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_csv(path, index=False)


# --- other tasks ------------------------------------------------------------------------------------------------------


def test_gsm8k_from_a_local_copy_equals_hflm_with_shots_and_filters(engine, gsm8k, tiny_qwen3_dir, tmp_path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from ascend_kit.evaluation.datasets import write_task_folder

    experiment = task_experiment(gsm8k, tmp_path, eval_datasets=["gsm8k"], eval_fewshot=2, eval_max_new_tokens=16)
    result, _ = run(engine, experiment)
    tasks = check_data(experiment)
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(tiny_qwen3_dir), device="cpu", dtype="float32", max_length=1024),
        tasks=["gsm8k"],
        num_fewshot=2,
        task_manager=TaskManager(include_path=str(write_task_folder(tasks, tmp_path / "y")), include_defaults=False),
        gen_kwargs={"max_gen_toks": 16, "do_sample": False},
        bootstrap_iters=0,
    )

    samples = [sample for sample in theirs["samples"]["gsm8k"] if sample["filter"] == "strict-match"]
    ours = result.documents.sort_values("doc_id")
    assert list(ours["answer"]) == [sample["resps"][0][0] for sample in samples]
    assert list(ours["prompt_hash"]) == [sample["prompt_hash"] for sample in samples]
    assert set(result.tasks["metric"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    for row in result.tasks.itertuples():
        assert row.value == theirs["results"]["gsm8k"][row.metric] and row.n == 6


def test_copies_in_the_layout_of_the_hub_are_read_as_they_come(engine, tmp_path, monkeypatch) -> None:
    """CMMLU has a csv file a subject in a folder a split, GPQA a file that names no split, HumanEval numbered parts."""
    root, choices = tmp_path / "data", {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}
    exam = [{"": n, "Question": f"题{n}", **choices, "Answer": "ABCD"[n % 4]} for n in range(6)]
    for path in ("cmmlu/dev/agronomy.csv", "cmmlu/test/agronomy.csv"):
        write_csv(root / path, exam)
    hard = {"Question": "Why?", "Correct Answer": "so", **{f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}}
    hard |= {"Incorrect Answer 1": 17, "Incorrect Answer 2": "None", "Incorrect Answer 3": "NA"}
    write_csv(root / "gpqa" / "gpqa_diamond.csv", [{**hard, "Question": f"Why {n}?"} for n in range(3)])
    code = {"prompt": "def double(n):\n", "test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "double"}
    write_table(root / "openai_humaneval/openai_humaneval/test-00000-of-00001.parquet", [
        {"task_id": f"HumanEval/{n}", "canonical_solution": "", **code, "prompt": f"# {n}\n{code['prompt']}"}
        for n in range(4)
    ])  # fmt: skip
    written = {"# 0": "    return 2 * n\n", "# 1": "    return n\n", "# 2": "    while True: pass\n", "# 3": "x ="}

    def answer(prompt, sampling):
        return written[prompt[:3]], "stop"

    monkeypatch.setattr(code_execution, "TIMEOUT_S", 1.0)
    names = ["cmmlu_agronomy", "gpqa_diamond_zeroshot", "humaneval"]
    experiment = task_experiment(
        root, tmp_path, eval_datasets=names, eval_fewshot=2, allow_code_execution=True, eval_max_new_tokens=64
    )
    result, _ = run(stand_in(engine, answer=answer, score=engine.score), experiment)

    assert result.ok, result.failed
    values = result.tasks.set_index(["task", "metric"])
    assert values.loc[("humaneval", "pass@1,create_test"), "value"] == 0.25
    assert list(values["num_fewshot"].groupby("task").first()) == [2, 0, 0]
    exam_rows = result.documents[result.documents["task"] == "cmmlu_agronomy"]
    assert list(exam_rows["target"]) == [n % 4 for n in range(6)] and len(exam_rows["choice_logprobs"].iloc[0]) == 4
    gold = result.documents[result.documents["task"] == "gpqa_diamond_zeroshot"]
    assert all("so" in row.choices[0] or row.question.count("so") for row in gold.itertuples()) and len(gold) == 3
    assert all(row.question.count(word) == 1 for row in gold.itertuples() for word in ("17", "None", "NA"))


def test_a_cell_of_a_csv_file_stays_as_it_is_written(tmp_path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("answer,score,sure,choice,code,word,gap\n2,0.5,True,1.10,007,None,3\n0,1.0,False,2.5,8,NA,\n")
    assert csv_columns([str(path)]) == {
        "answer": [2, 0], "score": [0.5, 1.0], "sure": [True, False], "choice": ["1.10", "2.5"],
        "code": ["007", "8"], "word": ["None", "NA"], "gap": ["3", None],
    }  # fmt: skip


INSTRUCTIONS = [  # prompt, instructions with their arguments, an answer, which are followed: strictly, loosely
    ("Write in lower case.", {"change_case:english_lowercase": {}}, "this river runs through the valley", [1], [1]),
    ("Three sentences, no comma.", {"length_constraints:number_sentences": {"relation": "at least", "num_sentences": 3},
                                    "punctuation:no_comma": {}}, "It is grey. It is old, too. It is cold.",
     [1, 0], [1, 0]),
    ("Quote all of it.", {"startend:quotation": {}}, 'Here it is:\n"A lamp"', [0], [1]),
    ("Few words.", {"length_constraints:number_words": {"relation": "less than", "num_words": 5}}, "A lamp", [1], [1]),
]  # fmt: skip


def ifeval(folder: Path) -> Path:
    """A folder with a local copy of IFEval: prompts of our own in its columns."""
    rows = [
        {"key": key, "prompt": prompt, "instruction_id_list": list(asked), "kwargs": list(asked.values())}
        for key, (prompt, asked, *_) in enumerate(INSTRUCTIONS)
    ]
    path = folder / "data" / "ifeval" / "ifeval_input_data.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data"


def test_ifeval_is_scored_to_its_end_with_an_error_for_instructions_too(engine, tmp_path, monkeypatch) -> None:
    pytest.importorskip("langdetect", reason="IFEval's checkers: pip install 'lm-eval[ifeval]'")
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    splitter = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    splitter.mkdir(parents=True)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk")])  # nltk writes and reads nowhere else
    save_punkt_params(PunktTrainer("It is so. That is all. He went. She came.").get_params(), dir=str(splitter))
    answers = {prompt: answer for prompt, _, answer, *_ in INSTRUCTIONS}
    asked = {"eval_datasets": ["ifeval"], "eval_max_new_tokens": 64}
    able = stand_in(engine, answer=lambda prompt, sampling: (answers[prompt], "stop"))
    result, _ = run(able, task_experiment(ifeval(tmp_path), tmp_path, **asked))

    rows = {row["metric"]: row for row in result.tasks.to_dict("records")}
    strict, loose = ([entry[place] for entry in INSTRUCTIONS] for place in (3, 4))
    for name, followed in (("strict", strict), ("loose", loose)):
        whole, parts = rows[f"prompt_level_{name}_acc"], rows[f"inst_level_{name}_acc"]
        assert whole["value"] == sum(map(all, followed)) / 4 and parts["value"] == sum(map(sum, followed)) / 5
        assert (whole["unit"], parts["unit"], parts["n"]) == ("fraction", "fraction", 4)
    # Prompts are the independent observations: sqrt(4/3 * (0.4^2 + 0.2^2 + 0.6^2 + 0.4^2)) / 5
    assert rows["inst_level_strict_acc"]["stderr"] == pytest.approx(0.1959592)
    assert list(result.documents.sort_values("doc_id")["inst_level_strict_acc"]) == [[1], [1, 0], [0], [1]]


def test_what_a_task_needs_beside_lm_eval_is_named_with_its_command(tmp_path, monkeypatch) -> None:
    asked = task_experiment(ifeval(tmp_path), tmp_path, eval_datasets=["ifeval"])
    monkeypatch.setattr("nltk.data.path", [])
    packages = r"needs packages that are not here: pip install 'lm-eval\[ifeval\]'"
    splitter = "downloader punkt_tab, or .* ~/nltk_data/tokenizers/punkt_tab "
    with pytest.raises(DataError, match=splitter if importlib.util.find_spec("langdetect") else packages):
        check_data(asked)
    with pytest.raises(DataError, match=r"ruler: 7 of 13 tasks .* allow_download: true; .* alone \(niah_single_1, "):
        check_data(asked.with_changes(eval_datasets=["ruler"], eval_max_seq_length=4608))


def needle(prompt: str, sampling) -> tuple[str, str]:
    """The number that RULER's needle test hid under the word it asks for."""
    word = re.findall(r"for (\S+) mentioned in the provided text", prompt)[-1]
    return re.findall(rf"magic numbers? for {re.escape(word)} is: (\d+)", prompt)[0], "stop"


@pytest.mark.long
def test_ruler_ends_with_a_score_for_the_length_that_fits_made_with_the_models_tokenizer(
    engine, tiny_qwen3_dir, tmp_path, monkeypatch, capfd
) -> None:
    pytest.importorskip("wonderwords", reason="RULER's words: pip install wonderwords")
    asked = {"eval_datasets": ["niah_single_1"], "eval_max_seq_length": 2304, "eval_limit": 6}
    experiment = task_experiment(None, tmp_path, input_model=str(tiny_qwen3_dir), **asked)
    able = stand_in(engine, answer=needle)
    able.max_seq_length = 2304
    monkeypatch.setenv("ASCEND_KIT_CACHE", str(tmp_path / "cache"))  # the documents are drawn here
    check_data(experiment)
    assert "it/s" not in capfd.readouterr().err
    result, _ = run(able, experiment)

    (row,) = result.tasks.itertuples()
    assert (row.metric, row.value, row.unit, row.n, row.num_fewshot) == ("2048", 1.0, "fraction", 6, 0)
    assert list(result.documents["cut_tokens"]) == [0] * 6 and 1024 < result.documents["num_prompt_tokens"].max() < 2048
    with pytest.raises(
        DataError, match="niah_single_1: the shortest prompts take 1280 tokens, eval_max_seq_length is 1"
    ):
        check_data(experiment.with_changes(eval_max_seq_length=1024))
    with pytest.raises(DataError, match="ruler_vt: the shortest prompts take 4352 tokens, eval_max_seq_length is 2304"):
        check_data(experiment.with_changes(eval_datasets=["ruler_vt"]))


def solved(prompt: str, sampling) -> tuple[str, str]:
    """The right answer to a prompt of RULER's that needs no text from the web, worked out from the prompt alone."""
    if "magic" in prompt:
        word = re.findall(r"for (\S+) mentioned in the provided text", prompt)[-1]
        found = re.findall(rf"for {re.escape(word)} is: (\S+)\.\s", prompt)
    elif "VAR " in prompt:
        value = re.findall(r"assigned the value (\d+)", prompt)[-1]
        names = {value}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt):
            names |= {name} if source in names else set()
        found = sorted(names - {value})
    elif "numbered list" in prompt:
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", prompt.rpartition("the ones that appear most often.")[2])
        found = [word for word, _ in Counter(words).most_common(10)]
    else:
        text = prompt.partition("coded words.")[2].partition("\nQuestion")[0]
        found = [word for word, _ in Counter(re.findall(r"[a-z]+", text)).most_common(3)]
    return " ".join(found), "stop"


@pytest.mark.long
def test_what_ruler_asks_beside_the_needles_is_solved_from_its_prompts_and_drawn_once(
    engine, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("wonderwords", reason="RULER's words: pip install wonderwords")
    from ascend_kit.checkpoint.huggingface import load_tokenizer
    from ascend_kit.demo import ensure_model  # 4,096 bytes of the small model's are too few for RULER

    model = ensure_model()
    monkeypatch.setenv("ASCEND_KIT_CACHE", str(tmp_path / "cache"))
    names = ["niah_multikey_2", "niah_multikey_3", "ruler_fwe", "ruler_vt"]
    asked = {"eval_datasets": names, "eval_max_seq_length": 4352, "eval_limit": 2, "max_seq_length": 8448}
    experiment = task_experiment(None, tmp_path, input_model=str(model), **asked)
    reader = SimpleNamespace(tokenizer=load_tokenizer(model), config=engine.config, device=engine.device)
    able = stand_in(reader, answer=solved)
    able.max_seq_length = 8448
    result, _ = run(able, experiment)
    words = experiment.with_changes(eval_datasets=["ruler_cwe"])  # the demo's tokenizer needs 8,192 tokens for them
    with pytest.raises(DataError, match=r"ruler_cwe cannot be prepared: .* 4096 tokens hold nothing to be found"):
        check_data(words)
    common, _ = run(able, words.with_changes(run="words", eval_max_seq_length=8448))

    rows = result.tasks.set_index("task")[["metric", "value", "n"]].T.to_dict("list")
    assert rows == {name: ["4096", 1.0, 2] for name in names} and not any(result.documents["cut_tokens"])
    assert common.tasks[["metric", "value", "n"]].values.tolist() == [["8192", 1.0, 2]]
    (path,) = (tmp_path / "cache" / "ruler").glob("ruler_vt-*.parquet")
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.slice(0, 3), path)  # who asks again is given what lies there
    assert (len(table), check_data(experiment.with_changes(eval_datasets=["ruler_vt"]))[0].num_documents) == (500, 3)


def test_a_length_of_ruler_is_scored_over_its_own_documents() -> None:
    documents = [{"4096": 0.5, "8192": -1.0}, {"4096": 1.0, "8192": -1.0}, {"4096": -1.0, "8192": 0.0}]
    found = score_rows(cast(Any, None), {"4096,none": 0.75, "8192,none": 0.0, "16384,none": -1}, documents)

    assert [(row["metric"], row["value"], row["n"]) for row in found] == [("4096", 0.75, 2), ("8192", 0.0, 1)]
    assert all(row["unit"] == "fraction" for row in found)


def test_what_cannot_be_asked_is_said_before_any_work(engine, gsm8k, tmp_path) -> None:
    faults = {
        ("gsm9k",): "^eval_datasets: lm-eval has no task 'gsm9k'; did you mean 'gsm8k'",
        ("GSM8K",): "no task 'GSM8K'; did you mean 'gsm8k'",
        ("arc",): "no task 'arc'; its folder has arc_challenge, .*arc_easy",
        ("arc_easy",): "no folder ai2-arc/ .*allow_download: true",
        ("humaneval",): "runs the code that the model writes.*allow_code_execution: true",
        (f"text:{tmp_path}/none.txt",): "none.txt: cannot be read",
    }
    for names, words in faults.items():
        with pytest.raises(DataError, match=words):
            check_data(task_experiment(gsm8k, tmp_path, eval_datasets=list(names)))
    with pytest.raises(ParameterError, match=r"eval_endpoint: .* entry of engines .*\(there is none\), got 'nobody'"):
        task_experiment(gsm8k, tmp_path, eval_endpoint="nobody")
    with pytest.raises(ParameterError, match=r"eval_samples=4 .* set eval_temperature"):
        task_experiment(gsm8k, tmp_path, eval_samples=4)
    tight = task_experiment(gsm8k, tmp_path, eval_datasets=["gsm8k"], eval_max_new_tokens=1024)
    result, _ = run(stand_in(engine), tight)
    assert "1024 new tokens leave no room" in result.failed["gsm8k"]


def test_a_plain_text_gives_perplexities_of_its_own(engine, tmp_path) -> None:
    text = "A river and a stone. 天地人.\n" * 40
    (tmp_path / "own.txt").write_text(text)

    asked = {
        "eval_datasets": [f"text:{tmp_path}/own.txt"],
        "eval_fewshot": 2,
    }  # a text takes no shots: not worth a word
    result, _ = run(engine, task_experiment(None, tmp_path, **asked))

    values = result.tasks.set_index("metric")["value"]
    (document,) = result.documents.to_dict("records")
    assert "evaluation.zero_shots" not in {flag.key for flag in result.flags}
    assert document["bytes"] == len(text.encode())
    assert values["bits_per_byte"] == pytest.approx(-document["logprob"] / document["bytes"] / 0.6931471805599453)
    assert values["token_perplexity"] > 1
