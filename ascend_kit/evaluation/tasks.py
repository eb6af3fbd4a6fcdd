"""lm-eval's tasks: those it brings, their data from this disk, and its results in its own layout."""

from __future__ import annotations

import io
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from ascend_kit.files import hash_value, write_atomic
from ascend_kit.results import RunFolder
from ascend_kit.stages import RunRecord

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.loggers import EvaluationTracker

SHUFFLE_SEED = 0  # lm-eval's default: some tasks shuffle their choices with the global generators
PARTS = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class LocalTask:
    """One lm-eval task whose data lies on this disk: the files, and their checked rows by split."""

    task: str
    set_name: str
    packaged_yaml: Path
    output_type: str
    files: dict[str, tuple[Path, ...]] = field(default_factory=dict, hash=False)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict, hash=False, repr=False)
    eval_split: str = "test"
    num_fewshot: int = 0
    metrics: tuple[str, ...] = ()
    version: float = 1.0

    @property
    def num_documents(self) -> int:
        return len(self.rows[self.eval_split])

    @property
    def data_hash(self) -> str:
        """The content of the rows, whatever files and layout they came in."""
        return hash_value(self.rows)

    def config(self, folder: Path) -> dict[str, Any]:
        """What the task's YAML file in `folder` says; the rows are written beside it."""
        config = {"include": str(self.packaged_yaml), "task": self.task, **self.data_settings(folder)}
        # lm-eval opens the splits of shots even when it takes none, and lists all of WikiText's training text.
        if not self.num_fewshot:
            config["fewshot_split"] = None
        if self.set_name == "wikitext":
            config |= {"training_split": None, "validation_split": None}
        return config

    def data_settings(self, folder: Path) -> dict[str, Any]:
        """Write the rows below `folder`; the settings that make lm-eval read them."""
        import pyarrow
        import pyarrow.parquet

        paths = {}
        for split, rows in self.rows.items():
            path = folder / "data" / self.task / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            paths[split] = [str(path)]
        return {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": paths, "cache_dir": str(folder / "cache")},
        }


@dataclass(frozen=True)
class GroupSpec:
    """A group of the tasks that are present; `num_packaged` is how many lm-eval's own group has."""

    group: str
    set_name: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    num_packaged: int


def go_offline(*, may_download: bool = False) -> None:
    """Tell the datasets and hub libraries not to use the network, also where they were imported already."""
    if not may_download:
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants
    from datasets import config, disable_progress_bars

    if not may_download:
        config.HF_DATASETS_OFFLINE = config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    disable_progress_bars()  # one bar per split and subject would bury the evaluation's own


@contextmanager
def without_warnings() -> Iterator[None]:
    """lm-eval warns of its own YAML files, and of what is said here in other words."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_task(folder: str | Path, name: str) -> ConfigurableTask:
    """lm-eval's task from the YAML files in `folder`: its documents are read once, from a fixed state of the global
    generators, and stay as they are.
    """
    import numpy
    from lm_eval.tasks import TaskManager

    random.seed(SHUFFLE_SEED)
    numpy.random.seed(SHUFFLE_SEED)
    # RULER prints each length that it tries, and draws a bar over its documents.
    with redirect_stdout(None), redirect_stderr(io.StringIO()), without_warnings():
        manager = TaskManager(include_path=folder, include_defaults=False)
        task = cast("ConfigurableTask", manager.load([name])["tasks"][name])
        documents: list[Any] = list(task.eval_docs)
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: documents)
    return task


# --- the packaged lm-eval tasks ---------------------------------------------------------------------------------------


class _TaskYaml(yaml.SafeLoader):
    """Reads lm-eval's task files without running the functions they name."""


_TaskYaml.add_constructor("!function", lambda loader, node: str(node.value))


def packaged_folder(task_folder: str) -> Path:
    """Where lm-eval keeps the YAML files of a set; found without importing lm-eval."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lm-eval is not installed: pip install lm-eval")
    return Path(spec.origin).parent / "tasks" / task_folder


@lru_cache
def packaged_tasks(task_folder: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Task name -> (YAML file, settings with `include` resolved) of one packaged folder."""
    configs = [(path, packaged_config(path)) for path in sorted(packaged_folder(task_folder).glob("*.yaml"))]
    return {config["task"]: (path, config) for path, config in configs if isinstance(config.get("task"), str)}


@lru_cache
def packaged_groups(task_folder: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Group name -> (leaf task names, metrics averaged) of one packaged folder."""
    configs = [packaged_config(path) for path in sorted(packaged_folder(task_folder).glob("*.yaml"))]
    groups = {config["group"]: config for config in configs if "group" in config}
    tags: dict[str, list[str]] = {}
    for task, (_, config) in packaged_tasks(task_folder).items():
        tag = config.get("tag") or []
        for name in [tag] if isinstance(tag, str) else tag:
            tags.setdefault(name, []).append(task)

    def leaves(name: str) -> list[str]:
        if name in groups:
            return [leaf for member in groups[name]["task"] for leaf in leaves(member)]
        return tags.get(name, [name])

    return {
        name: (tuple(leaves(name)), tuple(item["metric"] for item in config["aggregate_metric_list"]))
        for name, config in groups.items()
    }


def packaged_config(path: Path) -> dict[str, Any]:
    """The settings of a packaged task or group file, with `include` resolved."""
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskYaml)
    include = config.pop("include", None)
    return {**packaged_config(path.parent / include), **config} if include else config


def write_yaml(path: Path, config: dict[str, Any]) -> None:
    """Write a task's or group's settings."""
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")


# --- lm-eval's files --------------------------------------------------------------------------------------------------


class LmEvalExport:
    """lm-eval's files of one run folder."""

    def __init__(self, folder: RunFolder, model_name: str, chat_template: str | None) -> None:
        self.root, self.model_name, self.chat_template = folder.path / "lm_eval", model_name, chat_template
        record = RunRecord.read(folder.path)
        self.date = str(record.created or "").replace(":", "-").partition("+")[0]

    def keep(self, found: dict[str, Any]) -> None:
        """What `evaluate` returned: its samples, and for each task its part of the results."""
        from lm_eval.utils import hash_string

        tracker = self._tracker()
        for task, samples in found["samples"].items():
            file = self.root / str(tracker.general_config_tracker.model_name_sanitized)
            file = file / f"samples_{task}_{self.date}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            tracker.save_results_samples(task_name=task, samples=samples)
            part = {name: found[name].get(task) for name in PARTS}
            hashes = "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in samples)
            _write(self._part(task), {**part, "task_hash": hash_string(hashes)})

    def write(self, tasks: Iterable[str], groups: Iterable[dict[str, Any]], members: dict[str, list[str]]) -> None:
        """The results of the tasks that were scored, and of the groups (rows as in `evaluation.json`)."""
        parts = {task: json.loads(self._part(task).read_text()) for task in tasks if self._part(task).exists()}
        if not parts:
            return
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
        folder = self.root / str(tracker.general_config_tracker.model_name_sanitized)
        _write(folder / f"results_{self.date}.json", merged)

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


def _write(path: Path, value: Any) -> None:
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=2, default=handle_non_serializable, ensure_ascii=False))
