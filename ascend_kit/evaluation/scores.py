"""Rows of an evaluation: from lm-eval's results to plain values, groups of them, and back from a run
folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ascend_kit.evaluation.datasets import GroupSpec, LocalTask
from ascend_kit.evaluation.paired import Passages
from ascend_kit.evaluation.perplexity import ratio
from ascend_kit.files import Table
from ascend_kit.identity import hash_value
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
COLUMNS = ["task", "kind", "metric", "status", "n"]
LOWER_IS_BETTER = frozenset(UNITS) - {"acc", "acc_norm"}


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
        groups=with_groups(pandas.DataFrame(columns=COLUMNS), summary.get("groups", [])),
        documents=load_documents(folder),
        cards=pandas.DataFrame(list(_asked_rows(folder, "evaluation_cards"))),
        flags=[Finding.from_row(row) for row in summary.get("flags", [])],
        published=pandas.DataFrame(summary.get("published", [])),
    )


def load_scores(folder: RunFolder) -> Table:
    """The last outcome of every task that was asked for: a row per metric, or one row of a failure."""
    import pandas

    latest: dict[str, dict[str | None, dict[str, Any]]] = {}
    for row in _asked_rows(folder, "scores"):
        rows = latest.setdefault(row["task"], {})
        if row["status"] != "ok" or None in rows or row["metric"] in rows:  # the task was scored again
            rows.clear()
        rows[row["metric"]] = row
    found = [row for rows in latest.values() for row in rows.values()]
    return pandas.DataFrame(found, columns=None if found else COLUMNS)


def load_documents(folder: RunFolder) -> Table:
    """The documents behind `load_scores`, each once: the last answer to each of a task's scored documents."""
    import pandas

    return pandas.DataFrame(document_rows(folder))


def document_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of `load_documents`, without pandas; while an evaluation runs, those answered so far."""
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


def is_finished(rows: list[dict[str, Any]], drawn: list[int] | None) -> bool:
    """Whether the last score rows of a task are complete and about these documents (None: all)."""
    return bool(rows) and all(
        row["status"] == "ok" and row["num_rows"] == len(rows) and row["drawn"] == drawn_key(drawn) for row in rows
    )


def drawn_key(drawn: list[int] | None) -> str | None:
    """What stands in a score row for the documents that were drawn: a short hash, None where all count."""
    return None if drawn is None else hash_value(drawn)[:12]


def with_groups(table: Table, groups: list[dict[str, Any]]) -> Table:
    """`table` with rows of groups below it."""
    import pandas

    return pandas.concat([table, pandas.DataFrame(groups)], ignore_index=True) if groups else table


def _asked_rows(folder: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """The rows that belong to what the run's evaluation was last asked for; all others take part in nothing."""
    asked = (folder.read_json("evaluation") or {}).get("identities", {})
    return (row for row in folder.rows(name) if row.get("identity", "") == asked.get(row["task"]))


def score_rows(task: LocalTask, results: dict[str, Any], documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per metric of lm-eval's results for a task, and of its samples where each question was answered often."""
    names = [key for key, value in results.items() if "," in key and "_stderr," not in key and _is_number(value)]
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


def _is_number(value: Any) -> bool:
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
