"""ascend_manifest.json: what a converted folder was made from, how, and hashes that show it is still that.

Hashes are XXH3 with 128 bits. They find damage and mix-ups, which is all that a manifest lying beside its
files can do (whoever changes a file on purpose can change the manifest too), and unlike sha256 they keep up
with a disk.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NotRequired

import torch
import xxhash
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic takes the one of typing from Python 3.12 on

from ascend_kit import __version__
from ascend_kit.checkpoint.tensor_file import MAX_HEADER_BYTES, CheckpointError
from ascend_kit.files import one_line, strict_json
from ascend_kit.identity import file_hash, hash_file

MANIFEST_NAME = "ascend_manifest.json"
SCHEMA_VERSION = 1
NAME_BYTES = 255  # of a file, on every common file system
HASH_ALGORITHM = "xxh3_128"


class _Entry(TypedDict):
    name: str
    size: int
    mtime_ns: int
    header_hash: str
    hash: str


class _Source(TypedDict):
    folder: str
    files: list[_Entry]
    companions: NotRequired[list[_Entry]]
    left_out: NotRequired[list[str]]
    adapter: NotRequired[str]  # the folder; what it held is in the settings


class _Scheme(TypedDict):
    scheme: str


class _Form(TypedDict):
    settings: dict[str, Any]
    quantization: _Scheme
    num_tensors: int
    source: _Source
    files: list[_Entry]


_FORM = TypeAdapter(_Form)


def header_hash(path: Path) -> str:
    """Hash of what identifies a file quickly: a safetensors header, else the first and last 64 KiB."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if path.suffix == ".safetensors" and length <= min(size, MAX_HEADER_BYTES):
            return xxhash.xxh3_128_hexdigest(head + file.read(length))
        first = head + file.read((64 << 10) - 8)
        file.seek(max(len(first), size - (64 << 10)))
        return xxhash.xxh3_128_hexdigest(first + file.read())


def describe_file(path: Path, full_hash: str) -> dict[str, Any]:
    """The manifest's entry for a file: name, size, modification time, quick hash and full hash."""
    stat = os.stat(path)
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "header_hash": header_hash(path),
            "hash": full_hash}  # fmt: skip


def new_manifest(**parts: Any) -> dict[str, Any]:
    """The manifest of a finished conversion: its parts, and the versions that may change what a conversion writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "hash_algorithm": HASH_ALGORITHM,
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "ascend_kit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        },
        **parts,
    }


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a folder; None when there is none, CheckpointError when it is damaged."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = strict_json(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        if version == SCHEMA_VERSION:
            _FORM.validate_python(manifest, strict=True)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)}); convert the model again") from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}; convert the model again"
        )
    for name in (entry["name"] for entry in manifest["files"]):
        if Path(name).name != name or len(name.encode(errors="replace")) > NAME_BYTES:
            raise CheckpointError(f"{path} is damaged: it lists {name!r}, and only files beside it count")
    return manifest


def verify(folder: str | Path, full: bool = False) -> bool:
    """Check a folder against its manifest: sizes and headers, with `full` every byte.

    CheckpointError names the first file that is missing, added or different. False for a folder without a manifest (a
    plain Hugging Face download): it has nothing to be checked against.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    listed = {entry["name"] for entry in manifest["files"]}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in listed:
            raise CheckpointError(f"{path} is not in {MANIFEST_NAME}: it was added after the conversion")
    for entry in manifest["files"]:
        _check_entry(folder / entry["name"], entry, full)
    return True


def _check_entry(path: Path, entry: dict[str, Any], full: bool) -> None:
    again = "the folder was changed after the conversion; convert again, or delete the manifest to accept it"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {again}")
    if path.stat().st_size != entry["size"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['size']}: {again}")
    if header_hash(path) != entry["header_hash"]:
        raise CheckpointError(f"{path} has another header than its manifest says: {again}")
    if full and hash_file(path) != entry["hash"]:
        raise CheckpointError(f"{path} does not have the hash in its manifest: its contents are damaged or changed")


def changed_sources(
    folder: Path, weights: Iterable[Path], companions: Iterable[Path], manifest: dict[str, Any], *, content: bool = True
) -> Iterator[str]:
    """What differs between the source files that a manifest names and those that `folder` has now, one text each.

    With `content` a file is compared by its content hash, wherever it lies now (read once, then remembered by stat);
    without, by size and header alone. Companions are the small files that were copied.
    """
    source = manifest["source"]
    pairs = [(source["files"], list(weights))]
    if "companions" in source:
        pairs.append((source["companions"], list(companions)))
    for recorded, present in pairs:
        entries = {entry["name"]: entry for entry in recorded}
        for path in present:
            entry = entries.pop(source_name(folder, path), None)
            if entry is None:
                yield f"{path} is new"
            elif not _is_same_file(path, entry, content):
                yield f"{path} has other contents"
        yield from (f"{name} is not there any more" for name in entries)


def _is_same_file(path: Path, entry: dict[str, Any], content: bool) -> bool:
    if path.stat().st_size != entry["size"]:
        return False
    return file_hash(path) == entry["hash"] if content else header_hash(path) == entry["header_hash"]


def source_name(folder: Path, path: Path) -> str:
    """A source file's name in the manifest, relative to the checkpoint when it lies inside."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
