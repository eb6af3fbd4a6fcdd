"""From the wish (`w8a8`, `auto`, smoothing, clipping) to a Recipe: every decision of a conversion, what it writes for
every tensor, and the config.json that describes the result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ascend_kit.checkpoint.calibration import (
    MAX_TEXTS,
    InputStatistics,
    collect_statistics,
    plan_smoothing,
    tokenize_texts,
)
from ascend_kit.checkpoint.compressed_tensors import FORMATS
from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.layerwise import LayerwiseModel
from ascend_kit.checkpoint.sensitivity import MixChoice, Progress, choose_mix
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.tensor_jobs import CastJob, QuantizeJob, Quantizer, RepackJob, ScaleChange, TensorJob
from ascend_kit.model.config import DTYPES, ModelConfig
from ascend_kit.model.int4 import best_group_size, group_size_for
from ascend_kit.model.tensors import LAYER_PATTERN, expected_shapes, linear_names, uniform_schemes
from ascend_kit.params import ConversionParameters
from ascend_kit.prompts import read_prompts

MIX_TOKENS = 1024  # tokens on which mixes are compared; hidden states of every variant are held for them


@dataclass(frozen=True)
class Recipe:
    """Every decision of a conversion, taken before the first byte is written."""

    dtype: torch.dtype
    schemes: Mapping[str, str] = field(default_factory=dict)  # linear -> w8a8 | w8a16 | w4a16; absent = float
    changes: Mapping[str, ScaleChange] = field(default_factory=dict)  # tensor name -> smoothing
    quantizer: Quantizer = field(default_factory=Quantizer)

    def digest(self) -> str:
        """sha256 over every number that shapes the result: a resumed run must be the same conversion."""
        decisions = (str(self.dtype), sorted(self.schemes.items()), self.quantizer.clip, self.quantizer.group_size)
        state = hashlib.sha256(repr(decisions).encode())
        for name, change in sorted(self.changes.items()):
            for tensor in (change.row_divisor, change.column_factor):
                state.update(name.encode() + (b"" if tensor is None else tensor.numpy().tobytes()))
        for name, tensor in sorted(self.quantizer.input_squares.items()):
            state.update(name.encode() + tensor.numpy().tobytes())
        return state.hexdigest()


def plan_recipe(
    checkpoint: Checkpoint,
    wanted: ConversionParameters,
    *,
    device: torch.device | str = "cpu",
    bandwidth_bytes_per_s: float | None = None,
    on_progress: Progress | None = None,
) -> tuple[Recipe, MixChoice | None]:
    """Decide schemes, smoothing and clipping. Runs the source on calibration texts where the parameters ask for it."""
    model, dtype, quantize, smooth = checkpoint.model, DTYPES[wanted.precision], wanted.quantize, wanted.smooth
    if quantize == "none":
        return Recipe(dtype), None
    scheme = "w8a8" if quantize == "auto" else quantize
    schemes = uniform_schemes(model, scheme, wanted.quantize_keep)
    texts = _texts(wanted, checkpoint)
    if texts and "lm_head" in schemes and quantize == "auto":
        raise ValueError("quantize=auto does not quantise lm_head; keep it in quantize_keep")
    if texts and checkpoint.quantization.schemes and (smooth is not None or quantize == "auto"):
        raise CheckpointError(f"{checkpoint.folder} is quantised; smooth and quantize=auto need the float model")
    statistics = InputStatistics()
    if texts and (smooth is not None or wanted.clip_search):
        report = (
            (lambda done, total: on_progress(done, total, "layers of the calibration run")) if on_progress else None
        )
        statistics = collect_statistics(LayerwiseModel(checkpoint, model, device=device), texts, report)
    changes = {}
    if smooth is not None:
        changes, statistics = plan_smoothing(LayerwiseModel(checkpoint, model), statistics, schemes, smooth)
    widths = {expected_shapes(model)[f"{name}.weight"][1] for name in schemes}
    group_size = group_size_for(widths) if scheme == "w4a16" else best_group_size(widths)
    quantizer = Quantizer(wanted.clip_search, dtype, statistics.mean_square, group_size or 0)
    if quantize != "auto":
        return Recipe(dtype, schemes, changes, quantizer), None
    choice = choose_mix(
        LayerwiseModel(checkpoint, model, device=device, changes=changes, quantizer=quantizer),
        limit_tokens(texts, MIX_TOKENS),
        kept=set(linear_names(model)) - set(schemes),
        with_4_bits=group_size is not None,
        float_bytes=dtype.itemsize,
        max_kl=wanted.max_kl,
        max_accuracy_loss=wanted.max_accuracy_loss,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        on_progress=on_progress,
    )
    return Recipe(dtype, choice.chosen.schemes, changes, quantizer), choice


def _texts(wanted: ConversionParameters, checkpoint: Checkpoint) -> list[list[int]]:
    if wanted.calibration_file is None:
        return []
    texts = read_prompts(wanted.calibration_file, "calibration_file")[:MAX_TEXTS]
    return tokenize_texts(texts, Path(wanted.tokenizer_path or checkpoint.config_folder))


def limit_tokens(texts: Sequence[Sequence[int]], max_tokens: int) -> list[Sequence[int]]:
    """The first texts that fit into `max_tokens` together, at least one (cut if it must be)."""
    chosen, total = [], 0
    for text in texts:
        if total + len(text) > max_tokens:
            break
        chosen.append(text)
        total += len(text)
    return chosen or [texts[0][:max_tokens]]


def plan_jobs(checkpoint: Checkpoint, recipe: Recipe) -> list[TensorJob]:
    """One job per source tensor, in the order in which the source files hold them."""
    wanted = expected_shapes(checkpoint.model)
    return [_job(checkpoint, name, recipe) for name in checkpoint.tensor_names() if name in wanted]


def _job(checkpoint: Checkpoint, name: str, recipe: Recipe) -> TensorJob:
    source, linear = checkpoint.source(name), name.removesuffix(".weight")
    stored = checkpoint.quantization.scheme(linear) if name.endswith(".weight") else "none"
    target = recipe.schemes.get(linear, "none") if name.endswith(".weight") else "none"
    kept = stored in ("w8a8", "w8a8_static", "w8a16") and target in ("w8a8", "w8a16")
    if kept:  # codes of 8 bits are taken over as they are
        return RepackJob(linear, source, checkpoint.source(f"{linear}.weight_scale"), target)
    if stored != "none":
        source = checkpoint.dequantized(linear)
    if target == "none":
        return CastJob(name, source, recipe.dtype, recipe.changes.get(name))
    return QuantizeJob(linear, source, target, recipe.quantizer, recipe.changes.get(name))


def result_config(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """config.json of the result: the source's, with the new dtype and the description of the quantised linears."""
    result = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    name = str(recipe.dtype).removeprefix("torch.")
    keys = [key for key in ("torch_dtype", "dtype") if key in result] or ["torch_dtype"]
    result |= dict.fromkeys(keys, name)
    if recipe.schemes:
        result["quantization_config"] = quantization_config(
            checkpoint.model, recipe.schemes, recipe.quantizer.group_size
        )
    return result


