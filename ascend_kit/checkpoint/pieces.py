"""What checkpoints of training frameworks share: one table of names, tensors in parts, merged ones taken apart again.

Megatron-core's names are also those of MindSpore's newer models; MindFormers' older ones are in the same table.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, TensorSource
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, UNITS, expected_shapes, layer_prefix, layer_tensors

Found = TypeVar("Found")

LAYER_NAME = re.compile(r"(?:model|decoder)\.layers\.(\d+)\.(.+)\.(\w+)")  # number, part of the layer, weight or bias
OUTER_NAMES = {
    "model.tok_embeddings.embedding_weight": EMBEDDING,
    "embedding.word_embeddings.weight": EMBEDDING,
    "model.norm_out.weight": FINAL_NORM,
    "decoder.final_layernorm.weight": FINAL_NORM,
    "lm_head.weight": HEAD,
    "output_layer.weight": HEAD,
}
_ONE_FOR_ONE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "self_attention.linear_q": "self_attn.q_proj",
    "self_attention.linear_k": "self_attn.k_proj",
    "self_attention.linear_v": "self_attn.v_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.gating": "mlp.gate_proj",
    "mlp.hidden": "mlp.up_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
LAYER_NAMES = {name: (ours,) for name, ours in _ONE_FOR_ONE.items()} | {
    **dict.fromkeys(("attention.w_qkv", "self_attention.linear_qkv"), UNITS["qkv"]),
    **dict.fromkeys(("feed_forward.w_gate_hidden", "mlp.linear_fc1"), UNITS["gate_up"]),
}  # mlp.linear_fc1 beside mlp.gating is up alone


def row_pieces(pieces: Sequence[tuple[TensorSource, int, int]]) -> ByRows:
    """Rows [start, stop) of several tensors, one below the other."""
    first, filled = pieces[0][0], [piece for piece in pieces if piece[2] > piece[1]]

    def rows(start: int, stop: int) -> torch.Tensor:
        parts, position = [], 0
        for source, begin, end in filled:
            low, high = max(start, position), min(stop, position + end - begin)
            if low < high:
                parts.append(source.read_slice(0, begin + low - position, begin + high - position))
            position += end - begin
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else first.read_slice(0, 0, 0)

    return ByRows(rows, first.dtype, (sum(stop - start for _, start, stop in pieces), *first.shape[1:]), first.origin)


def _side_by_side(parts: Sequence[TensorSource]) -> ByRows:
    """Tensors [out, in_r] as one: [out, sum of in_r]."""
    rows = lambda start, stop: torch.cat([part.read_slice(0, start, stop) for part in parts], dim=1)  # noqa: E731
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    return ByRows(rows, parts[0].dtype, shape, parts[0].origin)


def same_on_all_ranks(name: str, parts: Sequence[TensorSource]) -> ByRows:
    """A tensor that every tensor-parallel rank holds; a difference is an error, found when its rows are read."""
    shape, origin = parts[0].shape, parts[0].origin

    def rows(start: int, stop: int) -> torch.Tensor:
        first = parts[0].read_slice(0, start, stop)
        for part in parts[1:]:
            if part.shape != shape or not torch.equal(first, part.read_slice(0, start, stop)):
                raise CheckpointError(
                    f"{part.origin}: {name} differs from the copy in {origin}; the shards are from "
                    "different checkpoints or are damaged"
                )
        return first

    return ByRows(rows, parts[0].dtype, shape, origin)


def every_other_row(inner: TensorSource, first: int) -> ByRows:
    """Rows 0, 2, 4, ... of a tensor, or 1, 3, 5, ...: one of two matrices whose rows alternate."""
    rows = lambda start, stop: inner.read_slice(0, 2 * start, 2 * stop)[first::2].contiguous()  # noqa: E731
    return ByRows(rows, inner.dtype, (inner.shape[0] // 2, *inner.shape[1:]), inner.origin)


def joined(
    name: str, shape: tuple[int, ...], parts: Sequence[TensorSource], *, advice: str, is_ordered: bool = False
) -> TensorSource:
    """The tensor of `shape` that the parts make up, or the one that each rank holds.

    CheckpointError ending with `advice` where nothing says in which order they follow: data parallelism beside tensor
    parallelism, or weights that the optimizer spread (its norms are in parts, too).
    """
    first, local = parts[0], parts[0].shape
    if local == shape:
        return first if len(parts) == 1 else same_on_all_ranks(name, parts)
    split = [dim for dim in range(len(shape)) if len(local) == len(shape) and local[dim] != shape[dim]]
    if len(split) != 1 or len(parts) == 1 or any(part.shape != local for part in parts):
        raise CheckpointError(f"{first.origin}: {name} has shape {list(local)}, config.json implies {list(shape)}")
    is_norm = name.endswith(("norm.weight", "norm_out.weight"))
    if local[split[0]] * len(parts) != shape[split[0]] or (is_norm and not is_ordered):
        raise CheckpointError(
            f"{first.origin}: {name} is in {len(parts)} parts of shape {list(local)}, the whole is {list(shape)}: not "
            f"tensor and pipeline parallelism alone{advice}"
        )
    return _side_by_side(parts) if split[0] else row_pieces([(part, 0, part.shape[0]) for part in parts])


def below_each_other(source: TensorSource, rows: Sequence[int]) -> list[ByRows]:
    """The tensors of so many rows that one tensor holds one below the other."""
    ends = itertools.accumulate(rows, initial=0)
    return [row_pieces([(source, first, last)]) for first, last in itertools.pairwise(ends)]


def _split_qkv(model: ModelConfig, source: TensorSource) -> list[ByRows]:
    """q, k and v out of rows of a KV group's queries, its key, its value; group after group."""
    head, per_group = model.head_dim, model.num_heads // model.num_kv_heads
    starts = [group * (per_group + 2) * head for group in range(model.num_kv_heads)]
    return [
        row_pieces([(source, start + first * head, start + last * head) for start in starts])
        for first, last in ((0, per_group), (per_group, per_group + 1), (per_group + 1, per_group + 2))
    ]


