"""Which documents an evaluation asks, how far it is, and the scores so far with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import Any

from ascend_kit.evaluation.datasets import LocalTask
from ascend_kit.evaluation.drawing import detectable, draw, half_width
from ascend_kit.evaluation.other_tasks import check_data
from ascend_kit.evaluation.paired import accuracy_interval
from ascend_kit.files import Table
from ascend_kit.params import Experiment

LIVE_METRICS = ("acc", "exact_match,flexible-extract", "exact_match", "prompt_level_strict_acc", "pass@1")


def drawn_documents(tasks: Iterable[LocalTask], experiment: Experiment) -> dict[str, list[int]]:
    """The documents that `eval_limit` leaves, spread over the subjects of each set; tasks asked whole are left out."""
    sets: dict[str, dict[str, int]] = {}
    for task in tasks:
        sets.setdefault(task.set_name, {})[task.task] = task.num_documents
    parts = [draw(sizes, experiment.eval_limit, experiment.seed) for sizes in sets.values()]
    return {task: numbers for part in parts for task, numbers in part.items()}


def expected_widths(experiment: Experiment) -> Table:
    """What the documents asked can show, before asking: a row per set and one for all, in points.

    `half_width_points` is half of a score's 95 % interval at its widest; `detectable_points` the difference between two
    runs on the same documents that is seen with 80 % power where they disagree on a tenth of them.
    """
    import pandas

    tasks = check_data(experiment)
    drawn = drawn_documents(tasks, experiment)
    counts: dict[str, list[int]] = {}
    for task in tasks:
        if task.output_type != "loglikelihood_rolling":
            found = counts.setdefault(task.set_name, [0, 0])
            found[0] += len(drawn.get(task.task) or range(task.num_documents))
            found[1] += task.num_documents
    if len(counts) > 1:
        counts["all"] = [sum(pair[place] for pair in counts.values()) for place in (0, 1)]
    rows = [
        {
            "set": name,
            "documents": asked,
            "of": whole,
            "half_width_points": 100 * half_width(asked),
            "detectable_points": 100 * detectable(asked),
        }
        for name, (asked, whole) in counts.items()
    ]
    return pandas.DataFrame(rows)


class Live:
    """How far an evaluation is, and the score of each set with its interval so far."""

    def __init__(self, tasks: Iterable[LocalTask], drawn: dict[str, list[int]]) -> None:
        self.sets = {task.task: task.set_name for task in tasks}
        self.sizes = {task.task: len(drawn.get(task.task) or range(task.num_documents)) for task in tasks}
        self.total, self._skipped = sum(self.sizes.values()), 0
        self._values: dict[str, list[float]] = {}
        self._seen: set[tuple[str, int]] = set()
        self._set = ""

    def skip(self, task: str) -> None:
        """A task was finished before."""
        self._skipped += self.sizes[task]

    def add(self, key: tuple[str, int], row: dict[str, Any]) -> None:
        """A document was answered."""
        if key in self._seen:
            return
        self._seen.add(key)
        self._set = self.sets[key[0]]
        value = next((row[name] for name in LIVE_METRICS if row.get(name) is not None), None)
        if value is not None:
            self._values.setdefault(self._set, []).append(float(value))

    def progress(self) -> tuple[int, int, str]:
        """Documents done, documents in all, and the set being asked with its score and 95 % interval."""
        values = self._values.get(self._set, [])
        text = self._set
        if values and set(values) <= {0.0, 1.0}:
            low, high = accuracy_interval(values, [None] * len(values))
            text += f" {mean(values):.1%} ({low:.1%} to {high:.1%})"
        return self._skipped + len(self._seen), self.total, text
