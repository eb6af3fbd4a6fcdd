"""`evaluate` end to end on small local data: rows, groups and documents against lm-eval's own run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from evaluated import CHAT, MAX_LENGTH, counting, experiment_for, run
from evaluation_data import write_sets

from ascend_kit.evaluation.datasets import SETS, drawn_documents, find_tasks, groups_of, write_task_folder
from ascend_kit.evaluation.perplexity import ratio, token_perplexity
from ascend_kit.evaluation.scores import load_evaluation
from ascend_kit.evaluation.tasks import go_offline
from ascend_kit.results import RunFolder

pytest.importorskip("lm_eval")
TOLERANCE = 1e-4  # float32 on both sides


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


def test_cut_generative_answers_are_named(finished) -> None:
    (flag,) = [flag for flag in finished.result.flags if flag.key == "evaluation.cut_answers_agieval"]

    answers = finished.result.documents["finish_reason"].dropna()
    text = str(flag)
    assert f"{(answers == 'length').sum()} of 5 answers were cut" in text and "agieval_multiple_choice" in text


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
