"""Which files of a folder are the data of a set, in the layouts people really have.

A split is a family of files: one file, the shards 0 to N-1 of N, the numbered parts of a folder, or what a README.md or
a state.json lists. Half a family or a second one is an error that names the files. Knows no benchmark: names come from
the caller.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import yaml

SPLITS = {"train": "train", "test": "test", "dev": "dev", "val": "val", "valid": "val", "validation": "val"}
SUFFIXES = (".parquet", ".arrow", ".csv", ".jsonl")
METADATA = ("state.json", "dataset_info.json", "dataset_dict.json", "README.md", "LICENSE", "complete.json")
SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")
# What browsers and desktops add to the name of a second copy: "test (1)", "test - Copy", "test copy 2".
COPY = re.compile(r"( - Copy| - 副本|[ _]copy)?( ?\(\d+\)| \d+)?$", re.I)
FILES_SHOWN = 6
Key = tuple[str | None, str]  # subject, None where no path names one; split


class DataError(ValueError):
    """The local copy of a set is missing, incomplete or holds faults; the text says where and what."""


@dataclass
class SetFiles:
    """What lies in the folders of a set. `listed`: families that a README.md names; `named`: those of file names."""

    listed: dict[Key, list[Path]] = field(default_factory=dict)
    named: dict[Key, list[Path]] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)

    def splits(self, subject: str | None) -> set[str]:
        """The splits that a subject has files of."""
        return {split for key, split in (*self.listed, *self.named) if key == subject}

    def family(self, subject: str | None, split: str) -> tuple[Path, ...]:
        """The files of a split, empty where there are none; DataError for an incomplete family or a second one."""
        listed = self.listed.get((subject, split))
        families = [_one_family(part) for part in _families(listed or self.named.get((subject, split), []))]
        if listed or len(families) < 2:
            return tuple(path for family in families for path in family)
        raise DataError(
            f"two copies of the {split} split: {_shown([family[0] for family in families])}; keep one of them, or name "
            "its folder in dataset_path"
        )

    def describe_others(self) -> str:
        """The files that are no data here, for a refusal; empty where there are none."""
        return f"; other files there: {_shown(self.others)}" if self.others else ""


def set_folders(root: Path, accepts: Callable[[str], bool]) -> list[Path]:
    """Every folder whose plain name is accepted: children of `root`, their children (owner/name), or `root` itself.

    A folder inside an accepted one is not listed again, and `root` counts also by the names of the two folders above it
    (AGIEval/data/v1).
    """
    children = _subfolders(root)
    nested = [path for child in children for path in _subfolders(child)]
    matching = [path for path in (*children, *nested) if accepts(plain_name(path.name))]
    if not matching and any(accepts(plain_name(part)) for part in root.absolute().parts[-3:]):
        matching = [root]
    outermost = [path for path in matching if not any(other in path.parents for other in matching)]
    return list({os.path.realpath(path): path for path in reversed(outermost)}.values())[::-1]


def set_files(folders: Iterable[Path], subjects: Iterable[str], default_split: str | None = None) -> SetFiles:
    """The data files of a set by subject and split. `default_split` is that of files which name none."""
    subjects, found = set(subjects), SetFiles()
    for folder in folders:
        inside = _snapshot(folder)
        files = list(_visible_files(inside))
        data = [path for path in files if path.suffix in SUFFIXES]
        found.others += [path for path in files if path.suffix not in SUFFIXES and path.name not in METADATA]
        for subject, split, path in _from_readme(inside, data):
            if subject in subjects:
                found.listed.setdefault((subject, split), []).append(path)
        for path in data:
            subject, split = _subject_of(folder.name, inside, path, subjects), _split_of(path) or default_split
            if split is None or (subject is None and not _holds_all_subjects(path.relative_to(inside))):
                found.others.append(path)
            else:
                found.named.setdefault((subject, split), []).append(path)
    return found


def plain_name(name: str) -> str:
    """A folder name without owner, hub prefix and underscores: cais___mmlu, datasets--cais--mmlu -> mmlu."""
    return re.split(r"_{2,}|--", name.lower().removeprefix("datasets--"))[-1].replace("_", "-")


def subject_key(name: str) -> str:
    """A subject as compared here: agieval-aqua-rat and aqua_rat -> aqua-rat."""
    return plain_name(name).removeprefix("agieval-")


def _shown(paths: list[Path]) -> str:
    names = ", ".join(str(path) for path in paths[:FILES_SHOWN])
    return names + (f" and {len(paths) - FILES_SHOWN} more" if len(paths) > FILES_SHOWN else "")


# --- walking ----------------------------------------------------------------------------------------------------------


def _subfolders(folder: Path) -> list[Path]:
    """Visible folders, linked ones too; none where the folder cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if _is_visible(name) and os.path.isdir(folder / name)]


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _visible_files(folder: Path) -> Iterator[Path]:
    """Every file that may matter: no hidden ones, no caches of the datasets library, only what a state.json lists."""
    seen: set[str] = set()
    for parent, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        names[:] = sorted(name for name in names if _is_visible(name)) if real not in seen else []
        if real in seen:  # a link back into the folder
            continue
        seen.add(real)
        listed = _listed_by_state(Path(parent))
        for name in sorted(listed if listed is not None else files):
            if _is_visible(name) and not name.startswith("cache-"):
                yield Path(parent, name)


