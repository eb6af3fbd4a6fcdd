"""Runs, and two of them on the same documents: what can be paired, how sure a difference is, and what it means.

Most of the noise cancels: only documents that one run answers right and the other wrong carry information. Questions on
one passage are right or wrong together; then the passages, and not the questions, are the independent observations
(cluster-robust standard errors, arXiv 2411.00640). Only what was asked alike is paired.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from ascend_kit.evaluation.scores import CONFIDENCE, SEEN, Passages, Z, document_rows, load_scores
from ascend_kit.identity import Identity
from ascend_kit.measure.rows import RATE, asked_rows, load_of, load_text
from ascend_kit.results import RunFolder, run_parameters
from ascend_kit.stages import RunRecord

Row = dict[str, Any]
Point = tuple[Any, ...]  # a load: the values of LOAD
LAYOUT = ("cards", "tensor_parallel")
ENGINE_BACKEND = "ascend_kit"
PAIR_ON = ("doc_id", "doc_hash", "prompt_hash")
ALL_SETS = "all"
DEFAULT_MARGIN = 0.01  # one point, in the order of MLPerf's 99 % of the reference accuracy
# Parts of an identity in the words of a benchmark.
WORDS = {
    "task.num_fewshot": "shots",
    "task.chat_template": "chat template",
    "task.thinking": "thinking",
    "task.version": "task version",
    "task.metrics": "metrics",
}


class Run:
    """One run folder, each of its files read once."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.name = f"{folder.path.parent.name}/{folder.path.name}"  # unique within an output folder

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """What its sweep or evaluation was made with."""
        return run_parameters(self.folder)

    @cached_property
    def tasks(self) -> dict[str, list[dict[str, Any]]]:
        """Task -> its answered documents; `acc` of a written answer is whether it was right."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in document_rows(self.folder):
            if row.get("right") is not None:
                row.setdefault("acc", row["right"])
            found.setdefault(row["task"], []).append(row)
        return found

    @cached_property
    def identities(self) -> dict[str, Identity]:
        """Task -> what its documents belong to."""
        known = self.folder.identities()
        return {task: known[rows[0]["identity"]] for task, rows in self.tasks.items()}

    def answers(self, value: str) -> dict[str, list[dict[str, Any]]]:
        """Task -> its documents that have `value` (a metric, or logprob of running text), where there are any."""
        having = {task: [row for row in rows if row.get(value) is not None] for task, rows in self.tasks.items()}
        return {task: rows for task, rows in having.items() if rows}

    def has(self, value: str) -> bool:
        """Whether any document has `value`."""
        return bool(self.answers(value))

    @cached_property
    def sweep(self) -> list[dict[str, Any]]:
        """Measured points of its own layout of cards or, where the sweep left that out, of its fastest layout."""
        rows = [
            row
            for row in asked_rows(self.folder)
            if row.get("status") == "ok" and row.get("backend") == ENGINE_BACKEND and row.get(RATE) is not None
        ]
        own, layouts = (self._layout(self.parameters), [self._layout(row) for row in rows])
        if rows and own not in layouts:
            own = self._layout(max(rows, key=lambda row: row[RATE]))
        return [row for row, layout in zip(rows, layouts, strict=True) if layout == own]

    @staticmethod
    def _layout(values: Row) -> list[Any]:
        return [values.get(name) for name in LAYOUT]

    @cached_property
    def points(self) -> set[Point]:
        return {load_of(row) for row in self.sweep}

    @cached_property
    def alarms(self) -> list[str]:
        """Why its results must not be trusted, as its stages recorded it."""
        return [alarm["text"] for stage in RunRecord.read(self.folder.path).stages.values() for alarm in stage.alarms]

    def lacks(self, point: Point | None = None) -> list[str]:
        """What a comparison at `point` would need and does not find here."""
        found = [] if self.has("acc") else ["no evaluation: run 05_evaluate"]
        scores = load_scores(self.folder)
        failed = sorted(set(scores[scores["status"] != "ok"]["task"]))
        if failed:
            found.append(f"failed tasks: {', '.join(failed)}")
        if not self.sweep:
            found.append("no sweep: run 04_throughput")
        elif point is not None and point not in self.points:
            found.append(
                f"not measured at {load_text(point)} (only at {'; '.join(sorted(map(load_text, self.points)))})"
            )
        return found + [f"alarm: {text}" for text in self.alarms]


@dataclass
class Pairs:
    """Documents that two runs were asked alike, as (baseline, candidate) rows, and what could not be paired.

    `refused`: set -> what differs, in words. `missing`: sets that only one of the runs has.
    """

    rows: list[tuple[Row, Row]] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def why_not(self) -> str:
        """What could not be paired and why; empty where everything was."""
        texts = [f"{name} is not paired ({'; '.join(dict.fromkeys(why))})" for name, why in self.refused.items()]
        return "; ".join(texts + [f"only one of the runs has {name}" for name in self.missing])


def pair_documents(baseline: Run, candidate: Run, value: str) -> Pairs:
    """The documents with `value` that both runs answered, of tasks whose data, shots, template and version agree."""
    found = Pairs()
    ours, theirs = baseline.answers(value), candidate.answers(value)
    for task in (task for task in ours if task in theirs):
        name = ours[task][0]["set"]
        unlike = baseline.identities[task].differences(candidate.identities[task], "pair")
        if unlike:
            found.refused.setdefault(name, []).extend(map(_in_words, unlike))
            continue
        pairs = _same_documents(ours[task], theirs[task])
        num_common = len({row["doc_id"] for row in ours[task]} & {row["doc_id"] for row in theirs[task]})
        if len(pairs) < num_common:
            text = (
                f"{task}: {num_common - len(pairs)} of {num_common} documents have other prompts or were cut in one run"
            )
            found.refused.setdefault(name, []).append(text)
        found.rows += pairs
    found.missing = sorted({rows[0]["set"] for rows in ours.values()} ^ {rows[0]["set"] for rows in theirs.values()})
    return found


def _same_documents(ours: list[Row], theirs: list[Row]) -> list[tuple[Row, Row]]:
    known = {tuple(row[name] for name in PAIR_ON): row for row in theirs}
    pairs = ((row, known.get(tuple(row[name] for name in PAIR_ON))) for row in ours)
    return [(a, b) for a, b in pairs if b and bool(a.get("cut_tokens")) == bool(b.get("cut_tokens"))]


def _in_words(difference: str) -> str:
    part, _, change = difference.partition(": ")
    return f"{WORDS.get(part, part)}: {change}"


def compare_accuracy(
    baseline: Run, candidate: Run, *, metric: str = "acc", margin: float = DEFAULT_MARGIN
) -> list[Row]:
    """One row per set and one for all documents that can be paired; a set that cannot has a row that says why.

    Percent and points; `p_value` is exact, `p_holm` corrected over the sets; the interval covers 95 %, both over whole
    passages where questions share them. `outcome`: `within margin` (a loss above `margin`, a fraction, is excluded),
    `worse` (any loss is certain, its size may exceed the margin), `undecided` or `not paired`.
    """
    pairs = pair_documents(baseline, candidate, metric)
    head = {"baseline": baseline.name, "candidate": candidate.name, "metric": metric}
    sets: dict[str, list[tuple[Row, Row]]] = {}
    for pair in pairs.rows:
        sets.setdefault(pair[0]["set"], []).append(pair)
    counts = {name: _counts(part, metric) for name, part in sets.items()}
    adjusted = holm([counts[name].p_value for name in sets])
    rows = [
        {**head, "set": name, **_paired_row(counts[name], p_holm, margin)}
        for name, p_holm in zip(sets, adjusted, strict=True)
    ]
    if pairs.rows:
        total = _counts(pairs.rows, metric)
        rows.append({**head, "set": ALL_SETS, **_paired_row(total, total.p_value, margin)})
    for name, why in pairs.refused.items():
        if name not in sets:
            text = f"not paired: {'; '.join(dict.fromkeys(why))}"
            rows.append({**head, "set": name, "outcome": "not paired", "verdict": text})
    return rows


def certain_losses(rows: Iterable[Row], margin: float) -> list[Row]:
    """The sets among the rows of `compare_accuracy` that show a significant loss (Holm) beyond `margin`, a fraction."""
    sets = [row for row in rows if row["set"] != ALL_SETS and row.get("p_holm", 1) < 1 - CONFIDENCE]
    return [row for row in sets if row["difference_points"] < -100 * margin]


def passage_of(row: Row) -> tuple[str, str] | None:
    """What a document shares with others of its task; None for a document of its own."""
    return (row["task"], row["passage"]) if row.get("passage") else None


def _counts(pairs: list[tuple[Row, Row]], metric: str) -> PairedCounts:
    ours, theirs = ([row[metric] for row in side] for side in zip(*pairs, strict=True))
    return paired_counts(ours, theirs, [passage_of(row) for row, _ in pairs])


def _paired_row(counts: PairedCounts, p_holm: float, margin: float) -> Row:
    low, high = counts.interval()
    row = {
        "n": counts.n,
        "num_passages": counts.n if counts.passages is None else len(counts.passages.sizes),
        "baseline_percent": 100 * counts.baseline_accuracy,
        "candidate_percent": 100 * counts.candidate_accuracy,
        "difference_points": 100 * counts.difference,
        "low_points": 100 * low,
        "high_points": 100 * high,
        "p_value": counts.p_value,
        "p_holm": p_holm,
        "only_baseline": counts.only_baseline,
        "only_candidate": counts.only_candidate,
        "min_detectable_points": 100 * counts.min_detectable(),
        "margin_points": 100 * margin,
        "documents_needed": counts.documents_needed(margin),
        "outcome": "within margin" if low > -margin else "worse" if high < 0 else "undecided",
    }
    return {**row, "verdict": _accuracy_text(row)}


def _accuracy_text(row: Row) -> str:
    shown = (
        f"{row['difference_points']:+.2f} points, 95 % interval {row['low_points']:+.2f} to "
        f"{row['high_points']:+.2f}, n = {row['n']}"
    )
    if row["outcome"] == "within margin":
        return f"no loss above {row['margin_points']:g} points ({shown})"
    if row["outcome"] == "worse":
        return f"less accurate ({shown}, p = {row['p_value']:.2g})"
    return (
        f"undecided ({shown}): a loss of {-row['low_points']:.1f} points cannot be excluded; "
        f"differences below {row['min_detectable_points']:.1f} points go unseen here, about "
        f"{row['documents_needed']} documents would settle it"
    )


# --- statistics over plain numbers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedCounts:
    """How two runs answered the same documents. Differences are candidate minus baseline, as fractions.

    `passages` holds the differences where documents share passages.
    """

    both_right: int
    only_baseline: int
    only_candidate: int
    both_wrong: int
    passages: Passages | None = field(default=None, compare=False)

    @property
    def n(self) -> int:
        return self.both_right + self.only_baseline + self.only_candidate + self.both_wrong

    @property
    def discordant(self) -> int:
        """Documents that exactly one run answers right."""
        return self.only_baseline + self.only_candidate

    @property
    def baseline_accuracy(self) -> float:
        return (self.both_right + self.only_baseline) / self.n

    @property
    def candidate_accuracy(self) -> float:
        return (self.both_right + self.only_candidate) / self.n

    @property
    def difference(self) -> float:
        return (self.only_candidate - self.only_baseline) / self.n

    @property
    def p_value(self) -> float:
        """Two-sided probability of so uneven a split if both were equally accurate: McNemar's exact test, over whole
        passages where documents share them.
        """
        from scipy.stats import binomtest

        if self.passages is not None:
            return self.passages.sign_test()
        return float(binomtest(self.only_candidate, self.discordant).pvalue) if self.discordant else 1.0

    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: Tango's score interval (1998), which covers as often as it says from
        some five differing documents on, and more often below, where whole documents are too coarse for less.

        With passages it counts as many documents as would be as certain on their own: each by the design effect, the
        cluster-robust variance over that of independent documents, where that is above 1.
        """
        effect = self._design_effect()
        return score_interval(self.only_candidate / effect, self.only_baseline / effect, self.n / effect, Z)

    def min_detectable(self) -> float:
        """The smallest true difference that this many documents, disagreeing this often, reveal with 80 % power."""
        return SEEN * math.sqrt(self._disagreement() / self.n)

    def documents_needed(self, margin: float) -> int:
        """Documents to show with 80 % power that an equally accurate run loses less than `margin`."""
        return math.ceil(self._disagreement() * (SEEN / margin) ** 2)

    def _disagreement(self) -> float:
        """The variance of one document's difference as it counts in the mean."""
        return (self.discordant + 2) / (self.n + 2) * self._design_effect()

    def _design_effect(self) -> float:
        alone = (self.discordant / self.n - self.difference**2) / self.n
        if self.passages is None or not alone:
            return 1.0
        return max(1.0, self.passages.mean_and_stderr()[1] ** 2 / alone)


