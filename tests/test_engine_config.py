"""One description of an engine: the defaults of Experiment, every value checked and named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ascend_kit import AscendInferEngine, Experiment
from ascend_kit.engine.config import EngineConfig
from ascend_kit.params import build_experiment


def test_defaults_are_those_of_the_experiment():
    config = EngineConfig("m")

    shared = [item.name for item in dataclasses.fields(config) if item.name in Experiment.model_fields]

    assert len(shared) >= 16
    wanted = {name: getattr(Experiment(), name) for name in shared}
    wanted["plain_ops"] = tuple(wanted["plain_ops"])  # a frozen value holds no list
    assert {name: getattr(config, name) for name in shared} == wanted


def test_an_experiment_gives_its_engine_parameters_and_the_checkpoint_it_names():
    experiment = build_experiment({"input_model": "src", "batch_size": 3, "graph_mode": False, "precision": "fp32"})

    converted = EngineConfig.from_experiment(experiment)
    source = EngineConfig.from_experiment(experiment.with_changes(use_model="source"))

    assert (converted.batch_size, converted.graph_mode, converted.precision) == (3, False, "fp32")
    assert converted.model_path == str(experiment.converted_folder) and source.model_path == "src"
    assert EngineConfig.from_experiment(experiment, "given").model_path == "given"


@pytest.mark.parametrize(
    "name,value",
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", 2.5),
        ("batch_size", "8"),
        ("batch_size", True),
        ("max_seq_length", 0),
        ("max_tokens_per_step", 0),
        ("block_size", 0),
        ("kv_cache_gib", 0.0),
        ("kv_cache_gib", -1),
        ("kv_cache_gib", float("nan")),
        ("seed", -1),
        ("cards", 0),
        ("tensor_parallel", 0),
        ("graph_mode", "yes"),
        ("graph_mode", 1),
        ("precision", "int3"),
        ("precision", None),
        ("device", "tpu"),
        ("device", 0),
        ("device_id", -1),
        ("ray_address", 6379),
        ("tokenizer_path", 7),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        EngineConfig("m", **{name: value})


def test_numpy_numbers_paths_and_other_spellings_are_taken_for_what_they_mean():
    config = EngineConfig(
        Path("~/m"), batch_size=np.int64(4), kv_cache_gib=np.float32(0.5), precision="Float16", device="ascend:1"
    )

    assert config.model_path == str(Path.home() / "m")
    assert (config.batch_size, config.kv_cache_gib, config.precision, config.device) == (4, 0.5, "fp16", "npu:1")
    assert type(config.batch_size) is int


def test_an_unknown_parameter_is_named_with_the_one_that_was_meant(tiny_qwen3_dir):
    with pytest.raises(TypeError, match="'max_seq_len'; did you mean 'max_seq_length'"):
        AscendInferEngine(tiny_qwen3_dir, max_seq_len=64)


def test_the_identity_names_what_changes_answers_or_speed_and_nothing_else():
    config = EngineConfig("a", batch_size=2)

    assert config.identity() == EngineConfig("b", batch_size=2, check_all_bytes=True).identity()
    assert config.identity() != EngineConfig("a", batch_size=3).identity()
    assert config.identity()["kind"] == "ascend_kit"
