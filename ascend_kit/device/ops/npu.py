"""The op table on an Ascend NPU, through torch_npu's fused kernels (schemas of 2.13.0).

Every contract below is from the operators' documents in the wheel (torch_npu/_op_plugin_docs.py) or from how
vllm-ascend and cann-recipes-infer call them. Where documents and practice leave a doubt, the documented
form is the default and the other one a switch:

    ASCEND_KIT_NPU_ROPE       bsnd (default) | tnd | rotary_mul
    ASCEND_KIT_NPU_KV_WRITE   scatter_pa (default) | nd_update
    ASCEND_KIT_NPU_WEIGHT_NZ  int8 (default) | off        FRACTAL_NZ layout of int8 weights
    ASCEND_KIT_NPU_HEAD_64    bsh (default) | tnd         attention with heads of 64; the self-test tries tnd
    ASCEND_KIT_NPU_DECODE_MASK  causal (default) | none   none reaches a kernel made for decode; the self-test times it

Attention is `npu_fused_infer_attention_score` over the paged cache for prefill, chunked prefill and decode
alike. Two layouts cover the head sizes: TND (packed tokens, one call a step) for 128, BSH for other
multiples of 16. float32 has no attention kernel; it takes plain torch, so that exact comparison with a CPU
stays possible.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ascend_kit.device.device import cann_version, import_torch_npu
from ascend_kit.device.ops import reference

# Decode is bound by reading weights, which FRACTAL_NZ does not change, and int8 weights alone are read as a transposed
# view: both stay in the plain layout.
from ascend_kit.device.ops.reference import argmax, gather_rows, linear, pack_int8_weight, pack_linear  # noqa: F401
from ascend_kit.device.ops.table import AttentionMeta

# Slices of a merged product are strided, and rope, norm and cache write want contiguous tensors. So q is a
# product of its own, and k and v come from one batched product. The int8 products have no batched form: there one
# product and one copying split are a kernel less than three products.
MERGED_QKV = False
HOST_LENGTHS = True  # attention takes lengths as host lists: a captured step needs an update at every replay

MAX_ROPE_HEADS = 76  # (Nq + Nkv) x 2560 + 2048 bytes must fit 192 KiB
MASK_SIZE = 2048
CAUSAL_BOTTOM_RIGHT, NO_MASK = 3, 0  # sparse_mode; under 3 a chunk sees its whole prefix
FRACTAL_ND, FRACTAL_NZ = 2, 29
MAX_QUANT_WIDTH = 65535
_FLOAT16 = (torch.float16, torch.bfloat16)

_SWITCHES = {
    "ASCEND_KIT_NPU_ROPE": ("bsnd", "tnd", "rotary_mul"),
    "ASCEND_KIT_NPU_KV_WRITE": ("scatter_pa", "nd_update"),
    "ASCEND_KIT_NPU_WEIGHT_NZ": ("int8", "off"),
    "ASCEND_KIT_NPU_HEAD_64": ("bsh", "tnd"),
    "ASCEND_KIT_NPU_DECODE_MASK": ("causal", "none"),
}


@cache
def _npu() -> Any:
    return import_torch_npu()


@cache
def switch(name: str) -> str:
    """Value of one of this module's environment switches; ValueError names the allowed ones."""
    allowed = _SWITCHES[name]
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}")
    return value


