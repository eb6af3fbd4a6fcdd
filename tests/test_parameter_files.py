"""Parameter files and hostile values: one clear error, with key, value, what is allowed, file and line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ascend_kit.__main__ import main
from ascend_kit.params import ParameterError, build_experiment, load_experiment
from ascend_kit.params.notebook import cell_source, write_cells
from ascend_kit.params.paths import check_paths
from ascend_kit.params.yaml_file import parse_overrides

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


def refusal(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ParameterError) as error:
        load_experiment(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, ["alias"]),
        ("seed: &a [*a]", ["alias"]),
        ("seed: " + "[" * 3000 + "]" * 3000, ["nested"]),
        ("seed: " + "{a: " * 500 + "1" + "}" * 500, ["nested"]),
        ("seed: 1\n<<: {run: x}", ["line 2", "merge key"]),
        ("seed: 1\n1: 2", ["line 2", "'1' as a name"]),
        ("null: 2", ["line 1", "as a name"]),
        ("on: 2", ["'on' as a name"]),
        ("? [a, b]\n: 1", ["a list or a block as a name"]),
        ("seed: 1\nrun: a\nseed: 2", ["line 3", "'seed' stands twice"]),
        ("optimization: {tensorrt: true, tensorrt: false}", ["stands twice"]),
        ("run: 2025-13-45", ["line 1", "'2025-13-45' cannot be read"]),
        ("seed: !!int abc", ["line 1", "cannot be read"]),
        ("run: !!python/object/apply:os.system [ls]", ["line 1"]),
        ("run: !mine x", ["line 1", "!mine"]),
        ("seed: " + "9" * 5000, ["line 1", "cannot be read"]),
        ("batch_size: 010", ["line 1", "octal"]),
        ("sweep_prompt_len: [0100]", ["octal"]),
        ("max_new_tokens: 1:30", ["base of 60"]),
        ("max_kl: 1:30.5", ["base of 60"]),
        ("seed: 1\x00", ["not valid YAML"]),
        (b"seed: \xff", ["no UTF-8"]),
        ("seed: 1\nconcurency: 3", ["line 2", "'concurency'", "'concurrency'"]),
        ("seed: 1\n\nbatch_size: many", ["line 3: batch_size", "integer", "'many'"]),
        ("cards: 4\ntensor_parallel: 3", ["line 2", "tensor_parallel=3", "[1, 2, 4]"]),
        ("sweep_at_once: false", ["line 1", "sweep_at_once", "leave it out"]),
        ("graph_mode: false\noptimization: {tensorrt: true}", ["line 1", "graph_mode=False", "graph_mode=True"]),
        ("seed: !!bool x", ["line 1", "'x' cannot be read as bool"]),
        ("seed: !!timestamp x", ["line 1", "'x' cannot be read as timestamp"]),
        ("seed: !!set {a}", ["line 1: seed", "integer"]),
        ("a: 1\n---\nb: 2", ["line 2", "another document"]),
        ("seed: 1\n\tbatch_size: 3", ["line 2", "'\\t'"]),
        ("seed: 1\r\nbatch_size: many\r\n", ["line 2: batch_size", "'many'"]),
        (b"\xef\xbb\xbfseed: 1\nbatch_size: many", ["line 2: batch_size"]),
        ("seed: 1".encode("utf-16"), ["no UTF-8"]),
        ("s\u0435ed: 1", ["line 1", "s\u0435ed", "'seed'"]),  # a Cyrillic letter
        ("batch_size: \uff11\uff16", ["line 1: batch_size", "integer"]),
        ("batch_size: true", ["line 1: batch_size", "integer", "True"]),
        ("graph_mode: 1", ["line 1: graph_mode", "boolean"]),
        ("sweep_concurrency: [[1, 2]]", ["line 1: sweep", "concurrency", "[1, 2]"]),
        ("eval_datasets: [[mmlu]]", ["line 1: eval_datasets.0", "['mmlu']"]),
        ('run: "a\\0b"', ["line 1: run", "control character"]),
        ("run: off", ["run:", "False", "quotes"]),
        ("run: 007.5", ["run:", "quotes"]),
    ],
)
def test_hostile_and_mistaken_yaml_is_one_clear_error(tmp_path, text, words):
    begun = time.monotonic()

    found = refusal(tmp_path, text)

    assert all(word in found for word in words), found
    assert time.monotonic() - begun < 5


def test_an_alias_bomb_takes_neither_time_nor_memory(tmp_path):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    code = (
        "import resource, sys\nfrom ascend_kit.params import load_experiment, ParameterError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    load_experiment(sys.argv[1])\nexcept ParameterError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb.yaml")], capture_output=True, text=True, timeout=60
    )

    assert int(done.stdout) < 50_000, done.stderr  # KiB


def test_small_aliases_are_allowed(tmp_path):
    (tmp_path / "x.yaml").write_text("sweep_prompt_len: &a [64]\nsweep_output_len: *a\n")

    assert load_experiment(tmp_path / "x.yaml").sweep["output_len"] == [64]


@pytest.mark.parametrize("size", [2 << 20])
def test_a_file_of_another_kind_is_not_read(tmp_path, size):
    assert "no parameter file" in refusal(tmp_path, b"a" * size)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kv_cache_gib": float("inf")}, ["kv_cache_gib", "finite", "inf"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"temperature": float("inf")}, ["temperature", "inf"]),
        ({"seed": 10**26}, ["seed", "less than 4294967296"]),
        ({"sweep_concurrency": [1, 1]}, ["sweep_concurrency", "1 stands twice"]),
        ({"eval_datasets": ["mmlu", "MMLU"]}, ["eval_datasets", "'mmlu' stands twice"]),
        ({"sweep_output_len": [10**26]}, ["sweep_output_len", "1048576"]),
        ({"device": "cpu\n"}, ["device", "line end"]),
        ({"device": "npu:0 "}, ["device", "npu:N"]),
        ({"run": "a\n"}, ["run", "line end"]),
        ({"run": "2025-11-01"}, ["run", "date", "run-2025-11-01"]),
        ({"run": "x" * 300}, ["run", "200 bytes"]),
        ({"model_name": "模型" * 100}, ["model_name", "200 bytes"]),
        ({"input_model": ""}, ["input_model", "empty"]),
        ({"output_root": "  "}, ["output_root", "empty"]),
        ({"prompts_file": "a/" + "x" * 256}, ["prompts_file", "255"]),
        ({"input_model": "a\ud800"}, ["input_model"]),
        ({"smooth": 0.5}, ["smooth", "set quantize"]),
        ({"clip_search": True}, ["clip_search", "set quantize"]),
        ({"max_kl": 0.1}, ["max_kl", "quantize: auto"]),
        ({"quantize": "w8a8", "max_accuracy_loss": 0.1}, ["max_accuracy_loss", "quantize: auto"]),
        ({"ray_address": "10.0.0.1"}, ["ray_address", "host:port"]),
        ({"ray_address": "head:70000"}, ["ray_address", "host:port"]),
        ({"ray_address": "http://head:6379/"}, ["ray_address", "host:port"]),
        ({"compare_runs": ["../other"]}, ["compare_runs", "`..`"]),
        ({"quantize_keep": ["", "lm_head"]}, ["quantize_keep", "empty"]),
        ({"if_exists": "resum"}, ["if_exists", "'resume'"]),
        ({"batch_size": 4.0}, ["batch_size", "integer"]),
        ({"batch_size": "1e3"}, ["batch_size", "integer"]),
    ],
)
def test_an_impossible_value_is_refused_before_work(values, words):
    with pytest.raises(ParameterError) as error:
        build_experiment(values)

    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_several_faults_are_told_at_once(tmp_path):
    found = refusal(tmp_path, "batch_size: 0\nprecision: b16\nsed: 1")

    assert all(word in found for word in ("line 1: batch_size", "line 2: precision", "line 3: unknown parameter 'sed'"))


def test_one_rule_reads_values_of_files_papermill_and_the_command_line(tmp_path):
    """papermill hands on what YAML 1.1 makes of its file, and -p as text."""
    text = "temperature: 1e-3\ninput_model: 2025-11-01\nsweep_concurrency: [1, 2]\n"
    (tmp_path / "x.yaml").write_text(text)
    as_papermill = {
        key: value if isinstance(value, list) else str(value) for key, value in yaml.safe_load(text).items()
    }

    own = load_experiment(tmp_path / "x.yaml")
    papermill = build_experiment(as_papermill)
    by_text = build_experiment({"sweep_concurrency": "[1, 2]", "eval_datasets": "mmlu, ceval", "temperature": ".5e-1"})
    command = build_experiment(
        parse_overrides(["temperature=1e-3", "input_model=2025-11-01", "sweep_concurrency=[1, 2]"])
    )

    for found in (own, papermill, command):
        assert (found.temperature, found.input_model, found.sweep["concurrency"]) == (0.001, "2025-11-01", [1, 2])
    assert (by_text.sweep["concurrency"], by_text.eval_datasets, by_text.temperature) == (
        [1, 2],
        ["mmlu", "ceval"],
        0.05,
    )


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    names = ["output_root", "input_model", "output_model", "tokenizer_path", "calibration_file", "prompts_file",
             "output_path", "dataset_path", "params_file"]  # fmt: skip

    found = build_experiment({name: "~/x" for name in names})

    assert {getattr(found, name) for name in names} == {"/home/someone/x"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output_path: {tmp}", "is a folder, it must be a file"),
        ("output_path: /dev/null", "is a pipe or a device"),  # replacing it by a file would harm the machine
        ("tokenizer_path: {tmp}/x.yaml", "is a file, it must be a folder"),
        ("prompts_file: {tmp}/absent", "nothing at"),
        ("quantize: w8a8\nquantize_keep: [nothing]", "'nothing' names no linear"),
        ("output_root: {tmp}/x.yaml/below", "is a file, so nothing can be written below"),
    ],
)
def test_what_shows_only_when_files_are_looked_at_names_the_line_too(tmp_path, text, words, capsys):
    (tmp_path / "x.yaml").write_text("seed: 1\n" + text.format(tmp=tmp_path))

    assert main(["check", str(tmp_path / "x.yaml")]) == 2

    line = 2 + text.count("\n")
    error = capsys.readouterr().err
    assert error.startswith(f"ascend_kit: error: {tmp_path}/x.yaml, line {line}: ") and words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("key", ["input_model", "tokenizer_path", "dataset_path"])
def test_a_file_is_no_folder(tmp_path, key):
    (tmp_path / "file").write_text("x")
    experiment = build_experiment({"input_model": str(tmp_path), key: str(tmp_path / "file")})

    with pytest.raises(ParameterError, match=rf"{key}: .*file is a file, it must be a folder"):
        check_paths(experiment, {key})


@pytest.mark.parametrize("key", ["prompts_file", "calibration_file", "output_path"])
def test_a_folder_is_no_file(tmp_path, key):
    experiment = build_experiment({"input_model": str(tmp_path), key: str(tmp_path)})

    with pytest.raises(ParameterError, match=rf"{key}: .* is a folder, it must be a file"):
        check_paths(experiment, {key})


@pytest.mark.parametrize("key", ["output_root", "output_model", "output_path"])
def test_nothing_can_be_written_below_a_file(tmp_path, key):
    (tmp_path / "file").write_text("x")
    experiment = build_experiment({key: str(tmp_path / "file" / "below" / "deep")})

    with pytest.raises(ParameterError, match=rf"{key}: .*file is a file, so nothing can be written below it"):
        check_paths(experiment, {key})


def test_a_model_of_ones_own_needs_its_own_data_and_prompts(tmp_path):
    own = build_experiment({"input_model": str(tmp_path)})
    sample = build_experiment({"input_model": str(tmp_path), "dataset_path": "demo", "prompts_file": "demo"})

    with pytest.raises(ParameterError, match=r"dataset_path is not set.*prompts_file is not set"):
        check_paths(own, {"dataset_path", "prompts_file"})
    with pytest.raises(ParameterError, match="dataset_path: demo is not for"):
        check_paths(sample, {"dataset_path"})
    check_paths(sample, {"prompts_file"})
    assert (own.dataset_path, own.prompts_file, own.model_name) == (None, None, tmp_path.name)
    assert build_experiment({}).dataset_path == build_experiment({}).prompts_file == "demo"


def test_the_word_demo_is_what_is_shown_and_stored():
    experiment = build_experiment({})

    resolved = experiment.standing_for({"input_model": "/cache/model", "dataset_path": "/cache/data"})
    changed = resolved.with_changes(cards=2)

    assert resolved.input_model == changed.input_model == "/cache/model" and changed.cards == 2
    assert resolved.model_dump() == experiment.model_dump()
    assert "/cache" not in resolved.to_yaml() and "/cache" not in changed.to_yaml()


def test_a_file_may_build_on_another_one(tmp_path):
    (tmp_path / "base.yaml").write_text("batch_size: 4\nseed: 7\n")
    (tmp_path / "x.yaml").write_text(f"params_file: {tmp_path / 'base.yaml'}\nseed: 8\n")
    (tmp_path / "wrong.yaml").write_text(f"params_file: {tmp_path / 'x.yaml'}\n")

    found = load_experiment(tmp_path / "x.yaml")

    assert (found.experiment, found.batch_size, found.seed) == ("x", 4, 8)
    with pytest.raises(ParameterError, match=r"x\.yaml, line 1: params_file may not name"):
        load_experiment(tmp_path / "wrong.yaml")


def test_cells_are_written_and_compared(tmp_path):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["seed: int = 3\n", "old: int = 1"]}
    path = tmp_path / "06_compare.ipynb"
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))

    found = write_cells(tmp_path, check=True)
    untouched = path.read_text()
    written = write_cells(tmp_path)

    assert found == written and "seed" in found[0] and "old" in found[0] and "compare_runs" in found[0]
    assert "old: int" in untouched
    assert "".join(json.loads(path.read_text())["cells"][0]["source"]) == cell_source("06_compare")
    assert write_cells(tmp_path, check=True) == []


def test_a_parameter_file_that_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")

    for path in (tmp_path / "pipe.yaml", "/dev/zero"):
        with pytest.raises(ParameterError, match="it is a pipe or a device"):
            load_experiment(path)
