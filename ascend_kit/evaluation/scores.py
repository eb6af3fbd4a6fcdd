"""Scores: of each set while it is asked, of tasks and groups, with their errors, and what a run's evaluation holds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean
from typing import Any

from ascend_kit.evaluation.tasks import GroupSpec, LocalTask
from ascend_kit.files import Table, hash_value
from ascend_kit.messages import Finding
from ascend_kit.results import RunFolder

UNITS = {
    "acc": "fraction",
    "acc_norm": "fraction",
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "bits_per_byte": "bits/byte",
    "token_perplexity": "per token",
}
LOWER_IS_BETTER = frozenset(UNITS) - {"acc", "acc_norm"}
COLUMNS = ["task", "kind", "metric", "status", "n"]  # of a table without a row
LIVE_METRICS = ("acc", "exact_match,flexible-extract", "exact_match", "prompt_level_strict_acc", "pass@1")

CONFIDENCE, POWER = 0.95, 0.8
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)  # half of a 95 % interval, in standard errors
SEEN = Z + NormalDist().inv_cdf(POWER)  # a difference that is seen with 80 % power, in standard errors


class Live:
    """How far an evaluation is, and the score of each set with its interval so far."""

    def __init__(self, tasks: Iterable[LocalTask], drawn: dict[str, list[int]]) -> None:
        self.sets = {task.task: task.set_name for task in tasks}
        self.sizes = {task.task: len(drawn.get(task.task) or range(task.num_documents)) for task in tasks}
        self.skipped = 0  # documents of tasks that were finished before
        self._values: dict[str, list[float]] = {}
        self._seen: set[tuple[str, int]] = set()
        self._set = ""

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
        return self.skipped + len(self._seen), sum(self.sizes.values()), text


# --- rows of tasks and groups -----------------------------------------------------------------------------------------


def score_rows(task: LocalTask, results: dict[str, Any], documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per metric of lm-eval's results for a task, and of its samples where each question was answered often."""
    names = [key for key, value in results.items() if "," in key and "_stderr," not in key and is_number(value)]
    rows = [_score_row(key, results, _of_length(key, documents)) for key in names]
    return [row for row in rows if row["n"]] + _sample_rows(documents)


