"""Faults of an earlier version, each shown through the command line, papermill or public names only.

The same file runs on that version and fails there for the reason that a test's first line states.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
HEADER = 'experiment: str = "fake"\nrun: str = "default"\noutput_root: str = "outputs"\nif_exists: str = "resume"\n'
OPEN = (
    "import json, pathlib\nimport ascend_kit\n"
    "values = {name: value for name, value in globals().items() if name in ascend_kit.Experiment.model_fields}\n"
    "values = ascend_kit.Experiment(**values)\n"
    "opened = ascend_kit.RunFolder.open(values, 'STAGE')\nopened.begin(values, 'rows')"
)
CLOSE = "opened.write_json('STAGE', {'findings': []})\nopened.close()"


def write_stage(folder: Path, stage: str, parameters: str, *cells: str) -> Path:
    """A small notebook that opens its stage as the real ones do, runs `cells` and closes it."""
    sources = [OPEN.replace("STAGE", stage), *cells, CLOSE.replace("STAGE", stage)]
    first = nbformat.v4.new_code_cell(HEADER + parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(f"# {stage}"), first, *map(nbformat.v4.new_code_cell, sources)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{stage}.ipynb")
    return folder / f"{stage}.ipynb"


def command(folder: Path, *words: str, module: str = "ascend_kit") -> subprocess.CompletedProcess[str]:
    """`python -m ascend_kit ...` (or another module) in `folder`; stdout and stderr together."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = [sys.executable, "-m", module, *words]
    return subprocess.run(
        process, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.multiproc
def test_2_a_checkpoint_that_was_overwritten_is_not_done_before(tmp_path):
    """Stage reuse compared the parameters only, so that answers of the old weights were shown for the new ones."""
    from conftest import make_model

    model = make_model(tmp_path / "model", "qwen3", seed=1)
    (tmp_path / "fake.yaml").write_text(f"experiment: fake\ninput_model: {model}\n")
    write_stage(tmp_path / "notebooks", "01_first", 'input_model: str = "demo"', "opened.append('rows', {'n': 1})")
    words = ("run", "fake.yaml", "--notebooks", "notebooks")
    assert command(tmp_path, *words).returncode == 0
    assert "01_first: done before" in command(tmp_path, *words, "--resume").stdout

    make_model(model, "qwen3", seed=2)
    weights = command(tmp_path, *words, "--resume").stdout
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": "{{ messages }}"}))
    template = command(tmp_path, *words, "--resume").stdout

    assert "done before" not in weights and "weights" in weights, weights
    assert "done before" not in template and "chat_template" in template, template


@pytest.mark.multiproc
def test_7_a_finished_sweep_can_be_extended(tmp_path):
    """Another concurrency was refused although rows are keyed by their point."""
    (tmp_path / "fake.yaml").write_text("experiment: fake\nsweep_concurrency: [1, 4]\n")
    points = "for point in sweep_concurrency:\n    opened.append('rows', {'concurrency': point})"
    write_stage(tmp_path / "notebooks", "04_throughput", "sweep_concurrency: list[int] = [1]", points)
    words = ("run", "fake.yaml", "--notebooks", "notebooks")
    assert command(tmp_path, *words).returncode == 0

    done = command(tmp_path, *words, "--resume", "--set", "sweep_concurrency=[8]")

    assert done.returncode == 0, done.stdout
    rows = (tmp_path / "outputs" / "fake" / "default" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["concurrency"] for row in rows] == [1, 4, 8]


@pytest.mark.multiproc
def test_9_plain_papermill_into_another_folder_leaves_a_run_with_a_report(tmp_path):
    """`report` said that the folder is no run folder."""
    write_stage(tmp_path / "notebooks", "01_first", "seed: int = 0", "print('an output of the notebook')")
    (tmp_path / "elsewhere").mkdir()
    done = command(tmp_path, "notebooks/01_first.ipynb", "elsewhere/out.ipynb", "-p", "seed", "3", module="papermill")
    assert done.returncode == 0, done.stdout

    report = command(tmp_path, "report", "outputs/fake/default")

    assert report.returncode == 0, report.stdout
    assert "an output of the notebook" in (tmp_path / "outputs" / "fake" / "default" / "report.html").read_text()
