"""A signal at any moment of a run ends it with the notebook's copy, a true record, a report and no child left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_run import write_notebook

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}


def send_at(folder: Path, number: int, after_s: float, *, to_kernel: bool = False) -> str:
    """Start a run in `folder`, send a signal `after_s` after its first notebook was announced, return what is wrong.

    The notebook takes about a second, so that late moments meet the end of the kernel, the verdict and the report.
    """
    folder.mkdir(parents=True)
    (folder / "fake.yaml").write_text("experiment: fake\nseed: 7\n")
    write_notebook(folder / "notebooks", "01_first", "import time", "print('begun', flush=True)", "time.sleep(0.6)")
    command = [sys.executable, "-m", "ascend_kit", "run", "fake.yaml", "--notebooks", "notebooks"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "[1/1] 01_first ..." in line:
            break
    time.sleep(after_s)
    targets = kernels(process.pid) if to_kernel else [process.pid]
    for pid in targets:
        os.kill(pid, number)
    started = time.monotonic()
    output = process.communicate(timeout=90)[0]
    return "; ".join(faults(folder, process, output, bool(targets), STATUS[number], time.monotonic() - started))


def kernels(driver: int) -> list[int]:
    """The processes that a driver has started."""
    try:
        return [child.pid for child in psutil.Process(driver).children()]
    except psutil.NoSuchProcess:
        return []


def faults(
    folder: Path, process: subprocess.Popen, output: str, was_sent: bool, status: int, took_s: float
) -> list[str]:
    """What is wrong with the end of a run; a run that was already at its end may also have succeeded."""
    run_folder = folder / "outputs" / "fake" / "default"
    found = []
    record = json.loads((run_folder / "run.json").read_text())
    state, stage = record["state"], record["stages"]["01_first"]["state"]
    if process.returncode not in ({0, status, -15, -1, -2} if stage == "ok" else {status}):
        found.append(f"exit status {process.returncode}, stage {stage}: {output[-300:]}")
    if stage not in ("ok", "interrupted") or (state != stage):
        found.append(f"run.json says {state} / {stage}: {record['stages']['01_first']['error']}")
    found += [f"no {name}" for name in ("01_first.ipynb", "report.html") if not (run_folder / name).is_file()]
    left = [item.pid for item in psutil.process_iter(["cwd"]) if item.info["cwd"] == str(folder)]
    if left:
        found.append(f"processes {left} are left")
    working = [path.name for path in run_folder.glob(".*") if not path.name.endswith(".lock")]
    if working:
        found.append(f"{working} are left")
    if took_s > 30:
        found.append(f"took {took_s:.0f} s to stop")
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("number", "after_s"),
    [
        (signal.SIGINT, 0.0),
        (signal.SIGTERM, 0.15),
        (signal.SIGHUP, 0.3),
        (signal.SIGINT, 0.5),
        (signal.SIGTERM, 0.8),
        (signal.SIGINT, 1.2),
        (signal.SIGHUP, 1.6),
        (signal.SIGINT, 2.2),
        (signal.SIGTERM, 3.0),
    ],
)
def test_a_signal_to_the_run_leaves_everything_in_order(tmp_path, number, after_s):
    assert send_at(tmp_path / "project", number, after_s) == ""


@pytest.mark.multiproc
@pytest.mark.parametrize(("number", "after_s"), [(signal.SIGINT, 2.0), (signal.SIGTERM, 1.0), (signal.SIGTERM, 2.5)])
def test_a_signal_to_the_kernel_leaves_everything_in_order(tmp_path, number, after_s):
    assert send_at(tmp_path / "project", number, after_s, to_kernel=True) == ""


@pytest.mark.multiproc
def test_an_interrupt_while_the_program_is_imported_says_nothing(tmp_path):
    (tmp_path / "x.yaml").write_text("experiment: x\n")
    command = [sys.executable, "-X", "importtime", "-m", "ascend_kit", "check", "x.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if "pydantic_core" in line)  # much is still to come
    process.send_signal(signal.SIGINT)

    output = process.communicate(timeout=60)[0]

    assert process.returncode == 130 and "Traceback" not in output


@pytest.mark.multiproc
def test_an_interrupt_ends_what_the_doctor_has_started(tmp_path):
    code = (
        "import sys; from ascend_kit.doctor.host import Host\n"
        "try: Host().run([sys.executable, '-c', 'import time; time.sleep(60)'], 50)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while not (children := kernels(process.pid)):
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)

    assert process.wait(20) == 130
    assert not any(psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" for child in children)


@pytest.mark.multiproc
def test_a_second_interrupt_ends_at_once(tmp_path):
    (tmp_path / "fake.yaml").write_text("experiment: fake\n")
    stubborn = (
        "import pathlib, time; pathlib.Path('deaf').touch()\n"
        "while True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"
    )
    write_notebook(tmp_path / "notebooks", "01_first", stubborn)
    command = [sys.executable, "-m", "ascend_kit", "run", "fake.yaml", "--notebooks", "notebooks"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "deaf").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()

    assert process.wait(30) == 130 and time.monotonic() - started < 2
    time.sleep(0.2)
    assert not [item.pid for item in psutil.process_iter(["cwd"]) if item.info["cwd"] == str(tmp_path)]
