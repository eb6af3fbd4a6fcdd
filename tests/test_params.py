"""Parameters: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from ascend_kit.params import Experiment, ParameterError, build_experiment, experiment_from_notebook, load_experiment
from ascend_kit.params.yaml_file import parse_overrides

ARTICLE = """model_name: qwen3-8b
precision: bf16
max_seq_length: 8192
batch_size: 16
optimization:
  tensorrt: True
  operator_fusion: True
  memory_optimize: False
"""


@pytest.fixture
def article(tmp_path):
    path = tmp_path / "infer_optimize_config.yaml"
    path.write_text(ARTICLE)
    return path


def test_the_articles_file_is_valid_as_it_is(article):
    experiment = load_experiment(article)

    assert (experiment.model_name, experiment.precision, experiment.batch_size) == ("qwen3-8b", "bf16", 16)
    assert (experiment.graph_mode, experiment.operator_fusion, experiment.memory_optimize) == (True, True, False)
    assert experiment.experiment == "infer_optimize_config"


def test_an_override_wins_over_the_articles_block(article):
    assert load_experiment(article, {"graph_mode": False}).graph_mode is False
    assert load_experiment(article, {"tensorrt": False}).graph_mode is False
    assert load_experiment(article, {"optimization": {"operator_fusion": False}}).operator_fusion is False


@pytest.mark.parametrize(
    "override,words",
    [
        ({"concurency": 3}, ["concurency", "'concurrency'"]),
        ({"batch_size": "many"}, ["batch_size", "integer", "'many'"]),
        ({"batch_size": True}, ["batch_size", "True"]),
        ({"batch_size": 0}, ["batch_size", "greater than or equal to 1", "0"]),
        ({"graph_mode": 1}, ["graph_mode", "boolean"]),
        ({"device": "gpu7"}, ["device", "npu:N", "gpu7"]),
        ({"precision": "b16"}, ["precision", "bf16", "b16"]),
        ({"eval_datasets": "mmul"}, ["eval_datasets", "mmlu"]),
        ({"quantize": "int4"}, ["quantize", "w8a8", "int4"]),
        ({"cards": 4, "tensor_parallel": 3}, ["tensor_parallel=3", "[1, 2, 4]"]),
        ({"max_new_tokens": 9000}, ["max_new_tokens=9000", "max_seq_length=8192"]),
        ({"sweep_prompt_len": [9000]}, ["sweep_prompt_len", "max_seq_length=8192"]),
        ({"sweep_concurrency": []}, ["sweep_concurrency"]),
        ({"sweep_concurrency": [0]}, ["sweep_concurrency", "at least 1"]),
        ({"experiment": "../up"}, ["experiment", "folder"]),
        ({"optimization": {"tensort": True}}, ["optimization", "tensort", "'tensorrt'"]),
        ({"optimization": "all"}, ["optimization", "'all'"]),
    ],
)
def test_a_bad_value_is_one_error_naming_key_value_and_way_out(article, override, words):
    with pytest.raises(ParameterError) as error:
        load_experiment(article, override)

    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbour(article):
    with pytest.raises(ParameterError, match=r"did you mean .*infer_optimize_config\.yaml"):
        load_experiment(article.with_name("infer_optimise_config.yaml"))


@pytest.mark.parametrize(
    "text,word", [("a: [1", "not valid YAML"), ("- 1\n- 2", "name: value"), ("seed: 1\nseed: 2", "stands twice")]
)
def test_broken_yaml_is_refused(tmp_path, text, word):
    path = tmp_path / "x.yaml"
    path.write_text(text)

    with pytest.raises(ParameterError, match=word):
        load_experiment(path)


def test_yaml_scalars_mean_what_they_look_like():
    values = build_experiment(
        parse_overrides(["temperature=1e0", "graph_mode=off", "top_k=null", "sweep_concurrency=[1, 2]"])
    )

    assert (values.temperature, values.graph_mode, values.top_k) == (1.0, False, None)
    assert values.sweep["concurrency"] == [1, 2]


def test_an_assignment_without_equals_is_refused():
    with pytest.raises(ParameterError, match="key=value"):
        parse_overrides(["graph_mode"])


def test_numpy_and_path_values_are_taken_as_plain_ones():
    experiment = build_experiment(
        {"batch_size": np.int64(4), "input_model": Path("models") / "x", "sweep_concurrency": (1, np.int32(2))}
    )

    assert experiment.batch_size == 4 and experiment.input_model == "models/x"
    assert experiment.sweep["concurrency"] == [1, 2]


def test_resolved_parameters_read_back_equal(tmp_path, article):
    experiment = load_experiment(article, {"cards": 4, "tensor_parallel": 2})
    path = tmp_path / "params.yaml"
    path.write_text(experiment.to_yaml())

    assert load_experiment(path) == experiment


def test_a_short_context_pulls_its_defaults_along():
    experiment = build_experiment({"max_seq_length": 256, "sweep_prompt_len": [32], "sweep_output_len": [32]})

    assert experiment.eval_max_seq_length == 256 and experiment.max_new_tokens == 128


def test_a_misspelt_notebook_variable_is_refused():
    namespace = {
        "__name__": "__main__",
        "_i": "",
        "In": [""],
        "Out": {},
        "exit": print,
        "quit": print,
        "get_ipython": print,
        "precision": "fp32",
    }

    assert experiment_from_notebook(namespace).precision == "fp32"
    with pytest.raises(ParameterError, match="'precision'"):
        experiment_from_notebook({**namespace, "precison": "fp32"})


def test_every_parameter_says_what_it_is_for():
    assert all(field.description for field in Experiment.model_fields.values())


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "params").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_is_valid(path):
    experiment = load_experiment(path)

    assert set(yaml.safe_load(path.read_text())) <= set(Experiment.model_fields)
    assert path.stem.startswith(experiment.experiment)  # variants of one experiment share its folder


def test_old_names_read_what_took_their_place():
    experiment = build_experiment({"sweep_concurrency": [3], "slo": {"ttft_ms": 5}, "sweep_baseline": False})

    assert (experiment.sweep_concurrency, experiment.ttft_limit_ms, experiment.tpot_limit_ms) == ([3], 5, None)
    assert experiment.sweep_baseline is False and build_experiment({}).sweep_baseline is True
    with pytest.raises(AttributeError, match="sweep_nothing"):
        _ = experiment.sweep_nothing
