"""The adapter against lm-eval's own Hugging Face model (HFLM) on the same float32 checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from running_server import Running

from ascend_kit import AscendInferEngine
from ascend_kit.evaluation.endpoint import EndpointEngine
from ascend_kit.params.engines import OpenAIEngine

lm_eval = pytest.importorskip("lm_eval")

# float32 on both sides; sums of at most a few hundred terms.
TOLERANCE = 1e-4
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [
    ("The river", " is green"),
    ("The river", " is cold"),
    ("Question: what?\nAnswer:", " A"),
    ("Question: what?\nAnswer:", " B"),
    ("trailing spaces   ", "word"),
    ("", "nothing before"),
    ("答案：", " 天"),
    ("one two three", " four five six seven eight nine ten"),
]


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=item, idx=0, metadata=("t", n, 1))
        for n, item in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def engine(tiny_qwen3_dir: Path, device: str) -> Iterator[AscendInferEngine]:
    with AscendInferEngine(tiny_qwen3_dir, precision="fp32", device=device, max_seq_length=512) as engine:
        engine.tokenizer.chat_template = CHAT
        yield engine


@pytest.fixture(scope="module")
def hflm(tiny_qwen3_dir: Path):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(tiny_qwen3_dir), device="cpu", dtype="float32", batch_size=4, max_length=512)
    model.tokenizer.chat_template = CHAT
    return model


def adapter(engine, **options):
    from ascend_kit.evaluation.adapter import EngineLM

    return EngineLM(engine, **options)


def assert_same_scores(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=TOLERANCE)


def test_log_probabilities_equal_hflm(engine, hflm) -> None:
    ours = adapter(engine).loglikelihood(requests("loglikelihood", PAIRS))
    theirs = hflm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)

    assert_same_scores(ours, theirs)


def test_each_answer_is_told_as_it_comes_with_how_it_came_about(engine) -> None:
    told: dict[int, tuple] = {}

    found = adapter(engine, on_answer=lambda index, answer, facts: told.update({index: (answer, facts)})).loglikelihood(
        requests("loglikelihood", PAIRS)
    )

    assert [told[index][0] for index in range(len(PAIRS))] == found
    # Trailing spaces move to the continuation, and an empty context is the prefix token.
    lengths = [len(engine.tokenizer.encode(context.rstrip(" "))) or 1 for context, _ in PAIRS]
    assert [told[index][1]["num_prompt_tokens"] for index in range(len(PAIRS))] == lengths


@pytest.mark.parametrize("max_length", [9, 16, 24])
def test_long_input_loses_its_left_end_as_in_hflm(engine, hflm, monkeypatch, max_length: int) -> None:
    pairs = [("a long context about a river and a stone", " tower"), ("short", " x"), ("exactly", " fits!")]
    monkeypatch.setattr(hflm, "_max_length", max_length)
    cut: list[int] = []
    lm = adapter(engine, max_length=max_length, on_answer=lambda index, answer, facts: cut.append(facts["cut_tokens"]))

    assert_same_scores(
        lm.loglikelihood(requests("loglikelihood", pairs)),
        hflm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True),
    )
    assert max(cut) >= 1


def test_the_engine_takes_a_continuation_that_fills_the_whole_context(engine) -> None:
    ids = list(range(97, 97 + 26)) * 20

    (score,) = engine.score([([1], ids[:512])])  # 512 tokens are fed, the last is only predicted

    assert math.isfinite(score.logprob)


def test_a_continuation_longer_than_the_limit_names_the_parameter(engine) -> None:
    with pytest.raises(ValueError, match="eval_max_seq_length"):
        adapter(engine, max_length=4).loglikelihood(requests("loglikelihood", [("a", "bcdefgh")]))


def test_an_empty_context_becomes_the_prefix_token(engine) -> None:
    lm = adapter(engine)

    (found,) = lm.loglikelihood(requests("loglikelihood", [("", "stone")]))
    (expected,) = engine.score([([lm.prefix_token_id], engine.tokenizer.encode("stone"))])

    assert found[0] == pytest.approx(expected.logprob, abs=1e-6)
    assert lm.prefix_token_id == engine.tokenizer.eos_token_id  # this tokenizer has no begin-of-text token


@pytest.mark.parametrize("max_length", [7, 32, 512])
def test_rolling_log_probability_equals_hflm_for_one_and_many_windows(engine, hflm, monkeypatch, max_length) -> None:
    texts = [("A page about rivers and lamps. " * 3,), ("x",), ("",), ("天地人水火" * 5,)]
    monkeypatch.setattr(hflm, "_max_length", max_length)
    lm = adapter(engine, max_length=max_length)

    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    theirs = hflm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)

    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert sum(len(part) for _, part in lm.windows(texts[0][0])) == len(engine.tokenizer.encode(texts[0][0]))


def test_generated_text_equals_hflm_with_stop_strings_and_lengths(engine, hflm) -> None:
    arguments = [
        ("The river", {"until": ["e"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
        ("Q: a stone?\nA:", {"until": [], "max_gen_toks": 8}),
        ("lamp", {"until": "\n", "max_new_tokens": 5}),
    ]
    before = [dict(settings) for _, settings in arguments]

    ours = adapter(engine).generate_until(requests("generate_until", arguments))
    theirs = hflm.generate_until(requests("generate_until", arguments), disable_tqdm=True)

    assert ours == theirs
    assert [settings for _, settings in arguments] == before  # the caller's settings are left alone


def test_generation_cuts_the_prompt_to_leave_room_for_the_answer(engine, hflm, monkeypatch) -> None:
    arguments = [("a context that is much longer than the limit allows", {"until": [], "max_gen_toks": 6})]
    monkeypatch.setattr(hflm, "_max_length", 20)

    ours = adapter(engine, max_length=20).generate_until(requests("generate_until", arguments))

    assert ours == hflm.generate_until(requests("generate_until", arguments), disable_tqdm=True)


@pytest.mark.parametrize("through", ["engine", "endpoint"])
def test_the_other_family_equals_hflm_with_chat_shots_stops_and_cut_prompts(tiny_qwen2_dir, through) -> None:
    """Several-token choices after a conversation of two shots, the same cut on the left, and text up to a stop."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(tiny_qwen2_dir), device="cpu", dtype="float32", batch_size=4, max_length=96)
    theirs.tokenizer.chat_template = CHAT
    shots = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    with AscendInferEngine(tiny_qwen2_dir, precision="fp32", device="cpu", max_seq_length=512) as engine:
        server = Running(engine) if through == "endpoint" else None
        url = f"{server.base}/v1" if server else ""
        model = EndpointEngine(OpenAIEngine(base_url=url, model=""), str(tiny_qwen2_dir)) if server else engine
        model.tokenizer.chat_template = CHAT
        ours = adapter(model, max_length=96)
        prompt = ours.apply_chat_template([*shots, {"role": "user", "content": "Which?"}])
        choices = [(text, tail) for text in (prompt, prompt * 3) for tail in ("a river", "stones", " 天")]
        written = [(text, {"until": ["e", "\n"], "max_gen_toks": 10}) for text in (prompt, prompt * 3)]

        assert prompt == theirs.apply_chat_template([*shots, {"role": "user", "content": "Which?"}])
        assert_same_scores(
            ours.loglikelihood(requests("loglikelihood", choices)),
            theirs.loglikelihood(requests("loglikelihood", choices), disable_tqdm=True),
        )
        assert ours.generate_until(requests("generate_until", written)) == theirs.generate_until(
            requests("generate_until", written), disable_tqdm=True
        )
        if server:
            server.wait(server.runner.cleanup())


