"""An evaluation that ends as soon as its comparison with a finished run is certain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ascend_kit.evaluation.datasets import LocalTask
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.sequential import Decision, Key, Row
from ascend_kit.identity import Identity
from ascend_kit.params import Experiment


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
        from ascend_kit.evaluation.runs import load_runs  # imports torch

        (run,) = load_runs(experiment.with_changes(compare_runs=[self.name]))
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
