"""What each step computes, without a model."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.scheduler import LEAST, LONG_PROMPT, Scheduler, StepPace
from ascend_kit.engine.sequence import SamplingParams, Sequence


def scheduler(blocks=64, block_size=4, slots=4, budget=16):
    return Scheduler(BlockManager(blocks + 1, block_size), max_sequences=slots, max_tokens_per_step=budget)


def sequence(length, start=0):
    return Sequence([start + i for i in range(length)], SamplingParams(), arrival_s=0.0)


def run(target, token=1, prompt_tokens=None):
    """Do what the engine does with a step: everything planned is computed, ended prompts get a token."""
    plan = target.schedule(prompt_tokens)
    for chunk in plan.chunks:
        chunk.sequence.num_computed = chunk.end
        if chunk.end == chunk.sequence.num_tokens:
            chunk.sequence.token_ids.append(token)
    return plan


def test_decoding_sequences_come_first_and_prompts_fill_the_budget():
    target = scheduler(budget=10)
    first, second = sequence(6), sequence(30, 100)
    target.add(first)
    run(target)
    target.add(second)

    plan = run(target)

    assert [(c.sequence, c.count) for c in plan.chunks] == [(first, 1), (second, 9)]


def test_a_long_prompt_does_not_stop_others_from_decoding():
    target = scheduler(budget=8)
    short, long = sequence(4), sequence(60, 100)
    target.add(short)
    target.add(long)
    steps = [run(target) for _ in range(6)]

    assert all(any(c.sequence is short for c in plan.chunks) for plan in steps)


def test_a_full_pool_preempts_the_youngest_and_lets_the_oldest_finish():
    target = scheduler(blocks=4, block_size=4, slots=2, budget=32)
    old, young = sequence(8), sequence(8, 100)
    target.add(old)
    target.add(young)
    run(target)  # both prompts take the whole pool; each then needs a third block

    plan = run(target)

    assert [c.sequence for c in plan.chunks] == [old]
    assert young.num_preemptions == 1 and target.waiting[0] is young and young.blocks == []


def test_a_step_of_single_tokens_is_a_decode_step():
    target = scheduler()
    target.add(sequence(3))

    assert not run(target).is_decode and run(target).is_decode


def test_prompts_are_limited_only_beside_decoding_sequences():
    target = scheduler(budget=16)
    target.add(sequence(4))
    target.add(sequence(40, 100))

    assert sum(chunk.count for chunk in target.schedule(2).chunks) == 16  # nobody decodes yet
    for chunk in (first := target.running[0], target.running[1]):
        chunk.num_computed = 4 if chunk is first else 12
    first.token_ids.append(1)
    plan = target.schedule(2)
    assert plan.num_decoding == 1 and [c.count for c in plan.chunks] == [1, 2]
    assert target.schedule(0).is_decode


def test_a_long_prompt_leaves_half_to_those_behind_it():
    target = scheduler(blocks=2000, slots=4, budget=64)
    long, short = sequence(LONG_PROMPT + 400), sequence(20, 10_000)
    target.add(long)
    alone = run(target)
    target.add(short)
    both = run(target)

    assert [c.count for c in alone.chunks] == [64]
    assert [(c.sequence, c.count) for c in both.chunks] == [(long, 32), (short, 20)]


def test_prompts_with_the_same_long_start_share_its_work():
    target = scheduler(blocks=2000, slots=4, budget=64)
    prompts = [[*range(LONG_PROMPT + 88), 10_000 + 10 * i, 10_001 + 10 * i] for i in range(3)]
    together = [Sequence(prompt, SamplingParams(), arrival_s=0.0) for prompt in prompts]
    for one in together:
        target.add(one)

    computed = 0
    while any(s.num_output_tokens == 0 for s in together):
        computed += sum(c.count for c in run(target).chunks if c.start < c.sequence.num_prompt_tokens)

    assert computed == LONG_PROMPT + 88 + 3 * 2  # the start once
    assert sum(s.num_cached_tokens for s in together) == 2 * (LONG_PROMPT + 88)
    target.blocks.check(together)


class Clock:
    """Steps of a machine that needs `base_s`, and `row_s` per decoding row and `token_s` per prompt token."""

    def __init__(self, target, base_s=0.06, row_s=0.003, token_s=0.0025):
        self.target, self.costs, self.now = target, (base_s, row_s, token_s), 0.0
        self.pace = StepPace()
        self.token_times: dict[Sequence, list[float]] = {}

    def step(self, max_new=60):
        plan = self.target.schedule(self.pace.prompt_tokens())
        base_s, row_s, token_s = self.costs
        prompts = plan.num_prompt_tokens
        seconds = base_s + row_s * plan.num_decoding + token_s * prompts
        self.now += seconds
        self.pace.observe(plan.num_decoding, prompts, seconds)
        for chunk in plan.chunks:
            s = chunk.sequence
            s.num_computed = chunk.end
            if chunk.end == s.num_tokens:
                s.token_ids.append(7)
                self.token_times.setdefault(s, []).append(self.now)
                if len(self.token_times[s]) >= max_new:
                    self.target.remove(s)


def test_under_mixed_load_gaps_between_tokens_stay_within_three_times_their_median():
    clock = Clock(scheduler(blocks=8000, slots=16, budget=2048))
    requests = [sequence(60 + 37 * (n % 11) * (n % 3), 1000 * n) for n in range(60)]
    waiting = list(requests)
    while waiting or clock.target.has_unfinished:
        while waiting and len(requests) - len(waiting) <= clock.now / 1.5:  # one arrives every 1.5 s
            clock.target.add(waiting.pop(0))
        if clock.target.has_unfinished:
            clock.step()
        else:
            clock.now += 0.1

    assert all(len(clock.token_times[s]) == 60 for s in requests)
    gaps = sorted(b - a for times in clock.token_times.values() for a, b in itertools.pairwise(times))
    assert gaps[int(0.99 * len(gaps))] <= 3 * gaps[len(gaps) // 2]


def test_prompts_keep_their_speed_when_the_batch_has_grown():
    clock = Clock(scheduler(blocks=8000, slots=33, budget=2048))
    clock.target.add(sequence(8))
    for _ in range(5):
        clock.step(max_new=10_000)  # decoding alone, one row: 63 ms
    for n in range(1, 33):
        clock.target.add(sequence(200, 1000 * n))
        while clock.target.waiting or any(s.num_tokens - s.num_computed > 1 for s in clock.target.running):
            clock.step(max_new=10_000)
    one_row, now = 0.063, 0.06 + 33 * 0.003
    clock.pace.observe(33, 0, now)

    assert clock.pace.prompt_tokens() > 1.2 * (1.5 * one_row / 0.0025)
    assert clock.pace.prompt_tokens() <= 1.6 * now / 0.0025


def test_short_requests_beside_a_long_prompt_wait_for_a_bounded_time():
    clock = Clock(scheduler(blocks=8000, slots=8, budget=512))
    long = sequence(8000)
    shorts = [sequence(50, 10_000 * n) for n in range(1, 7)]
    clock.target.add(long)
    clock.step()
    asked = {s: clock.now for s in shorts}
    for s in shorts:
        clock.target.add(s)
    while clock.target.has_unfinished:
        clock.step()

    all_alone_s = 8000 * 0.0025
    assert max(clock.token_times[s][0] - asked[s] for s in shorts) < all_alone_s / 5
    # and the long one pays little for it
    assert clock.token_times[long][0] < 2.5 * all_alone_s


def test_a_slow_first_measurement_does_not_starve_prompts():
    pace = StepPace()
    pace.observe(0, 100, 30.0)  # the first step compiled something
    pace.observe(4, 0, 0.1)
    assert pace.prompt_tokens() == LEAST
    for _ in range(10):
        pace.observe(4, pace.prompt_tokens() or LEAST, 0.1 + 0.002 * LEAST)

    assert pace.prompt_tokens() > 2 * LEAST


class Engine(RuleBasedStateMachine):
    """Random adds, steps, cancellations and finishes never lose a block or a request."""

    def __init__(self):
        super().__init__()
        self.target = scheduler(blocks=12, block_size=2, slots=3, budget=6)
        self.live: list[Sequence] = []

    @rule(length=st.integers(1, 10), start=st.integers(0, 2))
    def add(self, length, start):
        s = sequence(length, start)
        self.target.add(s)
        self.live.append(s)

    @precondition(lambda self: self.live)
    @rule(prompt_tokens=st.one_of(st.none(), st.integers(0, 4)))
    def step(self, prompt_tokens=None):
        plan = run(self.target, prompt_tokens=prompt_tokens)
        assert plan.chunks, "something is waiting, so something must run"
        assert plan.num_decoding + plan.num_prompt_tokens <= self.target.max_tokens
        for chunk in plan.chunks:
            if chunk.sequence.num_tokens >= 20:
                self.end(chunk.sequence)

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 9))
    def cancel(self, number):
        self.end(self.live[number % len(self.live)])

    def end(self, s):
        self.target.remove(s)
        self.live.remove(s)

    @invariant()
    def nothing_is_lost(self):
        queued = [*self.target.waiting, *self.target.running]
        assert sorted(map(id, queued)) == sorted(map(id, self.live))
        self.target.blocks.check(self.target.running)

    def teardown(self):
        for _ in range(2000):
            if not self.live:
                break
            self.step()
        assert not self.live and self.target.blocks.num_free == self.target.blocks.total


Engine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerUnderRandomUse = Engine.TestCase