def add_once(found: dict[str, Found], name: str, value: Found, origin: str) -> None:
    """Put a value under a name that must be new."""
    if name in found:
        raise CheckpointError(f"{origin}: {name} is stored twice")
    found[name] = value


def renamed(
    model: ModelConfig,
    framework: str,
    parts: Mapping[str, Sequence[TensorSource]],
    whole: Callable[[str, tuple[int, ...], Sequence[TensorSource]], TensorSource],
    *,
    contiguous_qkv: bool = False,
    interleaved_mlp: bool = True,
) -> dict[str, TensorSource]:
    """Hugging Face's tensors out of a training framework's; `whole` makes one of some shape out of its parts.

    CheckpointError for a name that is in no table. What config.json has no place for passes: the check of the whole
    checkpoint names it.
    """
    shapes, layer, result = expected_shapes(model), layer_tensors(model), {}
    for name, pieces in parts.items():
        match = LAYER_NAME.fullmatch(name)
        number, part, kind = match.groups() if match else (0, "", "")
        linears = LAYER_NAMES.get(part, ())
        if part == "mlp.linear_fc1" and f"decoder.layers.{number}.mlp.gating.weight" in parts:
            linears = ("mlp.up_proj",)
        targets = [f"{layer_prefix(int(number))}{linear}.{kind}" for linear in linears]
        if name in shapes or name in OUTER_NAMES:  # Hugging Face's own, or one outside the layers
            targets = [OUTER_NAMES.get(name, name)]
        if not targets:
            raise CheckpointError(
                f"{pieces[0].origin}: unknown tensor {name}; readable are dense Qwen2.5, Qwen3 and Llama models of "
                f"{framework}"
            )
        if len(targets) == 1:
            found = [whole(name, shapes[targets[0]], pieces) if targets[0] in shapes else pieces[0]]
        else:
            rows = [layer[f"{linear}.weight"].shape[0] for linear in linears]
            merged = whole(name, (sum(rows), *([model.hidden_size] if kind == "weight" else [])), pieces)
            if contiguous_qkv if len(rows) == 3 else not interleaved_mlp:
                found = below_each_other(merged, rows)
            else:
                halves = [every_other_row(merged, first) for first in (0, 1)]
                found = _split_qkv(model, merged) if len(rows) == 3 else halves
        for target, source in zip(targets, found, strict=True):
            add_once(result, target, source, source.origin)
    return result
