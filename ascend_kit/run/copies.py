"""Notebooks in a run folder: working copies to be changed by hand, and executed copies of what was run by hand.

The templates stay clean. Working copies lie in <run>/work/, which no run touches; what was executed elsewhere, in
JupyterLab or by plain papermill, is copied beside the results, so that every way of working leaves the same report.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ascend_kit.files import write_atomic
from ascend_kit.messages import phrase, translate
from ascend_kit.params import Experiment, load_experiment
from ascend_kit.params.notebook import INJECTED_MARK, tagged
from ascend_kit.run.checks import find_notebooks
from ascend_kit.stages import DONE, RunRecord, Stage, changing

FOLDER = "work"
WIDGET = "application/vnd.jupyter.widget-view+json"
MEANING = re.compile(r"(?<=  # ).*$", re.MULTILINE)  # of a parameter
CHOICES = re.compile(r": [a-z0-9_]+(, [a-z0-9_]+)+$")  # that may stand after it


def make_working_copies(
    path: str | Path, overrides: dict[str, Any] | None = None, notebooks: str | Path | None = None
) -> Path:
    """Copy the notebooks to <run>/work/ with their parameters set to those of the file `path`; the folder.

    A copy that is there already is left as it is.
    """
    experiment, overrides = load_experiment(path, overrides), overrides or {}
    folder = experiment.run_folder / FOLDER
    names = {"experiment": experiment.experiment, "run": experiment.run}
    names["params_file"] = str(Path(path).absolute())
    for notebook in find_notebooks(notebooks):
        target = folder / notebook.path.name
        if not target.exists():
            content = json.loads(notebook.path.read_text(encoding="utf-8"))
            translate_cells(content["cells"], experiment.language)
            _set_values(content["cells"], names, overrides)
            write_atomic(target, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return folder


def _set_values(cells: list[dict[str, Any]], names: dict[str, str], overrides: dict[str, Any]) -> None:
    """Write values into the parameters cell; into a cell below it, as papermill injects one, where that says nothing.

    The parameters cell says nothing by a name that it lacks, nor by a default: params_file wins over both.
    """
    cell = next(cell for cell in cells if tagged(cell, "parameters"))
    source, injected = "".join(cell["source"]), {}
    for name, value in {**names, **overrides}.items():
        line = re.compile(rf"^({name}\b[^=\n]*=) .*?(  #[^\n\"']*)?$", re.MULTILINE)
        source, found = line.subn(lambda found, value=value: f"{found[1]} {value!r}{found[2] or ''}", source)
        if name in overrides and (not found or value == Experiment.model_fields[name].default):
            injected[name] = value
    cell["source"] = source.splitlines(keepends=True)
    if injected:
        lines = [f"{INJECTED_MARK}\n", *(f"{name} = {value!r}\n" for name, value in injected.items())]
        below = {"cell_type": "code", "id": "injected", "metadata": {"tags": ["injected-parameters"]}, "outputs": []}
        cells.insert(cells.index(cell) + 1, {**below, "execution_count": None, "source": lines})


def translate_cells(cells: list[dict[str, Any]], language: str) -> None:
    """Put prose, and the meanings in the parameters cells, into `language`; the templates are in English."""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = phrase(source, language)
        elif tagged(cell, "parameters", "injected-parameters"):
            source = MEANING.sub(lambda found: _meaning(found[0], language), source)
        cell["source"] = source


def _meaning(text: str, language: str) -> str:
    choices = CHOICES.search(text)
    if choices is None or phrase(text, language) != text:
        return phrase(text, language)
    return phrase(text[: choices.start()], language) + choices[0]


def without_widgets(cells: list[dict[str, Any]]) -> None:
    """Leave the table or text that stands beside each widget: without its kernel a reader cannot draw the widget."""
    for cell in cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.pop(WIDGET, None) is not None and "text/html" not in data:
                data["text/plain"] = translate("report.widget")


def collect_executed(folder: Path) -> None:
    """Copy the notebooks of stages that were run by hand beside their results, and note errors that stopped them."""
    stages = RunRecord.read(folder).stages
    found = {name: notebook for name, stage in stages.items() if (notebook := _executed_by_hand(folder, stage))}
    if not found:
        return
    with changing(folder) as record:
        for name, notebook in found.items():
            stage = record.stages[name]
            translate_cells(notebook["cells"], stage.parameters.get("language", "en"))
            without_widgets(notebook["cells"])
            notebook.get("metadata", {}).pop("widgets", None)
            write_atomic(folder / f"{name}.ipynb", json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")
            error = _first_error(notebook)
            if error is not None and stage.state not in DONE and stage.state != "running":
                stage.end("failed", error, stage.duration_s)


def _executed_by_hand(folder: Path, stage: Stage) -> dict[str, Any] | None:
    """The notebook in which a stage was run by hand, if it can still be read and was executed."""
    if not stage.by_hand:
        return None
    path = Path(stage.notebook) if stage.notebook else folder / FOLDER / f"{stage.name}.ipynb"
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return notebook if any(cell.get("execution_count") for cell in notebook["cells"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _first_error(notebook: dict[str, Any]) -> str | None:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    errors = [f"{output['ename']}: {output['evalue']}" for output in outputs if output.get("output_type") == "error"]
    return errors[0] if errors else None
