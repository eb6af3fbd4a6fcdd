"""Local copies of MMLU, C-Eval, AGIEval and WikiText, described to lm-eval as its own tasks.

Nothing is downloaded and nothing is kept: each evaluation reads the files named here again, so an edited file
can never be answered from an old copy. Every fault of the data is reported before the first request is
scored.
"""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from ascend_kit.evaluation import rows as shapes
from ascend_kit.evaluation.files import DataError, SetFiles, set_files, set_folders, subject_key
from ascend_kit.evaluation.rows import Reader, Row, Shape
from ascend_kit.identity import hash_value

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

MULTIPLE_CHOICE_GROUP = "agieval_multiple_choice"
FAULTS_SHOWN = 8
SHUFFLE_SEED = 0  # lm-eval's default: some tasks shuffle their choices with the global generators


@dataclass(frozen=True)
class SetSpec:
    """One set: its packaged task folder, the folder names it is recognised by, and what its rows must hold."""

    name: str
    task_folder: str
    folder_names: tuple[str, ...]
    shape: Shape
    hub_name: str
    shots: int = 0
    shots_are_fixed: bool = True
    default_split: str | None = None

    def accepts(self, folder_name: str) -> bool:
        """Whether a folder of this plain name holds the set (AGIEval: also one of its subjects)."""
        is_subject = self.name == "agieval" and folder_name.startswith("agieval-")
        return is_subject or folder_name in self.folder_names


SETS = {spec.name: spec for spec in (
    SetSpec("mmlu", "mmlu/default", ("mmlu", "cais-mmlu", "mmlu-no-train", "hendrycks-test"), shapes.MMLU, "cais/mmlu",
            5, False),
    SetSpec("ceval", "ceval", ("ceval", "ceval-exam", "c-eval", "formal-ceval"), shapes.CEVAL, "ceval/ceval-exam",
            5, False),
    # lm-eval 0.4.13 cannot build a shot from AGIEval's columns ("Answer is not a string!"): always 0.
    SetSpec("agieval", "agieval", ("agieval",), shapes.AGIEVAL, "hails/agieval-<name>", default_split="test"),
    SetSpec("wikitext", "wikitext", ("wikitext", "wikitext-document-level"), shapes.WIKITEXT,
            "EleutherAI/wikitext_document_level"),
)}  # fmt: skip


@dataclass(frozen=True)
class LocalTask:
    """One lm-eval task whose data lies on this disk: the files, and their checked rows by split."""

    task: str
    set_name: str
    packaged_yaml: Path
    files: dict[str, tuple[Path, ...]] = field(hash=False)
    rows: dict[str, list[Row]] = field(hash=False, repr=False)
    eval_split: str
    num_fewshot: int
    output_type: str
    metrics: tuple[str, ...]
    version: float

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


def find_tasks(dataset_path: str | Path, sets: Iterable[str], *, num_fewshot: int | None = None) -> list[LocalTask]:
    """Every task of `sets` whose data lies below `dataset_path`, checked row by row.

    `num_fewshot` replaces the usual number of shots of MMLU and C-Eval (5); the other sets stay at 0.
    Raises DataError with all faults at once: path, row, columns and splits expected, and what was found.
    """
    root, sets = Path(dataset_path).expanduser(), list(dict.fromkeys(sets))
    if not os.path.isdir(root) or not os.access(root, os.R_OK | os.X_OK):
        what = "cannot be read" if os.path.isdir(root) else "is not a folder; it must hold "
        wanted = "" if os.path.isdir(root) else ", ".join(wanted_folder(SETS[name]) for name in sets)
        raise DataError(f"dataset_path {str(root)!r} {what}{wanted}")
    tasks: list[LocalTask] = []
    faults: list[str] = []
    for name in sets:
        try:
            _find_set(root, SETS[name], num_fewshot, tasks, faults)
        except DataError as error:
            faults.append(f"{name}: {error}")
    if faults:
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        shown = "\n  ".join(faults[:FAULTS_SHOWN])
        raise DataError(f"dataset_path: the local data sets cannot be used:\n  {shown}{more}")
    return tasks


def groups_of(tasks: Iterable[LocalTask]) -> list[GroupSpec]:
    """lm-eval's groups restricted to the tasks that are present, and AGIEval without its generative tasks.

    The generative AGIEval tasks allow 32 new tokens, too few for a model that reasons first, and lm-eval
    counts them in the group mean; the extra group shows the mean without them under its own name.
    """
    tasks = list(tasks)
    present = {task.task for task in tasks}
    groups = []
    for name in dict.fromkeys(task.set_name for task in tasks):
        if name not in SETS:
            groups += plain_group(name, [task for task in tasks if task.set_name == name])
            continue
        for group, (members, metrics) in packaged_groups(SETS[name].task_folder).items():
            here = tuple(member for member in members if member in present)
            if here:
                groups.append(GroupSpec(group, name, here, metrics, len(members)))
    choice = tuple(t.task for t in tasks if t.set_name == "agieval" and t.output_type == "multiple_choice")
    if choice:
        packaged = packaged_tasks(SETS["agieval"].task_folder).values()
        total = sum(config["output_type"] == "multiple_choice" for _, config in packaged)
        groups.append(GroupSpec(MULTIPLE_CHOICE_GROUP, "agieval", choice, ("acc", "acc_norm"), total))
    return groups


