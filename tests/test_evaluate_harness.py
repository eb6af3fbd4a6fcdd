"""`evaluate` end to end on small local data: rows, groups against lm-eval's own run, resume, failures,
cautions.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from evaluation_data import write_sets

from ascend_kit import AscendInferEngine
from ascend_kit.engine.text import thinking_option
from ascend_kit.evaluation import judge
from ascend_kit.evaluation.datasets import SETS, find_tasks, go_offline, groups_of, write_task_folder
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.evaluation.judge import PUBLISHED, published, reasons
from ascend_kit.evaluation.perplexity import ratio, token_perplexity
from ascend_kit.evaluation.runs import EvaluationError, load_documents, load_evaluation
from ascend_kit.evaluation.tasks import check_data, drawn_documents
from ascend_kit.identity import Identity
from ascend_kit.params import Experiment, build_experiment
from ascend_kit.results import RunFolder
from ascend_kit.stages import RunRecord

pytest.importorskip("lm_eval")
TOLERANCE = 1e-4  # float32 on both sides
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_LENGTH = 2048


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"), documents=5)


@pytest.fixture(scope="module")
def engine(tiny_qwen3_dir: Path) -> Iterator[AscendInferEngine]:
    """On the CPU whatever `--device` says: what depends on the device is in test_evaluate_adapter.py."""
    with AscendInferEngine(tiny_qwen3_dir, precision="fp32", device="cpu", max_seq_length=4096) as engine:
        engine.tokenizer.chat_template = CHAT
        yield engine


def experiment_for(data: Path, out: Path, **changes) -> Experiment:
    values = {
        "experiment": "e",
        "output_root": str(out),
        "dataset_path": str(data),
        "precision": "fp32",
        "eval_max_seq_length": MAX_LENGTH,
        "eval_datasets": list(SETS),
        **changes,
    }
    return build_experiment(values)


def run(engine, experiment: Experiment, **options):
    with RunFolder.open(experiment, "05_evaluate") as folder:
        return evaluate(engine, experiment, folder, **options), folder


@pytest.fixture(scope="module")
def finished(engine, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """One full evaluation (MMLU, C-Eval with 5 shots, AGIEval, WikiText) and the progress it reported."""
    progress: list[tuple[int, int, str]] = []
    experiment = experiment_for(data, tmp_path_factory.mktemp("out"), plain_ops=["swiglu", "rotary"])
    result, folder = run(engine, experiment, on_progress=lambda *step: progress.append(step))
    return SimpleNamespace(result=result, folder=folder, experiment=experiment, progress=progress)


def hflm_results(model_dir: Path, data: Path, folder: Path, *, chat: bool = False, samples: dict | None = None) -> dict:
    """lm-eval's own evaluation of its own model on the same files."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    go_offline()
    model = HFLM(pretrained=str(model_dir), device="cpu", dtype="float32", batch_size=4, max_length=MAX_LENGTH)
    model.tokenizer.chat_template = CHAT
    tasks = find_tasks(data, SETS)
    manager = TaskManager(include_path=str(write_task_folder(tasks, folder)), include_defaults=False)
    merged: dict = {"results": {}, "samples": {}}
    for shots, names in ((5, ["mmlu", "ceval-valid"]), (0, ["agieval", "wikitext"])):
        part = simple_evaluate(
            model=model,
            tasks=names,
            num_fewshot=shots,
            task_manager=manager,
            apply_chat_template=chat,
            samples=samples,
            bootstrap_iters=10,
        )
        for key in merged:
            merged[key].update(part[key])
    return merged


