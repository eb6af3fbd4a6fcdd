"""Pairs to score: as sequences of the engine, and their results put back in order."""

from __future__ import annotations

import time

from ascend_kit.engine.sequence import SamplingParams, Score, ScoreTarget, Sequence


class PairsFailed(RuntimeError):
    """Some pairs could not be scored; `scores` holds the others, with None in the failed places."""

    def __init__(self, errors: dict[int, str], scores: list[Score | None]):
        first = min(errors)
        super().__init__(f"{len(errors)} of {len(scores)} pairs failed; pair {first}: {errors[first]}")
        self.errors, self.scores = errors, scores


class ScoreSheet:
    """The scores of numbered pairs, filled in as their sequences end."""

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        self.scores: dict[int, Score | None] = {}
        self.errors: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.scores)

    def note(self, sequence: Sequence) -> None:
        """Take over what a finished sequence found."""
        if sequence.error is not None:
            self.errors.update((target.pair, sequence.error) for target in sequence.targets)
            self.scores.update((target.pair, None) for target in sequence.targets)
            return
        for target, rows in zip(sequence.targets, sequence.target_scores, strict=True):
            self.scores[target.pair] = Score(sum(logprob for logprob, _ in rows), all(greedy for _, greedy in rows))

    def result(self) -> list[Score]:
        """All scores in order; PairsFailed when some could not be had."""
        scores = [self.scores[number] for number in range(self.num_pairs)]
        if self.errors:
            raise PairsFailed(self.errors, scores)
        return scores


def score_sequences(pairs: list[tuple[list[int], list[int]]], vocab_size: int, first: int = 0) -> list[Sequence]:
    """One sequence for all pairs with the same tokens before the last one; ValueError names a pair that cannot be.

    Their ids count down from -1 - `first`, apart from those of requests.
    """
    groups: dict[tuple[int, ...], list[ScoreTarget]] = {}
    for number, (context_ids, ids) in enumerate(pairs):
        if not context_ids or not ids:
            raise ValueError(
                f"pair {number}: context and continuation need at least one token each, got "
                f"{len(context_ids)} and {len(ids)}"
            )
        bad = next((t for t in ids if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise ValueError(f"pair {number}: token id {bad} is outside 0 to {vocab_size - 1}")
        groups.setdefault(tuple(context_ids + ids[:-1]), []).append(ScoreTarget(number, tuple(ids)))
    now = time.perf_counter()
    # Sorted, so that inputs with a long common prefix run next to each other and share its blocks.
    return [
        Sequence(ids, SamplingParams(), arrival_s=now, index=-1 - first - number, targets=groups[ids])
        for number, ids in enumerate(sorted(groups))
    ]
