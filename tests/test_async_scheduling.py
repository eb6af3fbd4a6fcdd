"""A decode step that is queued before the tokens of the last one are read: the same answers, and no step in between
in which the device has nothing to do."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from chinese_text import english_in

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.device.graphs import GraphHang
from ascend_kit.engine import runner as runner_module
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.sampler import NOT_FINITE
from ascend_kit.measure.engines import EngineBackend
from ascend_kit.messages import phrase
from ascend_kit.params import build_experiment

LENGTHS = (3, 20, 50, 33, 7, 90)
CPU = "cpu"  # where a behaviour is the scheduler's alone


def make_engine(folder, device, is_async, **changes):
    settings = dict(precision="fp32", device=device, max_seq_length=256, batch_size=4, block_size=16, kv_cache_gib=0.05,
                    graph_mode=False)  # fmt: skip
    return AscendInferEngine(folder, **{**settings, "async_scheduling": is_async, **changes})


def prompts(lengths=LENGTHS, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


def answers(outputs):
    return [(o.token_ids, o.text, o.finish_reason) for o in outputs]


def answered(folder, device, sampling, **changes):
    """Answers and counters of both engines, the synchronous one first."""
    found = []
    for is_async in (False, True):
        with make_engine(folder, device, is_async, **changes) as engine:
            found.append((answers(engine.generate(prompts(), sampling)), engine.stats()))
            engine.core.blocks.check([])
    return found


@pytest.mark.parametrize("graph_mode", [True, False])
def test_mixed_requests_get_the_tokens_of_the_synchronous_engine(graph_mode, tiny_qwen3_dir, device):
    where = device if graph_mode else CPU
    with make_engine(tiny_qwen3_dir, where, False) as engine:
        (first,) = engine.generate(prompts()[:1], SamplingParams(max_new_tokens=12, ignore_eos=True))
    sampling = [
        SamplingParams(max_new_tokens=16, ignore_eos=True, stop_token_ids=(first.token_ids[7],)),  # ends in the middle
        SamplingParams(max_new_tokens=12, temperature=0.8, top_k=20, seed=4),
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=16, temperature=1.0, seed=9, min_new_tokens=8),
        SamplingParams(max_new_tokens=16, stop=(first.text[4:6],)),
        SamplingParams(max_new_tokens=9),
    ]

    # Prompts in chunks and too few slots: steps with prompts come between.
    plain, ahead = answered(tiny_qwen3_dir, where, sampling, graph_mode=graph_mode, max_tokens_per_step=40)

    assert ahead[0] == plain[0]
    assert plain[1]["async_steps"] == 0 < ahead[1]["async_steps"]
    assert {name: ahead[1][name] for name in ("decodes", "output_tokens")} == {
        name: plain[1][name] for name in ("decodes", "output_tokens")
    }


def test_int8_weights_and_cache_get_the_same_tokens(tiny_int8_dir):
    plain, ahead = answered(
        tiny_int8_dir, CPU, SamplingParams(max_new_tokens=12, ignore_eos=True), kv_cache_dtype="int8"
    )

    assert ahead[0] == plain[0] and ahead[1]["async_steps"] > 0


def test_requests_whose_choice_needs_earlier_tokens_wait_for_them(tiny_qwen3_dir):
    for options in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"logprobs": 1}):
        plain, ahead = answered(tiny_qwen3_dir, CPU, SamplingParams(max_new_tokens=6, ignore_eos=True, **options))
        assert ahead[0] == plain[0] and ahead[1]["async_steps"] == 0


def test_preempted_requests_and_shared_prefixes_keep_their_tokens(tiny_qwen3_dir):
    every, sampling, found = prompts([30] * 4), SamplingParams(max_new_tokens=34, ignore_eos=True), []

    for is_async in (False, True):
        with make_engine(tiny_qwen3_dir, CPU, is_async, max_seq_length=64) as engine:
            blocks = engine.core.blocks  # room for two at full length
            blocks.num_blocks, blocks.references, blocks.free = 9, [0] * 9, list(range(8, 0, -1))
            once, again = engine.generate(every, sampling), engine.generate(every[3:], sampling)
            found.append(answers(once) + answers(again))
            assert engine.stats()["preemptions"] > 0 and again[0].num_cached_tokens > 0
            blocks.check([])

    assert found[1] == found[0] and found[0][4] == found[0][3]


def test_a_prompt_that_goes_on_from_an_answer_finds_its_blocks(tiny_qwen3_dir):
    with make_engine(tiny_qwen3_dir, CPU, True) as engine:
        (output,) = engine.generate([prompts()[1]], SamplingParams(max_new_tokens=45, ignore_eos=True))
        longer = prompts()[1] + output.token_ids + [1, 2]
        (again,) = engine.generate([longer], SamplingParams(max_new_tokens=5, ignore_eos=True))
    with make_engine(tiny_qwen3_dir, CPU, False) as engine:
        (fresh,) = engine.generate([longer], SamplingParams(max_new_tokens=5, ignore_eos=True))

    assert again.num_cached_tokens == 64  # 20 + 45 tokens, of which the last one has no keys
    assert again.token_ids == fresh.token_ids


def test_a_cancelled_request_and_a_closed_stream_leave_the_others_their_tokens(tiny_qwen3_dir):
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    with make_engine(tiny_qwen3_dir, CPU, False) as engine:
        expected = [o.token_ids for o in engine.generate(prompts()[:3], sampling)]

    with make_engine(tiny_qwen3_dir, CPU, True) as engine:
        numbers = [engine.add_request(prompt, sampling) for prompt in prompts()[:3]]
        for _ in range(6):
            engine.step()
        assert engine.core._flight is not None
        cut = engine.cancel(numbers[1])
        ended = {}
        while engine.has_unfinished:
            ended |= {o.index: o.token_ids for o in engine.step()}
        stream = engine.stream(prompts()[2], sampling)
        parts = [next(stream) for _ in range(4)]
        stream.close()
        again = engine.generate(prompts()[:3], sampling)
        engine.core.blocks.check([])

    assert ended == {numbers[0]: expected[0], numbers[2]: expected[2]}
    assert cut is not None and cut.token_ids == expected[1][: len(cut.token_ids)] != expected[1]
    assert [part.token_id for part in parts] == expected[2][:4]
    assert [o.token_ids for o in again] == expected


def test_logits_that_are_not_finite_end_their_request_although_a_step_went_on_from_them(tiny_qwen3_dir, monkeypatch):
    sampling = SamplingParams(max_new_tokens=10, ignore_eos=True)
    with make_engine(tiny_qwen3_dir, CPU, False) as engine:
        expected = [o.token_ids for o in engine.generate(prompts()[:2], sampling)]
    real = runner_module.sample

    def broken(logits, sequences, *rest):
        tokens = real(logits, sequences, *rest)
        for row, sequence in enumerate(sequences):
            if sequence.id == 0 and sequence.num_output_tokens == 4:
                tokens[row] = NOT_FINITE
        return tokens

    monkeypatch.setattr(runner_module, "sample", broken)
    with make_engine(tiny_qwen3_dir, CPU, True) as engine:
        bad, good = engine.generate(prompts()[:2], sampling)
        assert engine.stats()["async_steps"] > 0

    assert bad.finish_reason == "error" and "after 4 tokens" in bad.error and bad.token_ids == expected[0][:4]
    assert good.token_ids == expected[1]


@pytest.mark.parametrize("name", ["launch", "read"])
def test_an_interrupt_within_a_step_costs_no_token(name, tiny_qwen3_dir, device, monkeypatch):
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    with make_engine(tiny_qwen3_dir, device, False) as engine:
        expected = [o.token_ids for o in engine.generate(prompts()[:2], sampling)]

    with make_engine(tiny_qwen3_dir, device, True) as engine:
        real, calls, ended = getattr(engine.core.runner, name), [], {}

        def interrupted(*args):
            calls.append(args)
            if len(calls) % 3 == 0:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(engine.core.runner, name, interrupted)
        numbers = [engine.add_request(prompt, sampling) for prompt in prompts()[:2]]
        while engine.has_unfinished:
            try:
                ended |= {o.index: o.token_ids for o in engine.step()}
            except KeyboardInterrupt:
                continue
        engine.core.blocks.check([])

    assert [ended[number] for number in numbers] == expected


def test_an_engine_closes_with_a_step_under_way_and_opens_again(tiny_qwen3_dir, device):
    engine = make_engine(tiny_qwen3_dir, device, True).load_model()
    engine.add_request(prompts()[0], SamplingParams(max_new_tokens=20, ignore_eos=True))
    while engine.core._flight is None:
        engine.step()
    engine.close()

    with engine:
        assert len(engine.generate(prompts()[:1], SamplingParams(max_new_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_an_engine_whose_step_hangs_closes_without_waiting_again(tiny_qwen3_dir, device, monkeypatch):
    engine = make_engine(tiny_qwen3_dir, device, True).load_model()
    engine.add_request(prompts()[0], SamplingParams(max_new_tokens=20, ignore_eos=True))
    while engine.core._flight is None:
        engine.step()
    launch, never = engine.core.runner.launch, SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(engine.core.runner, "launch", lambda *args: replace(launch(*args), done=never, timeout_s=1.0))
    with pytest.raises(GraphHang):
        for _ in range(3):
            engine.step()

    started = time.perf_counter()
    engine.close()

    assert time.perf_counter() - started < 0.9


@pytest.mark.parametrize("graph_mode", [True, False])
def test_the_device_has_a_step_queued_whenever_tokens_are_read(graph_mode, tiny_qwen3_dir, device, monkeypatch):
    """Idle time between steps is what the host does while nothing is queued: before every decode step, or before one
    in an answer."""
    idle = {}
    for is_async in (False, True):
        with make_engine(tiny_qwen3_dir, device, is_async, graph_mode=graph_mode) as engine:
            launch, read, queued = engine.core.runner.launch, engine.core.runner.read, []

            def launched(*args, launch=launch, queued=queued):
                queued.append(1)
                return launch(*args)

            def was_read(*args, read=read, queued=queued, is_async=is_async):
                queued.pop()
                idle[is_async] = idle.get(is_async, 0) + (not queued)
                return read(*args)

            monkeypatch.setattr(engine.core.runner, "launch", launched)
            monkeypatch.setattr(engine.core.runner, "read", was_read)
            engine.generate(prompts()[:2], SamplingParams(max_new_tokens=16, ignore_eos=True))

    assert idle == {False: 16, True: 2}  # the prompts' step and the last one


@pytest.mark.npu
@pytest.mark.parametrize("graph_mode", [True, False])
def test_a_step_that_goes_on_from_unread_tokens_synchronises_once_and_uploads_once(graph_mode, sim, device):
    from npu_sim.counting import MODELS, count_step

    config = replace(MODELS["Qwen3-8B"], num_layers=2)
    plain, ahead = (
        count_step(sim, config, batch=4, graph_mode=graph_mode, async_scheduling=is_async) for is_async in (False, None)
    )

    for cost in (plain, ahead):
        assert (cost.syncs, cost.uploads, cost.replays) == (1, 1, int(graph_mode))
    assert ahead.launches - plain.launches <= 3  # the unread tokens become the next ids


def test_the_row_says_why_steps_wait_for_tokens():
    def why(device_kind, **settings):
        return EngineConfig("m", **settings).why_synchronous(device_kind)

    assert why("npu") is why("cuda") is why("cpu", async_scheduling=True) is None
    assert why("cpu") == "a CPU computes every step itself"
    assert why("npu", async_scheduling=False) == "async_scheduling is false"
    assert why("npu", async_scheduling=True, speculate=4) == "speculate needs the token first"
    assert "tensor_parallel" in why("npu", cards=2, tensor_parallel=2)
    reasons = [why("cpu"), why("npu", async_scheduling=False), why("npu", speculate=4),
               why("npu", cards=2, tensor_parallel=2)]  # fmt: skip
    assert [english_in(phrase(f"off: {reason}", "zh")) for reason in reasons] == [[]] * 4


def test_a_row_of_a_sweep_says_whether_steps_waited_and_why(tiny_qwen3_dir):
    def said(**changes):
        experiment = build_experiment({
            "input_model": str(tiny_qwen3_dir), "use_model": "source", "precision": "fp32", "device": "cpu",
            "max_seq_length": 128, **changes,
        })  # fmt: skip
        backend = EngineBackend(AscendInferEngine.from_experiment(experiment), experiment, "ours")
        return backend.variant()["async_scheduling"]

    assert said() == "off: a CPU computes every step itself" and said(async_scheduling=True) == "on"
    assert said(async_scheduling=True, speculate=4) == "off: speculate needs the token first"
