"""Rows of an evaluation: from lm-eval's results to plain values, groups of them, and back from a run
folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.datasets import GroupSpec, LocalTask
from ascend_kit.evaluation.paired import Passages
from ascend_kit.evaluation.perplexity import ratio
from ascend_kit.evaluation.rows import passage_of
from ascend_kit.files import Table
from ascend_kit.identity import Identity
from ascend_kit.messages import Finding
from ascend_kit.results import RunFolder

if TYPE_CHECKING:
    from ascend_kit.evaluation.adapter import EngineLM

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
        if row["status"] != "ok" or None in rows:
            rows.clear()
        rows[row["metric"]] = row
    found = [row for rows in latest.values() for row in rows.values()]
    return pandas.DataFrame(found, columns=None if found else COLUMNS)


def load_documents(folder: RunFolder) -> Table:
    """The documents behind `load_scores`, each once: the last answer to each of a task's scored documents."""
    import pandas

    return pandas.DataFrame(document_rows(folder))


def document_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of `load_documents`, without pandas."""
    table = load_scores(folder)
    counts = dict(zip(table["task"], table["n"], strict=True))
    latest = {(row["task"], row["doc_id"]): row for row in _asked_rows(folder, "documents")}
    return [row for (task, doc), row in latest.items() if doc < counts.get(task, 0)]


def finished(folder: RunFolder, identities: Mapping[str, Identity]) -> set[tuple[str, str, int]]:
    """(task, metric, number of documents) of every score row that agrees with the identity asked for of its task."""
    known = folder.identities()
    return {
        (row["task"], row["metric"], row["n"])
        for row in folder.rows("scores")
        if row["status"] == "ok"
        and row["task"] in identities
        and row.get("identity") in known
        and identities[row["task"]].agrees(known[row["identity"]], "resume")
    }


def with_groups(table: Table, groups: list[dict[str, Any]]) -> Table:
    """`table` with rows of groups below it."""
    import pandas

    return pandas.concat([table, pandas.DataFrame(groups)], ignore_index=True) if groups else table


def _asked_rows(folder: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """The rows that belong to what the run's evaluation was last asked for; all others take part in nothing."""
    asked = (folder.read_json("evaluation") or {}).get("identities", {})
    return (row for row in folder.rows(name) if row.get("identity", "") == asked.get(row["task"]))


def metrics_of(task: LocalTask) -> tuple[str, ...]:
    """Every metric a finished task has rows for."""
    return (*task.metrics, "token_perplexity") if task.set_name == "wikitext" else task.metrics


def score_row(results: dict[str, Any], metric: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One metric of lm-eval's results for a task; `stderr` is None where there is a single document.

    Where questions share passages, `stderr` is that of whole passages and `num_passages` says how many there are.
    """
    value, stderr = float(results[f"{metric},none"]), results.get(f"{metric}_stderr,none")
    row = {"metric": metric, "value": value, "unit": UNITS[metric], "n": len(documents)}
    if metric in LOWER_IS_BETTER:
        return row | {"stderr": _perplexity_stderr(metric, value, documents)}
    passages = Passages.of([document[metric] for document in documents], [row.get("passage") for row in documents])
    if passages is not None:
        return row | {"stderr": passages.mean_and_stderr()[1], "num_passages": len(passages.sizes)}
    return row | {"stderr": float(stderr) if isinstance(stderr, (int, float)) else None}


def document_row(task: LocalTask, sample: dict[str, Any], lm: EngineLM) -> dict[str, Any]:
    """One document's answer in plain values; two runs are paired on (task, doc_id, doc_hash, prompt_hash)."""
    row = {name: sample[name] for name in ("doc_id", "doc_hash", "prompt_hash")}
    responses = [response[0] for response in sample["resps"]]
    if task.output_type == "loglikelihood_rolling":
        logprob, words = sample["word_perplexity"]
        return row | {"logprob": logprob, "words": words, "bytes": sample["byte_perplexity"][1]}
    context = sample["arguments"][0][0]
    row |= {
        "target": sample["target"],
        "passage": passage_of(sample["doc"]),
        "cut_tokens": lm.cut_tokens.get(context, 0),
    }
    if task.output_type == "multiple_choice":
        logprobs = [logprob for logprob, _ in responses]
        row |= {
            "prediction": max(range(len(logprobs)), key=logprobs.__getitem__),
            "choice_logprobs": logprobs,
            "choice_is_greedy": [greedy for _, greedy in responses],
        }
    else:
        row |= {"answer": responses[0], "finish_reason": lm.finish_reasons.get(context)}
    return row | {metric: float(sample[metric]) for metric in task.metrics}


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
    row = {"metric": metric, "unit": UNITS[metric], "n": sum(sizes), "value": None, "stderr": None}
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
