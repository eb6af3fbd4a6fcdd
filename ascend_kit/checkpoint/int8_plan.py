"""From the wish (`w8a8`, `auto`, smoothing, clipping) to a Recipe: every int8 decision of a conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
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
from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.layerwise import LayerwiseModel
from ascend_kit.checkpoint.recipe import Recipe
from ascend_kit.checkpoint.sensitivity import MixChoice, Progress, choose_mix
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.tensor_jobs import Quantizer
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.int4 import best_group_size, group_size_for
from ascend_kit.model.tensors import expected_shapes, kept_linears, linear_names
from ascend_kit.prompts import read_prompts

MIX_TOKENS = 1024  # tokens on which mixes are compared; hidden states of every variant are held for them


@dataclass(frozen=True)
class Int8Options:
    """The int8 parameters of `convert`, as given."""

    quantize: str = "none"  # none | w8a8 | w8a16 | w4a16 | auto
    keep: tuple[str, ...] = ("lm_head",)
    calibration_file: str | Path | None = None
    smooth: float | None = None  # None = no smoothing, else the share moved from activations to weights, 0..1
    clip_search: bool = False
    max_kl: float | None = None
    max_accuracy_loss: float | None = None

    def check(self) -> None:
        """ValueError for options that contradict each other."""
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth={self.smooth}: allowed is a share from 0 to 1 (0.5 is usual), or None")
        for name in ("max_kl", "max_accuracy_loss"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: a limit is not negative")
        limited = self.max_kl is not None or self.max_accuracy_loss is not None
        if self.quantize == "auto" and not limited:
            raise ValueError("quantize=auto needs a limit: max_kl (nats per token) or max_accuracy_loss (share)")
        if self.quantize != "auto" and limited:
            raise ValueError(f"max_kl and max_accuracy_loss choose a mix; they need quantize=auto, not {self.quantize}")
        if self.quantize == "none" and (self.smooth is not None or self.clip_search):
            raise ValueError("smooth and clip_search change quantised weights; set quantize, or leave them off")
        if (self.quantize == "auto" or self.smooth is not None) and self.calibration_file is None:
            raise ValueError(
                "calibration_file is needed for smooth and for quantize=auto: JSON lines with `prompt`, "
                "or a text file with one text per line"
            )

    def settings(self) -> dict[str, Any]:
        """What the manifest keeps; the calibration file by its contents."""
        path = self.calibration_file
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None
        return {
            "quantize": self.quantize,
            "quantize_keep": sorted(self.keep),
            "smooth": self.smooth,
            "clip_search": self.clip_search,
            "max_kl": self.max_kl,
            "calibration_sha256": digest,
            "max_accuracy_loss": self.max_accuracy_loss,
        }


def plan_int8(
    checkpoint: Checkpoint,
    model: ModelConfig,
    dtype: torch.dtype,
    options: Int8Options,
    *,
    tokenizer_folder: Path,
    device: torch.device | str = "cpu",
    bandwidth_bytes_per_s: float | None = None,
    on_progress: Progress | None = None,
) -> tuple[Recipe, MixChoice | None]:
    """Decide schemes, smoothing and clipping. Runs the source on calibration texts where the options ask
    for it.
    """
    if options.quantize == "none":
        return Recipe(dtype), None
    kept = kept_linears(model, list(options.keep))
    wanted = "w8a8" if options.quantize == "auto" else options.quantize
    schemes = {name: wanted for name in linear_names(model) if name not in kept}
    texts = _texts(tokenizer_folder, options)
    if texts and "lm_head" in schemes and options.quantize == "auto":
        raise ValueError("quantize=auto does not quantise lm_head; keep it in quantize_keep")
    if texts and checkpoint.quantization.schemes and (options.smooth is not None or options.quantize == "auto"):
        raise CheckpointError(f"{checkpoint.folder} is quantised; smooth and quantize=auto need the float model")
    statistics = InputStatistics()
    if texts and (options.smooth is not None or options.clip_search):
        report = (
            (lambda done, total: on_progress(done, total, "layers of the calibration run")) if on_progress else None
        )
        statistics = collect_statistics(LayerwiseModel(checkpoint, model, device=device), texts, report)
    changes = {}
    if options.smooth is not None:
        source = LayerwiseModel(checkpoint, model)
        changes, statistics = plan_smoothing(source, statistics, schemes, options.smooth)
    widths = {expected_shapes(model)[f"{name}.weight"][1] for name in schemes}
    group_size = group_size_for(widths) if wanted == "w4a16" else best_group_size(widths)
    quantizer = Quantizer(options.clip_search, dtype, statistics.mean_square, group_size or 0)
    if options.quantize != "auto":
        return Recipe(dtype, schemes, changes, quantizer), None
    smoothed = LayerwiseModel(checkpoint, model, device=device, changes=changes, quantizer=quantizer)
    choice = choose_mix(
        smoothed,
        limit_tokens(texts, MIX_TOKENS),
        kept=kept,
        with_4_bits=group_size is not None,
        float_bytes=dtype.itemsize,
        max_kl=options.max_kl,
        max_accuracy_loss=options.max_accuracy_loss,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        on_progress=on_progress,
    )
    return Recipe(dtype, choice.chosen.schemes, changes, quantizer), choice


def _texts(tokenizer_folder: Path, options: Int8Options) -> list[list[int]]:
    if options.calibration_file is None:
        return []
    return tokenize_texts(read_prompts(options.calibration_file, "calibration_file")[:MAX_TEXTS], tokenizer_folder)


def limit_tokens(texts: Sequence[Sequence[int]], max_tokens: int) -> list[Sequence[int]]:
    """The first texts that fit into `max_tokens` together, at least one (cut if it must be)."""
    chosen, total = [], 0
    for text in texts:
        if total + len(text) > max_tokens:
            break
        chosen.append(text)
        total += len(text)
    return chosen or [texts[0][:max_tokens]]
