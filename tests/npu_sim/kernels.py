"""CPU kernels of torch_npu's fused operators, written from their documents, and refusing what those exclude.

Limits are those of Atlas A2 in `torch_npu/_op_plugin_docs.py` of the wheel (2.13.0), and, for the paged TND
form of attention, what vllm-ascend and cann-recipes-infer pass. Two kinds of check: `@checks` looks at
layout, dtypes, shapes and host lists and runs during capture as well; the kernels look at values (block
tables, slots), which a device would read out of bounds without a word.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, impl

from npu_sim.traits import checks

_LIBRARY = Library("npu", "IMPL", "CPU")
_HALF = (torch.float16, torch.bfloat16)
_FLOAT = (*_HALF, torch.float32)
_MASK = 2048
_NO_MASK, _ALL, _LEFT_UP, _RIGHT_DOWN, _BAND = range(5)  # sparse_mode


class LimitError(RuntimeError):
    """A documented limit of an operator was exceeded."""


def require(condition: bool, operator: str, what: str) -> None:
    """Raise LimitError unless `condition` holds."""
    if not condition:
        raise LimitError(f"{operator}: {what}")


def _contiguous(operator: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.is_contiguous(),
            operator,
            f"{name} must be contiguous, is {tuple(tensor.shape) if tensor is not None else ()} with strides "
            f"{tensor.stride() if tensor is not None else ()}",
        )


def _dtype(operator: str, allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.dtype in allowed,
            operator,
            f"{name} is {tensor.dtype if tensor is not None else None}, allowed {allowed}",
        )


# Norms and activation.


@checks("npu::npu_rms_norm")
def _check_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    _dtype("npu_rms_norm", _FLOAT, input=input)
    _contiguous("npu_rms_norm", input=input, gamma=gamma)
    require(
        gamma.dtype in (input.dtype, torch.float32),
        "npu_rms_norm",
        f"gamma is {gamma.dtype}, x {input.dtype}",
    )
    require(
        gamma.shape == input.shape[-gamma.dim() :],
        "npu_rms_norm",
        f"gamma {tuple(gamma.shape)} does not fit x",
    )


@impl(_LIBRARY, "npu_rms_norm")
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _check_rms_norm(input, gamma)
    wide = input.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


@checks("npu::npu_add_rms_norm")
def _check_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    _dtype("npu_add_rms_norm", _FLOAT, x1=x1)
    _dtype("npu_add_rms_norm", (x1.dtype,), x2=x2, gamma=gamma)
    _contiguous("npu_add_rms_norm", x1=x1, x2=x2, gamma=gamma)
    require(x1.shape == x2.shape, "npu_add_rms_norm", f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ")


@impl(_LIBRARY, "npu_add_rms_norm")
def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _check_add_rms_norm(x1, x2, gamma)
    total = x1 + x2
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


@checks("npu::npu_swiglu")
def _check_swiglu(input: Tensor, dim: int = -1) -> None:
    _dtype("npu_swiglu", _FLOAT, input=input)
    _contiguous("npu_swiglu", input=input)
    require(input.shape[dim] % 2 == 0, "npu_swiglu", f"dimension {dim} of {tuple(input.shape)} is odd")


@impl(_LIBRARY, "npu_swiglu")
def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    _check_swiglu(input, dim)
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


# Rotary position embedding.


@checks("npu::npu_apply_rotary_pos_emb")
def _check_apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> None:
    name = "npu_apply_rotary_pos_emb"
    require(
        layout in ("BSND", "TND") and rotary_mode == "half",
        name,
        f"layout {layout}, mode {rotary_mode} on A2",
    )
    require(
        all(t.dim() == len(layout) for t in (query, key, cos, sin)),
        name,
        f"{layout} wants {len(layout)} dimensions",
    )
    require(
        query.shape[-1] in (64, 128) and key.shape[-1] == query.shape[-1],
        name,
        f"head size {query.shape[-1]}, allowed 64 and 128",
    )
    require(
        cos.shape[-1] == sin.shape[-1] == query.shape[-1], name, "cos and sin must have the full head width"
    )
    _dtype(name, _FLOAT, query=query)
    _dtype(name, (query.dtype,), key=key, cos=cos, sin=sin)
    lead = len(layout) - 2
    require(
        all(t.shape[:lead] == query.shape[:lead] for t in (key, cos, sin)), name, "leading dimensions differ"
    )
    require(cos.shape[-2] == sin.shape[-2] == 1, name, "cos and sin have one head")
    require(query.numel() > 0, name, "empty tensors are refused")
    _contiguous(name, query=query, key=key, cos=cos, sin=sin)


@impl(_LIBRARY, "npu_apply_rotary_pos_emb")
def apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """In place, as the real operator, although its schema does not say so."""
    _check_apply_rotary(query, key, cos, sin, layout, rotary_mode)
    for tensor in (query, key):
        tensor.copy_(_rotate(tensor, cos, sin))
    return query, key


@checks("npu::npu_rotary_mul")
def _check_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Any = None
) -> None:
    name = "npu_rotary_mul"
    require(rotary_mode == "half" and rotate is None, name, f"mode {rotary_mode} is not simulated")
    require(
        input.dim() == 4 and input.shape[-1] % 2 == 0 and input.shape[-1] < 896,
        name,
        f"{tuple(input.shape)}: 4 dimensions and an even head size below 896 are wanted",
    )
    require(
        input.shape[0] < 1000 and input.shape[2] < 1000,
        name,
        f"{tuple(input.shape)}: B and N stay below 1000",
    )
    _dtype(name, _FLOAT, input=input)
    _dtype(name, (input.dtype,), r1=r1, r2=r2)
    _contiguous(name, input=input, r1=r1, r2=r2)


@impl(_LIBRARY, "npu_rotary_mul")
def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Any = None
) -> Tensor:
    _check_rotary_mul(input, r1, r2, rotary_mode, rotate)
    return _rotate(input, r1, r2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# KV cache.


@checks("npu::npu_scatter_pa_kv_cache")
def _check_scatter_pa(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Any = None,
    compress_seq_offsets: Any = None,
    seq_lens: Any = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    name = "npu_scatter_pa_kv_cache"
    require(
        cache_mode in (None, "Norm"),
        name,
        f"cache_mode {cache_mode!r} means FRACTAL_NZ caches; these are plain",
    )
    _contiguous(
        name, key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping
    )
    _dtype(name, (key.dtype,), value=value, key_cache=key_cache, value_cache=value_cache)
    _dtype(name, (torch.int32, torch.int64), slot_mapping=slot_mapping)
    require(key.dim() == 3 and key.shape[:2] == value.shape[:2], name, "key and value are [T, heads, size]")
    require(
        key_cache.dim() == 4 and key_cache.shape[2:] == key.shape[1:],
        name,
        f"key {tuple(key.shape)} does not fit the cache {tuple(key_cache.shape)}",
    )
    require(
        slot_mapping.shape == key.shape[:1],
        name,
        f"{tuple(slot_mapping.shape)} slots for {key.shape[0]} tokens",
    )
    row_bytes = key.shape[1] * key.shape[2] * key.element_size()
    require(row_bytes % 32 == 0, name, f"a token's row of {row_bytes} bytes is no multiple of 32")


@impl(_LIBRARY, "npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Any = None,
    compress_seq_offsets: Any = None,
    seq_lens: Any = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    _check_scatter_pa(key, value, key_cache, value_cache, slot_mapping, cache_mode=cache_mode)
    slots = slot_mapping.long()
    total = key_cache.shape[0] * key_cache.shape[1]
    _check_rows("npu_scatter_pa_kv_cache", "slot", slots, total)
    key_cache.view(total, *key_cache.shape[2:])[slots] = key
    value_cache.view(total, *value_cache.shape[2:])[slots] = value


@checks("npu::npu_scatter_nd_update_")
def _check_scatter_nd(input: Tensor, indices: Tensor, updates: Tensor) -> None:
    name = "npu_scatter_nd_update_"
    _dtype(name, (*_FLOAT, torch.bool, torch.int64, torch.int8), input=input)
    _dtype(name, (input.dtype,), updates=updates)
    _dtype(name, (torch.int32, torch.int64), indices=indices)
    require(indices.dim() >= 2 and indices.shape[-1] <= input.dim(), name, f"indices {tuple(indices.shape)}")
    wanted = (*indices.shape[:-1], *input.shape[indices.shape[-1] :])
    require(tuple(updates.shape) == wanted, name, f"updates {tuple(updates.shape)}, wanted {wanted}")


@impl(_LIBRARY, "npu_scatter_nd_update_")
def scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    _check_scatter_nd(input, indices, updates)
    require(indices.shape[-1] == 1, "npu_scatter_nd_update_", "only row indices are simulated")
    rows = indices.flatten().long()
    _check_rows("npu_scatter_nd_update_", "index", rows, input.shape[0])
    input[rows] = updates.reshape(rows.numel(), *input.shape[1:])
    return input


def _check_rows(operator: str, what: str, rows: Tensor, total: int) -> None:
    if rows.numel() == 0:
        return
    low, high = int(rows.min()), int(rows.max())
    require(
        low >= 0 and high < total, operator, f"{what} {low if low < 0 else high} is outside 0..{total - 1}"
    )
    require(rows.unique().numel() == rows.numel(), operator, f"a {what} occurs twice: {rows.tolist()[:32]}")


# Attention.


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
    _dtype(name, _HALF, query=query)
    _dtype(name, (query.dtype,), key=key, value=value)
    _contiguous(name, query=query, key=key, value=value, atten_mask=atten_mask, block_table=block_table)
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
    _dtype(name, (torch.bool, torch.int8, torch.uint8), atten_mask=mask)
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
    _dtype(name, (torch.int32,), block_table=table)
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
    require(
        table.shape[0] >= len(kv_lens),
        name,
        f"{table.shape[0]} block-table rows for {len(kv_lens)} KV lengths",
    )
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
    require(head == 128, name, f"head size {head} under TND, which takes 128")
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
        require(
            kv_lens[-1] == key.shape[0],
            name,
            "without pages KV lengths are cumulative and end at the key's rows",
        )
    else:
        short = [(b - a, n) for a, b, n in zip(starts, ends, kv_lens, strict=True) if n < b - a]
        require(not short, name, f"a sequence has more new tokens than its KV length: {short}")


@impl(_LIBRARY, "npu_fused_infer_attention_score")
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
        return torch.ones(new, context, dtype=torch.bool).triu(
            1 + (context - new if mode == _RIGHT_DOWN else 0)
        )
    return None if mask is None else mask[..., :new, :context].bool().reshape(new, context)


def _restore(rows: list[Tensor], query: Tensor, layout: str) -> Tensor:
    if layout == "TND":
        return torch.cat(rows)
    out = torch.stack(rows)
    return (out.transpose(1, 2) if layout == "BNSD" else out).reshape(query.shape).contiguous()


@impl(_LIBRARY, "npu_fused_infer_attention_score.out")
def attention_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    workspace: Tensor | None = None,
    out: list[Tensor],
    **options: Any,
) -> list[Tensor]:
    require(workspace is not None, "npu_fused_infer_attention_score.out", "the out form needs a workspace")
    out[0].copy_(attention(query, key, value, **options)[0])
    return out


@impl(_LIBRARY, "_npu_fused_infer_attention_score_get_max_workspace")
def attention_workspace(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return torch.empty(4096, dtype=torch.uint8)


@impl(_LIBRARY, "_npu_fused_infer_attention_score_infer_output")
def attention_output(query: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty(1)


# Quantised linear.


@checks("npu::npu_dynamic_quant")
def _check_dynamic_quant(input: Tensor, **options: Any) -> None:
    _dtype("npu_dynamic_quant", _HALF, input=input)
    require(input.dim() > 1, "npu_dynamic_quant", f"x of {tuple(input.shape)} needs two dimensions")


@impl(_LIBRARY, "npu_dynamic_quant")
def dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Any = None,
    dst_type: Any = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_dynamic_quant(input)
    require(
        group_index is None and quant_mode == "pertoken", "npu_dynamic_quant", "only per token is simulated"
    )
    wide = input.float() * (1.0 if smooth_scales is None else smooth_scales.float())
    scale = wide.abs().amax(-1) / 127.0
    codes = torch.round(wide / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).clamp(-128, 127)
    return codes.to(torch.int8), scale


_OUTPUTS = {torch.float16: 5, torch.bfloat16: 15, torch.int32: 3, torch.int8: 1}  # c10::ScalarType


@checks("npu::npu_quant_matmul")
def _check_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    offset: Any = None,
    **other: Any,
) -> None:
    name = "npu_quant_matmul"
    _dtype(name, (torch.int8,), x1=x1, x2=x2)
    require(x1.shape[-1] == x2.shape[-2], name, f"{tuple(x1.shape)} times {tuple(x2.shape)}")
    require(
        x1.shape[-1] <= 65535 and x2.shape[-1] <= 65535,
        name,
        f"a last dimension above 65535: {tuple(x2.shape)}",
    )
    require(scale.dim() == 1 and scale.shape[0] in (1, x2.shape[-1]), name, f"scale {tuple(scale.shape)}")
    _contiguous(name, x1=x1, scale=scale, pertoken_scale=pertoken_scale)
    out = (
        next((k for k, v in _OUTPUTS.items() if v == int(output_dtype)), None)
        if output_dtype is not None
        else torch.int8
    )
    require(out is not None, name, f"output_dtype {output_dtype}")
    if pertoken_scale is not None:
        _dtype(name, (torch.float32,), pertoken_scale=pertoken_scale)
        require(
            tuple(pertoken_scale.shape) == tuple(x1.shape[:1]),
            name,
            f"pertoken_scale {tuple(pertoken_scale.shape)}",
        )
        allowed = {torch.bfloat16: (torch.float32, torch.bfloat16), torch.float16: (torch.float32,)}
        require(out in allowed, name, f"output {out} with pertoken_scale; None means int8")
        _dtype(name, allowed[out], scale=scale)
        _dtype(name, (torch.int32, torch.float32, out), bias=bias)
    require(offset is None, name, "offset is not simulated")


@impl(_LIBRARY, "npu_quant_matmul")
def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Any = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    **other: Any,
) -> Tensor:
    _check_quant_matmul(x1, x2, scale, pertoken_scale=pertoken_scale, bias=bias, output_dtype=output_dtype)
    result = (x1.double() @ x2.double()).float() * scale.float()
    if pertoken_scale is not None:
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None:
        result = result + bias.float()
    codes = {code: dtype for dtype, code in _OUTPUTS.items()}
    return result.to(codes[int(output_dtype)] if output_dtype is not None else torch.int8)


@checks("npu::npu_weight_quant_batchmatmul")
def _check_weight_quant(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    **other: Any,
) -> None:
    name = "npu_weight_quant_batchmatmul"
    _dtype(name, _HALF, x=x)
    _dtype(name, (torch.int8,), weight=weight)
    _dtype(name, (x.dtype,), antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    _dtype(name, (torch.float32 if x.dtype == torch.bfloat16 else torch.float16,), bias=bias)
    require(
        x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0],
        name,
        f"{x.shape} times {weight.shape}",
    )
    require(tuple(antiquant_scale.shape) == (weight.shape[1],), name, f"scale {tuple(antiquant_scale.shape)}")
    require(antiquant_group_size == 0 and quant_scale is None, name, "only per channel is simulated")


@impl(_LIBRARY, "npu_weight_quant_batchmatmul")
def weight_quant_matmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    **other: Any,
) -> Tensor:
    _check_weight_quant(x, weight, antiquant_scale, antiquant_offset, quant_scale, quant_offset, bias)
    offset = 0.0 if antiquant_offset is None else antiquant_offset.float()
    result = x.float() @ ((weight.float() + offset) * antiquant_scale.float())
    return (result if bias is None else result + bias.float()).to(x.dtype)


# The training-side attention that torch_npu substitutes for scaled_dot_product_attention.


@impl(_LIBRARY, "npu_fusion_attention_v3")
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
    require(
        input_layout == "BNSD" and prefix is None and actual_seq_qlen is None, name, "only BNSD is simulated"
    )
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
