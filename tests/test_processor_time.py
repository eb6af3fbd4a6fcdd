"""Processor time of ours and of others, with real processes that burn it; other tests may run beside these, so what is
compared is a bound that they cannot break."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time

import pandas
import pytest
from chinese_text import english_in

from ascend_kit.device import meters
from ascend_kit.device.meters import COLUMNS, Process, ProcessorMeter, own_processes, processes
from ascend_kit.measure.disturbed import disturbance, is_disturbed
from ascend_kit.measure.remote import EndpointBackend
from ascend_kit.measure.server_process import ServerProcess
from ascend_kit.params import build_experiment
from ascend_kit.show.findings import sweep_findings

linux = pytest.mark.skipif(sys.platform != "linux", reason="counters of Linux")
BURN = "while :; do :; done"


@contextlib.contextmanager
def stranger():
    """A process that burns, is nobody's child here and in a session of its own; its number."""
    quiet = "start_new_session=True, stdout=-3, stderr=-3"  # -3: DEVNULL; a pipe of ours it would hold open
    start = f"import subprocess; print(subprocess.Popen(['sh', '-c', '{BURN}'], {quiet}).pid)"
    pid = int(subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True).stdout)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)


def measured(pid, seconds=0.8):
    """(seconds that the process ran, seconds of ours, seconds of others) while all are measured."""
    with ProcessorMeter() as meter:
        before, start = processes()[pid].cpu_s, time.perf_counter()
        time.sleep(seconds)
        burnt, wall_s = processes()[pid].cpu_s - before, time.perf_counter() - start
    row = meter.columns()
    assert burnt > 0.05 and row["cpu_cores"] == len(os.sched_getaffinity(0))
    return burnt, row["own_cpu_cores"] * wall_s, row["other_cpu_cores"] * wall_s


@linux
def test_what_a_stranger_burns_is_others():
    with stranger() as pid:
        burnt, _, other = measured(pid)

    assert other > 0.8 * burnt


@linux
def test_what_a_worker_of_a_started_server_burns_is_ours_although_its_parent_has_ended(tmp_path):
    note = tmp_path / "pid"
    script = f"(sh -c '{BURN}' & echo $! > {note}); sleep 60"
    server = ServerProcess(f"sh -c {shlex.quote(script)}", tmp_path / "log")
    server.start(iter([False, True]).__next__, 5)
    try:
        while not note.exists() or not note.read_text().strip():
            time.sleep(0.01)
        pid = int(note.read_text())
        assert processes()[pid].parent not in own_processes([os.getpid()], processes())
        burnt, own, _ = measured(pid)
    finally:
        server.stop()

    assert own > 0.8 * burnt


def test_ours_are_the_descendants_and_the_sessions_they_lead():
    every = {
        1: Process(0, 1, 0), 10: Process(1, 5, 0), 11: Process(10, 5, 0), 12: Process(11, 12, 0),
        13: Process(1, 12, 0), 14: Process(13, 14, 0), 20: Process(1, 5, 0),
        30: Process(1, 30, 0), 31: Process(30, 30, 0),
    }  # fmt: skip

    assert own_processes([10], every) == {10, 11, 12, 13, 14}  # 20 shares the session of 10, which 10 does not lead
    assert own_processes([10, 30, 99], every) == {10, 11, 12, 13, 14, 30, 31}


def test_nothing_is_told_of_a_short_block_of_unknown_processes_and_outside_linux(tmp_path, monkeypatch):
    nothing = dict.fromkeys(COLUMNS)
    with ProcessorMeter() as short, ProcessorMeter(None) as unknown:
        pass
    assert short.columns() == unknown.columns() == nothing

    monkeypatch.setattr(meters, "SHORTEST_S", 0)
    monkeypatch.setattr(meters, "PROC", tmp_path)
    with ProcessorMeter() as elsewhere:
        pass
    assert elsewhere.columns() == nothing


