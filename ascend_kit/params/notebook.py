"""The parameter cells of notebooks: written from Experiment (one set of defaults, one wording), and read into one.

Only names assigned in the parameters cell and in the cell that papermill injects are parameters, and their values are
those written there: what other cells assign, before or after, changes nothing, however often cells are run. Both cells
are found in the kernel's history by their first line, which JupyterLab, papermill, nbclient and nbconvert all keep.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascend_kit.files import write_atomic
from ascend_kit.messages import show_errors_in_one_line, use_language
from ascend_kit.params.experiment import RETIRED, Experiment, expand_aliases, kind_of
from ascend_kit.params.fields import notebooks_of
from ascend_kit.params.paths import check_paths
from ascend_kit.params.sweep import ALIASES as OLD_NAMES
from ascend_kit.params.sweep import layered
from ascend_kit.params.values import ParameterError, choices, shown, unknown_key
from ascend_kit.params.yaml_file import build_over_params_file

CELL_MARK = "# Parameters of this notebook"  # first line of a generated cell starts with this
INJECTED_MARK = "# Parameters"  # first line of the cell that papermill injects
DEMO_FILE = "params/demo.yaml"
ALIASES = ("optimization", "tensorrt", *OLD_NAMES)
# What the panel applied in this kernel: it wins over all cells until the kernel ends.
applied: dict[str, Any] = {}


def experiment_from_notebook(namespace: Mapping[str, Any]) -> Experiment:
    """The experiment of a notebook's globals(); ParameterError for a wrong name, value or path.

    Experiment's defaults < params_file < values changed in the parameters cell < injected values < the panel. Without
    params_file and without a model the file is params/demo.yaml. Also leaves the folder `notebooks`, so that relative
    paths mean the same in JupyterLab as on the command line, and sets how errors look and the language of all texts.
    """
    show_errors_in_one_line()
    _leave_notebooks_folder()
    declared, injected = _cells(namespace)
    _refuse_unknown(declared, "the parameters cell")
    _refuse_unknown(injected, "the injected parameters")
    known = Experiment.model_fields
    changed = {name: value for name, value in declared.items() if name not in known or value != known[name].default}
    given = layered(layered(expand_aliases(changed), expand_aliases(injected)), applied)
    default_file = None if given.keys() & {"input_model", "model_name"} else _demo_file()
    experiment = build_over_params_file(given, source="notebook parameters", default_file=default_file)
    if _history(namespace):
        check_paths(experiment, declared.keys())
    use_language(experiment.language)
    return experiment


def literal_assignments(source: str) -> dict[str, Any]:
    """Name -> value of a cell that holds nothing but `name: type = literal` lines; ParameterError for anything else."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ParameterError(f"the parameters cell is not Python: {error}") from None
    values = {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if len(targets) != 1 or not isinstance(targets[0], ast.Name) or value is None:
            found = shown(ast.unparse(statement))
            raise ParameterError(f"the parameters cell may hold only `name: type = literal` lines, found {found}")
        try:
            values[targets[0].id] = _literal(value)
        except ValueError:
            raise ParameterError(f"{targets[0].id} must be a plain literal, found `{ast.unparse(value)}`") from None
    return values


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "float" and node.args:
        return float(ast.literal_eval(node.args[0]))  # papermill writes float('nan') and float('inf')
    return ast.literal_eval(node)


def _cells(namespace: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of the parameters cell and of the injected one, as they were last run in this kernel."""
    history = _history(namespace)
    injected = [source for source in history if source.split("\n")[0].strip() == INJECTED_MARK]
    marked = [source for source in history if source.startswith(CELL_MARK)]
    if marked:
        declared = literal_assignments(marked[-1])
    elif own := [literal_assignments(source) for source in history if _is_all_annotated(source)]:
        declared = [values for values in own if values.keys() == own[0].keys()][-1]
    elif history:  # without injected ones: the results of a notebook whose parameters were not run in this kernel
        declared = {} if injected else _saved_parameters()
    else:  # a script, or a test: everything plain in it must be a parameter
        declared = {name: value for name, value in namespace.items() if _is_plain(name, value)}
    return declared, literal_assignments(injected[-1]) if injected else {}


def _history(namespace: Mapping[str, Any]) -> list[str]:
    """The sources of the cells run in this kernel, oldest first; empty outside a notebook."""
    return [str(source).strip() for source in namespace.get("In", []) if str(source).strip()]


def _is_all_annotated(source: str) -> bool:
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError):
        return False
    return bool(statements) and all(isinstance(statement, ast.AnnAssign) for statement in statements)


def _saved_parameters() -> dict[str, Any]:
    """The parameters in the notebook's file as JupyterLab last saved it; nothing where the file is not known."""
    path = Path(os.environ.get("JPY_SESSION_NAME", ""))
    if path.suffix != ".ipynb" or not path.is_file():
        return {}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    values: dict[str, Any] = {}
    for cell in cells:
        if tagged(cell, "parameters", "injected-parameters"):
            values |= literal_assignments("".join(cell["source"]))
    return values


def tagged(cell: Mapping[str, Any], *tags: str) -> bool:
    """Whether a notebook's cell carries one of these tags."""
    return not set(tags).isdisjoint(cell.get("metadata", {}).get("tags", []))


def _is_plain(name: str, value: Any) -> bool:
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))
    return plain and not name.startswith("_") and name not in ("In", "Out")


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    known = [*Experiment.model_fields, *ALIASES, *RETIRED]  # a retired name is refused with its reason
    wrong = next((name for name in values if name not in known), None)
    if wrong is not None:
        raise ParameterError(f"{where}: {unknown_key(wrong, known)}")


