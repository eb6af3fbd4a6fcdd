"""Faults of an earlier version, each shown through the command line, papermill or public names only.

The same file runs on that version and fails there for the reason that a test's first line states.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
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


@pytest.mark.long
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
def test_9_plain_papermill_into_another_folder_leaves_a_run_with_a_report(tmp_path):
    """`report` said that the folder is no run folder."""
    write_stage(tmp_path / "notebooks", "01_first", "seed: int = 0", "print('an output of the notebook')")
    (tmp_path / "elsewhere").mkdir()
    done = command(tmp_path, "notebooks/01_first.ipynb", "elsewhere/out.ipynb", "-p", "seed", "3", module="papermill")
    assert done.returncode == 0, done.stdout

    report = command(tmp_path, "report", "outputs/fake/default")

    assert report.returncode == 0, report.stdout
    assert "an output of the notebook" in (tmp_path / "outputs" / "fake" / "default" / "report.html").read_text()


def make_tiny(folder: Path, name: str, seed: int, **values: object) -> Path:
    """A random model and a parameter file <name>.yaml that runs it from its source in seconds."""
    from conftest import make_model

    model = make_model(folder / name, "qwen3", seed=seed)
    small = {
        "experiment": "fake", "model_name": "tiny", "input_model": str(model), "use_model": "source", "device": "cpu",
        "precision": "fp32", "graph_mode": False, "max_seq_length": 512, "max_new_tokens": 4,
        "eval_max_seq_length": 512,
        "sweep_concurrency": [1], "sweep_prompt_len": [8], "sweep_output_len": [4], "sweep_repeats": 1,
        "sweep_requests_per_point": 1, "sweep_baseline": False, "prompts_file": "demo",
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps({**small, **values}))  # JSON is YAML
    return model


@pytest.mark.long
@pytest.mark.multiproc
def test_1_another_models_converted_folder_is_not_measured_under_this_ones_name(tmp_path):
    """04 ran the folder named after model_name and precision, whatever input_model was."""
    make_tiny(tmp_path, "first", 1, use_model="converted")
    second = make_tiny(tmp_path, "second", 2, use_model="converted")
    assert command(tmp_path, "convert", "first.yaml").returncode == 0

    done = command(tmp_path, "run", "second.yaml", "--only", "04")

    assert done.returncode != 0 and str(second) in done.stdout and str(tmp_path / "first") in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.multiproc
def test_5_a_model_that_is_not_the_demo_is_not_scored_on_the_demos_questions(tmp_path):
    """A forgotten dataset_path scored the user's model on the demo's data and called it the local copy."""
    make_tiny(tmp_path, "tiny", 1, eval_limit=1, eval_datasets=["wikitext"])

    done = command(tmp_path, "run", "tiny.yaml", "--only", "05")

    assert done.returncode == 2 and "dataset_path" in done.stdout, done.stdout


@pytest.mark.multiproc
def test_6_cells_may_run_again_and_scratch_variables_are_no_parameters(tmp_path):
    """Every variable left in the kernel counted as a parameter, so that Run All failed the second time."""
    import papermill

    notebook = nbformat.read(ROOT / "notebooks" / "06_compare.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    again = nbformat.v4.new_code_cell(cell.source)
    read = "import ascend_kit\nexperiment = ascend_kit.experiment_from_notebook(globals())\nmargin = experiment.seed"
    codes = [nbformat.v4.new_code_cell(source) for source in (read, "runs, limit = [], 5", read)]
    notebook.cells = [cell, codes[0], codes[1], again, codes[2]]
    nbformat.write(notebook, tmp_path / "twice.ipynb")

    papermill.execute_notebook(str(tmp_path / "twice.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False)


def test_8_a_notebook_and_the_command_line_have_the_same_defaults():
    """sweep_repeats was 2 or 1, max_new_tokens 32 or 1024, depending on the way a run was started."""
    import ast

    import papermill

    from ascend_kit import Experiment

    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        for name, entry in papermill.inspect_notebook(str(path)).items():
            assert ast.literal_eval(entry["default"]) == Experiment.model_fields[name].default, f"{path.name}: {name}"


def test_10_the_list_of_parameters_promises_no_parts_of_names(tmp_path):
    """quantize_keep was said to take parts of names, which the converter does not accept."""
    text = command(tmp_path, "check", "--list").stdout

    assert "quantize_keep" in text and "parts of names" not in text


@pytest.mark.long
@pytest.mark.multiproc
def test_3_answers_to_prompts_that_are_gone_are_not_shown(tmp_path):
    """A prompts file cut from 4 to 2 lines left 4 answers, of the old prompts, in generations.json."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\nfour\n")
    make_tiny(tmp_path, "tiny", 1, prompts_file=str(prompts))
    words = ("run", "tiny.yaml", "--only", "03")
    assert command(tmp_path, *words).returncode == 0
    prompts.write_text("three\ntwo\n")

    done = command(tmp_path, *words, "--resume")

    assert done.returncode == 0, done.stdout
    answers = json.loads((tmp_path / "outputs" / "fake" / "default" / "generations.json").read_text())
    assert [answer["prompt"] for answer in answers] == ["three", "two"]


