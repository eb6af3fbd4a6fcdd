"""Experiment parameters: the model, its files, its notebooks' cells and the paths it names."""

from ascend_kit.params.experiment import Experiment, build_experiment
from ascend_kit.params.notebook import experiment_from_notebook
from ascend_kit.params.values import ParameterError
from ascend_kit.params.yaml_file import load_experiment

__all__ = ["Experiment", "ParameterError", "build_experiment", "experiment_from_notebook", "load_experiment"]
