"""Any other task of lm-eval: from local files, or from the hub where that is allowed.

A local copy is a folder named like the hub's data set (gsm8k/ for openai/gsm8k), with a file for each split.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import metadata, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ascend_kit.evaluation import code_execution
from ascend_kit.evaluation.files import SPLITS, DataError, plain_name, set_files, set_folders, subject_key
from ascend_kit.evaluation.rows import csv_columns
from ascend_kit.evaluation.tasks import LocalTask, load_task, packaged_config, packaged_folder, write_yaml
from ascend_kit.files import cache_root, hash_value, one_line, write_atomic
from ascend_kit.messages import did_you_mean
from ascend_kit.params.experiment import EVAL_SETS, Experiment

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".jsonl": "json"}
SPLIT_KEYS = ("test_split", "validation_split", "training_split", "fewshot_split")
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
# The longest of these that fits stands in where none of its own does, for needles: its other tasks never end then.
RULER_SHORT = (2048, 1024)
RULER_ROOM = 256  # tokens beside the text: the longest answer, and the template
RULER_FROM_WEB = frozenset((
    "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "ruler_qa_squad",
    "ruler_qa_hotpot",
))  # fmt: skip
NEED_SENTENCES = re.compile(r"ifeval|niah_(single_[23]|multikey_1|multivalue|multiquery)$")  # nltk's splitter
SHOWN = 8  # tasks named in an error


@dataclass(frozen=True)
class OtherTask(LocalTask):
    """A task whose documents lm-eval itself reads: `settings` replace those of its packaged file. csv files are read
    here, into `tables` (split -> columns): pandas makes "1.10" 1.1 and "None" nothing.
    """

    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    tables: dict[str, dict[str, list[Any]]] = field(default_factory=dict, hash=False, repr=False)
    count: int = 0
    content: str = ""

    @property
    def num_documents(self) -> int:
        return self.count

    @property
    def data_hash(self) -> str:
        return self.content

    def config(self, folder: Path) -> dict[str, Any]:
        """What the task's YAML file says."""
        import pyarrow.parquet

        settings, copies = self.settings, {}
        for split, columns in self.tables.items():
            copies[split] = str(folder / f"{self.task}-{split}.parquet")
            pyarrow.parquet.write_table(pyarrow.table(columns), copies[split])
        if copies:
            settings = settings | {"dataset_path": "parquet", "dataset_kwargs": {"data_files": copies}}
        return {"include": str(self.packaged_yaml), "task": self.task, **settings}


# --- lm-eval's own tasks ----------------------------------------------------------------------------------------------


def other_tasks(name: str, experiment: Experiment) -> list[OtherTask]:
    """The tasks behind a name of lm-eval (a task, a group or a tag), each loaded once to see that it can be.

    DataError for an unknown name, for data that is neither below `dataset_path` nor may be downloaded, for code that
    may not be run, and for a package that the task needs and that is not here.
    """
    index = _index(name)
    leaves = leaf_tasks(name, index)
    if not leaves:
        raise DataError(f"lm-eval has no task {name!r}{_near(name, index)}")
    found: dict[str, OtherTask] = {}
    faults: dict[str, DataError] = {}
    for leaf in leaves:
        try:
            found[leaf] = _other_task(name, leaf, index[leaf].yaml_path, experiment)
        except DataError as error:
            faults[leaf] = error
    if faults:
        first, able = next(iter(faults.values())), ", ".join(list(found)[:SHOWN])
        if len(leaves) == 1:
            raise first
        rest = f"; of the others any may be named alone ({able}{', ...' if len(found) > SHOWN else ''})" if able else ""
        raise DataError(f"{name}: {len(faults)} of {len(leaves)} tasks cannot be asked; {first}{rest}")
    return [_loaded(task, experiment) for task in found.values()]


def _near(name: str, index: dict[str, Entry]) -> str:
    """What may have been meant: a name in other letters, the tasks of a folder of that name, or the closest word."""
    folders = {path.name for path in packaged_folder("").iterdir() if path.is_dir()}
    root = packaged_folder(name)
    inside = sorted(task for task, entry in index.items() if entry.yaml_path and root in entry.yaml_path.parents)
    if inside:
        return f"; its folder has {', '.join(inside[:SHOWN])}{', ...' if len(inside) > SHOWN else ''}"
    return did_you_mean(name.lower(), {*EVAL_SETS, *index, *folders} - {name})


@cache
def _index(name: str) -> dict[str, Entry]:
    """lm-eval's tasks in the folders that may hold `name`: parsing all of its 14,000 files takes 15 s."""
    from lm_eval.tasks import TaskManager

    root = packaged_folder("")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    near: list[str | Path] = [
        path for path in folders if name.startswith(path.name) or path.name.startswith(re.split("[_-]", name)[0])
    ]
    index = first = TaskManager(include_path=near, include_defaults=False).task_index if near else {}
    if name not in index:
        word = re.compile(rb"(?<![\w-])%s(?![\w-])" % re.escape(name.encode()))
        near = [path for path in folders if any(word.search(file.read_bytes()) for file in path.rglob("*.yaml"))]
        index = TaskManager(include_path=near, include_defaults=False).task_index if near else {}
    return index if name in index else first


