"""Find the data files of a set on disk, in the layouts people really have, and check their columns.

Layouts: <subject>/<split>.parquet, hub downloads (<subject>/<split>-00000-of-00001.parquet, data/<split>-...,
datasets--owner--name/snapshots/...), converted branches (<subject>/<split>/0000.parquet) and cache folders of
the datasets library (owner___name/..., .arrow). Knows no benchmark: names and columns come from the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

SPLITS = {"train": "train", "test": "test", "dev": "dev", "val": "val", "valid": "val", "validation": "val"}
SUFFIXES = (".parquet", ".arrow")
SplitFiles = dict[str, tuple[Path, ...]]


class DataError(ValueError):
    """The local copy of a set is missing, incomplete or has other columns; the text says where and what."""


def set_folders(root: Path, accepts: Callable[[str], bool], *, first_name: str) -> list[tuple[str, Path]]:
    """(folder name, where its files are) of every folder whose plain name is accepted, `first_name` first.

    Looks at `root`'s children, their children (owner/name) and `root` itself; a folder inside an accepted one
    is not listed again.
    """
    children = [path for path in sorted(root.iterdir()) if path.is_dir()]
    nested = [path for child in children for path in sorted(child.iterdir()) if path.is_dir()]
    matching = [path for path in (*children, *nested, root) if accepts(plain_name(path.name))]
    outermost = [path for path in matching if not any(other in path.parents for other in matching)]
    outermost.sort(key=lambda path: plain_name(path.name) != first_name)
    return [(path.name, _snapshot(path)) for path in outermost]


def data_files(folders: Iterable[tuple[str, Path]], subjects: Iterable[str]) -> dict[str, SplitFiles]:
    """subject key -> split -> files. A README's `configs` decide; names of files and folders fill the
    rest.
    """
    subjects = set(subjects)
    result: dict[str, SplitFiles] = {}
    for name, folder in folders:
        for key, split, paths in (*_from_readme(folder), *_from_names(name, folder, subjects)):
            if key in subjects:
                result.setdefault(key, {}).setdefault(split, paths)
    return result


def plain_name(name: str) -> str:
    """A folder name without owner, hub prefix and underscores: cais___mmlu, datasets--cais--mmlu -> mmlu."""
    return re.split(r"_{2,}|--", name.lower().removeprefix("datasets--"))[-1].replace("_", "-")


def subject_key(name: str) -> str:
    """A subject as compared here: agieval-aqua-rat and aqua_rat -> aqua-rat."""
    return plain_name(name).removeprefix("agieval-")


def check_file(path: Path, columns: dict[str, str]) -> int:
    """Rows of the file; DataError when it cannot be read or a column is missing or of another kind."""
    import pyarrow

    try:
        schema, num_rows = _open_schema(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as {path.suffix[1:]} ({reason})") from None
    found = {name: _kind(schema.field(name).type) for name in schema.names}
    wrong = [name for name, kind in columns.items() if found.get(name) != kind]
    if wrong:
        missing = _describe({name: columns[name] for name in wrong})
        raise DataError(f"{path} lacks {missing}; expected columns {_describe(columns)}; found {_describe(found)}")
    if not num_rows:
        raise DataError(f"{path} has no rows")
    return num_rows


def _snapshot(folder: Path) -> Path:
    """The files of a hub-cache folder (datasets--owner--name): its main or newest snapshot; else the
    folder.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    return max(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, default=folder)


def _from_readme(folder: Path) -> Iterator[tuple[str, str, tuple[Path, ...]]]:
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    match = re.match(r"---\n(.*?)\n---", text, re.S)
    try:
        front = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return  # a broken card says nothing; the file names still do
    for config in (front or {}).get("configs") or []:
        for item in config.get("data_files") or []:
            if not isinstance(item, dict):  # a bare pattern names no split
                continue
            patterns = [item["path"]] if isinstance(item["path"], str) else item["path"]
            found = sorted(path for pattern in patterns for path in folder.glob(pattern))
            paths = tuple(path for path in found if path.suffix in SUFFIXES)
            if paths:
                yield subject_key(config["config_name"]), SPLITS.get(item["split"], item["split"]), paths


def _from_names(name: str, folder: Path, subjects: set[str]) -> Iterator[tuple[str, str, tuple[Path, ...]]]:
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        keys = [subject_key(part) for part in (name, *path.relative_to(folder).parts[:-1])]
        key = next((key for key in reversed(keys) if key in subjects), None)
        if key is None and len(subjects) == 1 and path.parent in (folder, folder / "data"):
            key = next(iter(subjects))  # a set of one configuration may lie flat
        split = _split_of(path)
        if split and key:
            found.setdefault((key, split), []).append(path)
    for (key, split), paths in found.items():
        # One copy of a split: parquet before arrow, and the files that lie together.
        best = min(paths, key=lambda path: (SUFFIXES.index(path.suffix), len(path.parts), path))
        together = (path for path in paths if (path.suffix, path.parent) == (best.suffix, best.parent))
        yield key, split, tuple(together)


def _split_of(path: Path) -> str | None:
    """The split in `test.parquet`, `test-00000-of-00001.parquet`, `mmlu-test.arrow` or
    `test/0000.parquet`.
    """
    stem = re.sub(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$", "", path.stem)
    return SPLITS.get(re.split(r"[-_.]", stem)[-1]) or SPLITS.get(path.parent.name)


def _open_schema(path: Path) -> tuple[Any, int]:
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        meta = pyarrow.parquet.read_metadata(path)
        return meta.schema.to_arrow_schema(), meta.num_rows
    with pyarrow.memory_map(str(path)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
    return table.schema, table.num_rows


def _kind(arrow_type: Any) -> str:
    from pyarrow import types

    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        return f"list of {_kind(arrow_type.value_type)}"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "string"
    return "integer" if types.is_integer(arrow_type) else str(arrow_type)


def _describe(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
