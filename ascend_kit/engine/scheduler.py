"""What the next step computes: which sequences, and how many of their tokens. Ints and lists only."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.sequence import Sequence


@dataclass
class Chunk:
    """`count` tokens of one sequence from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def reaches_end(self) -> bool:
        """Whether the sequence's last token is in this chunk, so that a new one can be sampled."""
        return self.end == self.sequence.num_tokens


@dataclass
class StepPlan:
    """The chunks of one step, decoding sequences first."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        """Every sequence adds one token to a context: what a captured graph can run."""
        return all(chunk.count == 1 and chunk.start > 0 and not chunk.sequence.is_scoring for chunk in self.chunks)


class Scheduler:
    """Continuous batching: running sequences decode in every step, prompts fill what is left of the token budget.

    When blocks run out the youngest running sequence gives its blocks back and is computed again later.
    """

    def __init__(self, blocks: BlockManager, *, max_sequences: int, max_tokens_per_step: int):
        self.blocks = blocks
        self.max_sequences = max_sequences
        # Every running sequence must be able to decode in each step, whatever the budget for prompts.
        self.max_tokens = max(max_tokens_per_step, max_sequences)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and take its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.release(sequence)

    def schedule(self) -> StepPlan:
        """The next step. Empty only when nothing is waiting or running."""
        plan = StepPlan()
        budget = self.max_tokens
        decoding = [s for s in self.running if s.num_tokens - s.num_computed == 1]
        prefilling = [s for s in self.running if s.num_tokens - s.num_computed > 1]
        preempted = False
        for sequence in decoding + prefilling:
            if sequence not in self.running or budget == 0:  # preempted by an older one, or no room left
                continue
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if not self._make_room(sequence, count, plan):
                preempted = True
                continue
            budget -= self._plan(plan, sequence, count)
        if not preempted:
            self._admit(plan, budget)
        return plan

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting sequences, in order of arrival, while there are slots, tokens and blocks."""
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            self.blocks.match_prefix(sequence)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if not self.blocks.grow(sequence, sequence.num_computed + count):
                self.blocks.release(sequence)
                return
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed
            self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._plan(plan, sequence, count)

    def _plan(self, plan: StepPlan, sequence: Sequence, count: int) -> int:
        plan.chunks.append(Chunk(sequence, sequence.num_computed, count))
        self.blocks.register(sequence, sequence.num_computed + count)
        return count

    def _make_room(self, sequence: Sequence, count: int, plan: StepPlan) -> bool:
        """Get blocks for `count` more tokens, preempting younger sequences; False when it preempted itself."""
        while not self.blocks.grow(sequence, sequence.num_computed + count):
            planned = {id(chunk.sequence) for chunk in plan.chunks}
            victim = next(s for s in reversed(self.running) if id(s) not in planned)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)
