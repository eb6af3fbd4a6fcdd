"""What a model costs: bytes stored, bytes read, FLOPs, and the least time a card needs for them.

Pure arithmetic on a `ModelConfig` (or anything with its field names); nothing is measured and no tensor is
made. Bytes are bytes (GB in prose is 1e9), FLOPs count a multiply-add as two. A "step" is one pass of the
model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
QUANTIZE = ("none", "w8a8", "w8a16")
SCALE_BYTES = 4  # weight_scale is float32, one per output channel


class ModelShape(Protocol):
    """The fields of `ModelConfig` that decide costs."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_embeddings: bool
    attention_bias: bool
    qk_norm: bool


@dataclass(frozen=True)
class Limit:
    """What a machine can do at most: `flops_per_s` for the matrix dtype in use, `bytes_per_s` of reading
    memory.
    """

    flops_per_s: float | None
    bytes_per_s: float | None

    def floor_s(self, flops: float, num_bytes: float) -> float | None:
        """Least time for this work, compute and memory overlapped perfectly; None when a ceiling is
        unknown.
        """
        if self.flops_per_s is None or self.bytes_per_s is None:
            return None
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def linear_shapes(config: ModelShape) -> dict[str, tuple[int, int]]:
    """`(out, in)` of every matrix product of one layer, by the names of the Hugging Face checkpoint."""
    q, kv, hidden = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.hidden_size)
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (config.intermediate_size, hidden),
        "mlp.up_proj": (config.intermediate_size, hidden),
        "mlp.down_proj": (hidden, config.intermediate_size),
    }


def layer_parameters(config: ModelShape) -> int:
    """Parameters in the matrices of one layer."""
    return sum(rows * cols for rows, cols in linear_shapes(config).values())


def head_parameters(config: ModelShape) -> int:
    """Parameters of lm_head, counted whether or not it shares storage with the embedding."""
    return config.vocab_size * config.hidden_size


