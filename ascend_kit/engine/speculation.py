"""Speculative decoding by prompt lookup: guesses from the request's own text, checked in the step that follows.

Whatever a text repeats of its prompt or of itself can be guessed without a second model: the last few tokens are looked
up among those before, and what followed there is proposed (prompt lookup decoding, Saxena 2023). The step computes the
proposed tokens as rows of their own, each with the length it would have. Every row's token is chosen as a plain step
would choose it, with the number of its place; the first that differs from the guess ends the run and is kept. Answers
are those of plain decoding, greedy or sampled.
"""

from __future__ import annotations

from ascend_kit.engine.sequence import SamplingParams, ScoreTarget, Sequence, TokenLogprobs

SIZES = (4, 2)  # tokens that must have stood there before, the longest first
LONGEST_PAUSE = 64  # guesses left out after failures in a row: text without repetition is to cost nothing
FORGET = 0.2  # weight of the latest guess in the share of right ones


class PromptLookup:
    """Guesses for one sequence, at most `most` tokens at a time; fewer, and rarely, after guesses that were wrong."""

    def __init__(self, most: int) -> None:
        self.most = self._limit = most
        self._pause = self._left_out = 0
        self.share = 1.0  # of the latest guesses that were right, running mean
        self._ends: dict[tuple[int, ...], int] = {}  # run of tokens -> index behind its latest occurrence
        self._known = min(SIZES)  # runs that end before this index are in `_ends`

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        """What may follow `token_ids`; empty where nothing like their end stood before, and during a pause."""
        for end in range(self._known, len(token_ids)):
            for size in SIZES:
                if size <= end:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._known = max(self._known, len(token_ids))
        place = next((at for size in SIZES if (at := self._ends.get(tuple(token_ids[-size:])))), None)
        most = min(most, self._limit)
        if place is None or most < 1:
            return []
        if self._left_out < self._pause:
            self._left_out += 1
            return []
        guess = token_ids[place : place + most]
        while len(guess) < most:  # a match that reaches the end repeats itself
            guess.append(guess[len(guess) - (len(token_ids) - place)])
        return guess

    def learn(self, proposed: int, accepted: int) -> None:
        """Take in how many tokens of a guess were right."""
        self._left_out = 0
        self.share += FORGET * (accepted / proposed - self.share)
        if accepted:
            self._pause, self._limit = 0, min(self.most, 2 * accepted + (accepted == proposed))
        else:
            self._pause, self._limit = min(LONGEST_PAUSE, 2 * self._pause + 2), 1


class Ahead:
    """A sequence as if some of a guess had been written already: what one row of its step stands for."""

    targets: tuple[ScoreTarget, ...] = ()
    is_scoring = False

    def __init__(self, sequence: Sequence, guess: list[int]) -> None:
        self.sequence, self.guess, self.id = sequence, guess, sequence.id
        self.num_tokens = sequence.num_tokens + len(guess)
        self.num_output_tokens = sequence.num_output_tokens + len(guess)
        self.logprobs: list[TokenLogprobs] = []

    @property
    def sampling(self) -> SamplingParams:
        return self.sequence.sampling

    @property
    def blocks(self) -> list[int]:
        return self.sequence.blocks

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids + self.guess

    @property
    def output_ids(self) -> list[int]:
        return self.sequence.output_ids + self.guess

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Tokens from position `start` up to `end`; the last one alone is asked for."""
        return self.guess[-1:] or self.sequence.tokens_between(start, end)
