"""What an evaluation asks: local copies of MMLU, C-Eval, AGIEval and WikiText, described to lm-eval as its own tasks,
any other task, and the documents drawn from them.

Nothing is downloaded and nothing is kept: each evaluation reads the files named here again, so an edited file
can never be answered from an old copy. Every fault of the data is reported before the first request is
scored.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_kit.evaluation import rows as shapes
from ascend_kit.evaluation.files import DataError, SetFiles, set_files, set_folders, subject_key
from ascend_kit.evaluation.other_tasks import other_tasks
from ascend_kit.evaluation.perplexity import TEXT, text_task
from ascend_kit.evaluation.rows import Reader, Row, Shape
from ascend_kit.evaluation.scores import SEEN, Z
from ascend_kit.evaluation.tasks import GroupSpec, LocalTask, go_offline, packaged_groups, packaged_tasks, write_yaml
from ascend_kit.files import Table
from ascend_kit.params import Experiment
from ascend_kit.params.experiment import DEMO

MULTIPLE_CHOICE_GROUP = "agieval_multiple_choice"
DISAGREEMENT = 0.1  # share of documents that two precisions of one model answer differently, an upper guess
FAULTS_SHOWN = 8


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


def check_data(experiment: Experiment) -> list[LocalTask]:
    """The tasks of an experiment, every file and row of them checked, without a model: DataError with all faults.

    The demo's own data is right when it is built and not looked at. Its questions say nothing about another model: then
    `dataset_path` must be given, unless everything asked for is a text or may be downloaded.
    """
    written = experiment.model_dump()  # the word demo as it was written, wherever the demo lies
    sets = [name for name in experiment.eval_datasets if name in SETS]
    others = [name for name in experiment.eval_datasets if name not in SETS]
    if written["dataset_path"] in (None, DEMO) and written["input_model"] != DEMO and sets:
        raise DataError(
            f"dataset_path is not given, and the demo's questions say nothing about {experiment.input_model}: name a "
            f"folder that holds {', '.join(wanted_folder(SETS[name]) for name in sets)}"
        )
    path = experiment.needed("dataset_path") if sets else experiment.dataset_path
    tasks: list[LocalTask] = []
    if path != DEMO:
        tasks += find_tasks(path or ".", sets, num_fewshot=experiment.eval_fewshot)
    if any(not name.startswith(TEXT) for name in others):
        go_offline(may_download=experiment.allow_download)
    for name in others:
        try:
            tasks += [text_task(name)] if name.startswith(TEXT) else other_tasks(name, experiment)
        except DataError as error:
            raise DataError(f"eval_datasets: {error}") from None
    return tasks


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
        if name not in SETS:  # the mean over a group or tag of lm-eval's, of the metrics that all of its tasks have
            own = [task for task in tasks if task.set_name == name]
            common = tuple(metric for metric in own[0].metrics if all(metric in task.metrics for task in own))
            groups += [GroupSpec(name, name, tuple(task.task for task in own), common, len(own))] if own[1:] else []
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


def _subject(config: dict[str, Any]) -> str:
    """What a task's data is filed under: `anatomy`, `law`, `aqua-rat`, `wikitext-2-raw-v1`."""
    return subject_key(config.get("dataset_name") or config["dataset_path"].rpartition("/")[2])


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


# --- documents asked --------------------------------------------------------------------------------------------------


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
            "half_width_points": 100 * Z * math.sqrt(0.25 / asked),
            "detectable_points": 100 * detectable(asked),
        }
        for name, (asked, whole) in counts.items()
    ]
    return pandas.DataFrame(rows)


def allocate(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many documents of each subject: in proportion to their sizes (largest remainders), at least one of each."""
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    exact = {name: limit * size / total for name, size in sizes.items()}
    found = {name: max(1, math.floor(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: math.floor(exact[name]) - exact[name]):
        if sum(found.values()) < limit and found[name] < sizes[name]:
            found[name] += 1
    return found


def draw(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the documents to ask, in the order of the data; subjects that are asked as a whole are left out."""
    if limit is None:
        return {}
    counts = allocate(sizes, limit)
    return {
        name: sorted(random.Random(f"{seed} {name}").sample(range(size), counts[name]))
        for name, size in sizes.items()
        if counts[name] < size
    }


def detectable(n: int) -> float:
    """The smallest difference of two runs on the same n documents that is seen with 80 % power, a fraction."""
    return SEEN * math.sqrt(DISAGREEMENT / n)
