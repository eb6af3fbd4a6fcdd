"""The tensors of a decoder: names, shapes, what ranks share, which linears may be int8, and how many bytes all that is.

Names are Hugging Face's. Linears that one matrix product serves share a scheme: q, k, v read the same input and run
as one product in most engines, as do gate and up. `UNITS` names these groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ascend_kit.messages import did_you_mean
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.quantize import best_group_size

UNITS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
LINEAR_PARTS = tuple(part for parts in UNITS.values() for part in parts)
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)")
SCALE_BYTES = 4  # weight_scale is float32, one per output channel, or per group of 4-bit weights


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a float model."""

    shape: tuple[int, ...]
    split: int | None = None  # dimension that ranks share; None: every rank holds all of it
    shared: str = ""  # the number that must divide over the ranks, by its name in config.json
    pieces: int = 1  # that number


def layer_prefix(number: int) -> str:
    """`model.layers.N.`, the start of the names of a layer's tensors."""
    return f"model.layers.{number}."


def layer_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """The tensors of one layer by their names without `model.layers.N.`, in the order of a forward pass."""
    hidden, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = ("num_attention_heads", config.num_heads), ("num_key_value_heads", config.num_kv_heads)
    widths = ("intermediate_size", ffn)
    linears = {  # part: (out, in, dimension that is shared, what is shared, has a bias)
        "self_attn.q_proj": (heads[1] * head, hidden, 0, heads, config.attention_bias),
        "self_attn.k_proj": (groups[1] * head, hidden, 0, groups, config.attention_bias),
        "self_attn.v_proj": (groups[1] * head, hidden, 0, groups, config.attention_bias),
        "self_attn.o_proj": (hidden, heads[1] * head, 1, heads, config.output_bias),
        "mlp.gate_proj": (ffn, hidden, 0, widths, config.mlp_bias),
        "mlp.up_proj": (ffn, hidden, 0, widths, config.mlp_bias),
        "mlp.down_proj": (hidden, ffn, 1, widths, config.mlp_bias),
    }
    tensors = {f"{norm}.weight": TensorSpec((hidden,)) for norm in ("input_layernorm", "post_attention_layernorm")}
    if config.qk_norm:
        tensors |= {f"self_attn.{letter}_norm.weight": TensorSpec((head,)) for letter in "qk"}
    for part, (rows, columns, split, shared, has_bias) in linears.items():
        tensors[f"{part}.weight"] = TensorSpec((rows, columns), split, *shared)
        if has_bias:  # of a linear whose input is shared, the bias is added once
            tensors[f"{part}.bias"] = TensorSpec((rows,), 0, *shared) if split == 0 else TensorSpec((rows,))
    return tensors


def outer_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """The tensors outside the layers; a tied model has no head of its own."""
    vocab, hidden = config.vocab_size, config.hidden_size
    tensors = {
        EMBEDDING: TensorSpec((vocab, hidden), 1, "hidden_size", hidden),
        FINAL_NORM: TensorSpec((hidden,)),
        HEAD: TensorSpec((vocab, hidden), 0, "vocab_size", vocab),
    }
    if config.tie_embeddings:
        del tensors[HEAD]
    return tensors


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a float model."""
    layer, outer = layer_tensors(config), outer_tensors(config)
    shapes = {name: outer[name].shape for name in (EMBEDDING,)}
    for number in range(config.num_layers):
        shapes |= {layer_prefix(number) + name: spec.shape for name, spec in layer.items()}
    return shapes | {name: spec.shape for name, spec in outer.items() if name != EMBEDDING}


def tensor_spec(config: ModelConfig, name: str) -> TensorSpec:
    """The description of one tensor by its full name; KeyError when a model like this has none."""
    match = LAYER_PATTERN.fullmatch(name)
    return layer_tensors(config)[match.group(2)] if match else outer_tensors(config)[name]


# --- which linears are int8 -------------------------------------------------------------------------------------------


def linear_names(config: ModelConfig) -> list[str]:
    """Every linear that may be quantised: the seven of each layer, then lm_head when it is not tied."""
    names = [layer_prefix(layer) + part for layer in range(config.num_layers) for part in LINEAR_PARTS]
    return names if config.tie_embeddings else [*names, "lm_head"]


def unit_names(config: ModelConfig) -> list[str]:
    """`model.layers.N.<unit>` of every group of linears that shares a scheme."""
    return [layer_prefix(layer) + unit for layer in range(config.num_layers) for unit in UNITS]


def unit_members(unit: str) -> list[str]:
    """The linears of one unit name."""
    prefix, _, kind = unit.rpartition(".")
    return [f"{prefix}.{part}" for part in UNITS[kind]]


def is_kept(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names this linear: by whole parts of its name (`down_proj`, `layers.1`, `self_attn`), or by a
    `re:` expression that fits all of it."""
    return any(
        re.fullmatch(pattern[3:], name) is not None if pattern.startswith("re:") else f".{pattern}." in f".{name}."
        for pattern in patterns
    )


