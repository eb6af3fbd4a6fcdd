"""What the next step computes: which sequences, and how many of their tokens. Ints and lists only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.sequence import Sequence
from ascend_kit.engine.speculation import Ahead, PromptLookup

STRETCH = 2.5  # a step that also computes prompts may last this many decode steps; token gaps then stay within 3x
LEAST = 16  # prompt tokens a step: prompts must move on however slow they are
PROBE_EVERY = 16  # steps: then one computes no prompt, so that the time of decoding alone is known for today's batch
WEIGHT = 0.5  # of the latest measurement in the running means
LONG_PROMPT = 512  # tokens; a prompt with more to go leaves half of a step's prompt tokens to those behind it


class Pending(Ahead):
    """A sequence whose latest token no host has read yet: the device has it, in row `row` of the step before."""

    def __init__(self, sequence: Sequence, row: int) -> None:
        super().__init__(sequence, [0])  # stands for the token
        self.row = row


@dataclass
class Chunk:
    """`count` tokens of one sequence from position `start`, and those that are guessed to follow."""

    sequence: Sequence | Ahead
    start: int
    count: int
    guess: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def owner(self) -> Sequence:
        """The request that it is computed for."""
        return self.sequence.sequence if isinstance(self.sequence, Ahead) else self.sequence

    @property
    def reaches_end(self) -> bool:
        """Whether the sequence's last token is in this chunk, so that a new one can be sampled."""
        return self.end == self.sequence.num_tokens

    def rows(self) -> list[Chunk]:
        """Itself; with a guess, a chunk for each of its tokens and for that before them, as a decode step has them."""
        if not self.guess:
            return [self]
        assert isinstance(self.sequence, Sequence)
        return [Chunk(Ahead(self.sequence, self.guess[:n]), self.start + n, 1) for n in range(len(self.guess) + 1)]


@dataclass
class StepPlan:
    """The chunks of one step, decoding sequences first."""

    chunks: list[Chunk] = field(default_factory=list)
    num_decoding: int = 0  # the first so many chunks

    @property
    def num_prompt_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks[self.num_decoding :])

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

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_sequences: int,
        max_tokens_per_step: int,
        speculate: int = 0,
        max_rows: int = 0,
    ):
        """`speculate` tokens at most are guessed for a sequence, in decode steps of at most `max_rows` rows."""
        self.blocks, self.speculate = blocks, speculate
        self.max_sequences = max_sequences
        # Every running sequence must be able to decode in each step, whatever the budget for prompts.
        self.max_tokens = max(max_tokens_per_step, max_sequences)
        self.max_rows = min(max_rows, self.max_tokens)
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

    def schedule(self, prompt_tokens: int | None = None, least_share: float = 0.0) -> StepPlan:
        """The next step; empty only when nothing is waiting or running.

        `prompt_tokens`: how many tokens of prompts the step may have, if a watched sequence decodes in it; None for no
        limit but that of the step. `least_share`: how many of a sequence's guesses must have been right lately.
        """
        plan = StepPlan()
        budget = self.max_tokens
        decoding = [s for s in self.running if s.num_tokens - s.num_computed == 1]
        prefilling = [s for s in self.running if s.num_tokens - s.num_computed > 1]
        preemptions = self.num_preemptions
        guesses = self.max_rows - len(decoding)  # rows left for them
        for sequence in decoding:
            if sequence in self.running and self._make_room(sequence, 1, plan):  # else preempted
                guess = self._guess(sequence, guesses, least_share) if self.speculate else []
                guesses -= len(guess)
                budget -= self._plan(plan, sequence, 1, guess)
        plan.num_decoding = len(plan.chunks)
        if prompt_tokens is not None and any(chunk.owner.is_watched for chunk in plan.chunks):
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

    def follow(self, plan: StepPlan) -> StepPlan | None:
        """The decode step after `plan`, whose tokens are not read yet; None where it has to wait for them.

        It has to while a prompt is under way or could start, where a choice depends on earlier tokens or the host reads
        logits, and where blocks are missing. Who ends with the unread token because of a length is left out; who ends
        for another reason is computed once more, for nothing.
        """
        alive = [(row, chunk.owner) for row, chunk in enumerate(plan.chunks) if not chunk.owner.is_finished]
        is_admitting = self.waiting and len(self.running) < self.max_sequences
        if is_admitting or not plan.is_decode or len(alive) < len(self.running):
            return None
        following = StepPlan()
        for row, sequence in alive:
            sampling, length = sequence.sampling, sequence.num_tokens + 1
            if sampling.logprobs is not None or (sampling.repetition_penalty, sampling.presence_penalty) != (1.0, 0.0):
                return None
            if sequence.num_output_tokens + 1 >= sampling.max_new_tokens or length >= self.blocks.max_seq_length:
                continue
            if not self.blocks.grow(sequence, length):
                return None
            following.chunks.append(Chunk(Pending(sequence, row), length - 1, 1))
        following.num_decoding = len(following.chunks)
        return following if following.chunks and all(c.reaches_end for c in plan.chunks) else None

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

    def _guess(self, sequence: Sequence, rows: int, least_share: float) -> list[int]:
        """Tokens guessed to follow, if that pays and there are rows and blocks for them."""
        written, longest = sequence.num_output_tokens, self.blocks.max_seq_length
        most = min(rows, sequence.sampling.max_new_tokens - written - 1, longest - sequence.num_tokens)
        sequence.lookup = sequence.lookup or PromptLookup(self.speculate)
        if sequence.lookup.share < least_share:
            return []
        guess = sequence.lookup.propose(sequence.token_ids, most)
        return guess if guess and self.blocks.grow(sequence, sequence.num_tokens + len(guess)) else []

    def _plan(self, plan: StepPlan, sequence: Sequence, count: int, guess: Seq[int] = ()) -> int:
        plan.chunks.append(Chunk(sequence, sequence.num_computed, count, list(guess)))
        self.blocks.register(sequence, sequence.num_computed + count)  # of guesses nothing is to be found later
        return count + len(guess)

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
        self.guess_s: float | None = None  # what a guessed token adds to a decode step
        self._asked = 0

    def prompt_tokens(self) -> int:
        """Prompt tokens for the next step, if somebody decodes in it; 0 asks for a step that decodes alone."""
        if self.decode_s is None or self._mixed_steps >= PROBE_EVERY:
            return 0
        if self.token_s is None:
            return LEAST
        return max(LEAST, int((STRETCH - 1) * self.decode_s / self.token_s))

    def least_share(self, num_decoding: int) -> float:
        """The share of guesses that must be right for them to save time: an accepted token saves its part of a step.

        Now and then 1, for a step without guesses, and 0, for one with guesses: what both cost must stay known.
        """
        self._asked += 1
        if self.decode_s is None or self._asked % PROBE_EVERY == 0:
            return 1.0
        if self.guess_s is None or self._asked % PROBE_EVERY == PROBE_EVERY // 2:
            return 0.0
        return self.guess_s * num_decoding / self.decode_s

    def observe(self, num_decoding: int, prompt_tokens: int, seconds: float, guesses: int = 0) -> None:
        """Learn from a step that took `seconds` for that many decoding sequences, prompt tokens and guessed tokens."""
        if guesses:
            if prompt_tokens == 0 and self.decode_s is not None:
                new = max(0.0, seconds - self.decode_s) / guesses
                self.guess_s = _mean(self.guess_s, min(new, 2 * (self.guess_s or new)))  # a first step is slow
            return
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