@pytest.fixture(scope="module")
def theirs(tiny_qwen3_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return hflm_results(tiny_qwen3_dir, data, tmp_path_factory.mktemp("yaml"))


def test_scores_and_groups_equal_lm_eval_with_its_own_model(finished, theirs) -> None:
    table = pandas.concat([finished.result.tasks, finished.result.groups])
    compared = 0

    for row in table.itertuples():
        if row.metric == "token_perplexity" or row.task not in theirs["results"]:
            continue  # ours alone
        expected = theirs["results"][row.task][f"{row.metric},none"]
        assert row.value == pytest.approx(expected, rel=1e-5), (row.task, row.metric)
        stderr = theirs["results"][row.task].get(f"{row.metric}_stderr,none")
        if row.metric in ("acc", "acc_norm"):
            assert row.stderr == pytest.approx(stderr, rel=1e-9), (row.task, row.metric)
        compared += 1

    # 2 mmlu, 2 x 2 ceval, 2 x 2 + 1 agieval, 3 wikitext; groups: mmlu, 2 x ceval-valid, agieval.
    assert compared == 14 + 4


def test_every_documents_log_probabilities_equal_hflm(finished, theirs) -> None:
    assert_same_documents(finished.result.documents, theirs["samples"])


def test_with_a_chat_template_they_equal_hflm_too(engine, tiny_qwen3_dir, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path / "out", eval_chat_template=True, eval_limit=4)
    drawn = drawn_documents(find_tasks(data, SETS), experiment)
    theirs = hflm_results(tiny_qwen3_dir, data, tmp_path / "yaml", chat=True, samples=drawn)
    result, _ = run(engine, experiment)

    assert_same_documents(result.documents, theirs["samples"], 16)
    assert "chat template" in result.tasks["conditions"].iloc[0]


def test_on_the_demo_data_they_equal_hflm_too(engine, tiny_qwen3_dir, tmp_path) -> None:
    from ascend_kit.demo.datasets import write_datasets

    write_datasets(tmp_path / "demo")
    experiment = experiment_for(tmp_path / "demo", tmp_path / "out", eval_limit=6)
    drawn = drawn_documents(find_tasks(tmp_path / "demo", SETS), experiment)
    theirs = hflm_results(tiny_qwen3_dir, tmp_path / "demo", tmp_path / "yaml", samples=drawn)
    result, _ = run(engine, experiment)

    assert_same_documents(result.documents, theirs["samples"], 20)
    accuracy = result.groups[result.groups["metric"] == "acc"].set_index("task")["value"]
    for group in ("mmlu", "ceval-valid", "agieval"):
        assert accuracy[group] == pytest.approx(theirs["results"][group]["acc,none"])


def assert_same_documents(documents: pandas.DataFrame, theirs: dict, at_least: int = 40) -> None:
    assert len(documents) == sum(len(samples) for samples in theirs.values()) >= at_least
    for row in documents.itertuples():
        (sample,) = [sample for sample in theirs[row.task] if sample["doc_id"] == row.doc_id]
        assert (row.doc_hash, row.prompt_hash) == (sample["doc_hash"], sample["prompt_hash"])
        responses = [response[0] for response in sample["resps"]]
        if row.set == "wikitext":
            # HFLM adds up in float32, where a sum of thousands has steps of 2.4e-4; ours is a Python float.
            assert row.logprob == pytest.approx(responses[0], rel=2.4e-7, abs=TOLERANCE)
        elif isinstance(row.choice_logprobs, list):
            assert row.choice_logprobs == pytest.approx([logprob for logprob, _ in responses], abs=TOLERANCE)
            assert row.acc == sample["acc"]
        else:
            assert row.answer == responses[0] and row.acc == sample["acc"]


def test_rows_state_unit_shots_conditions_and_count(finished) -> None:
    tasks = finished.result.tasks.set_index(["task", "metric"])

    row = tasks.loc[("ceval-valid_law", "acc")]
    assert (row["unit"], row["num_fewshot"], row["n"], row["status"], row["set"]) == ("fraction", 5, 5, "ok", "ceval")
    assert row["conditions"].startswith("5-shot, plain prompt, all documents, context 2048 tokens")
    assert tasks.loc[("wikitext", "bits_per_byte"), "unit"] == "bits/byte"
    assert set(tasks["plain_ops"]) == set(finished.result.groups["plain_ops"]) == {"rotary, swiglu"}
    assert finished.result.ok and not finished.result.failed
    finished.result.raise_if_failed()
    identity = finished.folder.identities()[row["identity"]]
    assert identity.versions["lm_eval"].startswith("0.4") and identity.task["num_fewshot"] == 5


def test_the_group_without_generative_tasks_is_the_mean_of_its_documents(finished) -> None:
    documents = finished.result.documents
    choice = documents[(documents["set"] == "agieval") & documents["choice_logprobs"].notna()]
    groups = finished.result.groups.set_index(["task", "metric"])

    assert groups.loc[("agieval_multiple_choice", "acc"), "value"] == pytest.approx(choice["acc"].mean())
    assert groups.loc[("agieval_multiple_choice", "acc_norm"), "value"] == pytest.approx(choice["acc_norm"].mean())
    assert groups.loc[("agieval_multiple_choice", "acc"), "n"] == 10
    assert groups.loc[("agieval", "acc"), "n"] == 15


def test_progress_counts_documents_up_to_all_of_them(finished) -> None:
    done = [step[0] for step in finished.progress]

    assert done == sorted(done) and done[-1] == 40
    assert {step[1] for step in finished.progress} == {40}
    assert len(set(done)) >= 6  # also within tasks
    assert any("ceval" in step[2] and "%" in step[2] for step in finished.progress)  # the score so far


def test_perplexities_follow_their_definitions(finished, engine, data) -> None:
    documents = finished.result.documents
    pages = documents[documents["set"] == "wikitext"]
    table = finished.result.tasks.set_index(["task", "metric"])["value"]["wikitext"]
    nll, size = -pages["logprob"].sum(), pages["bytes"].sum()

    assert table["word_perplexity"] == pytest.approx(math.exp(nll / pages["words"].sum()))
    assert table["byte_perplexity"] == pytest.approx(math.exp(nll / size))
    assert table["bits_per_byte"] == pytest.approx(nll / (size * math.log(2)))
    raw = pandas.read_parquet(next((data / "wikitext").rglob("*.parquet")))["page"]
    assert list(pages["words"]) == [len(__import__("re").split(r"\s+", page)) for page in raw]
    assert list(pages["bytes"]) == [len(page.encode()) for page in raw]


def test_token_perplexity_equals_a_plain_loop_over_windows(finished, tiny_qwen3_dir, data, engine) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval()
    pages = list(pandas.read_parquet(next((data / "wikitext").rglob("*.parquet")))["page"])
    ids = torch.tensor(engine.tokenizer.encode("\n\n".join(pages)))
    window = 128
    losses = []
    for start in range(0, len(ids) // window * window, window):
        part = ids[start : start + window][None]
        with torch.no_grad():
            losses.append(float(model(part, labels=part).loss))  # mean over window - 1 predicted tokens

    found = token_perplexity(engine, pages, context_len=window)

    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found.num_windows, found.num_tokens) == (len(losses), len(losses) * (window - 1))
    assert found.stderr == pytest.approx(
        found.value * torch.tensor(losses, dtype=torch.float64).std().item() / math.sqrt(len(losses)), rel=1e-4
    )
    row = finished.result.tasks.set_index("metric").loc["token_perplexity"]
    assert (row["context_len"], row["stride"], row["first_token"]) == (2048, 2048, "not scored")


def test_windows_of_running_text_that_are_known_are_not_scored_again(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["wikitext"], eval_max_seq_length=256)
    result, folder = run(engine, experiment)
    folder.table_path("scores").unlink()  # killed before the scores were written
    asked: list[int] = []
    second = counting(engine)
    second.identity = engine.identity
    second.score = lambda pairs, **on: asked.append(len(pairs)) or engine.score(pairs, **on)

    again, _ = run(second, experiment)

    assert asked == []
    columns = ["metric", "value", "stderr", "n"]
    pandas.testing.assert_frame_equal(again.tasks[columns], result.tasks[columns])


def test_token_perplexity_scores_a_text_shorter_than_a_window(engine) -> None:
    found = token_perplexity(engine, ["A short page."], context_len=64)

    assert (found.num_windows, found.num_tokens, found.stderr) == (1, len("A short page.") - 1, None)
    with pytest.raises(ValueError, match="at least two tokens"):
        token_perplexity(engine, ["x"], context_len=64)
    with pytest.raises(ValueError, match="max_seq_length=4096"):
        token_perplexity(engine, ["x y"], context_len=5000)


def test_the_ratios_standard_error_is_the_usual_one_for_equal_sizes() -> None:
    values = [1.0, 2.0, 4.0, 5.0]

    mean, stderr = ratio([3 * value for value in values], [3] * 4)

    assert mean == 3.0
    assert stderr == pytest.approx(math.sqrt(10 / 3) / 2)  # sample deviation of 1, 2, 4, 5 over the root of 4
    assert ratio([2.0], [4]) == (0.5, None)


def test_everything_is_read_back_from_the_files(finished) -> None:
    again = load_evaluation(RunFolder(finished.folder.path))

    pandas.testing.assert_frame_equal(again.tasks, finished.result.tasks)
    assert again.flags == finished.result.flags and again.flags
    assert load_evaluation(RunFolder(finished.folder.path / "nothing")).ok is False


def test_a_limit_draws_documents_of_every_subject_by_seed(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_limit=4, eval_datasets=["ceval", "wikitext"], eval_fewshot=0)

    result, folder = run(engine, experiment)

    assert dict(result.documents["task"].value_counts()) == {
        "ceval-valid_law": 2, "ceval-valid_physician": 2, "wikitext": 4,
    }  # fmt: skip
    drawn = folder.read_json("evaluation")["drawn"]
    for task, part in result.documents.groupby("task"):
        assert sorted(part["doc_id"]) == drawn[task]
    assert any("eval_limit" in str(flag) for flag in result.flags)
    whole, folder = run(engine, experiment.with_changes(eval_limit=None))
    assert len(folder.load("documents")) == len(whole.documents) == 15  # those drawn before are not asked again


def test_the_evaluation_says_what_the_cards_did(finished) -> None:
    rows = finished.folder.load("evaluation_cards")

    assert set(rows["task"]) == {"all"}
    assert (rows["card"] == "cpu 0").all()
    assert (rows["peak_memory_bytes"] > 0).all() and (rows["wall_s"] > 0).all()


# --- resume and failures ------------------------------------------------------------------------------------


def counting(engine):
    """The engine behind a counter of scored pairs."""
    return SimpleNamespace(
        tokenizer=engine.tokenizer,
        config=engine.config,
        max_seq_length=engine.max_seq_length,
        device=engine.device,
        identity=Identity(weights="w", engine={"precision": "fp32"}, versions={"torch": "2"}),
        pairs=0,
        generate=engine.generate,
        score=engine.score,
        stats=engine.stats,
    )


def scores_of(logprob):
    """A stand-in for `score` that gives the pair at place i the log-probability `logprob(i)`."""

    def score(pairs, *, on_score, on_progress):
        found = [SimpleNamespace(logprob=logprob(i), is_greedy=False) for i in range(len(pairs))]
        for place, one in enumerate(found):
            on_score(place, one)
        on_progress(len(found), len(found))
        return found

    return score


def test_a_resumed_evaluation_asks_no_answered_document_again(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["ceval", "agieval"], eval_fewshot=0)
    first = counting(engine)

    def interrupted(pairs, *, on_score, on_progress):
        done = []

        def step(*counts):
            on_progress(*counts)
            if len(done) >= 30:  # seven or eight documents of four choices
                raise KeyboardInterrupt

        return engine.score(pairs, on_score=lambda *found: done.append(on_score(*found)), on_progress=step)

    first.score = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(first, experiment)
    answered = load_documents(RunFolder(experiment.run_folder))
    second = counting(engine)
    scored: list[int] = []
    second.score = lambda pairs, **on: scored.append(len(pairs)) or engine.score(pairs, **on)

    result, folder = run(second, experiment)

    assert 6 <= len(answered) < 20
    choices = result.documents["choice_logprobs"].dropna().map(len).sum()
    assert sum(scored) == choices - answered["choice_logprobs"].map(len).sum()
    assert result.ok and len(folder.load("documents")) == 25
    undisturbed, _ = run(counting(engine), experiment.with_changes(run="undisturbed"))
    columns = ["task", "metric", "value", "stderr", "n"]
    pandas.testing.assert_frame_equal(result.tasks[columns], undisturbed.tasks[columns])
    once_more: list[int] = []
    second.score = lambda pairs, **on: once_more.append(len(pairs)) or engine.score(pairs, **on)
    again, _ = run(second, experiment)
    assert once_more == []
    pandas.testing.assert_frame_equal(again.tasks, result.tasks)


def test_a_task_cut_off_while_its_scores_were_written_is_scored_from_its_answers(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["ceval"], eval_fewshot=0)
    result, folder = run(engine, experiment)
    scores = folder.table_path("scores")
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text(lines[0] + lines[1][:20])  # killed in the middle of the first task's second metric

    again, folder = run(engine, experiment)

    assert len(folder.load("documents")) == 10
    columns = ["task", "metric", "value", "stderr", "n"]
    pandas.testing.assert_frame_equal(again.tasks[columns], result.tasks[columns])


def test_changed_data_is_not_answered_from_old_rows(engine, tmp_path) -> None:
    data = write_sets(tmp_path / "data", documents=4, seed=1)
    experiment = experiment_for(data, tmp_path / "out", eval_datasets=["wikitext"])
    first, _ = run(engine, experiment)
    write_sets(data, documents=3, seed=2)

    second, _ = run(engine, experiment)

    assert list(first.tasks["n"]) == [4] * 4 and list(second.tasks["n"]) == [3] * 4
    assert len(second.documents) == 3
    assert set(first.documents["doc_hash"]).isdisjoint(second.documents["doc_hash"])


@pytest.mark.parametrize(
    "parts",
    [
        {"weights": "shuffled"},
        {"tokenizer": "other"},
        {"engine": {"precision": "bf16"}},
        {"engine": {"precision": "fp32", "seed": 1}},
        {"versions": {"torch": "3"}},
        {"device": {"name": "another card"}},
    ],
    ids=str,
)
def test_answers_of_another_model_engine_or_version_are_not_reused(engine, data, tmp_path, parts) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["ceval"], eval_fewshot=0)
    first, second = counting(engine), counting(engine)
    run(first, experiment)
    second.identity = second.identity.with_parts(**parts)
    scored: list[int] = []
    second.score = lambda pairs, **on: scored.append(len(pairs)) or engine.score(pairs, **on)

    result, folder = run(second, experiment)

    assert sum(scored) == 2 * 5 * 4  # two subjects of five documents with four choices: all of them again
    assert len(folder.load("documents")) == 20 and len(result.documents) == 10
    assert set(result.documents["identity"]) == set(result.tasks["identity"])


