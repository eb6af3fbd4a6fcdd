"""Where a conversion may write, and what may be done with a result that is already there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.manifest import MANIFEST_NAME, describe_file, hash_file, read_manifest, verify
from ascend_kit.checkpoint.tensor_file import CheckpointError


def check_destination(source: Path, destination: Path) -> None:
    """ValueError when writing to `destination` could touch the source."""
    if not source.is_dir():
        raise CheckpointError(f"input_model: no checkpoint folder at {source}")
    real = destination.resolve()
    if real == source or (destination.exists() and os.path.samefile(source, destination)):
        raise CheckpointError(f"output_model {destination} is the source itself; choose another folder")
    if real in source.parents or source in real.parents:
        raise CheckpointError(
            f"output_model {destination} and input_model {source} lie inside each other; choose a "
            "folder beside the source"
        )


def existing_result(
    destination: Path, checkpoint: Checkpoint, settings: dict[str, Any], if_exists: str
) -> dict[str, Any] | None:
    """The manifest of a result to reuse, None when it is to be overwritten; CheckpointError otherwise."""
    manifest = read_manifest(destination) if destination.is_dir() else None
    if if_exists == "refuse":
        raise CheckpointError(
            f"output_model {destination} exists; choose another folder, or if_exists=reuse or "
            "overwrite (if_model_exists in a parameter file)"
        )
    if manifest is None:
        raise CheckpointError(
            f"output_model {destination} exists and was not made by convert (no {MANIFEST_NAME}); "
            "it is neither reused nor overwritten, remove it yourself"
        )
    if if_exists == "overwrite":
        return None
    verify(destination)
    _check_same(destination, manifest, checkpoint, settings)
    return manifest


def _check_same(destination: Path, manifest: dict[str, Any], checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    way_out = "use if_exists=overwrite (if_model_exists in a parameter file) or another output_model"
    for key in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = manifest["settings"].get(key), settings.get(key)
        if was != now:
            raise CheckpointError(f"{destination} was converted with {key}={was}, now {key}={now}; {way_out}")
    entries = {entry["name"]: entry for entry in manifest["source"]["files"]}
    for path in checkpoint.files:
        name = source_name(checkpoint, path)
        if name not in entries or not _is_same_file(path, entries.pop(name)):
            raise CheckpointError(f"{destination} was made from another version of {path}; {way_out}")
    if entries:
        raise CheckpointError(
            f"{destination} was made from more files than {checkpoint.folder} has now: {', '.join(entries)}; {way_out}"
        )


def _is_same_file(path: Path, entry: dict[str, Any]) -> bool:
    now = describe_file(path)
    if now["size"] != entry["size"] or now["header_hash"] != entry["header_hash"]:
        return False
    # The same time stamp is trusted; a copied or touched file is compared byte for byte.
    return now["mtime_ns"] == entry["mtime_ns"] or hash_file(path) == entry["hash"]


def source_name(checkpoint: Checkpoint, path: Path) -> str:
    """A source file's name in the manifest, relative to the checkpoint when it lies inside."""
    return path.relative_to(checkpoint.folder).as_posix() if path.is_relative_to(checkpoint.folder) else path.name
