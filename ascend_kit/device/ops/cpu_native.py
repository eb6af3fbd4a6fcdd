"""The op table on a CPU with a C++ compiler: decode-sized work in kernels of our own, large products in torch.

A decode step here consists of kernel calls alone, so that it can be recorded and repeated (see native.Recording).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_kit.device.ops import AttentionMeta, cpu
from ascend_kit.device.ops.cpu import HOST_LENGTHS, MERGED_QKV, make_mask, pack_linear  # noqa: F401 - part of this table
from ascend_kit.device.ops.native import DTYPES, call

RECORDS = True
# Rows up to which reading each weight once beats torch's blocked product (one core of Zen 4: 1.2x at 16 rows, 0.8x at
# 32); also the largest decode batch that is recorded.
MAX_ROWS = 16


def validate(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """Limits of this back-end that a model breaks."""
    if dtype not in DTYPES:
        return [f"the CPU kernels take bf16 and fp32, not {dtype}; set precision, or operator_fusion: false"]
    return []


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in reference; rows may be strided, heads within a row may not."""
    y = torch.empty(x.shape, dtype=x.dtype)
    heads, size = (x.shape[1], x.shape[2]) if x.dim() == 3 else (1, x.shape[1])
    call(
        "ak_rms_norm", DTYPES[x.dtype], x, x.stride(0), None, weight, y, None, x.shape[0], heads, size, eps, _threads()
    )
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As in reference, in one pass."""
    y, total = torch.empty_like(x), torch.empty_like(x)
    call(
        "ak_rms_norm",
        DTYPES[x.dtype],
        x,
        x.stride(0),
        residual,
        weight,
        y,
        total,
        x.shape[0],
        1,
        x.shape[1],
        eps,
        _threads(),
    )
    return y, total


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference, in place."""
    tokens, heads, size = q_TNH.shape
    call(
        "ak_rotary",
        DTYPES[q_TNH.dtype],
        q_TNH,
        q_TNH.stride(0),
        k_TKH,
        k_TKH.stride(0),
        cos_TH,
        sin_TH,
        tokens,
        heads,
        k_TKH.shape[1],
        size,
        _threads(),
    )
    return q_TNH, k_TKH


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """As in reference."""
    tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up_T2F.dtype)
    call("ak_swiglu", DTYPES[out.dtype], gate_up_T2F, out, tokens, width, _threads())
    return out


def store_kv(k_TKH: Tensor, v_TKH: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """As in reference; rows of k and v may be strided."""
    row_bytes = k_TKH[0].numel() * k_TKH.element_size()
    call(
        "ak_store",
        k_TKH,
        k_TKH.stride(0),
        v_TKH,
        v_TKH.stride(0),
        k_cache,
        v_cache,
        slot_mapping,
        k_TKH.shape[0],
        row_bytes,
        k_TKH.element_size(),
    )


def paged_attention(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """As in reference; sequences with one new token read the cache where it lies, prompts go through torch."""
    if not meta.is_decode:
        return cpu.attend_mixed(q_TNH, k_cache, v_cache, meta, scale, decode)
    return decode(q_TNH, k_cache, v_cache, meta, scale)


def decode(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """Attention of one new token a sequence."""
    batch, heads, size = q_TNH.shape
    out = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
    call(
        "ak_attend",
        DTYPES[out.dtype],
        q_TNH,
        q_TNH.stride(0),
        k_cache,
        v_cache,
        meta.block_table,
        meta.block_table.stride(0),
        meta.context_lens_t,
        out,
        batch,
        heads,
        k_cache.shape[2],
        size,
        meta.block_size,
        scale,
        _threads(),
    )
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As in reference."""
    rows, width = x.shape
    if rows > MAX_ROWS:
        return torch.nn.functional.linear(x, weight, bias)
    out = torch.empty(rows, weight.shape[0], dtype=x.dtype)
    call("ak_linear", DTYPES[x.dtype], x, x.stride(0), weight, bias, out, rows, weight.shape[0], width, _threads())
    return out


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference."""
    x = x.contiguous()
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], dtype=torch.float32)
    call("ak_quantize", DTYPES[x.dtype], x, codes, scale, x.shape[0], x.shape[1], _threads())
    return codes, scale


def pack_int8(weight: Tensor) -> Tensor:
    """int8 [out, in] as it is: the kernel streams its rows."""
    return weight.contiguous()


def int8_matmul(
    xq: Tensor, act_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As in reference."""
    rows, width = xq.shape
    if rows > MAX_ROWS:
        return cpu.int8_matmul(xq, act_scale, weight.t(), weight_scale, bias, out_dtype)
    out = torch.empty(rows, weight.shape[0], dtype=out_dtype)
    call(
        "ak_linear_w8a8",
        DTYPES[out_dtype],
        xq,
        act_scale,
        weight,
        weight_scale,
        bias,
        out,
        rows,
        weight.shape[0],
        width,
        _threads(),
    )
    return out


def int8_weight_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As in reference."""
    rows, width = x.shape
    if rows > MAX_ROWS:
        return cpu.int8_weight_matmul(x, weight, weight_scale, bias)
    out = torch.empty(rows, weight.shape[0], dtype=x.dtype)
    call(
        "ak_linear_w8a16",
        DTYPES[x.dtype],
        x,
        x.stride(0),
        weight,
        weight_scale,
        bias,
        out,
        rows,
        weight.shape[0],
        width,
        _threads(),
    )
    return out


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """As in reference."""
    out = torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype)
    call("ak_gather", table, ids, out, ids.shape[0], table.shape[1] * table.element_size())
    return out


def _threads() -> int:
    return torch.get_num_threads()
