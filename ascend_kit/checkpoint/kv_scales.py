"""Scales of an int8 KV cache that a checkpoint brings along, in one form.

    <layer>.self_attn.{k,v}_cache_scale, {k,v}_cache_offset    code = round(x / scale + offset) of keys after rotary
one number, one a head or one a channel: msModelSlim's C8 ({k,v}_proj.kv_cache_scale, kv_cache_offset) and
compressed-tensors' kv_cache_scheme ({k,v}_scale, {k,v}_zero_point) in int8.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import layer_prefix

if TYPE_CHECKING:
    from ascend_kit.checkpoint.huggingface import Checkpoint

MSMODELSLIM = re.compile(r"(.*\.self_attn\.)([kv])_proj\.kv_cache_(scale|offset)")
COMPRESSED_TENSORS = re.compile(r"(.*\.self_attn\.)([kv])_(scale|zero_point)")


def present_kv_scales(pattern: re.Pattern[str], sources: dict[str, TensorSource]) -> None:
    """Give the tensors that `pattern` finds their names of the common form."""
    for match in [found for name in sources if (found := pattern.fullmatch(name))]:
        attention, letter, part = match.groups()
        kind = "scale" if part == "scale" else "offset"
        sources[f"{attention}{letter}_cache_{kind}"] = sources.pop(match.group())


def kv_scales(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(scales, offsets) float32 [2, KV heads, head size] of a layer's keys and values, None where there are none."""
    heads, size = config.num_kv_heads, config.head_dim
    attention = f"{layer_prefix(layer)}self_attn."
    if not any(f"{attention}{letter}_cache_scale" in checkpoint for letter in "kv"):
        return None

    def read(letter: str, kind: str) -> torch.Tensor:
        name = f"{attention}{letter}_cache_{kind}"
        if kind == "offset" and name not in checkpoint:
            return torch.zeros(heads, size)
        numbers = checkpoint.read(name).float()
        if numbers.numel() not in (1, heads, heads * size) or not bool(numbers.isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.source(name).origin}: {name} has shape {list(numbers.shape)}; an int8 KV cache takes one "
                f"finite number, {heads} (a head) or {heads * size} (a channel)"
            )
        if kind == "scale" and not bool((numbers > 0).all()):
            raise CheckpointError(f"{checkpoint.source(name).origin}: {name} holds numbers that are not positive")
        per_head = 1 if numbers.numel() == 1 else heads
        return numbers.reshape(per_head, -1).expand(heads, size).contiguous()

    scales, offsets = (torch.stack([read(letter, kind) for letter in "kv"]) for kind in ("scale", "offset"))
    return scales, offsets