def quantization_config(model: ModelConfig, schemes: Mapping[str, str], group_size: int) -> dict[str, Any]:
    """The compressed-tensors description of which linears are int8 and how."""
    kinds = sorted(set(schemes.values()))
    groups = {}
    for number, kind in enumerate(kinds):
        targets = ["Linear"] if len(kinds) == 1 else [name for name, scheme in schemes.items() if scheme == kind]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _integers("group", 4, group_size) if kind == "w4a16" else _integers("channel", 8),
            "output_activations": None,
            "input_activations": _integers("token", 8, dynamic=True) if kind == "w8a8" else None,
            "format": FORMATS[kind],
        }
    kept = [name for name in linear_names(model) if name not in schemes]
    if model.tie_embeddings:
        kept.append("lm_head")  # not a stored tensor, but a linear module all the same
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": FORMATS[kinds[0]] if len(kinds) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _integers(strategy: str, num_bits: int, group_size: int | None = None, *, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": group_size,
        "block_structure": None,
        "actorder": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def summarise(schemes: Mapping[str, str], model: ModelConfig) -> dict[str, Any]:
    """What the manifest says about quantisation."""
    kinds = set(schemes.values())
    kept = [name for name in linear_names(model) if name not in schemes and LAYER_PATTERN.match(name)]
    return {
        "scheme": kinds.pop() if len(kinds) == 1 else ("mixed" if kinds else "none"),
        "linears": dict(schemes),
        "kept": kept,
    }
