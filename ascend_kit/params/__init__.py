"""Experiment parameters: the model, its files, its notebooks' cells and the paths it names."""

from ascend_kit.params.experiment import ARTICLE_SWITCHES, ENGINE_SWITCHES, EVAL_SETS, Experiment, build_experiment
from ascend_kit.params.fields import PRECISIONS, ConversionParameters
from ascend_kit.params.notebook import experiment_from_notebook
from ascend_kit.params.values import DEVICE_PATTERN, ParameterError
from ascend_kit.params.yaml_file import load_experiment, parse_overrides, read_yaml

__all__ = [
    "ARTICLE_SWITCHES",
    "DEVICE_PATTERN",
    "ENGINE_SWITCHES",
    "EVAL_SETS",
    "PRECISIONS",
    "ConversionParameters",
    "Experiment",
    "ParameterError",
    "build_experiment",
    "experiment_from_notebook",
    "load_experiment",
    "parse_overrides",
    "read_yaml",
]