def test_another_template_or_number_of_shots_is_another_evaluation(engine, data, tmp_path) -> None:
    base = experiment_for(data, tmp_path, eval_datasets=["ceval"], eval_fewshot=0)
    seen = set()
    with RunFolder.open(base, "05_evaluate") as folder:
        for name, value in [("eval_fewshot", 1), ("eval_chat_template", True), ("eval_fewshot", 0)]:
            result = evaluate(counting(engine), base.with_changes(**{name: value}), folder)
            seen |= set(result.tasks["identity"])

    assert len(seen) == 3 * 2


def test_a_subject_removed_from_the_data_is_in_no_table(engine, tmp_path) -> None:
    data = write_sets(tmp_path / "data", documents=4)
    experiment = experiment_for(data, tmp_path / "out", eval_datasets=["ceval"], eval_fewshot=0)
    run(engine, experiment)
    shutil.rmtree(data / "ceval" / "law")

    result, _ = run(engine, experiment)

    assert set(result.tasks["task"]) == set(result.documents["task"]) == {"ceval-valid_physician"}
    assert set(result.groups["n"]) == {4}
    group = result.groups.set_index("metric").loc["acc", "value"]
    assert group == result.tasks.set_index("metric").loc["acc", "value"]


def test_a_second_pass_adds_no_row(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["mmlu", "ceval"], eval_fewshot=0)
    _, folder = run(engine, experiment)
    before = {path.name: path.read_text() for path in folder.path.glob("*.jsonl")}

    run(engine, experiment)

    assert {path.name: path.read_text() for path in folder.path.glob("*.jsonl")} == before


