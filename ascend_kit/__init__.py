"""Run Qwen models on Ascend 910B, measure them and check their answers; notebooks call what is named here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module. Resolved on first use, so that checking a parameter file does not import torch.
_PUBLIC = {
    "AscendInferEngine": "engine.engine",
    "SamplingParams": "engine.sequence",
    "RequestOutput": "engine.sequence",
    "Experiment": "params",
    "ParameterError": "params",
    "load_experiment": "params",
    "experiment_from_notebook": "params",
    "RunFolder": "results",
    "convert": "checkpoint.convert",
    "evaluate": "evaluation.harness",
    "run_sweep": "measure.sweep",
}
_interrupted: list[str] = []
__all__ = ["__version__", *sorted(_PUBLIC)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ascend_kit' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    if _interrupted:  # a second try ends in odd errors or kills the process: numpy and torch load once
        raise ImportError(f"the import of {_interrupted[0]} was interrupted and cannot go on: restart the kernel")
    try:
        module = import_module(f"ascend_kit.{_PUBLIC[name]}")
    except KeyboardInterrupt:
        _interrupted.append(name)
        raise
    # `convert` and `evaluate` are also package or module names: bind the function over them.
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
