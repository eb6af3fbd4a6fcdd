"""Batch inference over a prompts file, and the check of an engine against its plain twin."""

import json

import pytest

from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.measure.batch import load_answers, load_metrics, run_batch
from ascend_kit.measure.correctness import Reference, WrongAnswerError, check_against, reference_answers
from ascend_kit.params import Experiment
from ascend_kit.results import RunFolder

PROMPTS = ["one", "two and more", "three", "4", "five five five"]


@pytest.fixture
def experiment(tiny_qwen3_dir, tmp_path):
    """Five prompts for the tiny model, three in flight, in a fresh output folder."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return Experiment(
        input_model=str(tiny_qwen3_dir),
        output_root=str(tmp_path / "outputs"),
        use_model="source",
        prompts_file=str(path),
        precision="fp32",
        device="cpu",
        max_seq_length=64,
        sweep_prompt_len=[8],
        sweep_output_len=[4],
        max_new_tokens=5,
        concurrency=3,
        batch_size=2,
        graph_mode=False,
    )


@pytest.fixture
def engine(experiment):
    with AscendInferEngine.from_experiment(experiment) as loaded:
        yield loaded


def test_every_prompt_is_answered_in_file_order_as_generate_would(experiment, engine):
    expected = [output.text for output in engine.generate(PROMPTS, [_greedy(5)] * len(PROMPTS))]
    steps = []

    with RunFolder.open(experiment, "03_generate") as folder:
        result = run_batch(engine, experiment, folder, on_progress=lambda done, total, text: steps.append(done))

    answers = json.loads(result.path.read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in answers] == PROMPTS
    assert [answer["text"] for answer in answers] == expected
    assert steps == [1, 2, 3, 4, 5]
    assert (result.answers["ttft_ms"] > 0).all() and set(result.answers["status"]) == {"ok"}


def test_interrupted_batch_goes_on_with_the_missing_prompts(experiment, engine):
    folder = RunFolder.open(experiment, "03_generate")

    def stop(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(engine, experiment, folder, on_progress=stop)
    assert not engine.has_unfinished, "requests in flight must be given up"
    steps = []
    run_batch(engine, experiment, folder, on_progress=lambda done, total, text: steps.append(done))

    assert steps == [3, 4, 5]
    answers = load_answers(folder)
    assert list(answers["prompt"]) == PROMPTS
    metrics = load_metrics(answers)
    assert list(metrics["num_completed"]) == [2, 3], "sessions are summarised apart: their clocks differ"


def test_prompt_that_does_not_fit_fails_alone(experiment, engine):
    with open(experiment.prompts_file, "a") as file:
        file.write(json.dumps({"prompt": "word " * 200}) + "\n")

    with RunFolder.open(experiment, "03_generate") as folder:
        answers = run_batch(engine, experiment, folder).answers

    assert list(answers["status"]) == ["ok"] * 5 + ["failed"]
    assert "max_seq_length" in answers["error"].iloc[-1]


def test_engine_equals_its_plain_twin(experiment, engine):
    table = check_against(reference_answers(experiment), engine)

    assert set(table["note"]) == {"equal"}
    assert (table["equal_tokens"] == 8).all()


def test_wrong_token_stops_unless_the_twin_was_unsure(engine, experiment):
    found = reference_answers(experiment)
    wrong = tuple((ids[0] + 1, *ids[1:]) for ids in found.token_ids)
    unsure = tuple((found.tolerance / 2,) * len(ids) for ids in wrong)
    sure = tuple((found.tolerance * 2,) * len(ids) for ids in wrong)

    close = check_against(Reference(wrong, unsure, found.tolerance), engine)
    with pytest.raises(WrongAnswerError, match=r"token 0 .* operator_fusion: false"):
        check_against(Reference(wrong, sure, found.tolerance), engine)

    assert close["note"].str.startswith("close call at token 0").all()


def _greedy(tokens):
    from ascend_kit import SamplingParams

    return SamplingParams(max_new_tokens=tokens)