def leaf_tasks(name: str, index: dict[str, Entry]) -> list[str]:
    """The tasks behind a task, a group of groups or a tag; empty for an unknown name."""
    entry = index.get(name)
    if entry is None:
        return []
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    members = (entry.cfg or {}).get("task") or []
    names = [str(item.get("task") if isinstance(item, dict) else item) for item in members]
    return list(dict.fromkeys(leaf for member in names if member != name for leaf in leaf_tasks(member, index)))


def _other_task(group: str, name: str, path: Path | None, experiment: Experiment) -> OtherTask:
    assert path is not None, name
    raw = packaged_config(path)
    if raw.get("unsafe_code") and not experiment.allow_code_execution:
        raise DataError(
            f"{name} runs the code that the model writes, on this machine: set allow_code_execution: true where that "
            "may do no harm"
        )
    if raw.get("unsafe_code"):
        code_execution.replace_code_eval()
    is_ruler = path.parent.name == "ruler"
    is_generated = bool(raw.get("custom_dataset")) and not raw.get("dataset_path")
    if name in RULER_FROM_WEB and not experiment.allow_download:
        raise DataError(f"{name} is made from texts that lm-eval fetches from the web: set allow_download: true")
    shortest = RULER_ROOM + (RULER_SHORT[-1] if name.startswith("niah_") else RULER_LENGTHS[0])
    if is_ruler and experiment.eval_max_seq_length < shortest:
        raise DataError(
            f"{name}: the shortest prompts take {shortest} tokens, eval_max_seq_length is "
            f"{experiment.eval_max_seq_length}"
        )
    settings = {} if is_generated else _local_settings(name, raw, experiment)
    if settings is None and not experiment.allow_download:
        wanted = plain_name(str(raw.get("dataset_path", name)).rpartition("/")[2])
        raise DataError(
            f"{name}: no folder {wanted}/ (a copy of {raw.get('dataset_path')}) in dataset_path "
            f"{experiment.dataset_path!r}; put one there, or set allow_download: true"
        )
    tables: dict[str, dict[str, list[Any]]] = {}
    if settings and settings.get("dataset_path") == "csv":
        # GPQA's answers are texts, even where all in a column are numbers.
        files, as_texts = settings["dataset_kwargs"]["data_files"], "gpqa" in path.parts
        tables = {split: csv_columns(paths, as_texts=as_texts) for split, paths in files.items()}
    return OtherTask(
        task=name,
        set_name=group,
        packaged_yaml=path,
        output_type=str(raw.get("output_type", "")),
        settings=settings or {},
        tables=tables,
    )


def _loaded(task: OtherTask, experiment: Experiment) -> OtherTask:
    """The task with what only lm-eval can tell: its documents, metrics and shots."""
    with tempfile.TemporaryDirectory(prefix="ascend-eval-") as scratch:
        try:
            with _nltk_stays_offline(experiment):
                if task.packaged_yaml.parent.name == "ruler":
                    task = replace(task, settings=_drawn_settings(task, experiment))
                write_yaml(Path(scratch) / f"{task.task}.yaml", task.config(Path(scratch)))
                built = load_task(scratch, task.task)
            if detector := sys.modules.get("langdetect"):  # it guesses by chance, and one answer counts always alike
                detector.DetectorFactory.seed = 0
            documents = list(built.eval_docs)
            built.doc_to_text(documents[0])
            if NEED_SENTENCES.search(task.task):
                import nltk

                nltk.data.find("tokenizers/punkt_tab")
        except Exception as error:  # whatever a task file does: a package that is missing, data of another shape
            raise DataError(f"{task.task} cannot be prepared: {_reason(task, error)}") from None
        config = built.config
        shots = config.num_fewshot or 0
        if experiment.eval_fewshot is not None and config.num_fewshot != 0 and config.fewshot_split:
            shots = experiment.eval_fewshot
        metrics = tuple(built.higher_is_better() or ())
        if task.packaged_yaml.parent.name == "ruler":  # a metric for each length
            metrics = tuple(map(str, ruler_lengths(experiment)))
        return replace(
            task,
            num_fewshot=shots,
            output_type=str(built.OUTPUT_TYPE),
            metrics=metrics,
            version=float((config.metadata or {}).get("version", 0)),
            count=len(documents),
            content=hash_value([json.dumps(doc, default=str, ensure_ascii=False) for doc in documents]),
        )