def test_thoughts_are_stripped_and_stops_cut_as_in_lm_eval() -> None:
    from lm_eval.models.utils import postprocess_generated_text

    from ascend_kit.evaluation.adapter import THINK_END, Job

    texts = ["<think>Q: a</think>\n\n42 Q: next", "a</think>b</think> c\nd", "</think>", "plain Q: rest", "</think> \n"]
    for text in texts:
        for stops in ([], ["Q:"], ["\n", "c"]):
            job = Job([], None, stops, 0, is_thinking=True)
            assert job.answer(text) == postprocess_generated_text(text, stops, THINK_END)
    # lm-eval grades a thought without an end as the answer; here it is none.
    assert Job([], None, [], 0, is_thinking=True).answer("<think>endless") == ""


def test_unknown_generation_settings_and_no_room_are_refused(engine) -> None:
    lm = adapter(engine, max_length=16)

    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until(requests("generate_until", [("a", {"num_beams": 4, "max_gen_toks": 4})]))
    with pytest.raises(ValueError, match="eval_max_seq_length"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 16})]))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_is_rendered_as_in_hflm(engine, hflm, add_generation_prompt: bool) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because"},
    ]

    ours = adapter(engine).apply_chat_template(history, add_generation_prompt=add_generation_prompt)

    assert ours == hflm.apply_chat_template(history, add_generation_prompt=add_generation_prompt)
    assert ours.endswith("<assistant>") is add_generation_prompt


def test_answers_before_a_failure_are_handed_over(engine) -> None:
    from ascend_kit.evaluation.answering import DocumentLM

    scored, kept, calls = engine.score, [], iter([True, True])

    def failing_score(pairs, **on):
        if not next(calls, False):
            raise RuntimeError("the device is gone")
        return scored(pairs, **on)

    stand_in = SimpleNamespace(tokenizer=engine.tokenizer, max_seq_length=64, config=engine.config, score=failing_score)
    lm = DocumentLM(stand_in, known=lambda document: None, on_documents=kept.extend, together=2)
    asked = requests("loglikelihood", PAIRS)
    for number, request in enumerate(asked):
        request.task_name, request.doc_id = "t", number
    answers = lm.loglikelihood(asked)

    assert sorted(document.key for document in kept) == [("t", number) for number in range(4)]  # two calls of two
    assert [logprob == logprob for logprob, _ in answers] == [number < 4 for number in range(len(PAIRS))]
    assert str(lm.failed["t"]) == "the device is gone"


def test_a_log_probability_that_is_not_a_number_stops_the_task(engine) -> None:
    broken = SimpleNamespace(
        tokenizer=engine.tokenizer,
        max_seq_length=64,
        config=engine.config,
        score=lambda pairs, **on: [SimpleNamespace(logprob=float("nan"), is_greedy=False) for _ in pairs],
    )

    with pytest.raises(ValueError, match="log-probability nan"):
        adapter(broken).loglikelihood(requests("loglikelihood", PAIRS[:1]))