def _demo_file() -> str | None:
    checkout = Path(__file__).resolve().parents[2]
    return next((str(path) for path in (Path(DEMO_FILE), checkout / DEMO_FILE) if path.is_file()), None)


def _leave_notebooks_folder() -> None:
    """JupyterLab starts a kernel in the notebook's folder; `make` and the command line work in the project's."""
    here = Path.cwd()
    if here.name in ("notebooks", "work"):
        project = next((path for path in here.parents if (path / "params").is_dir()), None)
        if project is not None:
            os.chdir(project)


# --- the cells, written from Experiment -------------------------------------------------------------------------------

FIRST_LINE = f"{CELL_MARK}. Values changed here win over params_file, injected ones over both."


def parameters_of(notebook: str) -> list[str]:
    """The parameters of a notebook such as `04_throughput`, in the order of Experiment."""
    number = notebook.lstrip("0")[:1]
    return [name for name, field in Experiment.model_fields.items() if number in notebooks_of(field)]


def cell_source(notebook: str) -> str:
    """The text of a notebook's parameters cell: `name: type = default  # meaning`."""
    return "\n".join([FIRST_LINE, *map(_line, parameters_of(notebook))])


def _line(name: str) -> str:
    field = Experiment.model_fields[name]
    meaning, default, words = field.description or "", field.default, choices(Experiment, name)
    if any(word not in meaning for word in words):
        meaning += f": {', '.join(words)}"
    written = json.dumps(default) if isinstance(default, (str, list, dict)) else str(default)
    return f"{name}: {kind_of(name)} = {written}  # {meaning}"


def write_cells(folder: Path, *, check: bool = False) -> list[str]:
    """Write every notebook's parameters cell anew, or only compare (`check`); returns what differs from Experiment."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ParameterError(f"no notebooks NN_name.ipynb in {folder}")
    differing = []
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        cell = next(cell for cell in document["cells"] if tagged(cell, "parameters"))
        before, wanted = "".join(cell["source"]), cell_source(path.stem)
        if before == wanted:
            continue
        if not check:
            cell["source"] = wanted.splitlines(keepends=True)
            write_atomic(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        old, new = literal_assignments(before), literal_assignments(wanted)
        changed = [name for name in {**old, **new} if old.get(name, ...) != new.get(name, ...)]
        differing.append(f"{path.name}: {', '.join(changed) or 'wording'}")
    return differing
