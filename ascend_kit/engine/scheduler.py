"""What the next step computes: which sequences, and how many of their tokens. Ints and lists only."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.sequence import Sequence

STRETCH = 2.5  # a step that also computes prompts may last this many decode steps; token gaps then stay within 3x
LEAST = 16  # prompt tokens a step: prompts must move on however slow they are
PROBE_EVERY = 16  # steps: then one computes no prompt, so that the time of decoding alone is known for today's batch
WEIGHT = 0.5  # of the latest measurement in the running means
LONG_PROMPT = 512  # tokens; a prompt with more to go leaves half of a step's prompt tokens to those behind it


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
    num_decoding: int = 0  # the first so many chunks

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        """Every sequence adds one token to a context: what a captured graph can run."""
        return all(chunk.count == 1 and chunk.start > 0 and not chunk.sequence.is_scoring for chunk in self.chunks)


class Scheduler:
    """Continuous batching: running sequences decode in every step, prompts fill what is left of the token budget.

    Prompts are computed in order of arrival, except that a long one lets those behind it advance too: a short question
    does not wait for a whole document. When blocks run out the youngest running sequence gives its blocks back and is
    computed again later.
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

    def schedule(self, prompt_tokens: int | None = None) -> StepPlan:
        """The next step; empty only when nothing is waiting or running.

        `prompt_tokens`: how many tokens of prompts the step may have, if a watched sequence decodes in it; None for no
        limit but that of the step.
        """
        plan = StepPlan()
        budget = self.max_tokens
        decoding = [s for s in self.running if s.num_tokens - s.num_computed == 1]
        prefilling = [s for s in self.running if s.num_tokens - s.num_computed > 1]
        preemptions = self.num_preemptions
        for sequence in decoding:
            if sequence in self.running and self._make_room(sequence, 1, plan):  # else preempted
                budget -= self._plan(plan, sequence, 1)
        plan.num_decoding = len(plan.chunks)
        if prompt_tokens is not None and any(chunk.sequence.is_watched for chunk in plan.chunks):
            budget = min(budget, prompt_tokens)
        for place, sequence in enumerate(prefilling):
            if sequence not in self.running or budget == 0:
                continue
            found = self.blocks.match_prefix(sequence)
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens += found
            behind = place + 1 < len(prefilling) or (self.waiting and len(self.running) < self.max_sequences)
            count = self._share(sequence, budget, bool(behind))
            if self._make_room(sequence, count, plan):
                budget -= self._plan(plan, sequence, count)
        if self.num_preemptions == preemptions:
            self._admit(plan, budget)
        return plan

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting sequences, in order of arrival, while there are slots, tokens and blocks."""
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            found = self.blocks.match_prefix(sequence)
            behind = len(self.waiting) > 1 and len(self.running) + 1 < self.max_sequences
            count = self._share(sequence, budget, behind)
            if not self.blocks.grow(sequence, sequence.num_computed + count):
                self.blocks.release(sequence)
                return
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = found
            self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._plan(plan, sequence, count)

    def _share(self, sequence: Sequence, budget: int, someone_behind: bool) -> int:
        """How many of `budget` tokens a prompt takes in this step."""
        wanted = sequence.num_tokens - sequence.num_computed
        if wanted <= budget or not someone_behind:
            return min(wanted, budget)
        count = -(-budget // 2) if wanted > LONG_PROMPT else budget
        over = (sequence.num_computed + count) % self.blocks.block_size
        return count - over if over < count else count  # whole blocks: those behind may go on from there

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


class StepPace:
    """How many prompt tokens a step may take while other requests decode, learned from how long steps take.

    Durations in seconds. A step is taken to last decode_s, and token_s more for every prompt token."""

    def __init__(self) -> None:
        self.decode_s: float | None = None
        self.token_s: float | None = None
        self._mixed_steps = 0  # since decoding alone was last timed

    def prompt_tokens(self) -> int:
        """Prompt tokens for the next step, if somebody decodes in it; 0 asks for a step that decodes alone."""
        if self.decode_s is None or self._mixed_steps >= PROBE_EVERY:
            return 0
        if self.token_s is None:
            return LEAST
        return max(LEAST, int((STRETCH - 1) * self.decode_s / self.token_s))

    def observe(self, num_decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds` for that many decoding sequences and prompt tokens."""
        if prompt_tokens == 0:
            self.decode_s, self._mixed_steps = _mean(self.decode_s, seconds), 0
            return
        if num_decoding:
            self._mixed_steps += 1
        if prompt_tokens >= LEAST and (not num_decoding or self.decode_s is not None):
            beyond = seconds - (self.decode_s or 0.0 if num_decoding else 0.0)
            # What decoding takes is an estimate: the rest may come out far too small, or below zero.
            self.token_s = _mean(self.token_s, max(beyond, seconds / 10) / prompt_tokens)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - WEIGHT) * old + WEIGHT * new
