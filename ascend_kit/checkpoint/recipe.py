"""From the wish (`w8a8`, `auto`, smoothing, clipping) to a Recipe: every decision of a conversion, what it writes for
every tensor, and the config.json that describes the result.

Calibration: how large the inputs of every linear get on some texts, and what follows for smoothing. Smoothing
(SmoothQuant, Xiao et al. 2023) moves outliers of an activation channel into the weight: channel j of a linear's input
is divided by s_j and column j of the weight multiplied by it. The division is folded into whatever made the channel:
the preceding norm's weight, and for down_proj the rows of up_proj. Factors are powers of two, so folding rounds
nothing, in bf16 as little as in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ascend_kit.checkpoint.compressed_tensors import FORMATS
from ascend_kit.checkpoint.huggingface import Checkpoint, QuantizationInfo, load_tokenizer
from ascend_kit.checkpoint.layerwise import LayerwiseModel, PackedTexts, plain_linear
from ascend_kit.checkpoint.sensitivity import MixChoice, Progress, choose_mix
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.checkpoint.tensor_jobs import Quantizer, ScaleChange, TensorJob, cast_job, quantized_job
from ascend_kit.model.config import DTYPES, ModelConfig
from ascend_kit.model.quantize import best_group_size, group_size_for
from ascend_kit.model.tensors import LAYER_PATTERN, UNITS, expected_shapes, layer_prefix, linear_names, uniform_schemes
from ascend_kit.params.fields import ConversionParameters
from ascend_kit.prompts import read_prompts

MIX_TOKENS = 1024  # tokens on which mixes are compared; hidden states of every variant are held for them


@dataclass(frozen=True)
class Recipe:
    """Every decision of a conversion, taken before the first byte is written."""

    dtype: torch.dtype
    schemes: Mapping[str, str] = field(default_factory=dict)  # linear -> w8a8 | w8a16 | w4a16; absent = float
    changes: Mapping[str, ScaleChange] = field(default_factory=dict)  # tensor name -> smoothing
    quantizer: Quantizer = field(default_factory=Quantizer)
    mix: MixChoice | None = None  # how `schemes` were chosen, where they were

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
) -> Recipe:
    """Decide schemes, smoothing and clipping. Runs the source on calibration texts where the parameters ask for it."""
    model, dtype, quantize, smooth = checkpoint.model, DTYPES[wanted.precision], wanted.quantize, wanted.smooth
    if quantize == "none":
        return Recipe(dtype)
    scheme = "w8a8" if quantize == "auto" else quantize
    schemes = uniform_schemes(model, scheme, wanted.quantize_keep)
    texts = []
    if wanted.calibration_file is not None:
        prompts = read_prompts(wanted.calibration_file, "calibration_file")[:MAX_TEXTS]
        texts = tokenize_texts(prompts, Path(wanted.tokenizer_path or checkpoint.config_folder))
    if texts and "lm_head" in schemes and quantize == "auto":
        raise ValueError("quantize=auto does not quantise lm_head; keep it in quantize_keep")
    if texts and checkpoint.quantization.schemes and (smooth is not None or quantize == "auto"):
        raise CheckpointError(f"{checkpoint.folder} is quantised; smooth and quantize=auto need the float model")
    statistics = InputStatistics()
    if texts and (smooth is not None or wanted.clip_search):
        statistics = collect_statistics(LayerwiseModel(checkpoint, model, device=device), texts, on_progress)
    changes = {}
    if smooth is not None:
        changes, statistics = plan_smoothing(LayerwiseModel(checkpoint, model), statistics, schemes, smooth)
    widths = {expected_shapes(model)[f"{name}.weight"][1] for name in schemes}
    group_size = group_size_for(widths) if scheme == "w4a16" else best_group_size(widths)
    quantizer = Quantizer(wanted.clip_search, dtype, statistics.mean_square, group_size or 0)
    if quantize != "auto":
        return Recipe(dtype, schemes, changes, quantizer)
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
    return Recipe(dtype, choice.chosen.schemes, changes, quantizer, choice)


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
    change = recipe.changes.get(name)
    if stored in ("w8a8", "w8a8_static", "w8a16") and target in ("w8a8", "w8a16"):
        scale = checkpoint.source(f"{linear}.weight_scale")  # `check_tensors` has read it: its numbers are finite
        return quantized_job(linear, source, target, lambda rows, *span: (rows, scale.read_slice(0, *span)))
    source = checkpoint.dequantized(name)
    if target == "none":
        return cast_job(name, source, recipe.dtype, change)

    def codes(rows: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return recipe.quantizer.codes(linear, change(rows, start, stop) if change else rows.float(), target)

    groups = source.shape[1] // recipe.quantizer.group_size if target == "w4a16" else 1
    return quantized_job(linear, source, target, codes, groups)


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


def summarise(recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
    """What the manifest says about quantisation."""
    schemes, mix = recipe.schemes, recipe.mix
    kept = [name for name in linear_names(model) if name not in schemes and LAYER_PATTERN.match(name)]
    found = {"scheme": QuantizationInfo(schemes=schemes).summary, "linears": dict(schemes), "kept": kept}
    if mix is None:
        return found
    rows = [candidate.row() for candidate in mix.candidates]
    return {**found, "chosen": mix.chosen.name, "candidates": rows, "sensitivity": list(mix.sensitivity)}


# --- calibration and smoothing ----------------------------------------------------------------------------------------

MAX_TEXTS, MAX_TOKENS_PER_TEXT = 32, 256
# What makes the inputs of a unit; o_proj's are made by attention, which has nothing to fold into.
SMOOTHED_UNITS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm", "down_proj": "mlp.up_proj"}


@dataclass
class InputStatistics:
    """Per linear, over all calibration tokens: largest absolute value and mean square of each input channel
    [in].
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    mean_square: dict[str, Tensor] = field(default_factory=dict)


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
    model: LayerwiseModel, texts: Sequence[Sequence[int]], on_progress: Progress | None = None
) -> InputStatistics:
    """Run the float model once over `texts` and measure the inputs of every linear."""
    packed, found = PackedTexts(texts, model), InputStatistics()
    hidden = model.embed(packed.token_ids)
    for number in range(model.config.num_layers):
        layer = model.build_layer(number, model.layer_weights(number), _observing(found))
        hidden = packed.forward(layer, hidden)
        if on_progress:
            on_progress(number + 1, model.config.num_layers, "layers of the calibration run")
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
    after = InputStatistics(dict(statistics.largest), dict(statistics.mean_square))
    for number in range(model.config.num_layers):
        prefix, pending = layer_prefix(number), {}  # tensor name -> [divide rows by, multiply columns by]
        for unit, maker in SMOOTHED_UNITS.items():
            linears = [prefix + part for part in UNITS[unit]]
            if any(schemes.get(linear) != "w8a8" for linear in linears):
                continue
            largest = [model.weight(f"{linear}.weight").abs().amax(0).cpu() for linear in linears]
            factors = smoothing_factors(statistics.largest[linears[0]], torch.stack(largest).amax(0), strength)
            for linear in linears:
                pending.setdefault(f"{linear}.weight", [None, None])[1] = factors
                after.largest[linear] = statistics.largest[linear] / factors
                after.mean_square[linear] = statistics.mean_square[linear] / factors.square()
            pending.setdefault(f"{prefix}{maker}.weight", [None, None])[0] = factors
        changes |= {name: ScaleChange(*scales) for name, scales in pending.items()}
    return changes, after
