"""ascend_manifest.json: what a converted folder was made from, how, and hashes that show it is still that.

Hashes are XXH3 with 128 bits. They find damage and mix-ups, which is all that a manifest lying beside its
files can do (whoever changes a file on purpose can change the manifest too), and unlike sha256 they keep up
with a disk.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from ascend_kit import __version__
from ascend_kit.checkpoint.tensor_file import MAX_HEADER_BYTES, CheckpointError

MANIFEST_NAME = "ascend_manifest.json"
SCHEMA_VERSION = 1
HASH_ALGORITHM = "xxh3_128"
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of `verify`; a mismatch raises instead."""

    status: str  # ok | no manifest
    num_files: int
    full: bool


def new_hash() -> xxhash.xxh3_128:
    """An empty hash of the kind that manifests hold."""
    return xxhash.xxh3_128()


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hash of a file, hexadecimal, read in blocks."""
    digest, buffer = new_hash(), bytearray(HASH_BLOCK_BYTES)
    view = memoryview(buffer)
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
                if on_bytes:
                    on_bytes(count)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


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


def describe_file(path: Path, full_hash: str | None = None) -> dict[str, Any]:
    """The manifest's entry for a file: name, size, modification time, quick hash and, if given, full hash."""
    stat = os.stat(path)
    entry = {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "header_hash": header_hash(path)}
    return entry | ({"hash": full_hash} if full_hash else {})


def tool_versions() -> dict[str, str]:
    """Versions that may change what a conversion writes."""
    return {
        "ascend_kit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def new_manifest(
    *,
    source: dict[str, Any],
    settings: dict[str, Any],
    files: list[dict[str, Any]],
    quantization: dict[str, Any],
    num_tensors: int,
) -> dict[str, Any]:
    """The manifest of a finished conversion."""
    return {
        "schema_version": SCHEMA_VERSION,
        "hash_algorithm": HASH_ALGORITHM,
        "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": tool_versions(),
        "settings": settings,
        "quantization": quantization,
        "num_tensors": num_tensors,
        "source": source,
        "files": files,
    }


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a folder; None when there is none, CheckpointError when it is damaged."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["schema_version"] == SCHEMA_VERSION and isinstance(manifest["files"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); convert the model again") from error
    if not known:
        raise CheckpointError(
            f"{path} has schema version {manifest['schema_version']}, this version reads "
            f"{SCHEMA_VERSION}; convert the model again"
        )
    return manifest


def verify(folder: str | Path, full: bool = False) -> VerifyResult:
    """Check a folder against its manifest: sizes and headers, with `full` every byte.

    CheckpointError names the first file that is missing, added or different. A folder without a manifest (a
    plain Hugging Face download) has nothing to be checked against: status `no manifest`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return VerifyResult("no manifest", 0, full)
    listed = {entry["name"] for entry in manifest["files"]}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in listed:
            raise CheckpointError(f"{path} is not in {MANIFEST_NAME}: it was added after the conversion")
    for entry in manifest["files"]:
        _check_entry(folder / entry["name"], entry, full)
    return VerifyResult("ok", len(listed), full)


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
