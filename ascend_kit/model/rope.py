"""Frequencies of the rotary embedding, with the scalings for long texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ascend_kit.model.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(float32 [H/2] angles per position, factor of cosine and sine)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies, scaling = 1.0 / config.rope_theta**half, config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, config), _yarn_attention_factor(scaling)


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling["factor"] * (1 - keep)


def _yarn(frequencies: Tensor, scaling: dict[str, Any], config: ModelConfig) -> Tensor:
    """YaRN (arXiv 2309.00071): as llama3's, but the ramp is even over the index of the frequency."""
    original, size = scaling["original_max_position_embeddings"], config.head_dim

    def index_of(turns: float) -> float:  # where a frequency makes so many turns within the original context
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = index_of(scaling.get("beta_fast", 32)), index_of(scaling.get("beta_slow", 1))
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    divide = (torch.arange(size // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    divide = divide.clamp(0, 1)
    return frequencies * (1 - divide) + frequencies / scaling["factor"] * divide


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    if "attention_factor" in scaling:
        return scaling["attention_factor"]

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
