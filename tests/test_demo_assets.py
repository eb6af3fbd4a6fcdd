"""The demo's assets: built once, cached, resolved, and never taken for complete when they are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ascend_kit.demo import assets, ensure_data, ensure_model, resolve
from ascend_kit.params import Experiment


def test_training_length_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1 step"):
        ensure_model(tmp_path, steps=0)


def test_resolve_builds_only_what_the_experiment_names(tmp_path):
    experiment = Experiment(input_model="elsewhere", dataset_path="demo", prompts_file="mine.jsonl")

    resolved = resolve(experiment, cache_dir=tmp_path)

    assert (resolved.input_model, resolved.prompts_file) == ("elsewhere", "mine.jsonl")
    assert (Path(resolved.dataset_path) / "wikitext" / "README.md").is_file()
    assert not list(tmp_path.glob("demo-model-*"))


def test_resolve_leaves_an_experiment_without_the_demo_alone(tmp_path):
    experiment = Experiment(input_model="a", dataset_path="b", prompts_file="c")

    assert resolve(experiment, cache_dir=tmp_path / "cache") is experiment
    assert not (tmp_path / "cache").exists()


def test_cache_folder_follows_the_argument_then_the_variable_then_the_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("ASCEND_KIT_CACHE", raising=False)
    assert assets.cache_root() == tmp_path / "user" / "ascend-kit"

    monkeypatch.setenv("ASCEND_KIT_CACHE", str(tmp_path / "variable"))
    assert assets.cache_root() == tmp_path / "variable"
    assert assets.cache_root(tmp_path / "argument") == tmp_path / "argument"


SLOW_BUILD = """
import os, signal, sys, time
from pathlib import Path
from ascend_kit.demo import assets

def build(target):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (target / "part").write_text("half")
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    (target / "rest").write_text("done")

assets._build_once(Path(sys.argv[1]), build)
"""


def start_build(folder: Path, log: Path, fate: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(folder), str(log), fate], env=environment)


@pytest.mark.multiproc
def test_two_processes_at_once_build_once(tmp_path):
    folder, log = tmp_path / "cache" / "part", tmp_path / "log"

    processes = [start_build(folder, log, "lives") for _ in range(2)]

    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert log.read_text() == "built\n"
    assert (folder / "rest").read_text() == "done"


@pytest.mark.multiproc
def test_a_killed_build_leaves_nothing_that_is_taken_for_complete(tmp_path):
    folder, log = tmp_path / "cache" / "part", tmp_path / "log"

    assert start_build(folder, log, "killed").wait(timeout=60) == -signal.SIGKILL
    assert not folder.exists()
    assert start_build(folder, log, "lives").wait(timeout=60) == 0

    assert log.read_text() == "built\n" * 2
    assert {path.name for path in folder.iterdir()} == {"part", "rest", assets.COMPLETE_FILE}
    assert list(folder.parent.glob(".building-*")) == []


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fail(target: Path) -> None:
        (target / "part").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        assets._build_once(tmp_path / "part", fail)

    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_damaged_asset_is_built_again(tmp_path):
    folder = ensure_data(tmp_path)
    damaged = folder / "mmlu" / "astronomy" / "test.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])

    assert ensure_data(tmp_path) == folder
    assert pq.read_table(damaged.parent / "test.parquet").num_rows == 12
