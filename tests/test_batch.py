"""Batch inference over a prompts file."""

import json
from pathlib import Path

import pytest

from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.measure.answers import answers_file, load_answers, load_metrics
from ascend_kit.measure.batch import run_batch
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
    steps, experiment = [], experiment.with_changes(plain_ops=["rotary", "linear"])

    with RunFolder.open(experiment, "03_generate") as folder:
        result = run_batch(engine, experiment, folder, on_progress=lambda done, total, text: steps.append(done))

    answers = json.loads(answers_file(experiment).read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in answers] == PROMPTS
    assert [answer["text"] for answer in answers] == expected
    assert steps == [1, 2, 3, 4, 5]
    assert (result["ttft_ms"] > 0).all() and set(result["status"]) == {"ok"}
    assert list(load_metrics(result)["plain_ops"]) == ["linear, rotary"]


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
    assert list(metrics.index) == ["start 1", "start 2"]
    assert list(metrics["num_completed"]) == [2, 3], "sessions are summarised apart: their clocks differ"


def test_prompt_that_does_not_fit_fails_alone(experiment, engine):
    with open(experiment.prompts_file, "a") as file:
        file.write(json.dumps({"prompt": "word " * 200}) + "\n")

    with RunFolder.open(experiment, "03_generate") as folder:
        answers = run_batch(engine, experiment, folder)

    assert list(answers["status"]) == ["ok"] * 5 + ["failed"]
    assert "max_seq_length" in answers["error"].iloc[-1]


def test_answers_are_those_of_the_present_file_in_its_order(experiment, engine):
    """A prompts file that lost two lines, changed one and was turned round: nothing of the old one is in the result."""
    with RunFolder.open(experiment, "03_generate") as folder:
        before = run_batch(engine, experiment, folder).set_index("prompt")["text"]
    now = ["five five five", "two and more!", "one"]
    Path(experiment.prompts_file).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in now))
    steps = []

    with RunFolder.open(experiment, "03_generate") as folder:
        run_batch(engine, experiment, folder, on_progress=lambda done, total, text: steps.append(done))
        kept = list(folder.rows("answers"))

    answers = json.loads(answers_file(experiment).read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in answers] == now
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert [answers[0]["text"], answers[2]["text"]] == [before["five five five"], before["one"]]
    assert steps == [3]  # only the edited prompt is answered
    assert len(kept) == 6


@pytest.mark.parametrize("changes", [{"max_new_tokens": 3}, {"temperature": 0.8}])
def test_answers_to_another_question_are_not_reused(experiment, engine, changes):
    with RunFolder.open(experiment, "03_generate") as folder:
        run_batch(engine, experiment, folder)
        changed = experiment.with_changes(**changes)
        answers = run_batch(engine, changed, folder)
        rows = list(folder.rows("answers"))

    assert len(rows) == 10 and len(answers) == 5
    assert (answers["num_output_tokens"] <= changed.max_new_tokens).all()


def test_sampled_answer_belongs_to_its_place_and_a_greedy_one_to_its_text(experiment, engine):
    sampled = experiment.with_changes(temperature=0.9)
    with RunFolder.open(sampled, "03_generate") as folder:
        first = run_batch(engine, sampled, folder)
        lines = Path(experiment.prompts_file).read_text().splitlines(True)
        Path(experiment.prompts_file).write_text("".join(lines[:1] + lines[2:]))
        second = run_batch(engine, sampled, folder)
        fresh = RunFolder.open(sampled.with_changes(run="fresh"), "03_generate")
        alone = run_batch(engine, sampled.with_changes(run="fresh"), fresh)

    assert second["text"][0] == first["text"][0]
    assert list(second["text"]) == list(alone["text"])  # as if the old file had never been


def test_half_an_emoji_fails_alone_and_stays_readable(experiment, engine):
    Path(experiment.prompts_file).write_text('{"prompt": "one"}\n{"prompt": "half \\ud83d"}\n{"prompt": "three"}\n')

    with RunFolder.open(experiment, "03_generate") as folder:
        result = run_batch(engine, experiment, folder)

    assert list(result["status"]) == ["ok", "failed", "ok"]
    assert json.loads(answers_file(experiment).read_text(encoding="utf-8"))[1]["prompt"] == "half \\ud83d"


def test_closed_engine_is_loaded_and_answers_are_read_without_one(experiment):
    engine = AscendInferEngine.from_experiment(experiment)
    with RunFolder.open(experiment, "03_generate") as folder:
        result = run_batch(engine, experiment, folder)
    engine.close()

    saved = load_answers(RunFolder(experiment.run_folder, "03_generate"))
    assert list(saved["text"]) == list(result["text"])


def _greedy(tokens):
    from ascend_kit import SamplingParams

    return SamplingParams(max_new_tokens=tokens)


def test_conversations_are_rendered_with_the_models_template_and_thinking_is_passed_on(experiment, engine):
    engine.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if enable_thinking %}!{% endif %}"
    )
    Path(experiment.prompts_file).write_text(
        '{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "3"}]}\n'
    )
    chat = experiment.with_changes(chat_template=True, thinking=True)
    wanted = engine.generate(["<user>one!", "<user>two<assistant>3!"], _greedy(5))

    with RunFolder.open(chat, "03_generate") as folder:
        answers = run_batch(engine, chat, folder)

    assert list(answers["text"]) == [output.text for output in wanted]


def test_missing_template_is_refused_before_anything_is_written(experiment, engine):
    with RunFolder.open(experiment, "03_generate") as folder:
        with pytest.raises(ValueError, match="chat_template: false"):
            run_batch(engine, experiment.with_changes(chat_template=True), folder)

        assert list(folder.rows("answers")) == [] and folder.read_json("batch") is None


def test_sampling_of_the_model_is_used_where_nothing_else_is_said(experiment, engine, tmp_path):
    asked = []
    add = engine.add_request
    engine.add_request = lambda prompt, sampling, **rest: asked.append(sampling) or add(prompt, sampling, **rest)
    file = Path(engine.model_path, "generation_config.json")
    before = file.read_text()
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}))
    try:
        chosen = experiment.with_changes(sampling="model", top_k=7)
        with RunFolder.open(chosen, "03_generate") as folder:
            run_batch(engine, chosen, folder)
    finally:
        file.write_text(before)

    assert {(one.temperature, one.top_k, one.top_p, one.max_new_tokens) for one in asked} == {(0.6, 7, 0.95, 5)}
    assert sorted(one.seed for one in asked) == [0, 1, 2, 3, 4]


def test_empty_answers_are_an_alarm_of_the_stage(experiment, engine, monkeypatch):
    from ascend_kit.stages import RunRecord

    with RunFolder.open(experiment, "03_generate") as folder:
        step = engine.step

        def empty():
            outputs = step()
            for output in outputs:
                output.text = "" if output.index % 5 == 1 else output.text
            return outputs

        engine.step = empty
        monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ messages[0].content }}")
        run_batch(engine, experiment, folder)
    stage = RunRecord.read(experiment.run_folder).stages["03_generate"]

    assert stage.state == "alarm"
    assert [alarm["key"] for alarm in stage.alarms] == ["empty_answers"]
    assert stage.alarms[0]["text"] == (
        "1 of 5 answers are empty (prompts 1); the tokenizer has a chat template: try chat_template: true"
    )