def test_a_failing_task_becomes_a_failed_row_and_the_others_go_on(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["mmlu", "wikitext"], eval_fewshot=0)
    broken = counting(engine)

    def score(pairs, **on):
        if any("business ethics" in engine.tokenizer.decode(context) for context, _ in pairs):
            raise RuntimeError("out of memory")
        return engine.score(pairs, **on)

    broken.score = score
    result, _ = run(broken, experiment)

    assert result.failed == {"mmlu_business_ethics": "RuntimeError: out of memory"}
    assert not result.ok
    assert set(result.tasks[result.tasks["status"] == "ok"]["task"]) == {"mmlu_abstract_algebra", "wikitext"}
    groups = result.groups.set_index("task")
    assert groups.loc["mmlu", "status"] == "failed" and groups.loc["mmlu", "error"] == "1 of 2 tasks failed"
    assert pandas.isna(groups.loc["mmlu", "value"]) and groups.loc["mmlu_stem", "status"] == "ok"
    assert any("mmlu_business_ethics failed" in str(flag) for flag in result.flags)
    with pytest.raises(EvaluationError, match=r"1 of 3 tasks failed .*out of memory"):
        result.raise_if_failed()

    mended, _ = run(engine, experiment)
    assert mended.ok and set(mended.groups["status"]) == {"ok"}


