"""An evaluation that ends as soon as its comparison with a finished run is certain, looked at after every document.

Documents come in random order, whole passages together. What is tested is the mean of the differences over passages'
documents; the capital of a bet against a value grows where the value is wrong, and by Ville's inequality it reaches
1 / alpha with a chance of at most alpha when the value is right, however often one looks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.runs import find_run
from ascend_kit.evaluation.tasks import LocalTask
from ascend_kit.identity import Identity
from ascend_kit.params import Experiment

Row = dict[str, Any]
Key = tuple[str, int]  # task, number of the document
Outcome = Literal["within margin", "worse than margin", "undecided"]
PRIOR_VARIANCE = 0.05  # of (difference + 1) / 2 before any is known: a fifth of the documents disagree
LARGEST_STAKE = 0.5  # share of the capital that may be lost with one document


@dataclass
class Bet:
    """Capital of betting that the mean of values in 0..1 lies above (`sign` 1) or below (-1) `value`.

    Stakes depend on the past alone (Waudby-Smith and Ramdas, arXiv 2010.09686, the aGRAPA stake).
    """

    value: float
    sign: int
    log_capital: float = 0.0
    best: float = 0.0  # the highest so far: what counts for stopping
    _n: int = 0
    _mean: float = 0.5
    _squares: float = PRIOR_VARIANCE

    def add(self, observed: float) -> None:
        """Bet on the next value, then learn from it."""
        gap = self.sign * (self._mean - self.value)
        variance = self._squares / (self._n + 1)
        limit = LARGEST_STAKE / (self.value if self.sign > 0 else 1 - self.value)
        stake = min(max(0.0, gap / (variance + gap * gap)), limit)
        self.log_capital += math.log1p(stake * self.sign * (observed - self.value))
        self.best = max(self.best, self.log_capital)
        self._n += 1
        before = self._mean
        self._mean += (observed - self._mean) / (self._n + 1)
        self._squares += (observed - self._mean) * (observed - before)


@dataclass
class SequentialTest:
    """Is a candidate's loss below `margin` (a fraction), or above? A verdict errs with a chance of at most `alpha`.

    Only one of the two verdicts can be wrong, whatever is true: each may take all of alpha.
    """

    margin: float
    alpha: float = 0.05
    n: int = 0
    lost: int = 0
    won: int = 0
    _above: Bet = field(init=False)
    _below: Bet = field(init=False)

    def __post_init__(self) -> None:
        border = (1 - self.margin) / 2  # of (difference + 1) / 2
        self._above, self._below = Bet(border, 1), Bet(border, -1)

    def add(self, differences: Iterable[float]) -> Outcome:
        """The next passage or document: candidate minus baseline of each of its documents, -1 to 1; the verdict so far.

        A passage counts with the mean of its documents.
        """
        values = list(differences)
        self.n += len(values)
        self.lost += sum(value < 0 for value in values)
        self.won += sum(value > 0 for value in values)
        mean = (math.fsum(values) / len(values) + 1) / 2
        self._above.add(mean)
        self._below.add(mean)
        return self.outcome

    @property
    def outcome(self) -> Outcome:
        """What is certain by now."""
        enough = math.log(1 / self.alpha)
        if self._above.best >= enough:
            return "within margin"
        return "worse than margin" if self._below.best >= enough else "undecided"


class Decision:
    """A sequential test of documents as they are answered, against a baseline's answers to the same documents.

    Documents count in a random order fixed by `seed`, whole passages together, whatever the order of the answers.
    `baseline` and the added rows have doc_hash, prompt_hash, acc and passage; a document that the baseline lacks or was
    asked otherwise is left out.
    """

    def __init__(self, baseline: Mapping[Key, Row], margin: float, seed: int) -> None:
        self.test = SequentialTest(margin)
        self._baseline = baseline
        passages: dict[tuple, list[Key]] = {}
        for key, row in baseline.items():
            passages.setdefault((key[0], row.get("passage") or key[1]), []).append(key)
        self._clusters = [passages[name] for name in sorted(passages, key=str)]
        random.Random(seed).shuffle(self._clusters)
        self.places = {key: place for place, keys in enumerate(self._clusters) for key in keys}
        self._answers: dict[Key, float | None] = {}
        self._next = 0

    def add(self, key: Key, row: Row) -> Outcome:
        """A document was answered; what is certain by now."""
        ours = self._baseline.get(key)
        if ours is not None and key not in self._answers:
            is_same = all(ours.get(name) == row.get(name) for name in ("doc_hash", "prompt_hash"))
            self._answers[key] = row["acc"] - ours["acc"] if is_same and row.get("acc") is not None else None
        while self._next < len(self._clusters) and self.test.outcome == "undecided":
            keys = self._clusters[self._next]
            if any(key not in self._answers for key in keys):
                break
            self._next += 1
            differences = [value for key in keys if (value := self._answers[key]) is not None]
            if differences:
                self.test.add(differences)
        return self.test.outcome


class EnoughEvidence(Exception):
    """The documents answered so far decide what was asked; the others need no answer."""


class Stop:
    """The sequential test against the run that `eval_stop_against` names.

    `places` is the order in which documents are asked, `found` what was decided, None while nothing is. DataError where
    there can be no such test: sets that are not multiple choice, or a run without documents that were asked alike.
    """

    def __init__(
        self,
        experiment: Experiment,
        tasks: Mapping[str, LocalTask],
        identities: Mapping[str, Identity],
        drawn: Mapping[str, list[int]],
    ) -> None:
        self.name = str(experiment.eval_stop_against)
        self.found: dict[str, Any] | None = None
        others = [task.task for task in tasks.values() if task.output_type != "multiple_choice"]
        if others:
            raise DataError(
                f"eval_stop_against needs multiple-choice sets only, asked in one random order: evaluate "
                f"{', '.join(others)} in a run of its own"
            )
        run = find_run(self.name, experiment, "eval_stop_against")
        alike, unlike = set(), []
        for name, identity in identities.items():
            differences = (
                identity.differences(run.identities[name], "pair") if name in run.identities else ["not there"]
            )
            alike |= set() if differences else {name}
            unlike += [f"{name}: {text}" for text in differences]
        wanted = {(name, number) for name in alike for number in drawn.get(name) or range(tasks[name].num_documents)}
        answered = {(name, row["doc_id"]): row for name, rows in run.answers("acc").items() for row in rows}
        both = {key: row for key, row in answered.items() if key in wanted}
        if not both:
            raise DataError(f"eval_stop_against: {self.name} has no documents asked alike ({'; '.join(unlike[:3])})")
        self.total = len(both)
        self._decision = Decision(both, experiment.accuracy_margin_points / 100, experiment.seed)
        self.places = self._decision.places

    def look(self, rows: Iterable[tuple[Key, Row]]) -> None:
        """Documents were answered; EnoughEvidence as soon as they decide."""
        if self.found is not None:
            return
        for key, row in rows:
            self._decision.add(key, row)
        test = self._decision.test
        if test.outcome != "undecided":
            self.found = {
                "baseline": self.name, "outcome": test.outcome, "documents": test.n, "of": self.total,
                "lost": test.lost, "won": test.won, "alpha": test.alpha, "margin_points": 100 * test.margin,
            }  # fmt: skip
            raise EnoughEvidence
