"""Results that must not be trusted, cautions, published scores."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from evaluated import CHAT, counting, experiment_for, run, scores_of
from evaluation_data import write_sets

from ascend_kit import AscendInferEngine
from ascend_kit.engine.text import thinking_option
from ascend_kit.evaluation import judge
from ascend_kit.evaluation.datasets import check_data
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.judge import PUBLISHED, published, reasons
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder
from ascend_kit.stages import RunRecord

pytest.importorskip("lm_eval")


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
