"""Several cards through the engine's own interface: the same answers as one card, and faults in the middle."""

from __future__ import annotations

import math
import os
import signal
import sys
import time

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ascend-kit[cluster]")

from int8_halves import halve  # noqa: E402
from small_engine import generate_while_a_rank_dies, prompts_of, tokens  # noqa: E402

from ascend_kit import AscendInferEngine, SamplingParams  # noqa: E402
from ascend_kit.engine import replica, replicas  # noqa: E402
from ascend_kit.engine.config import EngineConfig  # noqa: E402
from ascend_kit.engine.core import ReplicasLost  # noqa: E402
from ascend_kit.engine.processes import LocalProcesses  # noqa: E402
from ascend_kit.engine.ray_cluster import RaySession  # noqa: E402
from ascend_kit.engine.worker import Worker  # noqa: E402
from ascend_kit.model.config import ModelConfig  # noqa: E402

pytestmark = pytest.mark.multiproc

NEW = 12
POISON = 255  # a token no other prompt has
SETTINGS = dict(precision="fp32", device="cpu", max_seq_length=512, batch_size=4, block_size=16, kv_cache_gib=0.02)


class Poisonable(Worker):
    """A replica that dies as if by the kernel's hand as soon as a poisonous request has come in."""

    def advance(self, requests, cancelled):
        if any(POISON in request.prompt_ids for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().advance(requests, cancelled)


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for this file; engines find it running and leave it so."""
    session = RaySession("cpu", 6)  # two for the engine that most tests share, four for others
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    yield session
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    session.close()
    assert not session.ray.is_initialized()


@pytest.fixture(scope="module")
def two_cards(local_ray, tiny_qwen3_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "Worker", Poisonable)
        with AscendInferEngine(tiny_qwen3_dir, cards=2, **SETTINGS) as engine:
            yield engine


def one_card(folder, prompts, sampling, **changes):
    with AscendInferEngine(folder, **{**SETTINGS, **changes}) as engine:
        return engine.generate(prompts, sampling)


def wait_until_whole(engine, limit_s=90):
    """Step until every replica is back."""
    end = time.monotonic() + limit_s
    while any(row["state"] != "ready" for row in engine.stats()["replicas"]):
        assert time.monotonic() < end, engine.stats()["replicas"]
        engine.step()
        time.sleep(0.05)
    engine.step()


def test_two_replicas_answer_as_one_card_with_a_remainder(two_cards, tiny_qwen3_dir):
    prompts, sampling = prompts_of(7), SamplingParams(max_new_tokens=NEW)
    seen = []

    outputs = two_cards.generate(prompts, sampling, on_progress=lambda done, total: seen.append((done, total)))

    assert tokens(outputs) == tokens(one_card(tiny_qwen3_dir, prompts, sampling))
    assert [output.index for output in outputs] == list(range(7)) and seen[-1] == (7, 7)
    rows = two_cards.stats()["replicas"]
    assert sum(row["finished"] for row in rows) >= 7 and all(row["finished"] > 0 for row in rows)
    assert all(row["memory_bytes"] > 0 for row in rows)


def test_sampling_stops_and_logprobs_do_not_depend_on_the_replica(two_cards, tiny_qwen3_dir):
    prompts = prompts_of(4)
    sampling = [SamplingParams(max_new_tokens=NEW, temperature=1.0, seed=number, logprobs=2) for number in range(3)]
    stop_at = two_cards.generate([prompts[3]], SamplingParams(max_new_tokens=NEW))[0].text[4:6]
    sampling.append(SamplingParams(max_new_tokens=NEW, stop=stop_at))

    outputs = two_cards.generate(prompts, sampling)
    expected = one_card(tiny_qwen3_dir, prompts, sampling)

    assert [(o.token_ids, o.text, o.finish_reason) for o in outputs] == [
        (o.token_ids, o.text, o.finish_reason) for o in expected
    ]
    assert [row.logprob for row in outputs[0].logprobs] == pytest.approx(
        [row.logprob for row in expected[0].logprobs], abs=1e-4
    )


def test_scores_streams_and_arrays_work_as_on_one_card(two_cards, tiny_qwen3_dir):
    pairs = [("a question:", " yes"), ("a question:", " no"), ("something else", " entirely different")]
    prompts, sampling = prompts_of(3), SamplingParams(max_new_tokens=5)

    scores = two_cards.score(pairs)
    events = list(two_cards.stream(prompts, sampling))
    array = two_cards.infer([[1, 2, 3], [4, 5, 6]], max_new_tokens=4)

    with AscendInferEngine(tiny_qwen3_dir, **SETTINGS) as engine:
        assert [s.is_greedy for s in scores] == [s.is_greedy for s in engine.score(pairs)]
        assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in engine.score(pairs)], abs=1e-4)
        assert array.tolist() == engine.infer([[1, 2, 3], [4, 5, 6]], max_new_tokens=4).tolist()
        alone = list(engine.stream(prompts, sampling))
    for index in range(3):
        mine, theirs = ([e for e in some if e.index == index] for some in (events, alone))
        assert mine == theirs


def test_times_are_in_order_and_on_the_callers_clock(two_cards):
    before = time.perf_counter()

    outputs = two_cards.generate(prompts_of(3), SamplingParams(max_new_tokens=4))

    for line in (output.timeline for output in outputs):
        moments = [before, line.arrival_s, line.scheduled_s, *line.token_times_s, time.perf_counter()]
        assert moments == sorted(moments) and line.finished_s == line.token_times_s[-1]


def test_a_cancelled_request_ends_and_a_refused_one_comes_back(two_cards):
    running = two_cards.add_request(prompts_of(1)[0], SamplingParams(max_new_tokens=400))
    refused = two_cards.add_request([])
    ended = [output for _ in range(20) for output in two_cards.step()]

    cancelled = two_cards.cancel(running)

    assert cancelled.finish_reason == "cancelled"
    assert [(output.index, output.finish_reason) for output in ended] == [(refused, "error")]
    assert not two_cards.has_unfinished
    assert len(two_cards.generate(prompts_of(2), SamplingParams(max_new_tokens=2))) == 2


def test_a_replica_killed_in_the_middle_is_replaced_and_nothing_is_lost_or_twice(two_cards, tiny_qwen3_dir):
    wait_until_whole(two_cards)
    before = two_cards.stats()["restarts"]
    prompts, sampling = prompts_of(24), SamplingParams(max_new_tokens=150, ignore_eos=True)
    victim = two_cards.stats()["replicas"][0]["pids"][0]
    order = [two_cards.add_request(prompt, sampling) for prompt in prompts]
    outputs, steps = [], 0

    while two_cards.has_unfinished:
        outputs += two_cards.step()
        steps += 1
        if steps == 40:
            os.kill(victim, signal.SIGKILL)

    assert sorted(output.index for output in outputs) == order
    by_index = {output.index: output.token_ids for output in outputs}
    assert [by_index[number] for number in order] == tokens(one_card(tiny_qwen3_dir, prompts, sampling))
    wait_until_whole(two_cards)
    assert victim not in two_cards.stats()["replicas"][0]["pids"]
    assert two_cards.stats()["restarts"] == before + 1


def test_a_request_that_kills_two_replicas_is_reported_and_the_rest_completes(two_cards):
    wait_until_whole(two_cards)
    before = two_cards.stats()["restarts"]
    prompts = prompts_of(9)
    prompts[4] = [1, POISON, 2]

    outputs = two_cards.generate(prompts, SamplingParams(max_new_tokens=NEW))

    failed = [output.index for output in outputs if output.finish_reason == "error"]
    assert failed == [4] and "2 replicas were lost" in outputs[4].error
    assert all(output.token_ids for output in outputs if output.index != 4)
    assert two_cards.stats()["restarts"] == before + 2


def test_losing_all_replicas_is_an_error_that_carries_what_had_finished(two_cards, monkeypatch):
    wait_until_whole(two_cards)
    monkeypatch.setattr(two_cards.core.processes, "total_cards", lambda: 0)
    prompts = prompts_of(20)
    sampling = [SamplingParams(max_new_tokens=4)] * 8 + [SamplingParams(max_new_tokens=400, ignore_eos=True)] * 12
    pids = [pid for row in two_cards.stats()["replicas"] for pid in row["pids"]]

    def kill_all(done, total):
        while done >= 8 and pids:
            os.kill(pids.pop(), signal.SIGKILL)

    try:
        with pytest.raises(ReplicasLost, match="all 2 replicas are lost") as caught:
            two_cards.generate(prompts, sampling, on_progress=kill_all)

        assert [output.index for output in caught.value.outputs] == list(range(8))
        assert not two_cards.has_unfinished
    finally:
        monkeypatch.undo()
        two_cards.close()  # other tests may follow on the same engine
        two_cards.load_model()


def test_tensor_parallel_gives_the_tokens_and_scores_of_one_card(local_ray, tiny_qwen2_dir):
    prompts, sampling = prompts_of(5), SamplingParams(max_new_tokens=NEW)
    changes = dict(max_tokens_per_step=16)  # prompts in chunks, so that ranks see every kind of step
    pairs = [("a question:", " yes"), ("a question:", " no")]

    with AscendInferEngine(tiny_qwen2_dir, cards=2, tensor_parallel=2, **{**SETTINGS, **changes}) as engine:
        outputs, scores, stats = engine.generate(prompts, sampling), engine.score(pairs), engine.stats()

    with AscendInferEngine(tiny_qwen2_dir, **{**SETTINGS, **changes}) as engine:
        assert tokens(outputs) == tokens(engine.generate(prompts, sampling))
        assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in engine.score(pairs)], abs=1e-3)
        alone = engine.stats()
    # Norms are held twice, everything else once.
    assert alone["weight_bytes"] <= stats["weight_bytes"] < alone["weight_bytes"] * 1.02
    assert stats["kv_block_bytes"] == alone["kv_block_bytes"]


def test_int8_under_tensor_parallel_shards_codes_and_scales(local_ray, tiny_int8_dir):
    prompts, sampling = prompts_of(8), SamplingParams(max_new_tokens=NEW, ignore_eos=True)

    with AscendInferEngine(tiny_int8_dir, cards=2, tensor_parallel=2, **SETTINGS) as engine:
        outputs, sharded = engine.generate(prompts, sampling), engine.stats()["weight_bytes"]

    with AscendInferEngine(tiny_int8_dir, **SETTINGS) as engine:
        whole = engine.stats()["weight_bytes"]
        alone = tokens(engine.generate(prompts, sampling))
    with AscendInferEngine(tiny_int8_dir, **SETTINGS) as engine:
        halve(engine.core, tiny_int8_dir)
        assert tokens(outputs) == tokens(engine.generate(prompts, sampling))
    if tiny_int8_dir.name == "w8a16":  # activations are not rounded, so splitting the sum changes nothing
        assert tokens(outputs) == alone
    # Held twice: norms, and the scales of the two linears whose outputs every rank has in full.
    assert whole <= sharded < whole * 1.02


@pytest.mark.long
def test_two_replicas_of_two_cards_survive_the_death_of_a_rank(local_ray, tiny_qwen3_dir):
    prompts, sampling = prompts_of(10), SamplingParams(max_new_tokens=100, ignore_eos=True)
    expected = tokens(one_card(tiny_qwen3_dir, prompts, sampling))

    with AscendInferEngine(tiny_qwen3_dir, cards=4, tensor_parallel=2, **SETTINGS) as engine:
        quiet, disturbed, rows = generate_while_a_rank_dies(engine, prompts, sampling)

    assert quiet == disturbed == expected
    assert [row["restarts"] for row in rows] == [1, 0] and [row["cards"] for row in rows] == [2, 2]


def test_an_error_while_loading_is_the_workers_own_and_leaves_nothing(local_ray, tiny_qwen3_dir):
    settings = {**SETTINGS, "kv_cache_gib": 1e-9}
    free = ray.available_resources().get("CPU", 0)

    with pytest.raises(ValueError, match="does not hold one block"):
        AscendInferEngine(tiny_qwen3_dir, cards=2, **settings).load_model()

    wait = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < free:
        assert time.monotonic() < wait, "cards are still taken"
        time.sleep(0.1)


def test_more_cards_than_there_are_is_refused_with_both_numbers(local_ray, tiny_qwen3_dir):
    with pytest.raises(ValueError, match=r"cards=16, but Ray knows 6 of resource CPU"):
        AscendInferEngine(tiny_qwen3_dir, cards=16, **SETTINGS).load_model()


def test_pairs_that_fail_do_not_take_the_others_with_them(tiny_qwen3_dir, monkeypatch):
    """The engine's side alone: a core that reports one scoring request as failed."""
    with AscendInferEngine(tiny_qwen3_dir, **SETTINGS) as engine:
        pairs = [([1, 2], [3]), ([4, 5], [6])]
        good = engine.score(pairs)
        step = engine.core.step

        def failing(stop):
            touched = step(stop)
            for sequence in touched:
                if sequence.token_ids[0] == 4:
                    sequence.error = "2 replicas were lost"
            return touched

        monkeypatch.setattr(engine.core, "step", failing)
        scores = engine.score(pairs)

    assert scores[0] == good[0]
    assert math.isnan(scores[1].logprob) and scores[1].error == "2 replicas were lost"


def test_a_missing_ray_names_the_extra(tiny_qwen3_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(RuntimeError, match=r"pip install ascend-kit\[cluster\]"):
        AscendInferEngine(tiny_qwen3_dir, cards=2, **SETTINGS).load_model()


def test_a_hanging_replica_is_noticed(tiny_qwen3_dir):
    """The clock alone: a replica that has been silent for longer than the limit counts as lost."""
    config = ModelConfig.from_folder(tiny_qwen3_dir)
    silent = replica.Replica(0, EngineConfig(tiny_qwen3_dir), config, LocalProcesses(Worker))
    silent.calls.append(object())
    silent.heard_s = time.perf_counter() - replica.HANG_S - 1

    assert silent.is_hanging(replica.HANG_S)
    silent.calls.clear()
    assert not silent.is_hanging(replica.HANG_S)
