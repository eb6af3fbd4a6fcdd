"""Streams run in a thread of their own: nobody waits for a reader, and nobody's results go astray."""

from __future__ import annotations

import threading
import time

import pytest

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.engine.sequence import Sequence
from ascend_kit.engine.text import TokenStream

LONG = SamplingParams(max_new_tokens=60, ignore_eos=True)
PROMPTS = [[1, 2, 3, 4], [9, 8, 7], [5, 5, 5, 5, 6]]


@pytest.fixture
def engine(tiny_qwen3_dir):
    settings = dict(precision="fp32", device="cpu", max_seq_length=512, batch_size=8, block_size=16, kv_cache_gib=0.05)
    with AscendInferEngine(tiny_qwen3_dir, **settings) as engine:
        yield engine


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_the_engine_goes_on_while_the_reader_does_something_else(engine):
    stream = engine.stream(PROMPTS[:2], LONG)
    next(stream)

    wait_until(lambda: engine.stats()["output_tokens"] == 120)  # nobody reads meanwhile

    assert len(list(stream)) == 119


def test_requests_of_others_end_while_a_stream_is_not_read(engine):
    expected = engine.generate(PROMPTS[1:], LONG)
    stream = engine.stream(PROMPTS[0], SamplingParams(max_new_tokens=400, ignore_eos=True))
    next(stream)

    outputs = engine.generate(PROMPTS[1:], LONG)  # advanced by both threads

    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    stream.close()
    assert not engine.has_unfinished
    engine.core.blocks.check([])


def test_what_a_stream_finishes_for_others_comes_from_step(engine):
    expected = engine.generate([PROMPTS[1]], LONG)[0].token_ids
    request = engine.add_request(PROMPTS[1], LONG)

    events = list(engine.stream(PROMPTS[0], SamplingParams(max_new_tokens=100, ignore_eos=True)))

    outputs = engine.step()
    assert len(events) == 100
    assert [(output.index, output.token_ids) for output in outputs] == [(request, expected)]
    assert engine.step() == [] and not engine.has_unfinished


def test_scores_and_streams_do_not_mix(engine):
    pairs = [(prompt, [11, 12]) for prompt in PROMPTS]
    expected = engine.score(pairs)
    stream = engine.stream(PROMPTS, LONG)
    next(stream)

    got = engine.score(pairs)
    assert [score.logprob for score in got] == pytest.approx([score.logprob for score in expected], abs=1e-4)
    assert len(list(stream)) == 179


def test_a_refused_prompt_is_an_event_among_the_others(engine):
    events = list(engine.stream([[1, 2], [], [3]], SamplingParams(max_new_tokens=3, ignore_eos=True)))

    assert [event for event in events if event.index == 1] == [(1, None, "", "error")]
    assert sum(event.finish_reason == "length" for event in events) == 2


def test_the_reader_gets_the_engines_error():
    def fail():
        raise RuntimeError("the device is gone")

    unfinished = Sequence([1], SamplingParams(), arrival_s=0.0)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(TokenStream(lambda _: "").read([unfinished], fail))
    assert not any(thread.name == "ascend-kit-stream" for thread in threading.enumerate())


def test_a_request_cancelled_from_outside_ends_the_others_untouched(engine):
    first = engine.add_request(PROMPTS[0], LONG)
    second = engine.add_request(PROMPTS[1], LONG)
    for _ in range(10):
        engine.step()

    cancelled = engine.cancel(first)

    assert cancelled.finish_reason == "cancelled" and 0 < len(cancelled.token_ids) < 60
    assert engine.cancel(first) is None
    rest = []
    while engine.has_unfinished:
        rest += engine.step()
    assert [output.index for output in rest] == [second] and len(rest[0].token_ids) == 60
    engine.core.blocks.check([])


def test_a_cancelled_part_of_a_stream_ends_with_an_event(engine):
    stream = engine.stream(PROMPTS[:2], SamplingParams(max_new_tokens=300, ignore_eos=True))
    next(stream)

    engine.cancel(0)

    reasons = {event.index: event.finish_reason for event in stream if event.finish_reason}
    assert reasons == {0: "cancelled", 1: "length"}
