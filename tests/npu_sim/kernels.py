"""CPU kernels of torch_npu's fused operators, written from their documents, and refusing what those exclude.

Limits are those of Atlas A2 in `torch_npu/_op_plugin_docs.py` of the wheel (2.13.0), and, for the paged TND
form of attention, what vllm-ascend and cann-recipes-infer pass. Two kinds of check: `@checks` looks at
layout, dtypes, shapes and host lists and runs during capture as well; the kernels look at values (block
tables, slots), which a device would read out of bounds without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import impl

from npu_sim.limits import FLOAT, LIBRARY, check_contiguous, check_dtype, require
from npu_sim.traits import checks


@checks("npu::npu_rms_norm")
def _check_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    check_dtype("npu_rms_norm", FLOAT, input=input)
    check_contiguous("npu_rms_norm", input=input, gamma=gamma)
    require(gamma.dtype in (input.dtype, torch.float32), "npu_rms_norm", f"gamma is {gamma.dtype}, x {input.dtype}")
    require(gamma.shape == input.shape[-gamma.dim() :], "npu_rms_norm", f"gamma {tuple(gamma.shape)} does not fit x")


@impl(LIBRARY, "npu_rms_norm")
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _check_rms_norm(input, gamma)
    wide = input.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


@checks("npu::npu_add_rms_norm")
def _check_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    check_dtype("npu_add_rms_norm", FLOAT, x1=x1)
    check_dtype("npu_add_rms_norm", (x1.dtype,), x2=x2, gamma=gamma)
    check_contiguous("npu_add_rms_norm", x1=x1, x2=x2, gamma=gamma)
    require(x1.shape == x2.shape, "npu_add_rms_norm", f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ")


@impl(LIBRARY, "npu_add_rms_norm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    _check_add_rms_norm(x1, x2, gamma)
    total = x1 + x2
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


@checks("npu::npu_swiglu")
def _check_swiglu(input: Tensor, dim: int = -1) -> None:
    check_dtype("npu_swiglu", FLOAT, input=input)
    check_contiguous("npu_swiglu", input=input)
    require(input.shape[dim] % 2 == 0, "npu_swiglu", f"dimension {dim} of {tuple(input.shape)} is odd")


@impl(LIBRARY, "npu_swiglu")
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
    require(layout in ("BSND", "TND") and rotary_mode == "half", name, f"layout {layout}, mode {rotary_mode} on A2")
    require(
        all(t.dim() == len(layout) for t in (query, key, cos, sin)), name, f"{layout} wants {len(layout)} dimensions"
    )
    require(
        query.shape[-1] in (64, 128) and key.shape[-1] == query.shape[-1],
        name,
        f"head size {query.shape[-1]}, allowed 64 and 128",
    )
    require(cos.shape[-1] == sin.shape[-1] == query.shape[-1], name, "cos and sin must have the full head width")
    check_dtype(name, FLOAT, query=query)
    check_dtype(name, (query.dtype,), key=key, cos=cos, sin=sin)
    lead = len(layout) - 2
    require(all(t.shape[:lead] == query.shape[:lead] for t in (key, cos, sin)), name, "leading dimensions differ")
    require(cos.shape[-2] == sin.shape[-2] == 1, name, "cos and sin have one head")
    require(query.numel() > 0, name, "empty tensors are refused")
    check_contiguous(name, query=query, key=key, cos=cos, sin=sin)


@impl(LIBRARY, "npu_apply_rotary_pos_emb")
def apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """In place, as the real operator, although its schema does not say so."""
    _check_apply_rotary(query, key, cos, sin, layout, rotary_mode)
    for tensor in (query, key):
        tensor.copy_(_rotate(tensor, cos, sin))
    return query, key


@checks("npu::npu_rotary_mul")
def _check_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Any = None) -> None:
    name = "npu_rotary_mul"
    require(rotary_mode == "half" and rotate is None, name, f"mode {rotary_mode} is not simulated")
    require(
        input.dim() == 4 and input.shape[-1] % 2 == 0 and input.shape[-1] < 896,
        name,
        f"{tuple(input.shape)}: 4 dimensions and an even head size below 896 are wanted",
    )
    require(input.shape[0] < 1000 and input.shape[2] < 1000, name, f"{tuple(input.shape)}: B and N stay below 1000")
    check_dtype(name, FLOAT, input=input)
    check_dtype(name, (input.dtype,), r1=r1, r2=r2)
    check_contiguous(name, input=input, r1=r1, r2=r2)


@impl(LIBRARY, "npu_rotary_mul")
def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Any = None) -> Tensor:
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
    require(cache_mode in (None, "Norm"), name, f"cache_mode {cache_mode!r} means FRACTAL_NZ caches; these are plain")
    check_contiguous(
        name, key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping
    )
    check_dtype(name, (key.dtype,), value=value, key_cache=key_cache, value_cache=value_cache)
    check_dtype(name, (torch.int32, torch.int64), slot_mapping=slot_mapping)
    require(key.dim() == 3 and key.shape[:2] == value.shape[:2], name, "key and value are [T, heads, size]")
    require(
        key_cache.dim() == 4 and key_cache.shape[2:] == key.shape[1:],
        name,
        f"key {tuple(key.shape)} does not fit the cache {tuple(key_cache.shape)}",
    )
    require(slot_mapping.shape == key.shape[:1], name, f"{tuple(slot_mapping.shape)} slots for {key.shape[0]} tokens")
    row_bytes = key.shape[1] * key.shape[2] * key.element_size()
    require(row_bytes % 32 == 0, name, f"a token's row of {row_bytes} bytes is no multiple of 32")


@impl(LIBRARY, "npu_scatter_pa_kv_cache")
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
    check_dtype(name, (*FLOAT, torch.bool, torch.int64, torch.int8), input=input)
    check_dtype(name, (input.dtype,), updates=updates)
    check_dtype(name, (torch.int32, torch.int64), indices=indices)
    require(indices.dim() >= 2 and indices.shape[-1] <= input.dim(), name, f"indices {tuple(indices.shape)}")
    wanted = (*indices.shape[:-1], *input.shape[indices.shape[-1] :])
    require(tuple(updates.shape) == wanted, name, f"updates {tuple(updates.shape)}, wanted {wanted}")


@impl(LIBRARY, "npu_scatter_nd_update_")
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
    require(low >= 0 and high < total, operator, f"{what} {low if low < 0 else high} is outside 0..{total - 1}")
    require(rows.unique().numel() == rows.numel(), operator, f"a {what} occurs twice: {rows.tolist()[:32]}")
