"""Which tensors a model must have, from its config.json; and the linears that may be quantised.

Linears that one matrix product serves must share a scheme: q, k, v read the same input and run as one
product in most engines, as do gate and up. `UNITS` names these groups.
"""

from __future__ import annotations

import difflib
import math
import re

from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.model.config import ModelConfig

UNITS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
LINEAR_PARTS = tuple(part for parts in UNITS.values() for part in parts)
LAYER_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a float model, Hugging Face names."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        shapes.update(_layer_shapes(config, f"model.layers.{layer}."))
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _layer_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for part, rows in (("q", query), ("k", value), ("v", value)):
        shapes[f"self_attn.{part}_proj.weight"] = (rows, hidden)
        if config.attention_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    shapes["self_attn.o_proj.weight"] = (hidden, query)
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes |= {
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    return {prefix + name: shape for name, shape in shapes.items()}


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """CheckpointError unless `checkpoint` holds exactly the tensors, in the shapes, that `config` calls
    for.
    """
    expected = expected_shapes(config)
    allowed_extra = {f"{linear}.weight_scale" for linear in checkpoint.quantization.schemes}
    if config.tie_embeddings:
        allowed_extra.add("lm_head.weight")  # a stored copy of the tied matrix
    # Recovering a static W8A8 layout yields a bias for every linear, also for those that had none.
    allowed_extra |= {f"{linear}.bias" for linear in checkpoint.quantization.schemes}
    for name, shape in expected.items():
        if name not in checkpoint:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name} is missing" + _closest(name, checkpoint))
        found = checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.source(name).origin}: tensor {name} has shape {list(found)}, "
                f"config.json implies {list(shape)}"
            )
    for name in checkpoint.tensor_names():
        if name not in expected and name not in allowed_extra:
            raise CheckpointError(
                f"{checkpoint.source(name).origin}: tensor {name} does not belong to a "
                f"{config.family} model of {config.num_layers} layers as config.json describes it"
            )


def linear_names(config: ModelConfig) -> list[str]:
    """Every linear that may be quantised: the seven of each layer, then lm_head when it is not tied."""
    names = [f"model.layers.{layer}.{part}" for layer in range(config.num_layers) for part in LINEAR_PARTS]
    return names if config.tie_embeddings else [*names, "lm_head"]


def unit_names(config: ModelConfig) -> list[str]:
    """`model.layers.N.<unit>` of every group of linears that shares a scheme."""
    return [f"model.layers.{layer}.{unit}" for layer in range(config.num_layers) for unit in UNITS]


def unit_members(unit: str) -> list[str]:
    """The linears of one unit name."""
    prefix, _, kind = unit.rpartition(".")
    return [f"{prefix}.{part}" for part in UNITS[kind]]


def num_weights(config: ModelConfig, linear: str) -> int:
    """Elements of a linear's weight."""
    return math.prod(expected_shapes(config)[f"{linear}.weight"])


def kept_linears(config: ModelConfig, patterns: tuple[str, ...] | list[str]) -> set[str]:
    """Linears that stay in float: `patterns` are full names, trailing parts (`down_proj`) or `re:`
    expressions.

    A pattern that matches nothing is a ValueError, and so is one that splits q, k, v or gate, up.
    """
    linears = linear_names(config)
    kept: set[str] = set()
    for pattern in patterns:
        matched = {name for name in linears if _matches(pattern, name)}
        tied_head = pattern == "lm_head" and config.tie_embeddings
        if not matched and not tied_head:
            parts = sorted({name.rpartition(".")[2] for name in linears} | {"lm_head"} | set(linears))
            near = difflib.get_close_matches(pattern, parts, n=1)
            raise ValueError(
                f"quantize_keep: {pattern!r} names no linear of this model"
                + (f"; did you mean {near[0]!r}?" if near else f"; linears: {', '.join(LINEAR_PARTS)}")
            )
        kept |= matched
    for unit in unit_names(config):
        members = set(unit_members(unit))
        if members & kept and not members <= kept:
            raise ValueError(
                f"quantize_keep keeps only part of {unit}: {', '.join(sorted(members))} run as one "
                "matrix product; keep all of them or none"
            )
    return kept


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern) or name.startswith(pattern + ".")


def _closest(name: str, checkpoint: Checkpoint) -> str:
    near = difflib.get_close_matches(name, checkpoint.tensor_names(), n=1, cutoff=0.8)
    return f" (closest: {near[0]})" if near else ""