@linux
def test_short_blocks_are_told_with_those_before_them_but_not_with_other_processes(monkeypatch):
    readings = iter([
        (0.0, 0.0, 0.0), (0.2, 0.3, 0.1),  # the first block, too short
        (0.4, 0.6, 0.2), (0.6, 1.2, 0.6),  # the second: 0.6 s since the first began, 1.2 s busy, 0.6 of them ours
        (0.6, 1.2, 0.6), (0.7, 1.3, 0.7),  # beside a server that the others did not know
        (9.0, 2.0, 1.0), (9.2, 2.1, 1.1),  # long after
    ])  # fmt: skip
    monkeypatch.setattr(meters, "_read", lambda roots: next(readings))
    told, before = [], None
    for pids in ((), (), (1,), (1,)):
        with ProcessorMeter(pids, before) as before:
            pass
        told.append(before.columns())

    assert told[0] == told[2] == told[3] == dict.fromkeys(COLUMNS)
    assert (told[1]["own_cpu_cores"], told[1]["other_cpu_cores"]) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("kind", "own", "other", "expected"),
    [
        ("cpu", 14.0, 1.1, True), ("cpu", 14.0, 0.9, False), ("cpu", 1.0, 9.0, True), ("cpu", None, None, False),
        ("npu", 4.0, 9.0, False), ("npu", 4.0, 11.1, True), ("cuda", 15.9, 0.1, False), ("endpoint", 2.0, 3.0, False),
    ],
)  # fmt: skip
def test_others_disturb_a_cpu_by_what_they_take_and_the_host_of_a_card_where_nothing_is_left(
    kind, own, other, expected
):
    row = {"device_kind": kind, "cpu_cores": 16, "own_cpu_cores": own, "other_cpu_cores": other}

    assert is_disturbed(row) is expected
    assert is_disturbed(pandas.DataFrame([row]).to_dict("records")[0]) is expected
    assert not is_disturbed({"device_kind": kind})  # rows of an older version


def test_a_server_is_ours_where_the_sweep_starts_it_and_else_its_processes_are_unknown(tiny_model_dir, tmp_path):
    entry = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    experiment = build_experiment({
        "experiment": "x", "output_root": str(tmp_path), "input_model": str(tiny_model_dir),
        "engines": [{"name": "theirs", **entry}, {"name": "ours", **entry, "engine_command": "false"}],
    })  # fmt: skip

    found = [EndpointBackend(one.name, one.openai, experiment, tmp_path).pids() for one in experiment.engine_specs]

    assert found == [None, ()]


def row(other, concurrency, status="ok", **rest):
    return {"backend": "ascend_kit", "status": status, "device_kind": "cpu", "concurrency": concurrency,
            "prompt_len": 64, "output_len": 32, "error": None,
            "cpu_cores": 2, "own_cpu_cores": 1.0, "other_cpu_cores": other,
            "output_tokens_per_s": 10.0, "ttft_p50_ms": 1.0, "tpot_p50_ms": 1.0, **rest}  # fmt: skip


def test_a_sweep_names_the_points_that_others_disturbed_the_worst_first():
    rows = [row(0.01, 1), row(0.6, 4), row(0.5, 4), row(1.2, 16), row(2.0, 8, "failed")]

    (found,) = [finding for finding in sweep_findings(pandas.DataFrame(rows)) if finding.key == "sweep.disturbed"]

    assert found.level == "caution"
    assert "up to 1.2 of 2 cores during 3 measurements" in str(found)
    assert "ascend_kit 16/64/32, 4/64/32 (" in str(found)
    assert english_in(found.text("zh"), "ascend_kit", "if_exists", "overwrite") == []
    assert disturbance([("a", rows[0])]) == []
    (timed,) = disturbance([("a", row(0.6, 4096, rate=12.5)), ("a", row(0.6, 8, rate=float("nan")))])
    assert timed.values["points"] == "a 12.5/64/32, 8/64/32"
    many = disturbance([(f"run{n}", row(1.0, 4)) for n in range(9)])
    assert many[0].values["points"].endswith("run5 4/64/32 …")