def _of_length(key: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents that a metric is about: RULER calls its metrics by the length of the prompt, and gives -1 or
    nothing to documents of another.
    """
    metric = key.partition(",")[0]
    return [row for row in documents if row.get(metric, -1) >= 0] if metric.isdecimal() else documents


def _score_row(key: str, results: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One metric; `stderr` is None where there is a single document.

    Where questions share passages, `stderr` is that of whole passages and `num_passages` says how many there are.
    """
    base, _, filter_name = key.partition(",")
    metric = base if filter_name == "none" else key
    value, stderr = float(results[key]), results.get(f"{base}_stderr,{filter_name}")
    values = [document.get(metric) for document in documents]
    if any(isinstance(each, list) for each in values):  # several parts a document, all of which count
        parts = [each or [] for each in values]
        stderr = ratio([sum(each) for each in parts], [len(each) for each in parts])[1]
        return {"metric": metric, "value": value, "unit": "fraction", "n": len(documents), "stderr": stderr}
    is_share = all(each is not None and 0 <= each <= 1 for each in values)
    unit = UNITS.get(base, "fraction" if is_share else "score")
    row = {"metric": metric, "value": value, "unit": unit, "n": len(documents)}
    if metric in LOWER_IS_BETTER and documents and "logprob" in documents[0]:
        return row | {"stderr": _perplexity_stderr(metric, value, documents)}
    passages = None
    if None not in values:
        passages = Passages.of([document[metric] for document in documents], [row.get("passage") for row in documents])
    if passages is not None:
        return row | {"stderr": passages.mean_and_stderr()[1], "num_passages": len(passages.sizes)}
    return row | {"stderr": float(stderr) if isinstance(stderr, (int, float)) else None}


def _sample_rows(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """mean@k, pass@k and maj@k of documents with k samples each; errors are those of means over documents."""
    sampled = [row for row in documents if row.get("sample_metrics")]
    rows = []
    for name in sampled[0]["sample_metrics"] if sampled else ():
        values = [row["sample_metrics"][name] for row in sampled]
        k = len(values[0])
        found = {f"mean@{k}": [math.fsum(each) / k for each in values]}
        if all(value in (0, 1) for each in values for value in each):
            found |= {f"pass@{m}": [pass_at_k(k, round(sum(each)), m) for each in values] for m in sorted({1, k})}
        found[f"maj@{k}"] = [row["majority_metrics"][name] for row in sampled]
        for label, each in found.items():
            mean, stderr = ratio(each, [1] * len(each))
            head = {"metric": f"{label} {name}", "value": mean, "unit": "fraction", "n": len(each), "stderr": stderr}
            rows.append(head)
    return rows


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n answers, of which some are right, hold a right one (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def is_number(value: Any) -> bool:
    """Whether a metric's value is one number, of Python or numpy."""
    return isinstance(value, (int, float)) or hasattr(value, "item")


def group_rows(group: GroupSpec, table: Table) -> list[dict[str, Any]]:
    """Rows of one group: lm-eval's mean weighted by documents and its pooled standard error, per metric.

    A group with a failed member gets a failed row: a mean over the rest would look like the same figure.
    """
    members = table[table["task"].isin(group.tasks) & (table["status"] == "ok")]
    head = {
        "task": group.group,
        "set": group.set_name,
        "kind": "group",
        "num_tasks": len(group.tasks),
        "num_packaged_tasks": group.num_packaged,
        "conditions": " / ".join(sorted(set(members["conditions"]))),
        "plain_ops": members["plain_ops"].iloc[0] if len(members) and "plain_ops" in members else None,
        "num_fewshot": int(members["num_fewshot"].iloc[0]) if len(members) else None,
        "status": "ok",
        "error": None,
    }
    return [
        {**head, **_group_value(metric, members[members["metric"] == metric], len(group.tasks))}
        for metric in group.metrics
    ]


def _group_value(metric: str, rows: Table, num_tasks: int) -> dict[str, Any]:
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    sizes = [int(n) for n in rows["n"]]
    row = {"metric": metric, "unit": UNITS.get(metric, "score"), "n": sum(sizes), "value": None, "stderr": None}
    missing = num_tasks - len(rows)
    if missing:
        return {**row, "status": "failed", "error": f"{missing} of {num_tasks} tasks failed"}
    stderrs = [float(stderr) for stderr in rows["stderr"].astype(float)]
    if any(stderr != stderr for stderr in stderrs):
        stderr = None
    elif "num_passages" in rows and rows["num_passages"].notna().any():
        stderr = math.sqrt(sum((n * stderr) ** 2 for n, stderr in zip(sizes, stderrs, strict=True))) / sum(sizes)
    else:
        stderr = float(pooled_sample_stderr(stderrs, sizes))
    return {
        **row,
        "value": float(aggregate_subtask_metrics(list(rows["value"].astype(float)), sizes)),
        "stderr": stderr,
    }


def _perplexity_stderr(metric: str, value: float, documents: list[dict[str, Any]]) -> float | None:
    """Standard error over documents, which lm-eval leaves out for perplexities (linearised ratio of sums)."""
    size = "words" if metric == "word_perplexity" else "bytes"
    _, stderr = ratio([-row["logprob"] for row in documents], [row[size] for row in documents])
    if stderr is None:
        return None
    return stderr / math.log(2) if metric == "bits_per_byte" else value * stderr


def is_finished(rows: list[dict[str, Any]], drawn: list[int] | None) -> bool:
    """Whether the last score rows of a task are complete and about these documents (None: all)."""
    return bool(rows) and all(
        row["status"] == "ok" and row["num_rows"] == len(rows) and row["drawn"] == drawn_key(drawn) for row in rows
    )


def drawn_key(drawn: list[int] | None) -> str | None:
    """What stands in a score row for the documents that were drawn: a short hash, None where all count."""
    return None if drawn is None else hash_value(drawn)[:12]


# --- read back --------------------------------------------------------------------------------------------------------


class EvaluationError(RuntimeError):
    """At least one task failed; the rows say which and why, and the finished ones are kept."""


@dataclass(frozen=True)
class EvaluationResult:
    """What a run's evaluation holds, read back from its folder.

    `tasks` and `groups`: one row per task or group and metric, with value, unit, stderr and n (documents).
    `published`: figures of the same model under the same conditions; empty where none is known.
    """

    tasks: Table
    groups: Table
    documents: Table
    cards: Table
    flags: list[Finding]
    published: Table

    @property
    def failed(self) -> dict[str, str]:
        """Failed task -> error."""
        if self.tasks.empty:
            return {}
        rows = self.tasks[self.tasks["status"] != "ok"]
        return dict(zip(rows["task"], rows["error"], strict=True))

    @property
    def ok(self) -> bool:
        return not self.tasks.empty and not self.failed

    @property
    def error(self) -> EvaluationError | None:
        """What ends the stage as failed: an error naming the failed tasks, None where every task was scored."""
        if not self.failed:
            return None
        text = "; ".join(f"{task}: {error}" for task, error in list(self.failed.items())[:3])
        return EvaluationError(f"{len(self.failed)} of {self.tasks['task'].nunique()} tasks failed ({text})")

    def raise_if_failed(self) -> None:
        """EvaluationError naming the failed tasks: what ends a notebook or a command with a failure."""
        if self.error is not None:
            raise self.error


def load_evaluation(folder: RunFolder) -> EvaluationResult:
    """The evaluation of a run folder, from its files alone: no engine, no lm-eval. Empty where there is none."""
    import pandas

    summary = folder.read_json("evaluation") or {}
    return EvaluationResult(
        tasks=load_scores(folder),
        groups=_table(summary.get("groups", [])),
        documents=pandas.DataFrame(document_rows(folder)),
        cards=pandas.DataFrame(list(_asked_rows(folder, "evaluation_cards"))),
        flags=[Finding.from_row(row) for row in summary.get("flags", [])],
        published=pandas.DataFrame(summary.get("published", [])),
    )


def load_scores(folder: RunFolder) -> Table:
    """The last outcome of every task that was asked for: a row per metric, or one row of a failure."""
    latest: dict[str, dict[str | None, dict[str, Any]]] = {}
    for row in _asked_rows(folder, "scores"):
        rows = latest.setdefault(row["task"], {})
        if row["status"] != "ok" or None in rows or row["metric"] in rows:  # the task was scored again
            rows.clear()
        rows[row["metric"]] = row
    return _table([row for rows in latest.values() for row in rows.values()])


def _table(rows: list[dict[str, Any]]) -> Table:
    import pandas

    return pandas.DataFrame(rows, columns=None if rows else COLUMNS)


def document_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The documents behind `load_scores`, each once: the last answer to each of a task's scored documents; while an
    evaluation runs, those answered so far.
    """
    summary = folder.read_json("evaluation") or {}
    drawn = {task: set(numbers) for task, numbers in summary.get("drawn", {}).items()}
    scores = load_scores(folder)
    failed = set(scores[scores["status"] != "ok"]["task"]) if len(scores) else set()
    rows = list(_asked_rows(folder, "documents"))
    order = {task: place for place, task in enumerate(dict.fromkeys(row["task"] for row in rows))}
    rows.sort(key=lambda row: (order[row["task"]], row["doc_id"]))  # they stand there as they were answered
    latest = {(row["task"], row["doc_id"]): row for row in rows}
    return [
        row
        for (task, document), row in latest.items()
        if task not in failed and (task not in drawn or document in drawn[task])
    ]


def _asked_rows(folder: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """The rows that belong to what the run's evaluation was last asked for; all others take part in nothing."""
    asked = (folder.read_json("evaluation") or {}).get("identities", {})
    return (row for row in folder.rows(name) if row.get("identity", "") == asked.get(row["task"]))


# --- how sure a mean is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passages:
    """Sums of a value over the documents of each passage; a document without a passage is one of its own."""

    sizes: tuple[int, ...]
    sums: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], keys: Sequence[Hashable | None]) -> Passages | None:
        """None where no two documents share a key: then the documents are independent."""
        totals: dict[Hashable, tuple[int, float]] = {}
        for place, (value, key) in enumerate(zip(values, keys, strict=True)):
            name = (place,) if key is None else key
            size, total = totals.get(name, (0, 0.0))
            totals[name] = (size + 1, total + value)
        if len(totals) == len(values):
            return None
        return cls(tuple(size for size, _ in totals.values()), tuple(total for _, total in totals.values()))

    def mean_and_stderr(self) -> tuple[float, float]:
        """The mean over documents and its cluster-robust standard error, with the factor K / (K - 1) of its square."""
        n, count = sum(self.sizes), len(self.sizes)
        mean = sum(self.sums) / n
        squares = sum((total - size * mean) ** 2 for size, total in zip(self.sizes, self.sums, strict=True))
        return mean, math.sqrt(squares * count / max(1, count - 1)) / n

    def sign_test(self) -> float:
        """Two-sided exact probability of a sum so far from 0 if every passage's sign fell like a coin.

        Equals McNemar's exact test where every passage is one document.
        """
        import numpy

        sums = [abs(round(total)) for total in self.sums if total]
        chances = numpy.ones(1)  # chances[i]: the sum is i - (len - 1) / 2
        for size in sums:
            longer = numpy.zeros(len(chances) + 2 * size)
            longer[: len(chances)] += chances / 2
            longer[2 * size :] += chances / 2
            chances = longer
        middle, far = sum(sums), abs(round(sum(self.sums)))
        return min(1.0, 2 * float(chances[middle + far :].sum())) if far else 1.0


def accuracy_interval(right: Sequence[float], passages: Sequence[Hashable | None]) -> tuple[float, float]:
    """95 % interval of an accuracy from 0 or 1 per document: Wilson's, cluster-robust where passages are shared.

    The latter is Student's with a degree of freedom less than passages; one right and one wrong answer are added, which
    keeps its coverage near the ends.
    """
    from scipy.stats import binomtest, t

    clusters = Passages.of(right, passages)
    if clusters is None:
        found = binomtest(round(sum(right)), len(right)).proportion_ci(CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)
    wider = Passages((*clusters.sizes, 1, 1), (*clusters.sums, 1, 0))
    mean, stderr = wider.mean_and_stderr()
    half = float(t.ppf(0.5 + CONFIDENCE / 2, max(1, len(clusters.sizes) - 1))) * stderr
    return max(0.0, mean - half), min(1.0, mean + half)


def ratio(totals: Sequence[float], sizes: Sequence[float]) -> tuple[float, float | None]:
    """sum(totals) / sum(sizes) and its standard error over samples (linearised); None for fewer than two."""
    value = sum(totals) / sum(sizes)
    count = len(totals)
    if count < 2:
        return value, None
    spread = sum((total - value * size) ** 2 for total, size in zip(totals, sizes, strict=True))
    return value, math.sqrt(count / (count - 1) * spread) / sum(sizes)