def score_interval(gains: float, losses: float, n: float, z: float) -> tuple[float, float]:
    """Interval of (gains - losses) / n of paired answers: every difference within z standard errors of what was seen,
    the error being that under this difference (Tango, Statistics in Medicine 17:891, 1998).
    """
    from scipy.optimize import brentq

    def distance(difference: float) -> float:
        linear = (2 * n - gains + losses) * difference - gains - losses
        root = math.sqrt(max(0.0, linear**2 + 8 * n * losses * difference * (1 - difference)))
        variance = n * ((root - linear) / (2 * n) + difference * (1 - difference))
        return (gains - losses - n * difference) / math.sqrt(max(variance, 1e-12))

    def crossing(level: float, low: float, high: float) -> float:
        return cast(float, brentq(lambda value: distance(value) - level, low, high))

    seen, end = (gains - losses) / n, 1 - 1e-9
    low = crossing(z, -end, seen) if distance(-end) > z else -1.0
    high = crossing(-z, seen, end) if distance(end) < -z else 1.0
    return low, high


def paired_counts(
    baseline: Sequence[float], candidate: Sequence[float], passages: Sequence[Hashable | None]
) -> PairedCounts:
    """Counts from two equally long lists of 0 or 1 per document; ValueError for other values or no document.

    `passages` names the passage of each document, None for a document of its own.
    """
    if len(baseline) != len(candidate) or not len(baseline):
        raise ValueError(f"need the same documents in both runs, got {len(baseline)} and {len(candidate)}")
    pairs = list(zip(baseline, candidate, strict=True))
    if any(value not in (0, 1) for pair in pairs for value in pair):
        raise ValueError("a paired test of accuracy takes 0 (wrong) or 1 (right) per document")
    both, lost, won, neither = (pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0)))
    differences = [theirs - ours for ours, theirs in pairs]
    return PairedCounts(both, lost, won, neither, passages=Passages.of(differences, passages))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several sets at once (Holm's step-down), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted
