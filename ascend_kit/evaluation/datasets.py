"""Local copies of MMLU, C-Eval, AGIEval and WikiText, described to lm-eval as its own tasks.

Nothing is downloaded and nothing is kept: each evaluation reads the files named here again, so an edited file
can never be answered from an old copy. Every fault of the data is reported before the first request is
scored.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ascend_kit.evaluation.files import DataError, SplitFiles, check_file, data_files, set_folders, subject_key
from ascend_kit.identity import file_hash, hash_value

# Column -> kind, as the packaged lm-eval tasks read them.
MMLU_COLUMNS = {"question": "string", "choices": "list of string", "answer": "integer"}
CEVAL_COLUMNS = {name: "string" for name in ("question", "A", "B", "C", "D", "answer")}
AGIEVAL_COLUMNS = {"query": "string", "choices": "list of string", "gold": "list of integer"}
AGIEVAL_CLOZE_COLUMNS = {"query": "string", "answer": "string"}
MULTIPLE_CHOICE_GROUP = "agieval_multiple_choice"
FAULTS_SHOWN = 8


@dataclass(frozen=True)
class SetSpec:
    """One set: its packaged task folder, the folder names it is recognised by, and what its files must
    hold.
    """

    name: str
    task_folder: str
    folder_names: tuple[str, ...]
    columns: dict[str, str]
    hub_name: str
    shots: int = 0
    shots_are_fixed: bool = True

    def accepts(self, folder_name: str) -> bool:
        """Whether a folder of this plain name holds the set (AGIEval: also one of its subjects)."""
        is_subject = self.name == "agieval" and folder_name.startswith("agieval-")
        return is_subject or folder_name in self.folder_names


SETS = {
    "mmlu": SetSpec("mmlu", "mmlu/default", ("mmlu", "cais-mmlu"), MMLU_COLUMNS, "cais/mmlu", 5, False),
    "ceval": SetSpec("ceval", "ceval", ("ceval", "ceval-exam", "c-eval"), CEVAL_COLUMNS, "ceval/ceval-exam", 5, False),
    # lm-eval 0.4.13 cannot build a shot from AGIEval's columns ("Answer is not a string!"): always 0.
    "agieval": SetSpec("agieval", "agieval", ("agieval",), AGIEVAL_COLUMNS, "hails/agieval-<name>"),
    "wikitext": SetSpec(
        "wikitext",
        "wikitext",
        ("wikitext", "wikitext-document-level"),
        {"page": "string"},
        "EleutherAI/wikitext_document_level",
    ),
}


@dataclass(frozen=True)
class LocalTask:
    """One lm-eval task whose data lies on this disk."""

    task: str
    set_name: str
    packaged_yaml: Path
    files: SplitFiles = field(hash=False)
    num_documents: int
    num_fewshot: int
    output_type: str
    metrics: tuple[str, ...]
    data_hash: str
    version: float


@dataclass(frozen=True)
class GroupSpec:
    """A group of the tasks that are present; `num_packaged` is how many lm-eval's own group has."""

    group: str
    set_name: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    num_packaged: int


def go_offline() -> None:
    """Tell the datasets and hub libraries not to use the network, also where they were imported already."""
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()  # one bar per split and subject would bury the evaluation's own


def find_tasks(dataset_path: str | Path, sets: Iterable[str], *, num_fewshot: int | None = None) -> list[LocalTask]:
    """Every task of `sets` whose data lies below `dataset_path`, checked file by file.

    `num_fewshot` replaces the usual number of shots of MMLU and C-Eval (5); the other sets stay at 0.
    Raises DataError with all faults at once: path, columns and splits expected, and what was found.
    """
    root, sets = Path(dataset_path).expanduser(), list(dict.fromkeys(sets))
    if not root.is_dir():
        raise DataError(
            f"dataset_path {str(root)!r} is not a folder; it must hold "
            + ", ".join(_wanted_folder(SETS[name]) for name in sets)
        )
    tasks: list[LocalTask] = []
    faults: list[str] = []
    for name in sets:
        _find_set(root, SETS[name], num_fewshot, tasks, faults)
    if faults:
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise DataError("the local data sets cannot be used:\n  " + "\n  ".join(faults[:FAULTS_SHOWN]) + more)
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


def write_task_folder(tasks: Iterable[LocalTask], folder: str | Path) -> Path:
    """Write the YAML folder for `TaskManager(include_path=..., include_defaults=False)`; returns it.

    Each task includes its packaged YAML, keeps its name and points at the local files. Arrow copies made
    while reading go to <folder>/cache, so they live exactly as long as the folder does.
    """
    folder, tasks = Path(folder), list(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        _write_yaml(folder / f"{task.task}.yaml", _task_config(task, folder / "cache"))
    for group in groups_of(tasks):
        metrics = [{"metric": metric, "aggregation": "mean", "weight_by_size": True} for metric in group.metrics]
        _write_yaml(
            folder / f"_group_{group.group}.yaml",
            {"group": group.group, "task": list(group.tasks), "aggregate_metric_list": metrics},
        )
    return folder


# --- the packaged lm-eval tasks -----------------------------------------------------------------------------


class _TaskYaml(yaml.SafeLoader):
    """Reads lm-eval's task files without running the functions they name."""


_TaskYaml.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def packaged_folder(task_folder: str) -> Path:
    """Where lm-eval keeps the YAML files of a set; found without importing lm-eval."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lm-eval is not installed: pip install lm-eval")
    return Path(spec.origin).parent / "tasks" / task_folder


@lru_cache
def packaged_tasks(task_folder: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Task name -> (YAML file, settings with `include` resolved) of one packaged folder."""
    configs = [(path, _read_task(path)) for path in sorted(packaged_folder(task_folder).glob("*.yaml"))]
    return {config["task"]: (path, config) for path, config in configs if isinstance(config.get("task"), str)}


@lru_cache
def packaged_groups(task_folder: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Group name -> (leaf task names, metrics averaged) of one packaged folder."""
    configs = [_read_task(path) for path in sorted(packaged_folder(task_folder).glob("*.yaml"))]
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


def _read_task(path: Path) -> dict[str, Any]:
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskYaml)
    include = config.pop("include", None)
    return {**_read_task(path.parent / include), **config} if include else config


def _subject(config: dict[str, Any]) -> str:
    """What a task's data is filed under: `anatomy`, `law`, `aqua-rat`, `wikitext-2-raw-v1`."""
    return subject_key(config.get("dataset_name") or config["dataset_path"].rpartition("/")[2])


def _task_config(task: LocalTask, cache: Path) -> dict[str, Any]:
    builder = next(iter(task.files.values()))[0].suffix[1:]
    paths = {split: [str(path) for path in files] for split, files in task.files.items()}
    config = {
        "include": str(task.packaged_yaml),
        "task": task.task,
        "dataset_path": builder,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": paths, "cache_dir": str(cache)},
    }
    # lm-eval opens the splits of shots even when it takes none, and lists all of WikiText's training text.
    if not task.num_fewshot:
        config["fewshot_split"] = None
    if task.set_name == "wikitext":
        config |= {"training_split": None, "validation_split": None}
    return config


def _write_yaml(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")


# --- the tasks on this disk ---------------------------------------------------------------------------------


def _find_set(root: Path, spec: SetSpec, num_fewshot: int | None, tasks: list[LocalTask], faults: list[str]) -> None:
    folders = set_folders(root, spec.accepts, first_name=spec.name)
    if spec.name != "agieval":
        folders = folders[:1]  # one copy is read; only AGIEval lies in several folders
    if not folders:
        below = ", ".join(sorted(path.name for path in root.iterdir())[:12]) or "nothing"
        faults.append(f"{spec.name}: no folder {_wanted_folder(spec)} in {root} (it holds: {below})")
        return
    packaged = packaged_tasks(spec.task_folder)
    files = data_files(folders, {_subject(config) for _, config in packaged.values()})
    if not files:
        some = ", ".join(sorted(_subject(config) for _, config in packaged.values())[:3])
        where = ", ".join(str(path) for _, path in folders)
        faults.append(
            f"{spec.name}: no data file of a known subject in {where}; expected "
            f"<subject>/<split>.parquet with subjects such as {some}"
        )
    shots = spec.shots if num_fewshot is None or spec.shots_are_fixed else num_fewshot
    for task, (path, config) in packaged.items():
        splits = files.get(_subject(config))
        if splits:
            try:
                tasks.append(_local_task(spec, task, path, config, splits, shots))
            except DataError as error:
                faults.append(f"{task}: {error}")


def _local_task(
    spec: SetSpec, task: str, path: Path, config: dict[str, Any], splits: SplitFiles, shots: int
) -> LocalTask:
    columns = AGIEVAL_CLOZE_COLUMNS if config["output_type"] == "generate_until" else spec.columns
    eval_split = config.get("test_split") or config["validation_split"]
    shots_split = config["fewshot_split"] if shots else None
    files = {split: _split_files(splits, split) for split in (eval_split, shots_split) if split}
    rows = {split: sum(check_file(file, columns) for file in paths) for split, paths in files.items()}
    if shots_split and rows[shots_split] < shots:
        raise DataError(
            f"{shots} shots asked, but {files[shots_split][0]} has {rows[shots_split]} rows; set "
            f"eval_fewshot to {rows[shots_split]} or less"
        )
    return LocalTask(
        task=task,
        set_name=spec.name,
        packaged_yaml=path,
        files=files,
        num_documents=rows[eval_split],
        num_fewshot=shots,
        output_type=config["output_type"],
        data_hash=hash_value({split: [file_hash(file) for file in paths] for split, paths in files.items()}),
        version=config["metadata"]["version"],
        metrics=tuple(item["metric"] for item in config["metric_list"]),
    )


def _split_files(splits: SplitFiles, split: str) -> tuple[Path, ...]:
    if split not in splits:
        near = next(iter(splits.values()))[0].parent
        raise DataError(
            f"no {split} split in {near} (found: {', '.join(sorted(splits))}; expected "
            f"{split}.parquet or {split}-00000-of-00001.parquet)"
        )
    return splits[split]


def _wanted_folder(spec: SetSpec) -> str:
    return f"{spec.name}/ (a copy of {spec.hub_name})"
