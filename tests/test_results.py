"""The run folder: nothing lost, nothing mixed, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from ascend_kit.files import write_atomic
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder, RunFolderError, list_runs, run_parameters
from ascend_kit.stages import RunRecord


def experiment(tmp_path, **changes):
    return build_experiment({"output_root": str(tmp_path), "experiment": "e", "run": "r", **changes})


def test_rows_come_back_as_written(tmp_path):
    with RunFolder.open(experiment(tmp_path), "s") as folder:
        folder.append("rows", {"x": np.float64(1.5), "n": np.int64(3), "bad": float("nan")})
        folder.append("rows", {"x": 2.0, "status": "failed", "error": "why"})

        table = folder.load("rows")

    assert table["x"].tolist() == [1.5, 2.0] and table["status"].tolist() == ["ok", "failed"]
    assert table["bad"].isna().all()


def test_a_torn_line_costs_one_row_and_not_its_neighbour(tmp_path):
    with RunFolder.open(experiment(tmp_path), "s") as folder:
        folder.append("rows", {"x": 1})
        with open(folder.table_path("rows"), "ab") as file:
            file.write(b'{"x": 2, "sta')
        folder.append("rows", {"x": 3})

        assert [row["x"] for row in folder.rows("rows")] == [1, 3]


def test_the_record_holds_facts_parameters_and_state(tmp_path):
    e = experiment(tmp_path, seed=7)
    with RunFolder.open(e, "s", facts={"device": {"kind": "cpu"}}) as folder:
        record = folder.read_json("run")

    assert record["stages"]["s"]["facts"]["device"] == {"kind": "cpu"} and record["seed"] == 7
    assert record["state"] == record["stages"]["s"]["state"] == "running"
    assert folder.read_json("run")["state"] == "ok"
    assert run_parameters(folder, "s")["seed"] == 7
    assert [run.path.name for run in list_runs(tmp_path, "e")] == ["r"]


def test_a_second_process_is_refused_while_the_first_holds_the_stage(tmp_path):
    code = (
        "from ascend_kit.params import build_experiment; from ascend_kit.results import *\n"
        f"try: RunFolder.open(build_experiment(dict(output_root={str(tmp_path)!r}, experiment='e', run='r')), 's')\n"
        "except RunFolderError as e: print('refused', e)"
    )
    with RunFolder.open(experiment(tmp_path), "s"):
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    free = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert "refused" in held.stdout and "another process" in held.stdout
    assert free.stdout == "" and free.returncode == 0


def test_the_same_process_may_open_again(tmp_path):
    RunFolder.open(experiment(tmp_path), "s")

    assert RunFolder.open(experiment(tmp_path), "s").path.is_dir()


def test_resuming_with_other_parameters_is_refused_by_name(tmp_path):
    before = experiment(tmp_path)
    with RunFolder.open(before, "s") as folder:
        folder.begin(before, "rows")
        folder.append("rows", {"x": 1})

    with pytest.raises(RunFolderError, match="graph_mode: True -> False"):
        RunFolder.open(experiment(tmp_path, graph_mode=False), "s")
    with pytest.raises(RunFolderError, match="if_exists"):
        RunFolder.open(experiment(tmp_path, if_exists="refuse"), "s")
    with RunFolder.open(experiment(tmp_path), "s") as again:
        assert len(list(again.rows("rows"))) == 1
    with RunFolder.open(experiment(tmp_path, graph_mode=False, if_exists="overwrite"), "s") as new:
        assert list(new.rows("rows")) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.json"
    write_atomic(path, "old")

    with pytest.raises(TypeError):
        write_atomic(path, 5)

    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_json_is_strict(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("x", {"a": float("inf"), "b": np.array([1, 2]), "c": (1, 2), "d": tmp_path})

    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1, 2], "c": [1, 2], "d": str(tmp_path)}


def test_a_stage_that_asks_for_more_points_goes_on_and_keeps_its_rows(tmp_path):
    before = experiment(tmp_path, sweep_concurrency=[1, 4])
    with RunFolder.open(before, "04_throughput") as folder:
        folder.begin(before, "rows")
        folder.append("rows", {"concurrency": 1})

    with RunFolder.open(experiment(tmp_path, sweep_concurrency=[1, 4, 8]), "04_throughput") as again:
        assert [row["concurrency"] for row in again.rows("rows")] == [1]


def test_an_alarm_marks_the_stage_and_an_exception_fails_it(tmp_path):
    with RunFolder.open(experiment(tmp_path), "05_evaluate") as folder:
        folder.alarm("chance", "mmlu: 25.0 % is what guessing gives", set="mmlu")
    with pytest.raises(ValueError), RunFolder.open(experiment(tmp_path), "04_throughput"):
        raise ValueError("no such point")

    stages = folder.read_json("run")["stages"]
    assert stages["05_evaluate"]["state"] == "alarm" and stages["05_evaluate"]["alarms"][0]["key"] == "chance"
    assert stages["04_throughput"]["error"] == "ValueError: no such point"
    assert folder.read_json("run")["state"] == "failed"


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"ttft_limit_ms": 5.0}, {"sweep_requests_per_point": 3}, {"sweep_baseline": False}]
)
def test_what_keys_the_rows_may_change_and_what_makes_the_variant_may_not(tmp_path, changes):
    with RunFolder.open(experiment(tmp_path), "04_throughput") as folder:
        folder.begin(experiment(tmp_path), "rows")

    with RunFolder.open(experiment(tmp_path, **changes), "04_throughput") as again:
        again.begin(experiment(tmp_path, **changes), "rows")
    with pytest.raises(RunFolderError, match="precision"):
        again.begin(experiment(tmp_path, precision="fp16", **changes), "rows")
    with RunFolder.open(experiment(tmp_path), "04_throughput"):
        pass  # what was refused holds no lock


def state_of(folder):
    stage = RunRecord.read(folder.path).stages["s"]
    return stage.state, [alarm["key"] for alarm in stage.alarms]


def test_work_done_again_ends_its_stage_and_only_its_own_alarms_go(tmp_path):
    asked = experiment(tmp_path)
    folder = RunFolder.open(asked, "s")
    for part in ("engine", "baseline"):
        with folder.working(asked, "rows", part=part):
            folder.alarm(f"empty {part}", "is empty")
    assert state_of(folder)[0] == "running"  # the notebook goes on
    folder.close()
    assert state_of(folder) == ("alarm", ["empty engine", "empty baseline"])

    with folder.working(asked, "rows", part="engine"):
        assert state_of(folder) == ("running", ["empty baseline"])
    assert state_of(folder) == ("alarm", ["empty baseline"])
    with folder.working(asked, "rows", part="baseline"):
        pass
    assert state_of(folder) == ("ok", [])


def test_opening_a_stage_that_is_done_changes_nothing_until_its_work_begins(tmp_path):
    asked = experiment(tmp_path)
    with RunFolder.open(asked, "s") as folder:
        folder.alarm("chance", "what guessing gives")

    again = RunFolder.open(asked, "s")
    assert state_of(again) == ("alarm", ["chance"])
    again.begin(asked, "rows")
    assert state_of(again) == ("running", [])
    again.close()

    assert state_of(again) == ("ok", [])


def test_work_that_stops_or_partly_fails_ends_the_stage_as_failed_until_it_is_done(tmp_path):
    asked = experiment(tmp_path)
    folder = RunFolder.open(asked, "s")
    with pytest.raises(MemoryError), folder.working(asked, "rows"):
        raise MemoryError("no blocks")
    assert state_of(folder)[0] == "failed" and RunFolder.open(asked, "s").path == folder.path

    with RunFolder.open(asked, "s") as folder, folder.working(asked, "rows"):
        folder.fail("1 of 2 points failed")
    assert state_of(folder)[0] == "failed" and RunRecord.read(folder.path).stages["s"].error == "1 of 2 points failed"
    with folder.working(asked, "rows"):
        pass
    assert state_of(folder)[0] == "ok"


def test_stages_opened_at_the_same_time_lose_nothing_of_each_other(tmp_path):
    code = (
        "import sys; from ascend_kit import *; from ascend_kit.params import build_experiment\n"
        f"e = build_experiment(dict(output_root={str(tmp_path)!r}, experiment='e', run='r'))\n"
        "with RunFolder.open(e, sys.argv[1]) as folder:\n"
        "    for n in range(20): folder.alarm(f'{sys.argv[1]}-{n}', 'x')"
    )
    names = ["04_throughput", "05_evaluate"]
    for process in [subprocess.Popen([sys.executable, "-c", code, name]) for name in names]:
        assert process.wait(60) == 0

    stages = json.loads((tmp_path / "e" / "r" / "run.json").read_text())["stages"]
    assert [len(stages[name]["alarms"]) for name in names] == [20, 20]


def test_a_stage_whose_process_is_gone_is_interrupted(tmp_path):
    code = (
        "import os; from ascend_kit import *; from ascend_kit.params import build_experiment\n"
        f"e = build_experiment(dict(output_root={str(tmp_path)!r}, experiment='e', run='r'))\n"
        "RunFolder.open(e, 's'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9

    assert RunRecord.read(tmp_path / "e" / "r").state == "interrupted"


def test_a_row_without_space_leaves_the_table_as_it_was_and_names_the_file(tmp_path):
    code = (
        "import resource; from ascend_kit import RunFolder\n"
        f"folder = RunFolder({str(tmp_path)!r})\n"
        "folder.append('rows', {'n': 1, 'text': 'x' * 500})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))\n"
        "try: folder.append('rows', {'n': 2, 'text': 'x' * 500})\n"
        "except OSError as error: print(error.filename)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.strip() == str(tmp_path / "rows.jsonl"), done.stderr
    text = (tmp_path / "rows.jsonl").read_text()
    assert text.endswith("\n") and [json.loads(line)["n"] for line in text.splitlines()] == [1]


def test_half_a_character_is_written_out_so_that_tables_can_be_loaded(tmp_path):
    with RunFolder.open(experiment(tmp_path), "s") as folder:
        folder.append("rows", {"text": "half \ud83d", "whole": "\U0001f600"})
        folder.write_json("x", {"text": "half \ud83d"})

        assert folder.load("rows")[["text", "whole"]].values.tolist() == [["half \\ud83d", "\U0001f600"]]
        assert folder.read_json("x") == {"text": "half \\ud83d"}


def test_a_packed_table_is_read_with_what_is_added_later_and_packed_again(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_all("rows", [{"n": n} for n in range(3)])
    folder.pack("rows")
    folder.append("rows", {"n": 3})

    assert [row["n"] for row in folder.rows("rows")] == [0, 1, 2, 3] == list(folder.load("rows")["n"])
    folder.pack("rows")
    assert not folder.table_path("rows").exists() and [row["n"] for row in folder.rows("rows")] == [0, 1, 2, 3]
    packed = folder.written_path("rows")
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(RunFolderError, match=r"rows.jsonl.gz is damaged"):
        list(folder.rows("rows"))
    folder.clear("rows")
    assert list(folder.rows("rows")) == [] and not packed.exists()