def validate(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """Limits of the kernels that a model (its part on one rank) breaks; empty when it can run."""
    problems = []
    if num_heads % num_kv_heads:
        problems.append(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    elif num_heads // num_kv_heads > 64:
        problems.append(f"{num_heads // num_kv_heads} query heads share a KV head; the attention kernel allows 64")
    if num_heads > 256:
        problems.append(f"{num_heads} query heads; the attention kernel allows 256")
    if dtype in _FLOAT16 and (head_dim % 16 or head_dim > 512):
        problems.append(
            f"head size {head_dim}; the attention kernel takes multiples of 16 up to 512 (precision fp32 or "
            "operator_fusion: false run it in plain torch)"
        )
    if num_kv_heads * head_dim >= 65535:
        problems.append(f"{num_kv_heads} KV heads of {head_dim} make a cache row of 65535 or more elements")
    return problems


@cache
def make_mask(device: torch.device) -> Tensor:
    """The compressed causal mask [2048, 2048] int8, 1 above the diagonal; one for all layers and steps."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu(1).to(device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in reference; weight in x's dtype."""
    return _npu().npu_rms_norm(x, weight, epsilon=eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As in reference, in one kernel that also returns the sum."""
    y, _, total = _npu().npu_add_rms_norm(x, residual, weight, epsilon=eps)
    return y, total


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """As in reference; the kernel's swish is on the first half, too."""
    return _npu().npu_swiglu(gate_up_T2F, dim=-1)


def add_rms_norm_quantize(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 codes [T, D], float32 scale [T], x + residual) of `add_rms_norm` and `quantize_per_token` in one kernel."""
    if x.dtype not in _FLOAT16:
        y, total = add_rms_norm(x, residual, weight, eps)
        return *quantize_per_token(y), total
    codes, _, total, scale, _ = _npu().npu_add_rms_norm_dynamic_quant(x, residual, weight, epsilon=eps)
    return codes, scale, total


def swiglu_quantize(gate_up_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes [T, F], float32 scale [T]) of `swiglu` and `quantize_per_token` in one kernel, for bfloat16."""
    if gate_up_T2F.dtype != torch.bfloat16:
        return quantize_per_token(swiglu(gate_up_T2F))
    # Its defaults are the swish of the second half and static scales.
    return _npu().npu_dequant_swiglu_quant(gate_up_T2F, activate_left=True, quant_mode=1)


def split_columns(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """As in reference, contiguous: slices of a single row are, those of several are copied in one kernel."""
    if x.shape[0] == 1:
        return x.split(widths, dim=-1)
    parts = [x.new_empty(x.shape[0], width) for width in widths]
    torch.split_with_sizes_copy(x, widths, 1, out=parts)
    return tuple(parts)


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference, in place where the kernel takes the heads: the arguments must not be used afterwards."""
    form = switch("ASCEND_KIT_NPU_ROPE") if _fits_rope(q_TNH, k_TKH) else "rotary_mul"
    if form == "tnd":
        cos, sin = cos_TH.unsqueeze(1), sin_TH.unsqueeze(1)
        return _npu().npu_apply_rotary_pos_emb(q_TNH, k_TKH, cos, sin, layout="TND")
    # One sequence of T tokens: the kernel asks no more than equal leading dimensions.
    q, k = q_TNH.unsqueeze(0), k_TKH.unsqueeze(0)
    cos, sin = cos_TH[None, :, None], sin_TH[None, :, None]
    if form == "bsnd":
        q, k = _npu().npu_apply_rotary_pos_emb(q, k, cos, sin, layout="BSND")
    else:
        q, k = (_npu().npu_rotary_mul(x, cos, sin) for x in (q, k))
    return q.squeeze(0), k.squeeze(0)


def _fits_rope(q_TNH: Tensor, k_TKH: Tensor) -> bool:
    """Whether the in-place kernel takes these heads: its buffer holds 76, and kernels before CANN 9 know 128 only."""
    size = q_TNH.shape[-1]
    if q_TNH.shape[1] + k_TKH.shape[1] > MAX_ROPE_HEADS:
        return False
    return size == 128 or (size == 64 and not re.match(r"[1-8]\.", cann_version()))


def store_kv(
    k_TKH: Tensor, v_TKH: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, are_codes: bool = False
) -> None:
    """As in reference, but no int8 cache. Slots must be unique and within the cache: the kernels check neither."""
    if switch("ASCEND_KIT_NPU_KV_WRITE") == "scatter_pa" and hasattr(_npu(), "npu_scatter_pa_kv_cache"):
        # "Norm" is the plain layout; the default means FRACTAL_NZ caches.
        _npu().npu_scatter_pa_kv_cache(
            k_TKH.contiguous(), v_TKH.contiguous(), k_cache, v_cache, slot_mapping, cache_mode="Norm"
        )
        return
    indices = slot_mapping.unsqueeze(1)
    for rows, target in ((k_TKH, k_cache), (v_TKH, v_cache)):
        _npu().npu_scatter_nd_update_(target.view(-1, *target.shape[2:]), indices, rows)


def prompt_attention(head_dim: int, dtype: torch.dtype) -> Literal["kernel", "plain", "one by one"]:
    """What computes a step with prompts: one kernel call, plain torch, or a call for each sequence."""
    if dtype not in _FLOAT16:
        return "plain"
    takes_packed = head_dim == 128 or (head_dim == 64 and switch("ASCEND_KIT_NPU_HEAD_64") == "tnd")
    return "kernel" if takes_packed else "one by one"


def paged_attention(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """As in reference, through the fused kernel."""
    how = prompt_attention(q_TNH.shape[-1], q_TNH.dtype)
    if how == "plain":
        return reference.paged_attention(q_TNH, k_cache, v_cache, meta, scale)
    options: dict[str, Any] = dict(num_heads=q_TNH.shape[1], scale=scale)  # a scale left out is 1.0 without a word
    if how == "kernel":
        options |= dict(input_layout="TND", actual_seq_lengths=meta.cu_seqlens_q)
        return _attend(q_TNH, k_cache, v_cache, meta, options)
    options |= dict(input_layout="BSH")
    if meta.is_decode:  # [B, 1, N*H]; one query token each, so the kernel wants no query lengths
        return _attend(q_TNH.flatten(1).unsqueeze(1), k_cache, v_cache, meta, options).view_as(q_TNH)
    rows, start = [], 0
    for index, end in enumerate(meta.cu_seqlens_q):  # unlike lengths would have to be padded: each gets its own call
        q, own = q_TNH[start:end].flatten(1).unsqueeze(0), slice(index, index + 1)  # [1, S, N*H]
        step = replace(meta, block_table=meta.block_table[own], context_lens=meta.context_lens[own])
        rows.append(_attend(q, k_cache, v_cache, step, options | dict(actual_seq_lengths=[end - start])).squeeze(0))
        start = end
    return torch.cat(rows).view_as(q_TNH)


def _attend(query: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, options: dict[str, Any]) -> Tensor:
    """One kernel call. Query lengths in `options` are cumulative under TND only.

    Lengths go as keywords: the graph update finds them by name.
    """
    blocks, size, kv_heads, head = k_cache.shape
    keys, values = (cache.view(blocks, size, kv_heads * head) for cache in (k_cache, v_cache))
    # A single query token sees every key of its sequence, so nothing is hidden from it.
    is_masked = not meta.is_decode or switch("ASCEND_KIT_NPU_DECODE_MASK") == "causal"
    mask = meta.mask if meta.mask is not None else make_mask(query.device)
    return _npu().npu_fused_infer_attention_score(
        query.contiguous(),
        keys,
        values,
        atten_mask=mask if is_masked else None,
        actual_seq_lengths_kv=meta.context_lens,
        block_table=meta.block_table,
        num_key_value_heads=kv_heads,
        sparse_mode=CAUSAL_BOTTOM_RIGHT if is_masked else NO_MASK,
        block_size=size,
        **options,
    )[0]


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference; float32, which the kernel does not take, in plain torch."""
    return _npu().npu_dynamic_quant(x) if x.dtype in _FLOAT16 else reference.quantize_per_token(x)


def pack_int8(weight: Tensor) -> Tensor:
    """[in, out] contiguous from int8 [out, in]; FRACTAL_NZ unless switched off, so never slice or view it."""
    if max(weight.shape) > MAX_QUANT_WIDTH:
        raise ValueError(
            f"an int8 weight {tuple(weight.shape)} exceeds {MAX_QUANT_WIDTH} in one dimension, the limit of "
            "npu_quant_matmul; keep this linear in bf16 (quantize_keep)"
        )
    packed = weight.t().contiguous()
    if switch("ASCEND_KIT_NPU_WEIGHT_NZ") == "off":
        return packed
    torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]
    return _npu().npu_format_cast(packed, FRACTAL_NZ)


def int8_matmul(
    xq: Tensor, act_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As in reference. The kernel writes float16 or bfloat16; float32 is computed in plain torch."""
    if out_dtype not in _FLOAT16:
        plain = _npu().npu_format_cast(weight, FRACTAL_ND)  # a cast reads the plain layout only
        total = torch.matmul(xq.float(), plain.float()) * act_scale.unsqueeze(-1) * weight_scale
        return (total if bias is None else total + bias).to(out_dtype)
    # Without output_dtype the kernel returns int8.
    return _npu().npu_quant_matmul(
        xq, weight, weight_scale, pertoken_scale=act_scale, bias=bias, output_dtype=out_dtype
    )


def int8_weight_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As in reference, with the weight dequantised inside the kernel; float32 in plain torch."""
    if x.dtype not in _FLOAT16:
        return reference.int8_weight_matmul(x, weight, weight_scale, bias)
    if bias is not None and x.dtype == torch.bfloat16:
        bias = _cast_once(bias, torch.float32)  # the kernel's bias is float32 beside bfloat16
    # The document prefers a transposed view of [out, in] for scales per output channel.
    return _npu().npu_weight_quant_batchmatmul(x, weight.t(), _cast_once(weight_scale, x.dtype), bias=bias)


def quantize_static(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """As in reference; the kernel takes scale and offset in x's dtype, and multiplies by the inverse. float32 in plain
    torch."""
    if x.dtype not in _FLOAT16:
        return reference.quantize_static(x, scale, offset)
    inverse = _cast_once(scale, x.dtype, lambda value: 1 / value)
    return _npu().npu_quantize(x, inverse, _cast_once(offset, x.dtype), torch.qint8, -1, False)


pack_int8_static = pack_int8


def int8_static_matmul(
    xq: Tensor, weight: Tensor, dequantization: Tensor, bias: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """As in reference, scaled inside the kernel, whose int32 bias is added before; float32 in plain torch."""
    if out_dtype not in _FLOAT16:
        plain = _npu().npu_format_cast(weight, FRACTAL_ND)
        return ((torch.matmul(xq.float(), plain.float()) + bias) * dequantization).to(out_dtype)
    return _npu().npu_quant_matmul(xq, weight, dequantization, bias=bias, output_dtype=out_dtype)


def pack_int4(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """int32 [in, out / 8] of eight codes each, scale and zero [groups, out] ([out] where a row is one group); as in
    reference where the kernel does not take the shape."""
    rows, width = codes.shape
    group = width // scale.shape[1]
    fits = rows % 8 == 0 and max(rows, width) <= MAX_QUANT_WIDTH and (group == width or group % 32 == 0)
    if not fits:
        return reference.pack_int4(codes, scale, zero)
    packed = _npu().npu_convert_weight_to_int4pack(codes.t().contiguous().int())
    zero = None if zero is None else zero.t().squeeze(0).contiguous()
    return packed, scale.t().squeeze(0).contiguous(), zero


def int4_weight_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """As in reference, dequantised inside the kernel, which adds an offset where we subtract a zero point; float32 in
    plain torch."""
    if weight.dtype != torch.int32:
        return reference.int4_weight_matmul(x, weight, scale, zero, bias)
    groups = 1 if scale.dim() == 1 else scale.shape[0]
    if x.dtype not in _FLOAT16:
        shifts = torch.arange(28, -1, -4, dtype=torch.int32, device=x.device)
        codes = ((weight.unsqueeze(-1) << shifts) >> 28).flatten(1)  # the lowest four bits first
        grouped = codes.reshape(groups, -1, codes.shape[1]).float()
        grouped = grouped if zero is None else grouped - zero.reshape(groups, 1, -1)
        result = x @ (grouped * scale.reshape(groups, 1, -1)).flatten(0, 1)
        return result if bias is None else result + bias
    if bias is not None and x.dtype == torch.bfloat16:
        bias = _cast_once(bias, torch.float32)
    offset = None if zero is None else _cast_once(zero, x.dtype, torch.neg)
    return _npu().npu_weight_quant_batchmatmul(
        x, weight, _cast_once(scale, x.dtype), offset, bias=bias,
        antiquant_group_size=0 if groups == 1 else x.shape[1] // groups,
    )  # fmt: skip


def _cast_once(constant: Tensor, dtype: torch.dtype, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A weight's constant, changed and in another dtype, kept with it: at every call that would be a kernel."""
    kept = getattr(constant, "_cast", None)
    if kept is None or kept.dtype != dtype or kept.device != constant.device:
        kept = constant.detach()
        kept = (change(kept) if change else kept).to(dtype)
        constant._cast = kept  # type: ignore[attr-defined]
    return kept
