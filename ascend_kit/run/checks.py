"""What can be known before a kernel starts: the notebooks, their parameters, what the files they will read hold, and
the identity of these files, by whose content a stage counts as done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ascend_kit.files import GIB, hash_files
from ascend_kit.identity import Identity
from ascend_kit.messages import did_you_mean
from ascend_kit.params import Experiment, ParameterError
from ascend_kit.params.experiment import DEMO
from ascend_kit.params.notebook import literal_assignments, tagged
from ascend_kit.prompts import read_prompts

MIN_FREE_BYTES = 64 << 20  # rows, figures and executed notebooks of a run
PACKAGES = ("torch", "torch-npu", "transformers", "tokenizers", "lm-eval", "ascend-kit")
STAGE_NAME = re.compile(r"\d\d_\w+")


class RunError(ValueError):
    """The run cannot start as asked; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class Notebook:
    """A source notebook and the parameters of its tagged cell, with their defaults."""

    name: str
    path: Path
    defaults: dict[str, Any]


def find_notebooks(folder: str | Path | None = None) -> list[Notebook]:
    """Every notebook `NN_name.ipynb` of the folder in order, each with a valid parameters cell."""
    candidates = [Path(folder)] if folder else [Path(__file__).resolve().parents[2] / "notebooks", Path("notebooks")]
    found = next((path for path in candidates if path.is_dir()), None)
    # JupyterLab's copies, 04_throughput-Copy1.ipynb, are no stages.
    files = sorted(path for path in found.glob("*.ipynb") if STAGE_NAME.fullmatch(path.stem)) if found else []
    if not files:
        raise RunError(
            f"no notebooks NN_name.ipynb in {', '.join(map(str, candidates))}; name their folder with --notebooks"
        )
    return [Notebook(path.stem, path, parameter_defaults(path)) for path in files]


