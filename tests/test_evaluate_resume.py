"""An evaluation that is gone on with: what is asked again, and what fails alone."""

from __future__ import annotations

import shutil

import pandas
import pytest
from evaluated import counting, experiment_for, run
from evaluation_data import write_sets

from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.evaluation.scores import EvaluationError, load_evaluation
from ascend_kit.results import RunFolder

pytest.importorskip("lm_eval")


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
    answered = load_evaluation(RunFolder(experiment.run_folder)).documents
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