def small_parameters(config: ModelShape) -> int:
    """Norm weights and biases of the whole model."""
    per_layer = 2 * config.hidden_size
    if config.attention_bias:
        per_layer += (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if config.qk_norm:
        per_layer += 2 * config.head_dim
    return config.num_layers * per_layer + config.hidden_size


@dataclass(frozen=True)
class WeightBytes:
    """`stored`: memory the weights take. `per_step`: what one decode step must read (no embedding table)."""

    stored: int
    per_step: int


def weight_bytes(
    config: ModelShape,
    precision: str = "bf16",
    quantize: str = "none",
    keep: tuple[str, ...] | list[str] = ("lm_head",),
) -> WeightBytes:
    """Bytes of the weights in a precision, or with int8 linears except those whose name contains a `keep`
    part.

    Tied embeddings are stored once and still read once per step, by lm_head. Raises ValueError for an unknown
    precision or scheme.
    """
    size = _element_bytes(precision)
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize is {quantize!r}; costs are known for {', '.join(QUANTIZE)}")

    def one(name: str, rows: int, cols: int) -> int:
        is_int8 = quantize != "none" and not any(_is_kept(name, pattern) for pattern in keep)
        return rows * cols + rows * SCALE_BYTES if is_int8 else rows * cols * size

    layers = sum(
        one(f"model.layers.{i}.{name}", rows, cols)
        for i in range(config.num_layers)
        for name, (rows, cols) in linear_shapes(config).items()
    )
    head = one("lm_head", config.vocab_size, config.hidden_size)
    per_step = layers + head + small_parameters(config) * size
    embedding = config.vocab_size * config.hidden_size * size
    is_shared = config.tie_embeddings and head == embedding
    return WeightBytes(stored=per_step + (0 if is_shared else embedding), per_step=per_step)


def step_weight_bytes(config: ModelShape, stored_bytes: int, precision: str) -> int:
    """Bytes a decode step reads when an engine reports `stored_bytes`: less the embedding table where
    untied.
    """
    if config.tie_embeddings:
        return stored_bytes
    return stored_bytes - config.vocab_size * config.hidden_size * _element_bytes(precision)


def kv_bytes_per_token(config: ModelShape, precision: str = "bf16") -> int:
    """Bytes of keys and values that one token of one request keeps, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * _element_bytes(precision)


def token_flops(config: ModelShape) -> int:
    """FLOPs of the layers' matrices for one token (attention scores and lm_head not included)."""
    return 2 * config.num_layers * layer_parameters(config)


def attention_flops(config: ModelShape, num_pairs: float) -> float:
    """FLOPs of scores and weighted sum for `num_pairs` (query token, visible key token) pairs."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * num_pairs


def prefill_flops(config: ModelShape, prompt_len: int, cached_len: int = 0) -> float:
    """FLOPs to prefill a prompt of which `cached_len` tokens are in the cache, with logits for its last
    token.
    """
    new = prompt_len - cached_len
    pairs = prompt_len * (prompt_len + 1) / 2 - cached_len * (cached_len + 1) / 2
    return token_flops(config) * new + attention_flops(config, pairs) + 2.0 * head_parameters(config)


def decode_flops(config: ModelShape, batch: int, context_len: float) -> float:
    """FLOPs of one decode step for `batch` requests that each see `context_len` tokens on average."""
    per_token = token_flops(config) + 2.0 * head_parameters(config) + attention_flops(config, context_len)
    return batch * per_token


def decode_bytes(step_weights: int, kv_token_bytes: int, batch: int, context_len: float) -> float:
    """Bytes a decode step must read: the weights once, and the KV of every request."""
    return step_weights + kv_token_bytes * batch * context_len


def prefill_floor_s(config: ModelShape, limit: Limit, step_weights: int, prompt_len: int) -> float | None:
    """Least time from a prompt to its first token on an idle machine; None when a ceiling is unknown."""
    return limit.floor_s(prefill_flops(config, prompt_len), step_weights)


def decode_floor_s(
    config: ModelShape, limit: Limit, step_weights: int, kv_token_bytes: int, batch: int, context_len: float
) -> float | None:
    """Least time of one decode step; None when a ceiling is unknown."""
    return limit.floor_s(
        decode_flops(config, batch, context_len), decode_bytes(step_weights, kv_token_bytes, batch, context_len)
    )


def throughput_ceiling(
    config: ModelShape,
    limit: Limit,
    *,
    step_weights: int,
    kv_token_bytes: int,
    concurrency: int,
    prompt_len: int,
    output_len: int,
) -> float | None:
    """Output tokens per second that no schedule can exceed with `concurrency` requests in flight; None if
    unknown.

    A step yields at most one token per request in flight and reads the weights once, so the weights are read
    at least 1/concurrency times per token. A prompt's FLOPs and its share of reading overlap with other work
    at best, so the bound is the larger of total FLOPs and total bytes over their ceilings.
    """
    decode_steps = output_len - 1  # the prompt pass yields the first token
    context = prompt_len + output_len / 2
    flops = prefill_flops(config, prompt_len) + decode_steps * decode_flops(config, 1, context)
    num_bytes = step_weights * output_len / concurrency + kv_token_bytes * decode_steps * context
    seconds = limit.floor_s(flops, num_bytes)
    return None if not seconds else output_len / seconds


def request_work(config: ModelShape, records: list[Any]) -> float:
    """Model FLOPs that a list of `RequestRecord`s needed (cached prompt tokens not counted)."""
    total = 0.0
    for record in records:
        steps = max(record.num_output_tokens - 1, 0)
        context = record.num_prompt_tokens + (steps + 1) / 2
        total += prefill_flops(config, record.num_prompt_tokens, record.num_cached_tokens)
        total += steps * decode_flops(config, 1, context)
    return total


def _is_kept(name: str, pattern: str) -> bool:
    return bool(re.fullmatch(pattern[3:], name)) if pattern.startswith("re:") else pattern in name


def _element_bytes(precision: str) -> int:
    if precision not in ELEMENT_BYTES:
        raise ValueError(f"precision is {precision!r}; allowed: {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[precision]
