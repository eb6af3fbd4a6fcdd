"""The interactive loop: cells run in a real kernel as JupyterLab runs them, more than once, and after a restart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from queue import Empty

import nbformat
import pytest
import yaml
from jupyter_client.manager import start_new_kernel

from ascend_kit.demo import ensure_data
from ascend_kit.params import load_experiment
from ascend_kit.run.checks import find_notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {notebook.name: notebook for notebook in find_notebooks(ROOT / "notebooks")}


class Session:
    """A kernel that runs sources one after the other; `run` raises AssertionError with the kernel's error."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment)

    def run(self, *sources: str) -> str:
        text = ""
        for source in sources:
            text += self._run(source)
        return text

    def _run(self, source: str) -> str:
        text, error = "", None
        identity = self.client.execute(source)
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=300)
            except Empty:
                raise AssertionError(f"no answer within five minutes to: {source}") from None
            if message["parent_header"].get("msg_id") != identity:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
            elif kind == "error":
                error = f"{content['ename']}: {content['evalue']}"
            elif kind == "status" and content["execution_state"] == "idle":
                assert error is None, error
                return text

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def session(tmp_path) -> Iterator[Session]:
    opened = Session(tmp_path)
    yield opened
    opened.close()


def code_of(name: str) -> dict[str, str]:
    """Id -> source of a notebook's code cells, in order."""
    cells = nbformat.read(NOTEBOOKS[name].path, as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def project(tiny_qwen3_dir, tmp_path_factory) -> Path:
    """A folder with the smallest parameter file."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "prompts.txt").write_text("first prompt\nsecond\n")
    values = {
        "experiment": "tiny",
        "output_root": str(folder / "outputs"),
        "input_model": str(tiny_qwen3_dir),
        "dataset_path": str(ensure_data(folder / "data")),
        "prompts_file": str(folder / "prompts.txt"),
        "device": "cpu",
        "precision": "fp32",
        "graph_mode": False,
        "max_seq_length": 1024,
        "max_new_tokens": 4,
        "sweep_concurrency": [1, 2],
        "sweep_prompt_len": [8],
        "sweep_output_len": [4],
        "sweep_requests_per_point": 2,
        "eval_datasets": ["mmlu"],
        "eval_fewshot": 0,
        "eval_limit": 2,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


# 02 comes before those that need its result, and 06 after those that it compares.
@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("name", list(NOTEBOOKS))
def test_run_all_twice_with_scratch_variables_and_the_results_alone_after_a_restart(project, session, name):
    injected = f"# Parameters\nparams_file = {str(project / 'tiny.yaml')!r}"
    code = code_of(name)
    parameters, *work = [code.pop("parameters"), *code.values()]
    results = list(code).index("reload") if "reload" in code else 0
    scratch = "limit = 5\nruns = ['x']\nbandwidth: float = 3.0\nseed = 99"

    session.run(parameters, injected, *work, scratch)
    session.run(parameters, injected, *work)
    session.manager.restart_kernel(now=True)
    session.client.wait_for_ready(timeout=60)
    session.run(*([] if results else list(code.values())[:1]), parameters, injected, *list(code.values())[results:])

    assert (project / "outputs" / "tiny" / "default" / f"{name}.json").is_file()


PRINT = "import ascend_kit\nfound = ascend_kit.experiment_from_notebook(globals())\nprint(found.to_yaml())"


def parameters_read(session: Session, *cells: str) -> dict:
    return yaml.safe_load(session.run(*cells, PRINT))


@pytest.mark.multiproc
def test_what_wins_over_what(session, project):
    cell = code_of("04_throughput")["parameters"]
    named = cell.replace("params_file: str | None = None", f"params_file: str | None = {str(project / 'tiny.yaml')!r}")
    edited = named.replace("batch_size: int = 16", "batch_size: int = 3").replace(
        "max_seq_length: int = 8192", "max_seq_length: int = 512"
    )

    demo = parameters_read(session, cell)
    by_file = parameters_read(session, named)
    by_cell = parameters_read(session, edited)
    injected = parameters_read(session, edited, '# Parameters\nbatch_size = 5\nprecision = "bf16"')
    panel = parameters_read(session, "from ascend_kit.params import notebook\nnotebook.applied['batch_size'] = 7")

    assert demo["experiment"] == demo["dataset_path"] == "demo"
    assert demo["max_seq_length"] == load_experiment(ROOT / "params" / "demo.yaml").max_seq_length == 4096
    assert (by_file["experiment"], by_file["max_seq_length"], by_file["batch_size"]) == ("tiny", 1024, 16)
    assert (by_cell["max_seq_length"], by_cell["batch_size"], by_cell["precision"]) == (512, 3, "fp32")
    assert (injected["max_seq_length"], injected["batch_size"], injected["precision"]) == (512, 5, "bf16")
    assert (panel["max_seq_length"], panel["batch_size"]) == (512, 7)


@pytest.mark.multiproc
def test_only_the_two_cells_hold_parameters_and_their_last_run_counts(session):
    cell = code_of("03_generate")["parameters"]

    typo = cell.replace("concurrency: int", "concurency: int")
    with pytest.raises(AssertionError, match=r"ParameterError: .*'concurency'.*did you mean 'concurrency'"):
        session.run("batch_size = 2\nlimit = 5", typo, PRINT)
    mended = parameters_read(session, cell.replace("concurrency: int = 32", "concurrency: int = 6"), "seed = 4")

    assert (mended["concurrency"], mended["batch_size"], mended["seed"]) == (6, 16, 0)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("concurency = 4", "'concurency'; did you mean 'concurrency'"),
        ("optimization = {'tensort': True}", "'tensort'; did you mean 'tensorrt'"),
        ("kv_cache_gib = float('inf')", "kv_cache_gib: .*finite number, got inf"),
        ("input_model = '/no/such/model'", "input_model: nothing at /no/such/model"),
        ("sweep_at_once = False", "sweep_at_once: points are always measured one after the other"),
        ("input_model = '.'", "prompts_file is not set"),
    ],
)
def test_a_wrong_injected_parameter_stops_before_anything_is_made(session, tmp_path, line, message):
    with pytest.raises(AssertionError, match=message):
        session.run(code_of("03_generate")["parameters"], f"# Parameters\n{line}", PRINT)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiproc
def test_the_articles_words_and_those_of_another_notebook_are_taken(session):
    injected = "# Parameters\noptimization = {'tensorrt': False}\neval_limit = 3\nmin_p = 0.5\ntensorrt = True"

    found = parameters_read(session, code_of("03_generate")["parameters"], injected)

    assert (found["graph_mode"], found["eval_limit"], found["min_p"]) == (False, 3, 0.5)
