"""Two conversions to one place, and an engine that loads what a conversion replaces, stopped at every step.

The pauses are whole runs of the other side, put before each access to a file: whatever the interleaving, the
destination is complete or absent, and an engine has one version of the model or none.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import make_model

from ascend_kit import AscendInferEngine, SamplingParams, convert
from ascend_kit.checkpoint.manifest import verify
from ascend_kit.checkpoint.tensor_file import CheckpointError

WRITES = [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree"),
          (fcntl, "flock")]  # fmt: skip
READS = [(os, "open"), (os, "preadv"), (io, "open"), (builtins, "open")]
SETTINGS = dict(precision="fp32", device="cpu", max_seq_length=64, batch_size=1, block_size=16, kv_cache_gib=0.001)


@contextlib.contextmanager
def before_step(
    functions: list, folder: Path, number: int, act: Callable[[], object]
) -> Iterator[tuple[list[str], list]]:
    """The steps that were made, and what `act` returned: it is called before the `number`-th of them.

    A step is a call of one of the functions with a path below `folder` or a descriptor.
    """
    steps: list[str] = []
    results: list = []

    def paused(name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            if isinstance(arguments[0], int) or str(folder) in str(arguments[0]) or hasattr(arguments[0], "fileno"):
                steps.append(name)
                if len(steps) == number:
                    patch.undo()
                    results.append(act())
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in functions:
            patch.setattr(module, name, paused(name, getattr(module, name)))
        yield steps, results


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two models of one shape that answer differently, by their weights as by their config."""
    root = tmp_path_factory.mktemp("sources")
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, head_dim=8, num_hidden_layers=1)
    return [make_model(root / f"m{seed}", "qwen3", seed, rope_theta=1e4 * 10**seed, **sizes) for seed in (0, 2)]


def overwrite(source: Path, destination: Path) -> str:
    try:
        return "reused" if convert(source, destination, if_exists="overwrite").reused else "written"
    except CheckpointError as error:
        return str(error)


def is_whole(destination: Path) -> bool:
    return not destination.exists() or verify(destination, full=True)


def test_two_conversions_leave_a_complete_folder_or_none_wherever_the_first_is_paused(sources, tmp_path):
    destination, number, refused = tmp_path / "result", 0, 0
    while True:
        number += 1
        second = partial(overwrite, sources[1], destination)
        with before_step(WRITES, tmp_path, number, second) as (steps, seen):
            first = overwrite(sources[0], destination)
        if len(steps) < number:
            break
        assert is_whole(destination), (number, steps)
        assert first == "written" or "another conversion" in first, (number, first)
        assert seen == ["written"] or "another conversion" in seen[0], (number, seen)
        assert "written" in (first, *seen) and destination.exists(), (number, first, seen)
        refused += seen != ["written"]
        assert [path.name for path in tmp_path.iterdir()] == ["result"], (number, list(tmp_path.iterdir()))

    assert number > 12 and refused > 4  # of the steps, and of those at which the lock was held


def answer(folder: Path) -> list[int] | str:
    try:
        with AscendInferEngine(folder, **SETTINGS) as engine:
            return engine.generate([[5, 6, 7, 8]], SamplingParams(max_new_tokens=8, ignore_eos=True))[0].token_ids
    except ValueError as error:
        return str(error)


def test_an_engine_loads_one_version_or_none_wherever_a_conversion_is_paused(sources, tmp_path):
    destination, whole = tmp_path / "result", [answer(source) for source in sources]
    convert(sources[0], destination)
    whole = [answer(convert(source, tmp_path / f"c{n}").folder) for n, source in enumerate(sources)]
    assert whole[0] != whole[1]
    number = 0
    while True:
        number += 1
        with before_step(WRITES, destination, number, partial(answer, destination)) as (steps, seen):
            assert overwrite(sources[number % 2], destination) == "written"
        if len(steps) < number:
            break
        assert seen[0] in whole or "no config.json" in seen[0], (number, seen)

    assert number > 8


def test_an_engine_that_is_paused_while_it_loads_has_one_version_or_none(sources, tmp_path):
    destination = tmp_path / "result"
    whole = [answer(convert(source, tmp_path / f"c{n}").folder) for n, source in enumerate(sources)]
    convert(sources[0], destination)
    number, refused = 0, 0
    while True:
        number += 1
        replaced = partial(overwrite, sources[number % 2], destination)
        with before_step(READS, destination, number, replaced) as (steps, _):
            found = answer(destination)
        if len(steps) < number:
            break
        assert found in whole or "was replaced while it was read" in found, (number, found)
        refused += isinstance(found, str)

    assert refused > 4
