"""A real Chromium and a real JupyterLab for tests and benchmarks: started, waited for, ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
INDICATOR = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator"
SCROLLER = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"


@contextlib.contextmanager
def chromium():
    """A headless browser of the system's Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextlib.contextmanager
def jupyterlab(folder: Path, settings: Path):
    """The address of a JupyterLab over `folder`, without a token, its settings apart from the user's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    apart = {f"JUPYTER_{kind}_DIR": str(settings / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    words = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}", "--no-browser", "--allow-root",
             "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
             "--LabApp.extension_manager=readonly"]  # fmt: skip
    environment = {**os.environ, **apart, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(settings / "lab.log", "w") as log:
        server = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 90
        while not _answers(f"{address}/api/status"):
            assert server.poll() is None and time.monotonic() < until, (settings / "lab.log").read_text()[-2000:]
            time.sleep(0.3)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except OSError:
        return False
    return True


def open_notebook(page, address: str, path: str) -> None:
    """Open a notebook in a clean workspace and wait for its kernel."""
    page.goto(f"{address}/lab/tree/{path}?reset", wait_until="domcontentloaded")
    page.wait_for_selector(f"{INDICATOR}[data-status=idle]", timeout=90_000)
    for _ in range(4):  # a kernel is asked for only where the notebook's was not found in time
        if page.locator(".jp-Dialog button.jp-mod-accept").count():
            page.click(".jp-Dialog button.jp-mod-accept")
        time.sleep(0.5)
    page.wait_for_selector(f"{INDICATOR}[data-status=idle]", timeout=90_000)


def command(page, menu: str, name: str) -> None:
    """Click an entry of a menu, as a person does."""
    page.click(f"li.lm-MenuBar-item:has-text('{menu}')")
    page.click(f"li.lm-Menu-item[data-command='{name}']")
    if page.locator(".jp-Dialog button.jp-mod-accept").count():
        page.click(".jp-Dialog button.jp-mod-accept")


def run_all(page, timeout_s: float = 300) -> None:
    """Run All Cells, and wait until the kernel has nothing more to do."""
    command(page, "Run", "runmenu:run-all")
    wait_idle(page, timeout_s)


def wait_idle(page, timeout_s: float = 300) -> None:
    until, quiet = time.monotonic() + timeout_s, 0
    while quiet < 3:
        assert time.monotonic() < until, f"not done after {timeout_s} s"
        quiet = quiet + 1 if page.get_attribute(INDICATOR, "data-status") == "idle" else 0
        time.sleep(0.4)


def errors(page, file: Path) -> list[str]:
    """Save the notebook; its error outputs, and the cells that an error before them left without a run.

    They are read from the file: JupyterLab draws only the cells in sight.
    """
    before, document = file.stat().st_mtime_ns, None
    command(page, "File", "docmanager:save")
    until = time.monotonic() + 20
    while document is None:
        assert time.monotonic() < until, f"{file} was not saved"
        time.sleep(0.1)
        with contextlib.suppress(ValueError):  # half written
            document = json.loads(file.read_text()) if file.stat().st_mtime_ns != before else None
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    raised = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    left = [cell["id"] for cell in cells if cell["execution_count"] is None]
    return [f"{out['ename']}: {out['evalue']}" for out in raised] + [f"{name} was not run" for name in left]