def opened_tiny(folder: Path, name: str = "tiny", run: str = "default", **changes: object):
    """The experiment of `make_tiny`'s file with changes, and an engine for it; public names only."""
    import ascend_kit

    values = {**json.loads((folder / f"{name}.yaml").read_text()), "output_root": str(folder / "outputs"), "run": run}
    experiment = ascend_kit.Experiment(**{**values, "if_exists": "resume", **changes})
    return experiment, ascend_kit.AscendInferEngine.from_experiment(experiment).load_model()


def evaluated(folder: Path, **changes: object):
    """The result of one pass of 05's work, and the rows of scores.jsonl after it."""
    import ascend_kit

    experiment, engine = opened_tiny(folder, **changes)
    with ascend_kit.RunFolder.open(experiment, "05_evaluate") as opened:
        result = ascend_kit.evaluate(engine, experiment, opened)
    engine.close()
    return result, list(opened.rows("scores"))


@pytest.mark.slow
def test_3_rows_of_data_that_is_gone_take_part_in_nothing_and_no_pass_adds_groups(tmp_path):
    """A subject removed from the data stayed in the table; scores.jsonl gained all group rows at every pass."""
    import pandas

    from ascend_kit.demo import ensure_data

    data = tmp_path / "data"
    for subject in ("anatomy", "astronomy"):
        shutil.copytree(ensure_data() / "mmlu" / subject, data / "mmlu" / subject)
    values = {"dataset_path": str(data), "eval_datasets": ["mmlu"], "eval_limit": 1, "eval_fewshot": 0}
    make_tiny(tmp_path, "tiny", 1, **values)

    _, first = evaluated(tmp_path)
    _, again = evaluated(tmp_path)
    shutil.rmtree(data / "mmlu" / "astronomy")
    fewer, _ = evaluated(tmp_path)
    questions = data / "mmlu" / "anatomy" / "test.parquet"
    pandas.read_parquet(questions).iloc[::-1].to_parquet(questions, index=False)
    _, edited = evaluated(tmp_path)

    assert len(again) == len(first), "a pass without work added rows"
    assert set(fewer.tasks["task"]) == {"mmlu_anatomy"} and set(fewer.groups["n"]) == {1}
    assert len(edited) > len(first), "answers to the data before its edit were reused"


def measured(folder: Path, **changes: object) -> int:
    """Rows of rows.jsonl after one pass of 04's work; the ceilings are given, which takes no time."""
    import ascend_kit

    experiment, engine = opened_tiny(folder, **changes)
    ceilings = {"device": "given", "fp32_flops_per_s": 1e9, "read_bytes_per_s": 1e9, "launch_s": 1e-6}
    with ascend_kit.RunFolder.open(experiment, "04_throughput") as opened:
        ascend_kit.run_sweep(engine, experiment, opened, ceilings=ceilings)
    engine.close()
    return len(list(opened.rows("rows")))


def change_settings(model: Path, **values: object) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("changed", ["nothing", "weights", "tokenizer", "template", "package", "seed"])
def test_2_rows_are_reused_only_for_what_they_belong_to(tmp_path, monkeypatch, changed):
    """Resume compared names: rows of other weights, tokenizers, templates or packages counted as done."""
    import importlib.metadata

    from conftest import make_model

    model, changes = make_tiny(tmp_path, "tiny", 1), {}
    assert measured(tmp_path) == 1
    if changed == "weights":
        make_model(model, "qwen3", seed=2)
    elif changed == "tokenizer":
        change_settings(model, model_max_length=500)
    elif changed == "template":
        change_settings(model, chat_template="{{ messages }}")
    elif changed == "package":
        known = importlib.metadata.version
        newer = {"transformers": "99.0"}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: newer.get(name) or known(name))
    elif changed == "seed":
        changes["seed"] = 5

    assert measured(tmp_path, **changes) == (1 if changed == "nothing" else 2)