def test_data_faults_come_before_any_work(engine, data, tmp_path) -> None:
    experiment = experiment_for(tmp_path, tmp_path / "out", eval_datasets=["mmlu"])
    untouched = counting(engine)
    untouched.score = None

    with pytest.raises(DataError, match="no folder mmlu/"):
        run(untouched, experiment)

    assert not (experiment.run_folder / "scores.jsonl").exists()


# --- cautions and published scores --------------------------------------------------------------------------


def choices(accuracy: float, n: int = 200, prediction: int | None = None, tied=False, constant=False) -> list[dict]:
    right = round(accuracy * n)
    logprobs = [-1.0, -1.0, -2.0, -3.0] if tied else [-1.0, -1.5, -2.0, -3.0]
    logprobs = [-1.0] * 4 if constant else logprobs
    return [
        {
            "task": "t",
            "set": "mmlu",
            "acc": float(i < right),
            "choice_logprobs": logprobs,
            "prediction": i % 4 if prediction is None else prediction,
        }
        for i in range(n)
    ]


def of_set(documents: list[dict]) -> list[tuple[str, str]]:
    return [(flag.level, flag.key) for flag in judge._of_set("mmlu", documents, 512)]


@pytest.mark.parametrize(
    ("documents", "level", "key"),
    [
        (choices(0.25), "alarm", "evaluation.chance"),
        (choices(0.2303), "alarm", "evaluation.chance"),
        (choices(0.6, prediction=2), "alarm", "evaluation.one_choice"),
        (choices(0.6, n=190) + choices(0.6, n=10, tied=True), "caution", "evaluation.tied"),
        (choices(0.6, n=10, constant=True), "alarm", "evaluation.tied"),
        ([{"answer": "3"}] * 50 + [{"answer": " "}], "alarm", "evaluation.empty_answers"),
        ([{"cut_tokens": 5}] * 2 + [{"cut_tokens": 0}] * 98, "alarm", "evaluation.cut_prompts"),
        ([{"cut_tokens": 5}] + [{"cut_tokens": 0}] * 99, "caution", "evaluation.cut_prompts"),
    ],
)
def test_answers_that_mean_nothing_raise_an_alarm(documents: list[dict], level: str, key: str) -> None:
    assert of_set(documents) == [(level, key)]