def parameter_defaults(path: Path) -> dict[str, Any]:
    """Names and default values of the one cell tagged `parameters`; RunError when it is not as it must be.

    Read with ast: papermill's own reader works line by line and overlooks some assignments, and without the
    tag it would put the injected values above the defaults, which then win in silence.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = [cell for cell in cells if tagged(cell, "parameters")]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a notebook: {error}") from None
    if len(found) != 1:
        raise RunError(
            f"{path.name}: {len(found)} cells carry the tag `parameters`, it must be exactly one; without "
            "it the values of the parameter file would have no effect (JupyterLab: property inspector, "
            "cell tags)"
        )
    try:
        defaults = literal_assignments("".join(found[0]["source"]))
    except ParameterError as error:
        raise RunError(f"{path.name}: {error}") from None
    for name in defaults:
        if name not in Experiment.model_fields:
            meant = did_you_mean(name, Experiment.model_fields)
            raise RunError(f"{path.name}: its parameters cell defines {name!r}, which is no parameter{meant}")
    return defaults


def select_notebooks(available: list[Notebook], only: list[str] | None) -> list[Notebook]:
    """The notebooks named by `only` (whole name or a prefix such as 04), in running order."""
    if only is None:
        return available
    chosen = set()
    names = [notebook.name for notebook in available]
    for wanted in only:
        stem = Path(wanted).stem if wanted.endswith(".ipynb") else wanted
        hits = [name for name in names if name == stem] or [name for name in names if stem and name.startswith(stem)]
        if len(hits) != 1:
            found = "no notebook" if not hits else "several notebooks"
            known = f"{', '.join(names)}{did_you_mean(stem, names, 0.4)}"
            raise RunError(f"--only {wanted!r} names {found}; known: {known}")
        chosen.add(hits[0])
    return [notebook for notebook in available if notebook.name in chosen]


def check_conversion(experiment: Experiment, notebooks: list[Notebook]) -> None:
    """RunError when a notebook runs the converted model, none converts it, and it is not there or of another model."""
    uses = any("use_model" in notebook.defaults for notebook in notebooks)
    if not uses or any("if_model_exists" in notebook.defaults for notebook in notebooks):
        return
    from ascend_kit.checkpoint.manifest import check_converted
    from ascend_kit.checkpoint.tensor_file import CheckpointError
    from ascend_kit.demo.assets import cached_model

    if experiment.input_model == DEMO and (model := cached_model()):
        experiment = experiment.standing_for({"input_model": str(model)})
    try:
        check_converted(experiment, content=False)
    except CheckpointError as error:
        raise RunError(str(error)) from None


def check_contents(experiment: Experiment, names: Collection[str], *, converts: bool) -> None:
    """RunError with every fault of what is read and of where is written by notebooks that declare `names`.

    `converts`: the conversion is among them. Prompts and data are read, of a model only headers and small files.
    """
    faults: list[str] = []

    def check(function: Callable[..., object], *given: object) -> None:
        try:
            function(*given)
        except (ValueError, OSError) as error:
            faults.append(str(error))

    given = {name for name in names if getattr(experiment, name, None) not in (None, DEMO)}
    check(_check_written, experiment.run_folder, MIN_FREE_BYTES)
    if "log_to" in names:
        from ascend_kit.measure.tracking import require_tracker

        check(require_tracker, experiment)
    for key in sorted(given & {"prompts_file", "calibration_file"}):
        check(read_prompts, getattr(experiment, key), key)
    if given & {"trace_file", "load_prompts"}:
        from ascend_kit.measure.loads import read_load_prompts, read_trace

        for key, read in (("trace_file", read_trace), ("load_prompts", read_load_prompts)):
            if key in given:
                check(read, getattr(experiment, key))
    if "dataset_path" in names:
        from ascend_kit.evaluation.datasets import check_data

        check(check_data, experiment)
        if experiment.eval_stop_against is not None:
            from ascend_kit.evaluation.runs import find_run

            check(find_run, experiment.eval_stop_against, experiment, "eval_stop_against")
    if "input_model" in given and Path(experiment.input_model).is_dir():
        from ascend_kit.checkpoint.convert import check_model

        check(check_model, experiment)
    if "quantize_keep" in given and "input_model" not in given:
        check(_check_kept_of_demo, experiment.quantize_keep)
    if converts:
        check(lambda: _check_written(experiment.converted_folder, _converted_bytes(experiment)))
    if faults:
        raise RunError("; ".join(faults))


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


def stage_inputs(experiment: Experiment, names: Collection[str]) -> Identity:
    """The identity of the files that a stage reads whose notebook declares the parameters `names`.

    A file or folder that is not there has no identity. Weights are read once and remembered by stat.
    """
    if "input_model" not in names:
        return Identity()
    prompts = [_path(experiment, key) for key in ("prompts_file", "calibration_file") if key in names]
    folders = [_path(experiment, key) for key in ("dataset_path", "adapter_path") if key in names]
    return _model(experiment, names).with_parts(
        prompts=_content([path for path in prompts if path is not None]),
        data=_content([path for path in folders if path is not None]),
        versions={name: _version(name) for name in PACKAGES},
    )


def _model(experiment: Experiment, names: Collection[str]) -> Identity:
    source = _path(experiment, "input_model")
    runs_converted = "use_model" in names and experiment.use_model == "converted"
    model = experiment.converted_folder if runs_converted else source
    if model is None or not model.exists():
        return Identity()
    from ascend_kit.checkpoint.manifest import model_identity

    try:
        return model_identity(model, _path(experiment, "tokenizer_path"))
    except (ValueError, OSError):
        return Identity()  # damaged: the stage says how


def _path(experiment: Experiment, key: str) -> Path | None:
    """The path that a parameter names; of the built-in example only what was built before."""
    value = getattr(experiment, key)
    if value != DEMO:
        return Path(value) if value is not None else None
    from ascend_kit.demo.assets import cached_model, ensure_data

    if key in ("input_model", "tokenizer_path"):
        return cached_model()
    return ensure_data() if key == "dataset_path" else ensure_data() / "prompts.jsonl"


def _content(paths: list[Path]) -> str | None:
    """One hash over files and folders with all their files; None without any."""
    inside = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    files = [file for file in inside if file.is_file() and not file.name.startswith(".")]
    return hash_files(files, paths[0].parent) if files else None


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None
