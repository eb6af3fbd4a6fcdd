"""Scoring: pairs that share their input become one sequence, and their results are put back in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ascend_kit.engine.sequence import SamplingParams, Score, ScoreTarget, Sequence

OnScore = Callable[[int, Score], None]  # the place of a pair, its score
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity): an overflow in its arithmetic, or damaged weights; "
    "try precision bf16 or fp32"
)


class ScoreSheet:
    """The scores of numbered pairs, filled in as their sequences end; `on_score` hears of each at once."""

    def __init__(self, num_pairs: int, on_score: OnScore | None = None) -> None:
        self.num_pairs = num_pairs
        self.on_score = on_score
        self.scores: dict[int, Score] = {}

    def __len__(self) -> int:
        return len(self.scores)

    def fail(self, pair: int, error: str) -> None:
        """A pair has no score."""
        self._set(pair, Score(math.nan, False, error))

    def on_step(self, sequence: Sequence) -> None:
        """Take over what a finished sequence found."""
        for target, rows in zip(sequence.targets, sequence.target_scores, strict=True):
            logprob = sum(row.logprob for row in rows)
            if sequence.error is not None or not math.isfinite(logprob):
                self.fail(target.pair, sequence.error or NOT_FINITE)
            else:
                self._set(target.pair, Score(logprob, all(row.is_greedy for row in rows)))

    def _set(self, pair: int, score: Score) -> None:
        self.scores[pair] = score
        if self.on_score is not None:
            self.on_score(pair, score)

    def result(self) -> list[Score]:
        """All scores in order."""
        return [self.scores[number] for number in range(self.num_pairs)]


def score_sequences(pairs: dict[int, tuple[list[int], list[int]]], vocab_size: int, first: int = 0) -> list[Sequence]:
    """One sequence for all numbered pairs with the same tokens before the last one; ValueError names a pair that
    cannot be scored.

    Their ids count down from -1 - `first`, apart from those of requests.
    """
    groups: dict[tuple[int, ...], list[ScoreTarget]] = {}
    for number, (context_ids, ids) in pairs.items():
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
        Sequence(ids, SamplingParams(), arrival_s=now, request_id=-1 - first - number, targets=groups[ids])
        for number, ids in enumerate(sorted(groups))
    ]