def test_a_few_answers_that_end_at_their_first_token_and_are_all_wrong_are_an_alarm() -> None:
    rows = [{"task": "t", "finish_reason": "stop", "num_output_tokens": 1}] * 7
    score = {"kind": "task", "task": "t", "status": "ok", "unit": "fraction", "value": 0.0}

    def found(rows, **changes):
        return [flag.level for flag in judge._never_right("s", [{**score, **changes}], rows)]

    assert found(rows) == ["alarm"] and found(rows[:4]) == [] and found(rows, value=1 / 7) == []
    longer = [{**rows[0], "num_output_tokens": 2}]
    assert found(rows + longer) == [] and found(longer * 40) == ["alarm"]


def test_healthy_or_few_answers_raise_none() -> None:
    assert of_set(choices(0.6)) == []
    assert of_set(choices(0.25, n=39)) == []
    assert of_set(choices(0.32, n=200)) == []  # chance 25 %, two standard errors are 6.1 points
    assert of_set(choices(0.31, n=200)) == [("alarm", "evaluation.chance")]


def test_a_model_without_knowledge_ends_the_stage_with_an_alarm(engine, tmp_path) -> None:
    data = write_sets(tmp_path / "data", documents=40)
    experiment = experiment_for(data, tmp_path / "out", eval_datasets=["mmlu"], eval_fewshot=0)
    guessing = counting(engine)
    guessing.score = scores_of(lambda i: -float(i % 4))

    result, folder = run(guessing, experiment)

    stage = RunRecord.read(folder.path).stages["05_evaluate"]
    assert stage.state == "alarm"
    assert {alarm["key"] for alarm in stage.alarms} >= {"evaluation.one_choice mmlu"}
    assert "the answer is A for 100%" in " ".join(alarm["text"] for alarm in stage.alarms)
    assert {flag.key for flag in result.flags if flag.level == "alarm"} <= {
        "evaluation.chance",
        "evaluation.one_choice",
    }


