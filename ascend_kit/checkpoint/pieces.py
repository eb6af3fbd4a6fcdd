"""What checkpoints of training frameworks share: names, tensors in parts, merged tensors taken apart again.

Megatron-core's names are also those of MindSpore's newer models; MindFormers' older ones are in the same table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, TensorSource
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import EMBEDDING, FINAL_NORM, HEAD

LAYER_NAME = re.compile(r"(?:model|decoder)\.layers\.(\d+)\.(.+)\.(\w+)")  # number, part of the layer, weight or bias
OUTER_NAMES = {
    "model.tok_embeddings.embedding_weight": EMBEDDING,
    "embedding.word_embeddings.weight": EMBEDDING,
    "model.norm_out.weight": FINAL_NORM,
    "decoder.final_layernorm.weight": FINAL_NORM,
    "lm_head.weight": HEAD,
    "output_layer.weight": HEAD,
}
LAYER_NAMES = {
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
    "mlp.linear_fc1": "mlp.up_proj",  # beside mlp.gating; without it both are in here
    "mlp.linear_fc2": "mlp.down_proj",
}
MERGED_QKV = ("attention.w_qkv", "self_attention.linear_qkv")
MERGED_GATE_UP = ("feed_forward.w_gate_hidden", "mlp.linear_fc1")


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
        return torch.cat(parts) if len(parts) != 1 else parts[0]

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


def joined(name: str, parts: Sequence[TensorSource], split: int | None) -> TensorSource:
    """The tensor whose parts of dimension `split` the tensor ranks hold; None: each of them holds the whole."""
    if len(parts) == 1:
        return parts[0]
    if split is None:
        return same_on_all_ranks(name, parts)
    return _side_by_side(parts) if split else row_pieces([(part, 0, part.shape[0]) for part in parts])


def split_qkv(model: ModelConfig, name: str, parts: Sequence[TensorSource]) -> dict[str, ByRows]:
    """q, k and v out of a merged tensor of whole KV groups: rows of the group's queries, its key, its value; group
    after group, over all `parts` (tensor ranks)."""
    head, per_group = model.head_dim, model.num_heads // model.num_kv_heads
    group_rows, groups = (per_group + 2) * head, model.num_kv_heads // len(parts)
    for part in parts:
        if part.shape[0] != groups * group_rows or groups * len(parts) != model.num_kv_heads:
            raise CheckpointError(
                f"{part.origin}: {name} has {part.shape[0]} rows; config.json implies {model.num_kv_heads} groups of "
                f"{group_rows} over {len(parts)} tensor ranks"
            )
    spans = {"q": (0, per_group), "k": (per_group, per_group + 1), "v": (per_group + 1, per_group + 2)}
    return {
        letter: row_pieces(
            [
                (part, group * group_rows + first * head, group * group_rows + last * head)
                for part in parts
                for group in range(groups)
            ]
        )
        for letter, (first, last) in spans.items()
    }


class Renamed(dict[str, TensorSource]):
    """Tensors under Hugging Face's names, each of them once."""

    def add(self, name: str, source: TensorSource) -> None:
        if name in self:
            raise CheckpointError(f"{source.origin}: {name} is stored twice (also in {self[name].origin})")
        self[name] = source

    def add_qkv(self, prefix: str, kind: str, found: Mapping[str, TensorSource]) -> None:
        """q, k and v, by their letters, of the layer that `prefix` names; kind: weight or bias."""
        for letter, source in found.items():
            self.add(f"{prefix}self_attn.{letter}_proj.{kind}", source)

    def add_gate_up(self, prefix: str, kind: str, gate: TensorSource, up: TensorSource) -> None:
        self.add(f"{prefix}mlp.gate_proj.{kind}", gate)
        self.add(f"{prefix}mlp.up_proj.{kind}", up)


def unknown_tensor(name: str, source: TensorSource, framework: str) -> CheckpointError:
    return CheckpointError(
        f"{source.origin}: unknown tensor {name}; readable are dense Qwen2.5, Qwen3 and Llama models of {framework}"
    )