def kept_linears(config: ModelConfig, patterns: Iterable[str]) -> set[str]:
    """The linears that `patterns` (see `is_kept`) leave in float.

    ValueError for a pattern that names no linear or is no valid expression, and for one that parts q, k, v or gate, up.
    """
    linears, kept = linear_names(config), set()
    for pattern in patterns:
        try:
            named = {name for name in linears if is_kept(name, [pattern])}
        except re.error as error:
            raise ValueError(f"quantize_keep: {pattern!r} is no regular expression: {error}") from None
        if not named and not (config.tie_embeddings and is_kept("lm_head", [pattern])):
            raise ValueError(
                f"quantize_keep: {pattern!r} names no linear of this model{_closest_linear(pattern, linears)}"
            )
        kept |= named
    for unit in unit_names(config):
        members = set(unit_members(unit))
        if members & kept and not members <= kept:
            raise ValueError(
                f"quantize_keep keeps only part of {unit}: {', '.join(sorted(members))} run as one "
                "matrix product; keep all of them or none"
            )
    return kept


def _closest_linear(pattern: str, linears: list[str]) -> str:
    words = {part for name in linears for part in name.split(".")} | {"lm_head", *linears}
    return did_you_mean(pattern, sorted(words)) or f"; linears: {', '.join(LINEAR_PARTS)}, lm_head"


def uniform_schemes(config: ModelConfig, scheme: str, keep: Iterable[str]) -> dict[str, str]:
    """Linear -> scheme when all but the kept ones (see `kept_linears`) get the same; empty for `none`."""
    if scheme == "none":
        return {}
    kept = kept_linears(config, keep)
    return {name: scheme for name in linear_names(config) if name not in kept}


# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightBytes:
    """`stored`: memory that the weights take. `per_step`: what one decode step reads of them."""

    stored: int
    per_step: int


def num_weights(config: ModelConfig, linear: str) -> int:
    """Elements of a linear's weight."""
    return math.prod(tensor_spec(config, f"{linear}.weight").shape)


def weight_bytes(config: ModelConfig, schemes: Mapping[str, str], element_bytes: int) -> WeightBytes:
    """Bytes of all weights when the linears in `schemes` are quantised and the rest has `element_bytes` an element.

    A decode step reads all but the embedding table, of which it reads rows; a tied table is stored once and read whole,
    as the head.
    """
    stored = 0
    for name, shape in expected_shapes(config).items():
        count = math.prod(shape)
        scheme = schemes.get(name.removesuffix(".weight"), "none")
        if scheme == "w4a16":
            groups = shape[1] // (best_group_size([shape[1]]) or shape[1])
            stored += count // 2 + SCALE_BYTES * shape[0] * groups
        else:
            stored += count * element_bytes if scheme == "none" else count + SCALE_BYTES * shape[0]
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * element_bytes
    return WeightBytes(stored, stored - table)
