"""Scores: of each set while it is asked, of tasks and groups from lm-eval's results, and in lm-eval's own layout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.compare import Passages, accuracy_interval
from ascend_kit.evaluation.datasets import GroupSpec, LocalTask
from ascend_kit.evaluation.perplexity import ratio
from ascend_kit.files import Table, write_atomic
from ascend_kit.identity import hash_value
from ascend_kit.results import RunFolder
from ascend_kit.stages import RunRecord

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker

UNITS = {
    "acc": "fraction",
    "acc_norm": "fraction",
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "bits_per_byte": "bits/byte",
    "token_perplexity": "per token",
}
LOWER_IS_BETTER = frozenset(UNITS) - {"acc", "acc_norm"}
LIVE_METRICS = ("acc", "exact_match,flexible-extract", "exact_match", "prompt_level_strict_acc", "pass@1")
PARTS = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


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


# --- rows of tasks and groups -----------------------------------------------------------------------------------------


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


def is_finished(rows: list[dict[str, Any]], drawn: list[int] | None) -> bool:
    """Whether the last score rows of a task are complete and about these documents (None: all)."""
    return bool(rows) and all(
        row["status"] == "ok" and row["num_rows"] == len(rows) and row["drawn"] == drawn_key(drawn) for row in rows
    )


def drawn_key(drawn: list[int] | None) -> str | None:
    """What stands in a score row for the documents that were drawn: a short hash, None where all count."""
    return None if drawn is None else hash_value(drawn)[:12]


# --- lm-eval's files --------------------------------------------------------------------------------------------------


class LmEvalExport:
    """lm-eval's files of one run folder."""

    def __init__(self, folder: RunFolder, model_name: str, chat_template: str | None) -> None:
        self.root, self.model_name, self.chat_template = folder.path / "lm_eval", model_name, chat_template
        record = RunRecord.read(folder.path)
        self.date = str(record.created or "").replace(":", "-").partition("+")[0]

    def keep(self, found: dict[str, Any]) -> None:
        """What `evaluate` returned: its samples, and for each task its part of the results."""
        tracker = self._tracker()
        for task, samples in found["samples"].items():
            file = self.root / str(tracker.general_config_tracker.model_name_sanitized)
            file = file / f"samples_{task}_{self.date}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            tracker.save_results_samples(task_name=task, samples=samples)
            part = {name: found[name].get(task) for name in PARTS}
            hashes = "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in samples)
            _write(self._part(task), {**part, "task_hash": _hash(hashes)})

    def write(
        self, tasks: Iterable[str], groups: Iterable[dict[str, Any]], members: dict[str, list[str]]
    ) -> Path | None:
        """The results of the tasks that were scored, and of the groups (rows as in `evaluation.json`)."""
        parts = {task: json.loads(self._part(task).read_text()) for task in tasks if self._part(task).exists()}
        if not parts:
            return None
        merged: dict[str, Any] = {name: {task: part[name] for task, part in parts.items()} for name in PARTS}
        found: dict[str, dict[str, Any]] = {}
        for row in groups:
            if row["status"] == "ok":
                entry = found.setdefault(row["task"], {"alias": row["task"]})
                name, _, filter_name = row["metric"].partition(",")
                entry[f"{name},{filter_name or 'none'}"] = row["value"]
                entry[f"{name}_stderr,{filter_name or 'none'}"] = "N/A" if row["stderr"] is None else row["stderr"]
        merged["results"] |= found
        merged |= {
            "groups": found,
            "group_subtasks": {name: members[name] for name in found},
            "config": {"model": "ascend_kit", "model_args": f"pretrained={self.model_name}"},
            "date": self.date,
            "task_hashes": {task: part["task_hash"] for task, part in parts.items()},
        }
        for name in found:
            merged["versions"][name] = None
            merged["n-shot"][name] = 0
            first = members[name][0]
            merged["higher_is_better"][name] = merged["higher_is_better"].get(first)
        tracker = self._tracker()
        merged |= asdict(tracker.general_config_tracker)
        path = self.root / str(tracker.general_config_tracker.model_name_sanitized) / f"results_{self.date}.json"
        _write(path, merged)
        return path

    def _tracker(self) -> EvaluationTracker:
        from lm_eval.loggers import EvaluationTracker

        tracker = EvaluationTracker(output_path=str(self.root))
        tracker.general_config_tracker.log_experiment_args(
            "ascend_kit", f"pretrained={self.model_name}", None, self.chat_template, self.chat_template is not None
        )
        tracker.date_id = self.date
        return tracker

    def _part(self, task: str) -> Path:
        return self.root / "parts" / f"{task}.json"


def _hash(text: str) -> str:
    from lm_eval.utils import hash_string

    return hash_string(text)


def _write(path: Path, value: Any) -> None:
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=2, default=handle_non_serializable, ensure_ascii=False))
