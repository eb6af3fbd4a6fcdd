"""The real notebooks, executed headless on a tiny model: their files are asserted on, not printed text."""

import json
import re
import shutil

import nbformat
import pandas
import papermill
import pytest
import yaml
from chinese_text import english_in, own_cells
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.text import Text

from ascend_kit.demo import ensure_data
from ascend_kit.messages import use_language
from ascend_kit.params import load_experiment
from ascend_kit.results import RunFolder
from ascend_kit.run.checks import find_notebooks
from ascend_kit.run.experiment import run_experiment

NAMES = [notebook.name for notebook in find_notebooks()]


@pytest.fixture(scope="module")
def parameters(tiny_qwen3_dir, tmp_path_factory):
    """A parameter file for the smallest possible pass through all notebooks."""
    folder = tmp_path_factory.mktemp("project")
    data = ensure_data(folder / "cache")
    (folder / "prompts.txt").write_text("first prompt\nsecond <script>alert(1)</script>\n")
    values = {
        "experiment": "tiny",
        "language": "zh",
        "output_root": str(folder / "outputs"),
        "model_name": "tiny",
        "input_model": str(tiny_qwen3_dir),
        "dataset_path": str(data),
        "prompts_file": str(folder / "prompts.txt"),
        "device": "cpu",
        "precision": "fp32",
        "graph_mode": False,
        "max_seq_length": 1024,
        "eval_max_seq_length": 1024,
        "max_new_tokens": 4,
        "sweep_concurrency": [1, 2],
        "sweep_prompt_len": [8],
        "sweep_output_len": [4],
        "sweep_requests_per_point": 2,
        "eval_datasets": ["mmlu", "wikitext"],
        "eval_fewshot": 0,
        "eval_limit": 2,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run(parameters):
    lines = []
    report = run_experiment(parameters, echo=lines.append)
    # A random model is worse at text than even chances, which is said aloud and stops nothing.
    assert report.state == "alarm" and sum("ALARM wikitext" in line for line in lines) == 1, "\n".join(lines)
    return report


@pytest.mark.slow
@pytest.mark.multiproc
def test_all_notebooks_leave_their_rows_figures_and_findings(run):
    folder = RunFolder(run.run_folder)

    assert [state.name for state in run.notebooks] == NAMES
    assert all(folder.read_json(name)["findings"] for name in NAMES)
    rows = folder.load("rows")
    assert set(rows["status"]) == {"ok"} and set(rows["backend"]) == {"ascend_kit", "transformers"}
    assert len(rows) == 4 and (rows["output_tokens_per_s"] > 0).all()
    answers = json.loads((folder.path / "generations.json").read_text())
    assert [answer["prompt"] for answer in answers] == ["first prompt", "second <script>alert(1)</script>"]
    scores = folder.load("scores")
    assert {"acc", "bits_per_byte", "token_perplexity"} <= set(scores["metric"])
    assert pandas.DataFrame(folder.read_json("doctor"))["status"].isin(["ok", "warn", "fail", "n/a"]).all()
    figures = {path.stem for path in (folder.path / "figures").glob("*.png")}
    # One plan and one run are no comparison: 01 and 06 draw nothing.
    assert figures >= {"requests", "throughput", "latency", "tradeoff", "speedup", "memory"}
    assert not figures & {"plans", "comparison", "layouts"}


@pytest.mark.slow
@pytest.mark.multiproc
def test_executed_copies_hold_their_figures_and_the_report_runs_no_prompt(run):
    for name in NAMES:
        copy = nbformat.read(run.run_folder / f"{name}.ipynb", as_version=4)
        outputs = [output for cell in copy.cells if cell.cell_type == "code" for output in cell.outputs]
        kinds = {kind for output in outputs for kind in output.get("data", {})}
        assert "image/png" in kinds or name in ("01_environment", "02_convert", "06_compare")
        assert "application/vnd.jupyter.widget-view+json" not in kinds
        assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    page = run.report.read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "second &lt;script&gt;" in page  # the page's own, allowed by its hash
    assert "Nothing to show" not in page and len(page) < 3_000_000


@pytest.mark.slow
@pytest.mark.multiproc
def test_the_report_of_a_run_in_chinese_has_no_english_left_but_names_units_and_code(run):
    assert english_in(run.report.read_text(encoding="utf-8"), "tiny", "default") == []


@pytest.mark.slow
def test_the_results_of_the_same_run_read_again_in_english_hold_no_chinese(run, parameters, tmp_path, monkeypatch):
    shutil.copytree(run.run_folder, tmp_path / "tiny/default")
    experiment = load_experiment(parameters, {"language": "en", "output_root": str(tmp_path)})
    shell, texts = InteractiveShell.instance(), []

    def words_of(folder, name, figure, caption, **_):
        """What stands in a figure, without the seconds that drawing it takes."""
        texts.extend([caption, *(text.get_text() for text in figure.findobj(Text))] if figure else [])

    monkeypatch.setattr("ascend_kit.experiment_from_notebook", lambda _: experiment)
    monkeypatch.setattr("ascend_kit.show.charts.keep", words_of)
    use_language("en")
    try:
        for notebook in find_notebooks():
            cells = nbformat.read(notebook.path, as_version=4).cells
            ids = [cell.id for cell in cells]
            start = ids.index("reload" if "reload" in ids else "setup")  # 06 and 07 read files from their first cell on
            for cell in (cell for cell in cells[start:] if cell.cell_type == "code"):
                with capture_output() as caught:
                    done = shell.run_cell(cell.source)
                done.raise_error()
                shown = [getattr(done.result, "data", ""), *(out.data.get("text/html", "") for out in caught.outputs)]
                texts += [caught.stdout, *filter(None, shown)]
    finally:
        InteractiveShell.clear_instance()

    told = re.sub("<table.*?</table>", lambda found: own_cells(found[0]), "\n".join(texts), flags=re.DOTALL)
    assert re.findall(".*[\u3000-\u9fff\uff00-\uffef].*", told) == []
    for text in ("weights, GiB", "output tokens/s against requests in flight", "Throughput against latency",
                 "2 of 2 prompts answered", "no history yet"):  # fmt: skip
        assert text in told, text


@pytest.mark.multiproc
def test_plain_papermill_refuses_a_misspelt_key_in_the_first_cells(tmp_path):
    source = next(notebook.path for notebook in find_notebooks() if notebook.name == "06_compare")

    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'max_new_tokens'"):
        papermill.execute_notebook(
            str(source), str(tmp_path / "out.ipynb"), parameters={"max_new_token": 3}, progress_bar=False
        )

    assert not (tmp_path / "outputs").exists()