def _listed_by_state(folder: Path) -> list[str] | None:
    """The data files of a saved dataset, as its state.json says; None where there is no such file."""
    state = _state(folder)
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        return None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise DataError(f"{folder / 'state.json'} lists {', '.join(outside)}: a saved dataset names files beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder / 'state.json'} lists {', '.join(missing)}, which is not there: half a copy")
    return names


def _state(folder: Path) -> Any:
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _snapshot(folder: Path) -> Path:
    """The files of a hub-cache folder (datasets--owner--name): its main or newest snapshot; else the folder."""
    snapshots = folder / "snapshots"
    versions = _subfolders(snapshots)
    if not versions:
        return folder
    try:
        chosen = snapshots / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        chosen = snapshots
    return chosen if chosen in versions else max(versions, key=lambda path: path.stat().st_mtime)


# --- what a path says -------------------------------------------------------------------------------------------------


def _subject_of(name: str, folder: Path, path: Path, subjects: set[str]) -> str | None:
    stem = _stem(path)
    words = re.split(r"[-_.]", stem)
    if len(words) > 1 and words[-1].lower() in SPLITS:
        stem = stem[: -len(words[-1]) - 1]
    parts = [name, *path.relative_to(folder).parts[:-1], stem]
    key = next((key for key in map(subject_key, reversed(parts)) if key in subjects), None)
    if key is None and len(subjects) == 1 and path.parent in (folder, folder / "data"):
        return next(iter(subjects))  # a set of one configuration may lie flat
    return key


def _stem(path: Path) -> str:
    """The name without suffix, number of the shard and mark of a copy."""
    return SHARD.sub("", COPY.sub("", path.stem))


def _holds_all_subjects(relative: Path) -> bool:
    """Whether a file that names no subject may hold all of them: all/..., test.parquet, data/test-...parquet."""
    stem = _stem(relative).lower()
    return "all" in relative.parts[:-1] or (len(relative.parts) <= 2 and (stem in SPLITS or stem == "data"))


def _split_of(path: Path) -> str | None:
    """The split in `test.parquet`, `test-00000-of-00001.parquet`, `law_val.csv`, `test/0000.parquet` or state.json."""
    last = re.split(r"[-_.]", _stem(path))[-1].lower()
    found = SPLITS.get(last) or SPLITS.get(path.parent.name.lower())
    return found or SPLITS.get(str(dict(_state(path.parent)).get("_split")))


def _from_readme(folder: Path, files: list[Path]) -> Iterator[tuple[str, str, Path]]:
    """(subject, split, file) of every pattern in a dataset card's `configs`; none where it is broken."""
    try:
        text = (folder / "README.md").read_bytes().decode("utf-8-sig")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.S)
        card = yaml.safe_load(front.group(1)) if front else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return
    configs = card.get("configs") if isinstance(card, dict) else None
    for config in configs if isinstance(configs, list) else []:
        entries = config.get("data_files") if isinstance(config, dict) else None
        if isinstance(entries, dict):
            entries = [{"split": split, "path": patterns} for split, patterns in entries.items()]
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, dict) or not {"split", "path"} <= entry.keys():
                continue  # a bare pattern names no split
            patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
            for path in files:
                relative = path.relative_to(folder).as_posix()
                if any(fnmatch.fnmatchcase(relative, str(pattern)) for pattern in patterns):
                    split = str(entry["split"])
                    yield subject_key(str(config.get("config_name"))), SPLITS.get(split, split), path


# --- families ---------------------------------------------------------------------------------------------------------


def _families(paths: Iterable[Path]) -> list[list[Path]]:
    """Files grouped by what they are parts of; a file that is reached by two links counts once."""
    found: dict[tuple, list[Path]] = {}
    for path in {os.path.realpath(path) + path.suffix: path for path in paths}.values():
        shard = SHARD.search(path.stem)
        stem = "" if path.stem.isdecimal() else SHARD.sub("", path.stem)
        found.setdefault((path.parent, stem, path.suffix, shard and shard.group(2)), []).append(path)
    return list(found.values())


def _one_family(paths: list[Path]) -> list[Path]:
    """The files in the order of their numbers; DataError where one is missing or there twice."""
    shards = [SHARD.search(path.stem) for path in paths]
    numbers = [
        int(shard.group(1)) if shard else int(path.stem) if path.stem.isdecimal() else 0
        for path, shard in zip(paths, shards, strict=True)
    ]
    expected = int(shards[0].group(2)) if shards[0] else max(numbers) + 1
    twice = sorted(path for path, number in zip(paths, numbers, strict=True) if numbers.count(number) > 1)
    if twice:
        raise DataError(f"a part is there twice: {_shown(twice)}")
    present = set(numbers)
    beyond = [path for path, number in zip(paths, numbers, strict=True) if number >= expected]
    if beyond:
        raise DataError(f"a part beyond the {expected} that its name tells: {_shown(beyond)}")
    if len(present) < expected:  # a name may tell of any number of parts: never count them one by one
        missing = islice((number for number in count() if number not in present), FILES_SHOWN)
        raise DataError(
            f"half a download: {_shown(sorted(paths))} of {expected} parts; missing: part "
            f"{', '.join(str(number) for number in missing if number < expected)}"
        )
    return [path for _, path in sorted(zip(numbers, paths, strict=True))]
