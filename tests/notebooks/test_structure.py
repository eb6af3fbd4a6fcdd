"""The committed notebooks and parameter files: conventions that keep them thin, clean and in step."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

from ascend_kit.params import Experiment, experiment_from_notebook, load_experiment
from ascend_kit.params.notebook import write_cells
from ascend_kit.params.yaml_file import read_with_places
from ascend_kit.run.checks import find_notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = find_notebooks(ROOT / "notebooks")
PARAMETER_FILES = sorted((ROOT / "params").glob("*.yaml"))
MAX_CODE_CELLS, MAX_CELL_LINES, MAX_CODE_LINES, MAX_BYTES = 15, 15, 120, 40_000
# The article's file, word for word.
ARTICLE = """model_name: qwen3-8b
precision: bf16
max_seq_length: 8192
batch_size: 16
optimization:
  tensorrt: True  # TensorRT acceleration
  operator_fusion: True
  memory_optimize: True
"""


def cells_of(notebook, kind="code"):
    return [cell for cell in nbformat.read(notebook.path, as_version=4).cells if cell.cell_type == kind]


def work_cells(notebook):
    return [cell for cell in cells_of(notebook) if "parameters" not in cell.metadata.get("tags", [])]


each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
each_file = pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)


def test_the_seven_notebooks_are_there_in_order():
    names = [notebook.name for notebook in NOTEBOOKS]

    assert names == [
        "01_environment",
        "02_convert",
        "03_generate",
        "04_throughput",
        "05_evaluate",
        "06_compare",
        "07_explore",
    ]


@each_notebook
def test_notebook_is_committed_without_outputs_and_run_metadata(notebook):
    document = json.loads(notebook.path.read_text(encoding="utf-8"))

    assert document["metadata"]["kernelspec"]["name"] == "python3"
    assert document["metadata"]["language_info"]["name"] == "python"
    assert "papermill" not in document["metadata"]
    for cell in document["cells"]:
        assert re.fullmatch(r"[a-z0-9-]+", cell["id"]), "ids are names, so that an insertion touches no other cell"
        assert set(cell["metadata"]) <= {"tags"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])


@each_notebook
def test_notebook_is_thin(notebook):
    code = [cell.source for cell in work_cells(notebook)]

    assert len(code) + 1 <= MAX_CODE_CELLS
    assert all(source.count("\n") < MAX_CELL_LINES for source in code)
    assert sum(source.count("\n") + 1 for source in code) <= MAX_CODE_LINES
    assert notebook.path.stat().st_size < MAX_BYTES


@each_notebook
def test_notebook_defines_nothing_and_asks_for_no_device(notebook):
    banned = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try)
    for cell in work_cells(notebook):
        found = [type(node).__name__ for node in ast.walk(ast.parse(cell.source)) if isinstance(node, banned)]
        assert found == [], cell.source
        assert "torch_npu" not in cell.source


@each_notebook
def test_notebook_begins_with_its_question_and_ends_with_its_result(notebook):
    prose = cells_of(notebook, "markdown")
    first = nbformat.read(notebook.path, as_version=4).cells[:2]

    assert [cell.cell_type for cell in first] == ["markdown", "code"]
    assert first[1].metadata.tags == ["parameters"]
    for part in ("# ", "?**", "- In:", "- Out:", "- Time:"):
        assert part in prose[0].source
    assert f'"{notebook.name}"' in "".join(cell.source for cell in work_cells(notebook))
    assert "findings.conclude(" in cells_of(notebook)[-1].source


def test_parameter_cells_are_those_that_the_command_writes():
    assert write_cells(ROOT / "notebooks", check=True) == []


@each_notebook
def test_parameters_carry_type_and_help_and_are_the_defaults_of_experiment(notebook):
    source = cells_of(notebook)[0].source
    one = re.compile(r"\w+: [\w\[\], |]+ = .+  # .+")

    assert all(one.fullmatch(line) and len(line) <= 120 for line in source.splitlines()[1:])
    assert set(notebook.defaults) >= {"experiment", "run", "output_root", "if_exists", "params_file"}
    assert notebook.defaults == {name: Experiment.model_fields[name].default for name in notebook.defaults}


@each_notebook
def test_opened_without_anything_a_notebook_is_the_demo(notebook):
    demo = load_experiment(ROOT / "params" / "demo.yaml")

    found = experiment_from_notebook(notebook.defaults)

    assert found == demo


def test_every_parameter_is_declared_by_some_notebook():
    declared = {name for notebook in NOTEBOOKS for name in notebook.defaults}

    assert set(Experiment.model_fields) - declared == set()


@each_notebook
@each_file
def test_plain_papermill_and_the_run_command_see_the_same_parameters(notebook, path):
    """papermill lays a file's values over the notebook's defaults; a key in the defaults alone must agree."""
    expected = load_experiment(path)

    found = experiment_from_notebook({**notebook.defaults, **read_with_places(path)[0]})

    for key in notebook.defaults:
        assert getattr(found, key) == getattr(expected, key), key


@each_file
def test_parameter_file_names_its_experiment_and_round_trips(path, tmp_path):
    experiment = load_experiment(path)
    (tmp_path / "again.yaml").write_text(experiment.to_yaml(), encoding="utf-8")

    assert "experiment" in read_with_places(path)[0]
    assert load_experiment(tmp_path / "again.yaml") == experiment


@pytest.mark.parametrize("indent", ["  ", "\u00a0 "], ids=["typed", "copied from the page"])
@pytest.mark.parametrize("value", [True, False])
def test_switches_of_the_article_reach_the_engine(tmp_path, value, indent):
    path = tmp_path / "infer_optimize_config.yaml"
    path.write_text(ARTICLE.replace("True", str(value)).replace("  ", indent), encoding="utf-8")

    direct = load_experiment(path)
    by_notebook = experiment_from_notebook({**NOTEBOOKS[3].defaults, **read_with_places(path)[0]})

    for experiment in (direct, by_notebook):
        assert experiment.model_name == "qwen3-8b" and experiment.max_seq_length == 8192
        assert (experiment.graph_mode, experiment.operator_fusion, experiment.memory_optimize) == (value,) * 3
    assert direct.experiment == "infer_optimize_config"
