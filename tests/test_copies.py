"""Working copies of notebooks, and stages that were run by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from test_run import run_folder, write_notebook

from ascend_kit.__main__ import main
from ascend_kit.params.notebook import experiment_from_notebook, literal_assignments
from ascend_kit.run.checks import find_notebooks
from ascend_kit.run.copies import without_widgets
from ascend_kit.run.experiment import run_experiment

BY_HAND = (
    "from ascend_kit import RunFolder\nfrom ascend_kit.params import build_experiment\n"
    "values = {'experiment': experiment, 'run': run, 'output_root': output_root, 'seed': seed}\n"
    "folder = RunFolder.open(build_experiment(values), '01_first')"
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.yaml").write_text("experiment: fake\nseed: 7\n")
    notebook = write_notebook(
        tmp_path / "notebooks", "01_first", BY_HAND, "print('seen in the copy')", "folder.close()"
    )
    content = notebook.read_text().replace(
        'output_root: str = \\"outputs\\"',
        'output_root: str = \\"outputs\\"\\nparams_file: str | None = None  # YAML file',
    )
    notebook.write_text(content)
    return tmp_path


def test_working_copies_carry_the_file_and_leave_the_folder_unused(project, capsys):
    template = (project / "notebooks" / "01_first.ipynb").read_bytes()
    write_notebook(project / "notebooks", "01_first-Copy1")

    assert main(["work", "fake.yaml", "--notebooks", "notebooks", "--set", "seed=9"]) == 0

    copy = run_folder(project) / "work" / "01_first.ipynb"
    cell = nbformat.read(copy, as_version=4).cells[1].source
    assert (
        f"params_file: str | None = '{project / 'fake.yaml'}'  # YAML file" in cell and "seed: int = 9  # seed" in cell
    )
    assert capsys.readouterr().out.strip() == "outputs/fake/default/work"
    assert (project / "notebooks" / "01_first.ipynb").read_bytes() == template
    copy.write_text(copy.read_text().replace("seen in", "changed in"))
    changed = copy.read_text()
    assert run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None).ok
    main(["run", "fake.yaml", "--notebooks", "notebooks", "--overwrite"])
    main(["work", "fake.yaml", "--notebooks", "notebooks"])
    assert copy.read_text() == changed and not (copy.parent / "01_first-Copy1.ipynb").exists()


def test_values_that_the_parameters_cell_cannot_say_above_the_file_are_injected(project):
    """A default written in the cell is no change of it, and an old name is none of its names."""
    (project / "mine.yaml").write_text("experiment: mine\nseed: 9\n")
    main(["work", "mine.yaml", "--set", "seed=0", "--set", "sweep_output_len=[5]", "--set", "sweep_concurrency=[2]"])
    copy = project / "outputs/mine/default/work/04_throughput.ipynb"
    cells = [cell.source for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code"]

    experiment = experiment_from_notebook({"In": ["", *cells[:2]]})

    assert cells[1].startswith("# Parameters\nseed = 0\n")
    assert (experiment.seed, experiment.experiment) == (0, "mine")
    assert (experiment.sweep["output_len"], experiment.sweep["concurrency"]) == ([5], [2])


def test_a_stage_run_in_jupyterlab_is_a_run_with_a_report(project, monkeypatch):
    main(["work", "fake.yaml", "--notebooks", "notebooks", "--set", "seed=7"])
    copy = run_folder(project) / "work" / "01_first.ipynb"
    monkeypatch.setenv("JPY_SESSION_NAME", str(copy))
    papermill.execute_notebook(str(copy), str(copy), progress_bar=False)  # executes in place, as JupyterLab does

    assert main(["report", str(run_folder(project))]) == 0

    stage = json.loads((run_folder(project) / "run.json").read_text())["stages"]["01_first"]
    assert stage["state"] == "ok" and stage["parameters"]["seed"] == 7
    assert "seen in the copy" in (run_folder(project) / "report.html").read_text()


def test_an_error_in_a_stage_run_by_hand_is_in_the_record(project):
    notebook = project / "notebooks" / "01_first.ipynb"
    notebook.write_text(notebook.read_text().replace("print('seen in the copy')", "1 / 0"))
    words = [sys.executable, "-m", "papermill", "notebooks/01_first.ipynb", "out.ipynb", "-p", "experiment", "fake"]
    assert subprocess.run(words, capture_output=True).returncode != 0

    assert main(["report", str(run_folder(project))]) == 0

    stage = json.loads((run_folder(project) / "run.json").read_text())["stages"]["01_first"]
    assert stage["state"] == "failed" and stage["error"] == "ZeroDivisionError: division by zero"
    assert Path(run_folder(project) / "01_first.ipynb").is_file()


def test_a_copy_in_chinese_is_chinese_in_prose_and_meanings_and_equal_in_code(project):
    main(["work", "fake.yaml", "--set", "language=zh", "--set", "experiment=zh"])

    for path in find_notebooks():
        copy = nbformat.read(project / "outputs" / "zh" / "default" / "work" / path.path.name, as_version=4)
        template = nbformat.read(path.path, as_version=4)
        for ours, theirs in zip(copy.cells, template.cells, strict=True):
            if ours.cell_type == "markdown":
                assert re.search("[\u4e00-\u9fff]", ours.source), theirs.source
            elif "parameters" in ours.metadata.get("tags", []):
                assert literal_assignments(ours.source).keys() == literal_assignments(theirs.source).keys()
                lines = [line for line in ours.source.splitlines()[1:] if "fp32" not in line and "npu:N" not in line]
                assert [line for line in lines if not re.search("[\u4e00-\u9fff]", line)] == []
            else:
                assert ours.source == theirs.source


def test_widgets_of_a_collected_copy_become_what_stands_beside_them():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    shown = [{**widget, "text/html": "<table></table>"}, {**widget, "text/plain": "HBox("}]
    cells = [{"outputs": [{"data": data} for data in shown]}]

    without_widgets(cells)

    first, second = (output["data"] for output in cells[0]["outputs"])
    assert first == {"text/html": "<table></table>"}
    assert list(second) == ["text/plain"] and "HBox(" not in second["text/plain"]
