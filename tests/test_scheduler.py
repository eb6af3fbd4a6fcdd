"""What each step computes, without a model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.scheduler import Scheduler
from ascend_kit.engine.sequence import SamplingParams, Sequence


def scheduler(blocks=64, block_size=4, slots=4, budget=16):
    return Scheduler(BlockManager(blocks + 1, block_size), max_sequences=slots, max_tokens_per_step=budget)


def sequence(length, start=0):
    return Sequence([start + i for i in range(length)], SamplingParams(), arrival_s=0.0)


def run(target, token=1):
    """Do what the engine does with a step: everything planned is computed, ended prompts get a token."""
    plan = target.schedule()
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
    @rule()
    def step(self):
        plan = run(self.target)
        assert plan.chunks, "something is waiting, so something must run"
        assert plan.num_tokens <= self.target.max_tokens
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