def test_7_a_finished_sweep_can_be_extended(tmp_path):
    """Another concurrency was refused although rows are keyed by their point."""
    make_tiny(tmp_path, "tiny", 1)

    assert measured(tmp_path, sweep_concurrency=[1]) == 1
    assert measured(tmp_path, sweep_concurrency=[1, 2]) == 2  # the old row and one more


def test_2_another_precision_is_another_run(tmp_path):
    """Rows of two precisions in one run would be one name for two variants."""
    make_tiny(tmp_path, "tiny", 1)
    measured(tmp_path)

    with pytest.raises(RuntimeError, match="precision"):
        measured(tmp_path, precision="bf16")


@pytest.mark.slow
@pytest.mark.multiproc
def test_4_unlike_runs_are_told_in_words_and_a_run_that_lacks_something_stops_no_other(tmp_path):
    """06 gave a verdict on 5-shot against 1-shot; one run without evaluation, or with other points, stopped it."""
    from ascend_kit.demo import ensure_data

    values = {"dataset_path": str(ensure_data()), "eval_datasets": ["agieval"], "eval_limit": 1, "eval_fewshot": 0}
    make_tiny(tmp_path, "tiny", 1, **values)
    for run, shots in (("a", 0), ("b", 1)):
        measured(tmp_path, run=run)
        evaluated(tmp_path, run=run, eval_datasets=["mmlu"], eval_fewshot=shots)
    measured(tmp_path, run="killed", sweep_prompt_len=[16])

    done = command(tmp_path, "run", "tiny.yaml", "--only", "06")

    assert done.returncode == 0, done.stdout
    text = (tmp_path / "outputs" / "fake" / "default" / "06_compare.ipynb").read_text()
    assert "shots: 0 -&gt; 1" in text or "shots: 0 -> 1" in text
    assert "no evaluation" in text and "not measured at" in text


@pytest.mark.long
@pytest.mark.multiproc
def test_10_the_headline_is_the_mean_of_the_repeats_as_06_counts_it(tmp_path):
    """The best single repeat was the headline."""
    make_tiny(tmp_path, "tiny", 1, sweep_repeats=3)

    done = command(tmp_path, "run", "tiny.yaml", "--only", "04")

    assert done.returncode == 0, done.stdout
    folder = tmp_path / "outputs" / "fake" / "default"
    rates = [json.loads(row)["output_tokens_per_s"] for row in (folder / "rows.jsonl").read_text().splitlines()]
    text = json.dumps(json.loads((folder / "04_throughput.json").read_text())["findings"])
    numbers = [float(number.replace(",", "")) for number in re.findall(r"([\d,]+\.?\d*) (?:output )?tokens/s", text)]
    assert any(abs(number - sum(rates) / 3) < 1 for number in numbers), (rates, text)


@pytest.mark.long
@pytest.mark.multiproc
def test_every_row_carries_the_identity_of_what_made_it(tmp_path):
    """Rows were told apart by names and conditions."""
    from ascend_kit.demo import ensure_data

    make_tiny(tmp_path, "tiny", 1, dataset_path=str(ensure_data()), eval_datasets=["mmlu"], eval_limit=1)

    done = command(tmp_path, "run", "tiny.yaml", "--only", "03,04,05")

    assert done.returncode in (0, 1), done.stdout  # a model of random weights may be an alarm
    folder = tmp_path / "outputs" / "fake" / "default"
    texts = {path.name.split(".")[0]: path.read_bytes() for path in folder.glob("*.jsonl*")}
    texts = {name: gzip.decompress(text) if text[:2] == b"\x1f\x8b" else text for name, text in texts.items()}
    tables = {name: [json.loads(row) for row in text.splitlines()] for name, text in texts.items()}
    known = {row["id"] for row in tables.pop("identities", [])}
    assert set(tables) >= {"rows", "requests", "cards", "answers", "scores", "documents", "evaluation_cards"}
    assert {name for name, rows in tables.items() if not all(row.get("identity") in known for row in rows)} == set()
