"""Where a conversion may write, and what may be done with a result that is already there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.huggingface import Checkpoint, companion_files
from ascend_kit.checkpoint.manifest import MANIFEST_NAME, changed_sources, read_manifest, verify
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
    destination: Path, checkpoint: Checkpoint, settings: dict[str, Any], if_exists: str, tokenizer_path: Path | None
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
    _check_same(destination, manifest, checkpoint, settings, tokenizer_path)
    return manifest


def _check_same(
    destination: Path,
    manifest: dict[str, Any],
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    tokenizer_path: Path | None,
) -> None:
    way_out = "use if_exists=overwrite (if_model_exists in a parameter file) or another output_model"
    for key in sorted(settings.keys() | manifest["settings"].keys()):
        was, now = manifest["settings"].get(key), settings.get(key)
        if was != now:
            raise CheckpointError(f"{destination} was converted with {key}={was}, now {key}={now}; {way_out}")
    companions = companion_files(checkpoint.config_folder, tokenizer_path)
    for text in changed_sources(checkpoint.folder, checkpoint.files, companions, manifest):
        raise CheckpointError(f"{destination} was made from another version of {checkpoint.folder}: {text}; {way_out}")
