"""The evaluation in lm-eval's own layout, so that its other tools read it: `lm_eval/<model>/` in the run folder.

`samples_<task>_<date>.jsonl` is written as a task is scored, `results_<date>.json` at the end; the date is that of the
run, so that an evaluation that goes on replaces its own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.files import write_atomic
from ascend_kit.results import RunFolder
from ascend_kit.stages import RunRecord

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker

PARTS = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


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
