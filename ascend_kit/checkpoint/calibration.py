"""Calibration: which texts, how large the inputs of every linear get on them, and what follows for smoothing.

Smoothing (SmoothQuant, Xiao et al. 2023) moves outliers of an activation channel into the weight: channel j
of a linear's input is divided by s_j and column j of the weight multiplied by it. The division is folded
into whatever made the channel: the preceding norm's weight, and for down_proj the rows of up_proj. Factors
are powers of two, so folding rounds nothing, in bf16 as little as in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ascend_kit.checkpoint.huggingface import load_tokenizer
from ascend_kit.checkpoint.layerwise import LayerwiseModel, PackedTexts, plain_linear
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.tensor_jobs import ScaleChange
from ascend_kit.model.tensors import UNITS

MAX_TEXTS, MAX_TOKENS_PER_TEXT = 32, 256
SMOOTHED_UNITS = ("qkv", "gate_up", "down_proj")  # o_proj's input is made by attention, which has nothing to fold into


@dataclass
class InputStatistics:
    """Per linear, over all calibration tokens: largest absolute value and mean square of each input channel
    [in].
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    mean_square: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0


def tokenize_texts(
    texts: Sequence[str], tokenizer_folder: Path, max_tokens: int = MAX_TOKENS_PER_TEXT
) -> list[list[int]]:
    """Token ids of each text, cut at `max_tokens`; texts of fewer than two tokens are dropped."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = [tokenizer(text)["input_ids"][:max_tokens] for text in texts]
    kept = [row for row in ids if len(row) >= 2]
    if not kept:
        raise CheckpointError("the calibration texts have fewer than two tokens each")
    return kept


def collect_statistics(
    model: LayerwiseModel, texts: Sequence[Sequence[int]], on_layer: Callable[[int, int], None] | None = None
) -> InputStatistics:
    """Run the float model once over `texts` and measure the inputs of every linear."""
    packed, found = PackedTexts(texts, model), InputStatistics()
    found.num_tokens = len(packed.token_ids)
    hidden = model.embed(packed.token_ids)
    for number in range(model.config.num_layers):
        layer = model.build_layer(number, model.layer_weights(number), _observing(found))
        hidden = packed.forward(layer, hidden)
        if on_layer:
            on_layer(number + 1, model.config.num_layers)
    return found


def _observing(found: InputStatistics) -> Callable[[str, Tensor, Tensor | None], nn.Module]:
    def make(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        module = plain_linear(name, weight, bias)
        module.register_forward_pre_hook(lambda _, inputs: record(name, inputs[0]))
        return module

    def record(name: str, x: Tensor) -> None:
        found.largest[name] = x.abs().amax(0).float().cpu()
        found.mean_square[name] = x.float().square().mean(0).cpu()

    return make


def smoothing_factors(input_largest: Tensor, weight_largest: Tensor, strength: float) -> Tensor:
    """float32 [in] powers of two: inputs^strength / weights^(1 - strength), both largest values per
    channel.
    """
    known = (input_largest > 0) & (weight_largest > 0)
    ratio = input_largest.clamp(min=1e-8) ** strength / weight_largest.clamp(min=1e-8) ** (1 - strength)
    exponent = torch.log2(torch.where(known, ratio, torch.ones_like(ratio))).round()
    # Centred, so that norm weights stay near their own size, and bounded, so that nothing under- or
    # overflows.
    return torch.exp2((exponent - exponent.median()).clamp(-10, 10))


def plan_smoothing(
    model: LayerwiseModel, statistics: InputStatistics, schemes: Mapping[str, str], strength: float
) -> tuple[dict[str, ScaleChange], InputStatistics]:
    """Changes of weights for the units that become w8a8, and the statistics of the smoothed inputs.

    The changed model computes the same function; weight-only units gain nothing and are left alone.
    """
    changes: dict[str, ScaleChange] = {}
    after = InputStatistics(dict(statistics.largest), dict(statistics.mean_square), statistics.num_tokens)
    for number in range(model.config.num_layers):
        prefix, pending = f"model.layers.{number}.", {}
        for unit in SMOOTHED_UNITS:
            linears = [prefix + part for part in UNITS[unit]]
            if all(schemes.get(linear) == "w8a8" for linear in linears):
                factors = _unit_factors(model, statistics, linears, strength)
                _note_unit(prefix, unit, linears, factors, pending)
                for linear in linears:
                    after.largest[linear] = statistics.largest[linear] / factors
                    after.mean_square[linear] = statistics.mean_square[linear] / factors.square()
        changes |= {name: ScaleChange(*scales) for name, scales in pending.items()}
    return changes, after


def _unit_factors(model: LayerwiseModel, statistics: InputStatistics, linears: list[str], strength: float) -> Tensor:
    columns = [model.weight(f"{linear}.weight").abs().amax(0).cpu() for linear in linears]
    return smoothing_factors(statistics.largest[linears[0]], torch.stack(columns).amax(0), strength)


def _note_unit(prefix: str, unit: str, linears: list[str], factors: Tensor, pending: dict[str, list]) -> None:
    """Add a unit's factors to `pending`: tensor name -> [divide rows by, multiply columns by]."""
    for linear in linears:
        pending.setdefault(f"{linear}.weight", [None, None])[1] = factors
    source = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm", "down_proj": "mlp.up_proj"}[unit]
    pending.setdefault(f"{prefix}{source}.weight", [None, None])[0] = factors
