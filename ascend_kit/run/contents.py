"""What the files and folders that an experiment names hold, looked into before any work, without loading a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from ascend_kit.files import GIB
from ascend_kit.params import Experiment
from ascend_kit.run.checks import RunError

MIN_FREE_BYTES = 64 << 20  # rows, figures and executed notebooks of a run


def check_contents(experiment: Experiment, names: Collection[str], *, converts: bool) -> None:
    """RunError with every fault of what is read and of where is written by notebooks that declare `names`.

    `converts`: the conversion is among them. Prompts and data are read, of a model only headers and small files.
    """
    checks: list[tuple[str, Callable[[], object]]] = [
        ("", lambda: _check_written(experiment.run_folder, MIN_FREE_BYTES))
    ]
    given = {name for name in names if getattr(experiment, name, None) not in (None, "demo")}
    for key in given & {"prompts_file", "calibration_file"}:
        checks.append(("", lambda key=key: _check_prompts(experiment, key)))
    if "dataset_path" in names:
        checks.append(("dataset_path: ", lambda: _check_data(experiment)))
    if "input_model" in given and Path(experiment.input_model).is_dir():
        checks.append(("", lambda: _check_model(experiment)))
    if "quantize_keep" in given and "input_model" not in given:
        checks.append(("", lambda: _check_kept_of_demo(experiment.quantize_keep)))
    if converts:
        checks.append(("", lambda: _check_written(experiment.converted_folder, _converted_bytes(experiment))))
    faults = []
    for where, check in checks:
        try:
            check()
        except (ValueError, OSError) as error:
            faults.append(f"{where}{error}")
    if faults:
        raise RunError("; ".join(faults))


def _check_prompts(experiment: Experiment, key: str) -> None:
    from ascend_kit.prompts import read_prompts

    read_prompts(getattr(experiment, key), key)


def _check_data(experiment: Experiment) -> None:
    from ascend_kit.evaluation.other_tasks import check_data

    check_data(experiment)


def _check_model(experiment: Experiment) -> None:
    from ascend_kit.checkpoint.convert import check_model

    check_model(experiment)


def _check_kept_of_demo(patterns: list[str]) -> None:
    if patterns == Experiment.model_fields["quantize_keep"].default:
        return
    from ascend_kit.demo.train import MODEL_SIZES
    from ascend_kit.model.config import ModelConfig
    from ascend_kit.model.tensors import kept_linears

    kept_linears(ModelConfig.from_dict({"model_type": "qwen3", **MODEL_SIZES}, where="the demo model"), patterns)


def _check_written(folder: Path, num_bytes: int) -> None:
    """OSError's kinds of trouble, found without writing: a file in the way, no rights, names too long, no space."""
    path = folder.absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent) and parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: no rights, or a read-only file system, at {existing}")
    longest = os.pathconf(existing, "PC_NAME_MAX")
    for name in path.relative_to(existing).parts:
        if len(os.fsencode(name)) > longest:
            raise ValueError(
                f"{folder} cannot be made: a name of {len(os.fsencode(name))} bytes, {longest} are allowed"
            )
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(f"{folder} needs about {num_bytes / GIB:.2f} GiB, {existing} has {free / GIB:.2f} GiB left")


def _converted_bytes(experiment: Experiment) -> int:
    """About what the converted folder will take beyond what is there."""
    source = Path(experiment.input_model or "")
    if experiment.converted_folder.exists() or not source.is_dir():
        return MIN_FREE_BYTES
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    return total if experiment.quantize == "none" else total * 5 // 8
