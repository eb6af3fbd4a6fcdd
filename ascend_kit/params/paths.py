"""What the paths of an experiment must be, looked at before any work starts."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ascend_kit.messages import did_you_mean
from ascend_kit.params.experiment import DEMO, NEEDED, Experiment
from ascend_kit.params.fields import PathKind
from ascend_kit.params.values import ParameterError


def check_paths(experiment: Experiment, used: Collection[str]) -> None:
    """ParameterError for every path among the parameters `used` that is missing, not given or of the wrong kind."""
    faults = [f"{key} is not set: {NEEDED[key]}" for key in NEEDED if key in used and getattr(experiment, key) is None]
    if "dataset_path" in used and experiment.dataset_path == DEMO and experiment.input_model != DEMO:
        faults.append(f"dataset_path: demo is not for {experiment.input_model}: {NEEDED['dataset_path']}")
    for key, field in Experiment.model_fields.items():
        value = getattr(experiment, key)
        kind = next((mark for mark in field.metadata if isinstance(mark, PathKind)), None)
        if kind and key in used and value not in (None, DEMO) and (text := _fault(Path(value), kind)):
            faults.append(f"{key}: {text}{_gone_source(experiment) if key == 'input_model' else ''}")
    if faults:
        raise ParameterError(
            "; ".join(faults) + " (a path is read from the current folder; the word demo means the built-in example)"
        )


def _gone_source(experiment: Experiment) -> str:
    """The way out for a model that was converted and whose source is no longer there."""
    converted = experiment.converted_folder
    if experiment.use_model != "converted" or Path(experiment.input_model).exists() or not converted.is_dir():
        return ""
    return f"; to run {converted} without its source set input_model to it and use_model: source"


def _fault(path: Path, kind: PathKind) -> str | None:
    """What keeps a path from being read or written, None where nothing does."""
    is_folder, is_read = kind.is_folder, kind.is_read
    if is_read and not path.exists():
        return f"nothing at {path}{_nearest(path)}"
    if path.exists() and path.is_dir() != is_folder:
        return f"{path} is a {'file' if is_folder else 'folder'}, it must be a {'folder' if is_folder else 'file'}"
    if is_read:
        return None if os.access(path, os.R_OK | (os.X_OK if is_folder else 0)) else f"{path} may not be read"
    if path.exists() and not is_folder and not path.is_file():
        return f"{path} is a pipe or a device, it must be a file"
    above = path.absolute() if is_folder else path.absolute().parent
    existing = next(parent for parent in (above, *above.parents) if parent.exists())
    if not existing.is_dir():
        return f"{existing} is a file, so nothing can be written below it"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} may not be written to"


def _nearest(path: Path) -> str:
    parent = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    if parent is None or not os.access(parent, os.R_OK):
        return ""
    beside = parent.iterdir() if parent == path.absolute().parent else ()
    meant = did_you_mean(path.name, [item.name for item in beside], shown=lambda name: str(parent / name))
    return meant or f" ({parent} exists)"
