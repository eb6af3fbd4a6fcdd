"""What can be known before a kernel starts: the notebooks, their parameters, the paths they will read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_kit.messages import did_you_mean
from ascend_kit.params import Experiment, ParameterError, paths
from ascend_kit.params.experiment import DEMO
from ascend_kit.params.notebook import literal_assignments

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
        tagged = tagged_cells(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a notebook: {error}") from None
    if len(tagged) != 1:
        raise RunError(
            f"{path.name}: {len(tagged)} cells carry the tag `parameters`, it must be exactly one; without "
            "it the values of the parameter file would have no effect (JupyterLab: property inspector, "
            "cell tags)"
        )
    try:
        defaults = literal_assignments("".join(tagged[0]["source"]))
    except ParameterError as error:
        raise RunError(f"{path.name}: {error}") from None
    for name in defaults:
        if name not in Experiment.model_fields:
            meant = did_you_mean(name, Experiment.model_fields)
            raise RunError(f"{path.name}: its parameters cell defines {name!r}, which is no parameter{meant}")
    return defaults


def tagged_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a notebook that carry the tag `parameters`."""
    return [cell for cell in notebook["cells"] if "parameters" in cell.get("metadata", {}).get("tags", [])]


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
    from ascend_kit.checkpoint.identity import check_converted
    from ascend_kit.checkpoint.tensor_file import CheckpointError
    from ascend_kit.demo.assets import cached_model

    if experiment.input_model == DEMO and (model := cached_model()):
        experiment = experiment.standing_for({"input_model": str(model)})
    try:
        check_converted(experiment, content=False)
    except CheckpointError as error:
        raise RunError(str(error)) from None


def check_paths(experiment: Experiment, notebooks: list[Notebook]) -> None:
    """ParameterError for every path that one of the notebooks reads or writes and that is not as it must be."""
    paths.check_paths(experiment, {name for notebook in notebooks for name in notebook.defaults})