def plain_group(name: str, tasks: list[LocalTask]) -> list[GroupSpec]:
    """The mean over the tasks of a group or tag of lm-eval's, of the metrics that all of them have."""
    if len(tasks) < 2:
        return []
    metrics = tuple(metric for metric in tasks[0].metrics if all(metric in task.metrics for task in tasks))
    return [GroupSpec(name, name, tuple(task.task for task in tasks), metrics, len(tasks))]


def write_task_folder(tasks: Iterable[LocalTask], folder: str | Path) -> Path:
    """YAML and parquet files that make lm-eval read exactly the checked rows; returns the folder.

    Use it as `TaskManager(include_path=folder, include_defaults=False)`. The copies the datasets library makes
    while reading go to <folder>/cache, so they live exactly as long as the folder does.
    """
    folder, tasks = Path(folder), list(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        write_yaml(folder / f"{task.task}.yaml", task.config(folder))
    for group in groups_of(tasks):
        metrics = [{"metric": metric, "aggregation": "mean", "weight_by_size": True} for metric in group.metrics]
        write_yaml(
            folder / f"_group_{group.group}.yaml",
            {"group": group.group, "task": list(group.tasks), "aggregate_metric_list": metrics},
        )
    return folder


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


def _subject(config: dict[str, Any]) -> str:
    """What a task's data is filed under: `anatomy`, `law`, `aqua-rat`, `wikitext-2-raw-v1`."""
    return subject_key(config.get("dataset_name") or config["dataset_path"].rpartition("/")[2])


def write_yaml(path: Path, config: dict[str, Any]) -> None:
    """Write a task's or group's settings."""
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")


# --- the tasks on this disk -------------------------------------------------------------------------------------------


def _find_set(root: Path, spec: SetSpec, num_fewshot: int | None, tasks: list[LocalTask], faults: list[str]) -> None:
    folders = set_folders(root, spec.accepts)
    if not folders:
        below = ", ".join(sorted(os.listdir(root))[:12]) or "nothing"
        faults.append(f"{spec.name}: no folder {wanted_folder(spec)} in {root} (it holds: {below})")
        return
    packaged = packaged_tasks(spec.task_folder)
    subjects = {_subject(config) for _, config in packaged.values()}
    files = set_files(folders, subjects, spec.default_split)
    shots = spec.shots if num_fewshot is None or spec.shots_are_fixed else num_fewshot
    before, reader = (len(tasks), len(faults)), Reader(subjects)
    for task, (path, config) in packaged.items():
        try:
            found = _local_task(spec, task, path, config, files, reader, shots)
            tasks += [found] if found else []
        except DataError as error:
            if not any(fault.endswith(f": {error}") for fault in faults):  # one of a file for all subjects is said once
                faults.append(f"{task}: {error}")
    if (len(tasks), len(faults)) == before:
        where = ", ".join(map(str, folders))
        faults.append(
            f"{spec.name}: no data file of a known subject in {where}; expected <subject>/<split>.parquet, .arrow, "
            f".csv or .jsonl with subjects such as {', '.join(sorted(subjects)[:3])}{files.describe_others()}"
        )


def _local_task(
    spec: SetSpec, task: str, path: Path, config: dict[str, Any], files: SetFiles, reader: Reader, shots: int
) -> LocalTask | None:
    """The task with its rows; None where nothing of its subject is there."""
    subject = _subject(config)
    shape = shapes.AGIEVAL_CLOZE if config["output_type"] == "generate_until" else spec.shape
    mixed = not files.splits(subject)  # one file for all subjects, as the configuration `all` of MMLU
    eval_split = config.get("test_split") or config["validation_split"]
    shots_split = config["fewshot_split"] if shots else None
    chosen: dict[str, tuple[Path, ...]] = {}
    rows: dict[str, list[Row]] = {}
    for split in (eval_split, shots_split):
        if split:
            chosen[split] = files.family(None if mixed else subject, split)
            rows[split] = reader.split(chosen[split], shape, subject, mixed=mixed)
        if mixed and not rows[eval_split]:
            return None
    for split in chosen:
        if not rows[split]:
            there = sorted(files.splits(None if mixed else subject))
            near = files.family(None if mixed else subject, there[0])[0].parent
            raise DataError(
                f"no {split} split in {near} (found: {', '.join(there)}; expected {split}.parquet or "
                f"{split}-00000-of-00001.parquet{files.describe_others()})"
            )
    if spec.name == "wikitext" and not any(row["page"].strip() for row in rows[eval_split]):
        raise DataError(f"{chosen[eval_split][0]} holds no text")
    if shots_split and len(rows[shots_split]) < shots:
        count = len(rows[shots_split])
        raise DataError(
            f"{shots} shots asked, but {chosen[shots_split][0]} has {count} rows; set eval_fewshot to {count} or less"
        )
    return LocalTask(
        task=task,
        set_name=spec.name,
        packaged_yaml=path,
        files=chosen,
        rows=rows,
        eval_split=eval_split,
        num_fewshot=shots,
        output_type=config["output_type"],
        metrics=tuple(item["metric"] for item in config["metric_list"]),
        version=config["metadata"]["version"],
    )


def wanted_folder(spec: SetSpec) -> str:
    """How a folder that holds the set is called."""
    return f"{spec.name}/ (a copy of {spec.hub_name})"