@contextmanager
def _nltk_stays_offline(experiment: Experiment) -> Iterator[None]:
    """Some task files fetch nltk's sentence splitter when they are imported."""
    import nltk

    download = nltk.download
    if not experiment.allow_download:
        nltk.download = lambda *_, **__: False
    try:
        yield
    finally:
        nltk.download = download


def _reason(task: OtherTask, error: Exception) -> str:
    """Why a task cannot be prepared, with the command that helps where a package or its data is missing."""
    extras = metadata("lm-eval").get_all("Provides-Extra") or []
    extra = next((part.name for part in task.packaged_yaml.parents if part.name in extras), None)
    if isinstance(error, ImportError) and extra:
        return f"it needs packages that are not here: pip install 'lm-eval[{extra}]'"
    if isinstance(error, LookupError) and "punkt_tab" in str(error):
        return (
            "nltk has no sentence splitter here: python -m nltk.downloader punkt_tab, or without network a copy of it "
            "as ~/nltk_data/tokenizers/punkt_tab (or tokenizers/punkt_tab in the folder that NLTK_DATA names)"
        )
    return f"{type(error).__name__}: {one_line(error)}"


def _drawn_settings(task: OtherTask, experiment: Experiment) -> dict[str, Any]:
    """Settings that make lm-eval read a task of RULER's whose documents were drawn before, for this tokenizer and these
    lengths: drawing takes minutes, so it is done once per machine.
    """
    import pyarrow.parquet

    from ascend_kit.checkpoint.manifest import tokenizer_hash  # imports torch

    texts, lengths = experiment.tokenizer_path or experiment.input_model, ruler_lengths(experiment)
    key = hash_value([task.task, lengths, tokenizer_hash(Path(texts)), version("lm-eval")])
    path = cache_root() / "ruler" / f"{task.task}-{key[:16]}.parquet"
    if not path.exists():
        whole = replace(task, settings={"dataset_kwargs": {"tokenizer": texts, "max_seq_lengths": lengths}})
        with tempfile.TemporaryDirectory(prefix="ascend-eval-") as scratch:
            write_yaml(Path(scratch) / f"{task.task}.yaml", whole.config(Path(scratch)))
            # A tokenizer that needs many tokens for a word leaves common words no room: nothing is asked for there.
            drawn = cast("list[dict[str, Any]]", list(load_task(scratch, task.task).eval_docs))
            documents = [document for document in drawn if document["outputs"]]
        if not documents:
            raise ValueError(f"{lengths[-1]} tokens hold nothing to be found with this tokenizer")
        buffer = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), buffer, compression="zstd")
        write_atomic(path, buffer.getvalue().to_pybytes())
    files = {"data_files": {"test": str(path)}}
    return {"custom_dataset": None, "dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": files}


def ruler_lengths(experiment: Experiment) -> list[int]:
    """The lengths at which RULER's tasks are asked: those of its own that fit, else the longest short one."""
    longest = experiment.eval_max_seq_length - RULER_ROOM
    fitting = [length for length in RULER_LENGTHS if length <= longest]
    return fitting or [length for length in RULER_SHORT if length <= longest][:1]


def _local_settings(name: str, raw: dict[str, Any], experiment: Experiment) -> dict[str, Any] | None:
    """Settings that make lm-eval read a local copy; None where there is none."""
    root = Path(experiment.dataset_path).expanduser() if experiment.dataset_path else None
    if root is None or not os.path.isdir(root) or not raw.get("dataset_path"):
        return None
    wanted = plain_name(str(raw["dataset_path"]).rpartition("/")[2])
    folders = set_folders(root, lambda folder: folder == wanted)
    if not folders:
        return None
    subject = subject_key(str(raw.get("dataset_name") or wanted))
    splits: dict[str, str] = {key: raw[key] for key in SPLIT_KEYS if isinstance(raw.get(key), str)}
    asked = splits.get("test_split") or splits.get("validation_split") or splits.get("training_split")
    # A file that names no split (gpqa_diamond.csv) is that of the questions.
    files = set_files(folders, [subject], SPLITS.get(asked or "", asked))
    found: dict[str, tuple[Path, ...]] = {}
    for split in set(splits.values()):
        plain = SPLITS.get(split, split)
        paths = files.family(subject, plain) or files.family(None, plain)
        if paths:
            found[split] = paths
    if asked is None or asked not in found:
        where = ", ".join(map(str, folders))
        raise DataError(
            f"{name}: no {asked} split of {subject} in {where} (expected {asked}.parquet, .arrow, .csv or .jsonl)"
        )
    suffixes = {path.suffix for paths in found.values() for path in paths}
    if len(suffixes) > 1:
        raise DataError(f"{name}: files of several kinds ({', '.join(sorted(suffixes))}) in {folders[0]}; keep one")
    return {
        "dataset_path": BUILDERS[suffixes.pop()],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: [str(path) for path in paths] for split, paths in found.items()}},
        **{key: None for key, split in splits.items() if split not in found},
    }
