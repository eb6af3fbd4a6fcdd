"""CPU kernels of torch_npu's attention operators; see kernels.py for where their limits come from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import impl

from npu_sim.limits import HALF, LIBRARY, check_contiguous, check_dtype, require
from npu_sim.traits import checks

_MASK = 2048
_NO_MASK, _ALL, _LEFT_UP, _RIGHT_DOWN, _BAND = range(5)  # sparse_mode


@checks("npu::npu_fused_infer_attention_score", "npu::_npu_fused_infer_attention_score_get_max_workspace")
def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    workspace: Any = None,
    out: Any = None,
    **other: Any,
) -> None:
    name = "npu_fused_infer_attention_score"
    check_dtype(name, HALF, query=query)
    check_dtype(name, (query.dtype,), key=key, value=value)
    check_contiguous(name, query=query, key=key, value=value, atten_mask=atten_mask, block_table=block_table)
    groups = num_key_value_heads or num_heads
    require(
        num_heads % groups == 0 and num_heads // groups <= 64 and num_heads <= 256,
        name,
        f"{num_heads} query heads over {groups} KV heads",
    )
    require(key.shape == value.shape, name, f"key {tuple(key.shape)} and value {tuple(value.shape)} differ")
    head = _head_size(query, num_heads, input_layout)
    require(head % 16 == 0 and head <= 512, name, f"head size {head} is no multiple of 16 up to 512")
    # The default of 1.0 is legal and silently ruins the output: nobody means it for a head of more than one
    # element.
    require(scale != 1.0, name, "scale is 1.0, its default: pass 1/sqrt(head size)")
    _check_mask(name, atten_mask, sparse_mode)
    if block_table is not None:
        _check_pages(name, key, block_table, block_size, groups * head, input_layout, actual_seq_lengths_kv)
    if input_layout == "TND":
        _check_tnd(name, query, head, actual_seq_lengths, actual_seq_lengths_kv, key, block_table)
    elif block_table is not None:
        require(len(actual_seq_lengths_kv) >= query.shape[0], name, "fewer KV lengths than sequences")


def _head_size(query: Tensor, heads: int, layout: str) -> int:
    require(layout in ("TND", "BSH", "BNSD", "BSND"), "npu_fused_infer_attention_score", f"layout {layout}")
    wanted = {"TND": 3, "BSH": 3}.get(layout, 4)
    require(query.dim() == wanted, "npu_fused_infer_attention_score", f"{layout} query {tuple(query.shape)}")
    if layout == "BSH":
        return query.shape[-1] // heads
    axis = {"TND": 1, "BNSD": 1, "BSND": 2}[layout]
    require(
        query.shape[axis] == heads,
        "npu_fused_infer_attention_score",
        f"num_heads {heads} against a query of {tuple(query.shape)}",
    )
    return query.shape[-1]


def _check_mask(name: str, mask: Tensor | None, sparse_mode: int) -> None:
    require(sparse_mode in (_NO_MASK, _ALL, _LEFT_UP, _RIGHT_DOWN, _BAND), name, f"sparse_mode {sparse_mode}")
    check_dtype(name, (torch.bool, torch.int8, torch.uint8), atten_mask=mask)
    if sparse_mode in (_LEFT_UP, _RIGHT_DOWN, _BAND):
        require(
            mask is not None and tuple(mask.shape[-2:]) == (_MASK, _MASK),
            name,
            f"sparse_mode {sparse_mode} wants the compressed {_MASK}x{_MASK} mask, got "
            f"{None if mask is None else tuple(mask.shape)}",
        )
    elif sparse_mode == _ALL:
        require(mask is not None, name, "sparse_mode 1 wants a full mask")


def _check_pages(
    name: str, key: Tensor, table: Tensor, block_size: int, row: int, layout: str, kv_lens: list[int] | None
) -> None:
    check_dtype(name, (torch.int32,), block_table=table)
    require(table.dim() == 2, name, f"block_table {tuple(table.shape)} is [sequences, blocks]")
    require(
        key.dim() == 3 and tuple(key.shape[1:]) == (block_size, row),
        name,
        f"a paged key is [blocks, {block_size}, {row}], got {tuple(key.shape)}",
    )
    require(row < 65535, name, f"{row} elements in a cache row")
    limit = 1024 if layout == "TND" else 512
    require(
        block_size > 0 and block_size % 16 == 0 and block_size <= limit,
        name,
        f"block_size {block_size}: a multiple of 16 up to {limit} is wanted",
    )
    require(kv_lens is not None, name, "pages need actual_seq_lengths_kv")
    require(table.shape[0] >= len(kv_lens), name, f"{table.shape[0]} block-table rows for {len(kv_lens)} KV lengths")
    longest = max(kv_lens, default=0)
    require(
        longest <= table.shape[1] * block_size,
        name,
        f"a KV length of {longest} exceeds the {table.shape[1]} blocks of {block_size} in its row; "
        "with pages the KV lengths are per sequence, not cumulative",
    )


def _check_tnd(
    name: str,
    query: Tensor,
    head: int,
    ends: list[int] | None,
    kv_lens: list[int] | None,
    key: Tensor,
    table: Tensor | None,
) -> None:
    require(
        head == 128 or (head == 64 and table is not None),
        name,
        f"head size {head} under TND, which takes 128, and 64 over pages",
    )
    require(ends is not None and kv_lens is not None, name, "TND wants both length lists")
    require(
        0 < len(ends) <= 4096 and len(ends) == len(kv_lens),
        name,
        f"561002: {len(ends)} query ends and {len(kv_lens)} KV lengths; equal and at most 4096 are wanted",
    )
    starts = [0, *ends[:-1]]
    require(
        all(a < b for a, b in zip(starts, ends, strict=True)),
        name,
        f"561002: query lengths are cumulative under TND, got {ends}",
    )
    require(
        ends[-1] == query.shape[0],
        name,
        f"561002: the last query end is {ends[-1]}, the query has {query.shape[0]} rows",
    )
    require(min(kv_lens) > 0, name, f"561002: KV lengths {kv_lens}")
    if table is None:
        require(kv_lens[-1] == key.shape[0], name, "without pages KV lengths are cumulative and end at the key's rows")
    else:
        short = [(b - a, n) for a, b, n in zip(starts, ends, kv_lens, strict=True) if n < b - a]
        require(not short, name, f"a sequence has more new tokens than its KV length: {short}")


@impl(LIBRARY, "npu_fused_infer_attention_score")
def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    check_attention(query, key, value, **options)
    heads, layout = options["num_heads"], options.get("input_layout", "BSH")
    groups = options.get("num_key_value_heads") or heads
    rows, out = _queries(query, heads, layout, options.get("actual_seq_lengths")), []
    for index, q in enumerate(rows):
        k, v = (_keys(cache, index, groups, layout, options) for cache in (key, value))
        out.append(_attend(q, k, v, options, layout).to(query.dtype))
    return _restore(out, query, layout), torch.zeros(1)


def _queries(query: Tensor, heads: int, layout: str, lengths: list[int] | None) -> list[Tensor]:
    """Per sequence [S, N, H]."""
    if layout == "TND":
        return [query[start:end] for start, end in zip([0, *lengths[:-1]], lengths, strict=True)]
    if layout == "BNSD":
        return [q.transpose(0, 1) for q in query]
    return [q.reshape(q.shape[0], heads, -1) for q in query]


def _keys(cache: Tensor, index: int, groups: int, layout: str, options: dict[str, Any]) -> Tensor:
    """Keys or values of one sequence, [C, K, H] float32."""
    table, lengths = options.get("block_table"), options.get("actual_seq_lengths_kv")
    if table is not None:
        count = math.ceil(lengths[index] / options["block_size"])
        ids = table[index, :count].long()
        low, high = int(ids.min()), int(ids.max())
        require(
            low >= 0 and high < cache.shape[0],
            "npu_fused_infer_attention_score",
            f"block_table row {index} holds block {low if low < 0 else high}, the cache has {cache.shape[0]}",
        )
        rows = cache[ids].flatten(0, 1)[: lengths[index]]
    elif layout == "TND":
        rows = cache[lengths[index - 1] if index else 0 : lengths[index]]
    else:
        rows = cache[index].transpose(0, 1) if layout == "BNSD" else cache[index]
    return rows.reshape(rows.shape[0], groups, -1).float()


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], layout: str) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qnh,knh->nqk", q.float(), k) * options.get("scale", 1.0)
    hidden = _hidden(*scores.shape[-2:], options, layout)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("nqk,knh->qnh", scores.softmax(-1).nan_to_num(), v)


def _hidden(new: int, context: int, options: dict[str, Any], layout: str) -> Tensor | None:
    """Which scores the mask removes, [S, C]."""
    mode, mask = options.get("sparse_mode", 0), options.get("atten_mask")
    if new == 1 and layout != "TND":
        return None  # the incremental kernel ignores the mask mode
    if mode in (_LEFT_UP, _RIGHT_DOWN):
        # The compressed mask is a promise: hidden where it is 1.
        require(
            bool(mask[..., 0, 1]) and not bool(mask[..., 1, 0]),
            "npu_fused_infer_attention_score",
            "the compressed mask must be 1 above its diagonal",
        )
        return torch.ones(new, context, dtype=torch.bool).triu(1 + (context - new if mode == _RIGHT_DOWN else 0))
    return None if mask is None else mask[..., :new, :context].bool().reshape(new, context)


def _restore(rows: list[Tensor], query: Tensor, layout: str) -> Tensor:
    if layout == "TND":
        return torch.cat(rows)
    out = torch.stack(rows)
    return (out.transpose(1, 2) if layout == "BNSD" else out).reshape(query.shape).contiguous()


@impl(LIBRARY, "npu_fused_infer_attention_score.out")
def attention_out(
    query: Tensor, key: Tensor, value: Tensor, *, workspace: Tensor | None = None, out: list[Tensor], **options: Any
) -> list[Tensor]:
    require(workspace is not None, "npu_fused_infer_attention_score.out", "the out form needs a workspace")
    out[0].copy_(attention(query, key, value, **options)[0])
    return out


@impl(LIBRARY, "_npu_fused_infer_attention_score_get_max_workspace")
def attention_workspace(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return torch.empty(4096, dtype=torch.uint8)


@impl(LIBRARY, "_npu_fused_infer_attention_score_infer_output")
def attention_output(query: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty(1)


@impl(LIBRARY, "npu_fusion_attention_v3")
def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    *_: Any,
    **other: Any,
) -> tuple[Tensor, ...]:
    name = "npu_fusion_attention"
    require(input_layout == "BNSD" and prefix is None and actual_seq_qlen is None, name, "only BNSD is simulated")
    _check_mask(name, atten_mask, sparse_mode)
    repeat = query.shape[1] // key.shape[1]
    k, v = key.float().repeat_interleave(repeat, 1), value.float().repeat_interleave(repeat, 1)
    scores = query.float() @ k.transpose(-1, -2) * scale
    new, context = scores.shape[-2:]
    if sparse_mode in (_LEFT_UP, _RIGHT_DOWN):
        shift = context - new if sparse_mode == _RIGHT_DOWN else 0
        scores = scores.masked_fill(torch.ones(new, context, dtype=torch.bool).triu(1 + shift), -math.inf)
    elif atten_mask is not None:
        scores = scores.masked_fill(atten_mask.bool(), -math.inf)
    empty = torch.empty(0)
    return ((scores.softmax(-1) @ v).to(query.dtype), *[empty] * 5)