def test_a_log_probability_that_is_not_a_number_is_an_alarm(engine, data, tmp_path) -> None:
    broken = counting(engine)
    broken.score = scores_of(lambda i: float("nan"))

    result, folder = run(broken, experiment_for(data, tmp_path, eval_datasets=["ceval"], eval_fewshot=0))

    assert any(flag.key == "evaluation.not_finite" and flag.level == "alarm" for flag in result.flags)
    assert RunRecord.read(folder.path).stages["05_evaluate"].alarms


def test_prompts_that_lost_their_beginning_are_counted(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["ceval"], eval_max_seq_length=64)

    result, _ = run(engine, experiment)

    (flag,) = [flag for flag in result.flags if flag.key == "evaluation.cut_prompts"]
    assert flag.level == "alarm" and "10 of 10 prompts were longer than 64 tokens" in str(flag)
    assert (result.documents["cut_tokens"] > 0).all()


def test_cut_generative_answers_are_named(finished) -> None:
    (flag,) = [flag for flag in finished.result.flags if flag.key == "evaluation.cut_answers_agieval"]

    answers = finished.result.documents["finish_reason"].dropna()
    text = str(flag)
    assert f"{(answers == 'length').sum()} of 5 answers were cut" in text and "agieval_multiple_choice" in text


def test_partial_copies_and_ignored_shots_are_named(engine, data, tmp_path) -> None:
    experiment = experiment_for(data, tmp_path, eval_datasets=["agieval"], eval_fewshot=3)
    result, _ = run(engine, experiment)

    assert any("(agieval 3/21)" in str(flag) for flag in result.flags)
    assert any("eval_fewshot=3 does not apply" in str(flag) for flag in result.flags)


def test_thinking_is_switched_off_and_said(engine) -> None:
    tokenizer = SimpleNamespace(chat_template="{% if enable_thinking is false %}<think></think>{% endif %}")
    thinker = SimpleNamespace(tokenizer=tokenizer)
    always = SimpleNamespace(tokenizer=SimpleNamespace(chat_template="<think>"))
    chat, plain = build_experiment({"eval_chat_template": True}), build_experiment({})

    assert thinking_option(tokenizer, None) == {"enable_thinking": False}
    assert thinking_option(tokenizer, True) == {"enable_thinking": True}
    assert thinking_option(engine.tokenizer, None) == {}
    assert "switched off" in str(next(judge._thinking(chat, thinker)))
    assert "plain prompts" in str(next(judge._thinking(plain, thinker)))
    assert "Thinking is on" in str(next(judge._thinking(chat.with_changes(thinking=True), thinker)))
    assert "eval_chat_template: false" in str(next(judge._thinking(chat, always)))
    assert list(judge._thinking(plain, always)) == [] == list(judge._thinking(chat, engine))


def test_another_model_is_never_scored_on_the_demos_questions(engine, tmp_path) -> None:
    sample = write_sets(tmp_path / "sample")
    values = {"output_root": str(tmp_path / "out"), "eval_datasets": ["mmlu"], "eval_fewshot": 0}
    others = build_experiment({**values, "input_model": "/models/Qwen3-8B", "dataset_path": "demo"})
    forgotten = build_experiment({**values, "input_model": "/models/Qwen3-8B"})

    for experiment in (others, forgotten, others.standing_for({"dataset_path": str(sample)})):
        with pytest.raises(DataError, match=r"dataset_path is not given, .* /models/Qwen3-8B: .* mmlu/ \(a copy"):
            run(engine, experiment)
        assert not (experiment.run_folder / "scores.jsonl").exists()
    demo = build_experiment(values)
    assert check_data(demo) == [] and len(check_data(demo.standing_for({"dataset_path": str(sample)}))) == 2
    with pytest.raises(DataError, match=r"demo\.resolve"):
        run(engine, demo)


