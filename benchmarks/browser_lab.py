"""Every notebook in a real JupyterLab and Chromium: Run All twice, interrupted and gone on with, a model of one's own.

    python benchmarks/browser_lab.py [--only run_all,live,interrupt,own_model,readable] [--screenshots FOLDER]

Needs Chromium and playwright. Takes about ten minutes on two cores; a tiny random model is made on the spot.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser_session import INDICATOR, chromium, command, errors, jupyterlab, open_notebook, run_all, wait_idle  # noqa: E402
from conftest import make_model  # noqa: E402

from ascend_kit.demo import ensure_data  # noqa: E402
from ascend_kit.run.checks import find_notebooks  # noqa: E402

# Rows of the live table and size of the live chart, of the cell that sweeps.
LIVE = """() => {
  const cell = [...document.querySelectorAll('.jp-CodeCell')].find(one => one.innerText.includes('with LiveSweep('));
  const table = cell && cell.querySelector('tbody'), picture = cell && cell.querySelector('.jp-OutputArea-output img');
  return table ? [table.rows.length, picture ? picture.src.length : 0] : null;
}"""
NAMES = [notebook.name for notebook in find_notebooks()]


class Lab:
    """A project in a temporary folder, a browser and an open JupyterLab."""

    def __init__(self, folder: Path, browser, address: str, shots: Path | None) -> None:
        self.folder, self.browser, self.address, self.shots = folder, browser, address, shots

    def open(self, path: str, height: int = 1000):
        page = self.browser.new_page(viewport={"width": 1400, "height": height})
        open_notebook(page, self.address, path)
        return page

    def run_all(self, page, path: str) -> None:
        """Run All; AssertionError where a cell raised."""
        run_all(page)
        found = errors(page, self.folder / path)
        assert found == [], (path, found)

    def close(self, page, name: str) -> None:
        """Save the notebook, keep a picture, end its kernel."""
        command(page, "File", "docmanager:save")
        if self.shots:
            page.screenshot(path=self.shots / f"{name}.png")
        time.sleep(1)
        command(page, "Kernel", "kernelmenu:shutdown")
        page.close()

    def states(self, run: str) -> dict[str, str]:
        record = json.loads((self.folder / "outputs/tiny" / run / "run.json").read_text())
        return {name: stage["state"] for name, stage in record["stages"].items()}

    def kit(self, *words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "ascend_kit", *words]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, env=environment)


def make_project(folder: Path) -> None:
    """A tiny model, questions, prompts, a parameter file, and the notebooks."""
    model = make_model(folder / "model", "qwen3")
    (folder / "prompts.txt").write_text("first prompt\nsecond prompt\n")
    values = {"experiment": "tiny", "input_model": str(model), "dataset_path": str(ensure_data(folder / "cache"))}
    values |= {"prompts_file": str(folder / "prompts.txt"), "device": "cpu", "precision": "fp32", "graph_mode": False}
    values |= {"max_seq_length": 1024, "max_new_tokens": 4, "sweep_concurrency": [1, 2], "sweep_prompt_len": [8]}
    values |= {"sweep_output_len": [4], "eval_datasets": ["mmlu"], "eval_fewshot": 0, "eval_limit": 12}
    (folder / "params").mkdir()
    (folder / "params/tiny.yaml").write_text(yaml.safe_dump(values))
    (folder / "notebooks").symlink_to(ROOT / "notebooks")


def check_run_all(lab: Lab) -> None:
    """Run All twice in each notebook, in order: no error, and every stage done."""
    lab.kit("work", "params/tiny.yaml", "--run", "all")
    for name in NAMES:
        path = f"outputs/tiny/all/work/{name}.ipynb"
        page, started = lab.open(path), time.monotonic()
        for _ in range(2):
            lab.run_all(page, path)
        lab.close(page, name)
        assert lab.states("all")[name] == "ok", lab.states("all")
        print(f"  {name}: twice without an error, {time.monotonic() - started:.0f} s")


def check_live(lab: Lab) -> None:
    """The table and the chart of a sweep in 04 grow while it runs."""
    longer = ["--set", "sweep_output_len=[400]", "--set", "sweep_concurrency=[1,2,4,8]", "--set", "sweep_repeats=3"]
    lab.kit("work", "params/tiny.yaml", "--run", "live", "--set", "use_model=source", *longer)
    page = lab.open("outputs/tiny/live/work/04_throughput.ipynb", height=6000)  # JupyterLab draws the cells in sight
    command(page, "Run", "runmenu:run-all")
    seen: list[list[int]] = []
    until = time.monotonic() + 300
    while not seen or page.get_attribute(INDICATOR, "data-status") != "idle":
        assert time.monotonic() < until, seen
        state = page.evaluate(LIVE)
        if state and (not seen or state != seen[-1]):
            seen.append(state)
            if lab.shots:
                page.screenshot(path=lab.shots / f"live-{len(seen):02}.png")
        time.sleep(0.3)
    rows, pictures = ([state[place] for state in seen] for place in (0, 1))
    assert rows == sorted(rows) and len(set(rows)) >= 4 and len(set(pictures) - {0}) >= 3, seen
    shown = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").inner_text()
    assert "Loading weights" not in shown, "a bar of transformers is left"
    lab.close(page, "04_throughput-live")
    print(f"  04_throughput: table of {', '.join(map(str, dict.fromkeys(rows)))} rows")


def check_interrupt(lab: Lab) -> None:
    """04 and 05 interrupted in the middle and run again: rows that were there stay, the rest is added."""
    longer = ["--set", "sweep_output_len=[200]", "--set", "sweep_concurrency=[1,2,4]", "--set", "eval_limit=200"]
    lab.kit("work", "params/tiny.yaml", "--run", "stopped", "--set", "use_model=source", *longer)
    folder = lab.folder / "outputs/tiny/stopped"
    for name, table in (("04_throughput", "rows"), ("05_evaluate", "documents")):
        notebook = f"outputs/tiny/stopped/work/{name}.ipynb"
        page = lab.open(notebook)
        command(page, "Run", "runmenu:run-all")
        until = time.monotonic() + 120
        while not written(folder, table):
            assert time.monotonic() < until, f"{name} wrote no row"
            time.sleep(0.05)
        command(page, "Kernel", "kernelmenu:interrupt")
        wait_idle(page)
        before, state = written(folder, table), lab.states("stopped")[name]
        assert state == "interrupted", (name, state)
        lab.run_all(page, notebook)
        after = written(folder, table)
        assert after[: len(before)] == before and len(after) > len(before), name
        assert lab.states("stopped")[name] in ("ok", "alarm"), lab.states("stopped")  # of random weights
        lab.close(page, f"{name}-interrupted")
        print(f"  {name}: stopped after {len(before)} {table}, ended with {len(after)}")


def written(folder: Path, table: str) -> list[str]:
    """Whole lines of a table, which is packed when its stage is done."""
    path = folder / f"{table}.jsonl"
    if path.exists():
        text = path.read_text()
    else:
        packed = folder / f"{table}.jsonl.gz"
        text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else ""
    return text.split("\n")[:-1]


def check_own_model(lab: Lab) -> None:
    """Four fields of the form and Run All in 01: the plans are those of the model that was named."""
    demo = ["input_model=demo", "model_name=demo", "device=auto", "dataset_path=null", "prompts_file=demo"]
    lab.kit("work", "params/tiny.yaml", "--run", "own", *(word for value in demo for word in ("--set", value)))
    data = yaml.safe_load((lab.folder / "params/tiny.yaml").read_text())["dataset_path"]
    path = "outputs/tiny/own/work/01_environment.ipynb"
    page = lab.open(path)
    lab.run_all(page, path)
    fields = page.locator(".widget-gridbox").first.locator("input[type=text]")
    values = (str(lab.folder / "model"), "mine", "cpu", data)
    assert (found := [fields.nth(place).input_value() for place in range(4)]) == ["demo", "demo", "auto", "demo"], found
    for place, value in enumerate(values):
        fields.nth(place).fill(value)
        page.keyboard.press("Tab")
        time.sleep(0.2)
    page.click("button:has-text('Apply')")
    page.wait_for_selector("text=this notebook uses")
    lab.run_all(page, path)
    plans = json.loads((lab.folder / "outputs/mine/own/plans.json").read_text())
    assert plans["model"] == "mine", plans["model"]
    lab.close(page, "own-model")
    print("  01_environment: plans of the model named in the form")


def check_readable(lab: Lab) -> None:
    """The copies collected from JupyterLab hold no widget, and what is opened again says nothing of missing models."""
    lab.kit("report", "outputs/tiny/all")
    for name in ("01_environment", "04_throughput", "07_explore"):
        text = (lab.folder / "outputs/tiny/all" / f"{name}.ipynb").read_text()
        assert "widget-view" not in text and "HBox(" not in text and "FloatProgress" not in text, name
        page = lab.open(f"outputs/tiny/all/{name}.ipynb")
        shown = page.locator(".jp-NotebookPanel").inner_text()
        assert "model not found" not in shown and "Loading widget" not in shown, name
        lab.close(page, f"{name}-collected")
    print("  collected copies read without a kernel")


CHECKS = {
    "run_all": check_run_all,
    "live": check_live,
    "interrupt": check_interrupt,
    "own_model": check_own_model,
    "readable": check_readable,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, separated by commas; readable needs run_all")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of each notebook")
    arguments = parser.parse_args()
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder, settings = Path(name) / "project", Path(name) / "settings"
        folder.mkdir(), settings.mkdir()
        make_project(folder)
        with jupyterlab(folder, settings) as address:
            lab = Lab(folder, browser, address, arguments.screenshots)
            for check in arguments.only.split(","):
                print(f"{check}: {(CHECKS[check].__doc__ or '').splitlines()[0]}")
                CHECKS[check](lab)


if __name__ == "__main__":
    main()
