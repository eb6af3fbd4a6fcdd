"""What a stage is made from, as far as files tell: whether it counts as done depends on their content, not on names."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ascend_kit.identity import Identity, hash_files
from ascend_kit.params import Experiment

PACKAGES = ("torch", "torch-npu", "transformers", "tokenizers", "lm-eval", "ascend-kit")


def stage_inputs(experiment: Experiment, names: Collection[str]) -> Identity:
    """The identity of the files that a stage reads whose notebook declares the parameters `names`.

    A file or folder that is not there has no identity. Weights are read once and remembered by stat.
    """
    if "input_model" not in names:
        return Identity()
    prompts = [_path(experiment, key) for key in ("prompts_file", "calibration_file") if key in names]
    folders = [_path(experiment, key) for key in ("dataset_path", "adapter_path") if key in names]
    return _model(experiment, names).with_parts(
        prompts=_content([path for path in prompts if path is not None]),
        data=_content([path for path in folders if path is not None]),
        versions={name: _version(name) for name in PACKAGES},
    )


def _model(experiment: Experiment, names: Collection[str]) -> Identity:
    source = _path(experiment, "input_model")
    runs_converted = "use_model" in names and experiment.use_model == "converted"
    model = experiment.converted_folder if runs_converted else source
    if model is None or not model.exists():
        return Identity()
    from ascend_kit.checkpoint.identity import model_identity

    try:
        return model_identity(model, _path(experiment, "tokenizer_path"))
    except (ValueError, OSError):
        return Identity()  # damaged: the stage says how


def _path(experiment: Experiment, key: str) -> Path | None:
    """The path that a parameter names; of the built-in example only what was built before."""
    value = getattr(experiment, key)
    if value != "demo":
        return Path(value) if value is not None else None
    from ascend_kit.demo.assets import cached_model, ensure_data

    if key in ("input_model", "tokenizer_path"):
        return cached_model()
    return ensure_data() if key == "dataset_path" else ensure_data() / "prompts.jsonl"


def _content(paths: list[Path]) -> str | None:
    """One hash over files and folders with all their files; None without any."""
    inside = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    files = [file for file in inside if file.is_file() and not file.name.startswith(".")]
    return hash_files(files, paths[0].parent) if files else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