def test_overwritten_weights_tokenizer_or_template_are_scored_again(tiny_qwen3_dir, tmp_path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_qwen3_dir, model)
    data = write_sets(tmp_path / "data", documents=6)
    experiment = experiment_for(data, tmp_path / "out", eval_datasets=["mmlu"], eval_fewshot=0, input_model=str(model))

    def logprobs() -> list:
        with AscendInferEngine(model, precision="fp32", device="cpu", max_seq_length=4096) as fresh:
            result, _ = run(fresh, experiment)
        return result.documents.sort_values(["task", "doc_id"])["choice_logprobs"].to_list()

    def scored_rows() -> int:
        return len(RunFolder(experiment.run_folder).load("scores"))

    first = logprobs()
    assert logprobs() == first and scored_rows() == 2
    weights = load_file(model / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[name] = weights[name][torch.randperm(len(weights[name]), generator=torch.Generator().manual_seed(0))]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert logprobs() != first and scored_rows() == 4
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))
    logprobs()
    assert scored_rows() == 6


def score_table(group: str, n: int, num_fewshot: int = 5) -> list[dict]:
    row = {"task": group, "metric": "acc", "status": "ok", "value": 0.74, "stderr": 0.0036}
    return [{**row, "n": n, "num_fewshot": num_fewshot}]


def test_a_published_score_is_shown_for_the_same_model_and_conditions_only() -> None:
    engine = SimpleNamespace(config=SimpleNamespace(num_layers=28, hidden_size=3584))
    other = SimpleNamespace(config=SimpleNamespace(num_layers=2, hidden_size=64))
    base = build_experiment({"model_name": "qwen2.5-7b-w8a8", "input_model": "/models/Qwen2.5-7B"})
    chat = base.with_changes(eval_chat_template=True)
    full = score_table("mmlu", 14042)

    (row,) = published(base, engine, full)

    assert (row["published_percent"], row["source"]) == (74.16, "Qwen3 technical report, table 6")
    assert row["difference_points"] == pytest.approx(-0.16) and row["conditions"] == "5-shot, plain prompt"
    assert published(base, other, full) == []
    assert published(chat, engine, full) == []  # that figure is the instruct model's
    assert published(base, engine, score_table("mmlu", 100)) == []
    assert published(base, engine, score_table("mmlu", 14042, 0)) == []


def test_group_sizes_of_the_published_table_are_those_of_the_sets() -> None:
    assert {(item.group, item.num_documents) for item in PUBLISHED} <= {
        ("mmlu", 14042), ("ceval-valid", 1346), ("gsm8k", 1319),
    }  # fmt: skip
    assert all(50 < item.score < 100 and item.source for item in PUBLISHED)
    assert set(reasons(["gsm8k"])["set"]) == {"gsm8k", "generative sets", "multiple choice"}


def test_importing_the_harness_does_not_import_lm_eval_or_torch() -> None:
    code = (
        "import sys, ascend_kit.evaluation.harness, ascend_kit.evaluation.scores; "
        "print([m for m in ('lm_eval', 'torch', 'datasets', 'transformers') if m in sys.modules])"
    )

    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert json.loads(output.replace("'", '"')) == []


def test_evaluate_is_callable_whether_named_before_or_after_its_modules() -> None:
    code = (
        "import ascend_kit.evaluation.scores, ascend_kit\n"
        "from ascend_kit import evaluate\n"
        "try: evaluate(None, None)\n"
        "except TypeError as error: print(error)"
    )

    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert "missing 1 required positional argument: 'folder'" in output


def test_groups_weigh_tasks_by_their_documents(engine, tmp_path) -> None:
    data = write_sets(tmp_path / "data", documents=9, seed=5)
    file = next((data / "ceval" / "law").glob("val.parquet"))
    pandas.read_parquet(file).head(3).to_parquet(file)
    result, _ = run(engine, experiment_for(data, tmp_path / "out", eval_datasets=["ceval"], eval_fewshot=0))

    tasks = result.tasks[result.tasks["metric"] == "acc"].set_index("task")["value"]
    group = result.groups.set_index(["task", "metric"]).loc[("ceval-valid", "acc")]

    assert group["n"] == 12
    assert group["value"] == pytest.approx((3 * tasks["ceval-valid_law"] + 9 * tasks["ceval-valid_physician"]) / 12)
    assert [g.group for g in groups_of(find_tasks(data, ["ceval"]))] == ["ceval-valid"]
