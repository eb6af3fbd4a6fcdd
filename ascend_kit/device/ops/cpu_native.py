"""The op table on a CPU with a C++ compiler.

Where the processor has the instructions (native.packs), weights are packed once at load and every product, of one row
or of thousands, reads them in that form; attention reads the paged cache where it lies. Elsewhere, and for widths that
are no multiple of 64, decode-sized products run in kernels of our own and large ones in torch. A decode step consists
of kernel calls alone: while a `Recording` is open every call is also noted, so that a step over fixed buffers can be
repeated as a bare list of calls, the CPU's counterpart of a captured graph.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ascend_kit.device.ops import cpu
from ascend_kit.device.ops.cpu import *  # noqa: F403 - the rest of this table
from ascend_kit.device.ops.native import library, packs
from ascend_kit.device.ops.reference import SCALE_BYTES, attend_mixed, widened
from ascend_kit.device.ops.table import AttentionMeta

DTYPES = {torch.bfloat16: 0, torch.float32: 1}
RECORDS = True
MAX_RECORDED = 64  # largest decode batch that is recorded; beyond it the Python in between no longer matters
# Rows up to which reading each unpacked weight once beats torch's blocked product (one core of Zen 4: 1.2x at 16 rows,
# 0.8x at 32).
MAX_UNPACKED_ROWS = 16
PANEL = 64  # columns of a packed panel, as in native/tiles.h


def validate(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """Limits of this back-end that a model breaks."""
    if dtype not in DTYPES:
        return [f"the CPU kernels take bf16 and fp32, not {dtype}; set precision, or operator_fusion: false"]
    return []


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in reference; rows may be strided, heads within a row may not."""
    y = empty(*x.shape, dtype=x.dtype)
    heads, size = (x.shape[1], x.shape[2]) if x.dim() == 3 else (1, x.shape[1])
    if weight.numel() != size:
        raise ValueError(f"a norm of {weight.numel()} weights over rows of {size} numbers")
    _over_rows("ak_rms_norm", x, None, weight, y, None, x.shape[0], heads, size, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As in reference, in one pass."""
    y, total = empty(*x.shape, dtype=x.dtype), empty(*x.shape, dtype=x.dtype)
    _over_rows("ak_rms_norm", x, residual, weight, y, total, x.shape[0], 1, x.shape[1], eps)
    return y, total


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference, in place."""
    tokens, heads, size = q_TNH.shape
    _over_rows("ak_rotary", q_TNH, k_TKH, k_TKH.stride(0), cos_TH, sin_TH, tokens, heads, k_TKH.shape[1], size)
    return q_TNH, k_TKH


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """As in reference."""
    tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out = empty(tokens, width, dtype=gate_up_T2F.dtype)
    call("ak_swiglu", DTYPES[out.dtype], gate_up_T2F, out, tokens, width, _threads())
    return out


def store_kv(
    k_TKH: Tensor, v_TKH: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, are_codes: bool = False
) -> None:
    """As in reference; rows of k and v may be strided."""
    if k_cache.dtype == torch.int8:
        tokens, heads, size = k_TKH.shape
        block = k_cache.shape[1] // (heads * (size + SCALE_BYTES))
        for x, cache in ((k_TKH, k_cache), (v_TKH, v_cache)):
            _over_rows("ak_store_int8", x, cache, slot_mapping, tokens, heads, size, block, int(are_codes))
        return
    k, v, width = (k_TKH, k_TKH.stride(0)), (v_TKH, v_TKH.stride(0)), k_TKH.element_size()
    tokens, row_bytes = k_TKH.shape[0], k_TKH[0].numel() * width
    call("ak_store", *k, *v, k_cache, v_cache, slot_mapping, tokens, row_bytes, width, _threads())


def paged_attention(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """As in reference; the cache is read where it lies, except by prompts that do not fit the tiles."""
    if meta.is_decode:
        return _decode(q_TNH, k_cache, v_cache, meta, scale)
    if k_cache.dtype == torch.int8:  # a prompt computes far more than its context's numbers take to widen
        k_cache, v_cache, meta = widened(q_TNH, k_cache, v_cache, meta)
    if not (packs() and q_TNH.dtype == torch.bfloat16 and q_TNH.shape[2] % PANEL == 0):
        return attend_mixed(q_TNH, k_cache, v_cache, meta, scale, _decode)
    out = empty(*q_TNH.shape, dtype=q_TNH.dtype)
    first = next(i for i, end in enumerate(meta.cu_seqlens_q) if end != i + 1)  # decoding sequences come first
    table, lens = meta.block_table, meta.context_lens_t
    if first:
        decoding = replace(meta, block_table=table[:first], context_lens_t=lens[:first])
        _decode(q_TNH[:first], k_cache, v_cache, decoding, scale, out[:first])
    starts = torch.tensor([first, *meta.cu_seqlens_q[first:]], dtype=torch.int32)
    _, heads, size = q_TNH.shape
    cache = (k_cache.shape[2], size, meta.block_size)
    call("ak_attend_prompts", q_TNH, q_TNH.stride(0), k_cache, v_cache, table[first:], table.stride(0), starts,
         lens[first:], out, len(starts) - 1, heads, *cache, scale, _threads())  # fmt: skip
    return out


def _decode(
    q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, out: Tensor | None = None
) -> Tensor:
    """Attention of one new token a sequence."""
    batch, heads, size = q_TNH.shape
    out = empty(*q_TNH.shape, dtype=q_TNH.dtype) if out is None else out
    is_int8 = k_cache.dtype == torch.int8
    kv_heads = k_cache.shape[1] // (meta.block_size * (size + SCALE_BYTES)) if is_int8 else k_cache.shape[2]
    cache = (kv_heads, size, meta.block_size)
    name = "ak_attend_int8" if is_int8 else "ak_attend"
    table = (meta.block_table, meta.block_table.stride(0))
    _over_rows(name, q_TNH, k_cache, v_cache, *table, meta.context_lens_t, out, batch, heads, *cache, scale)
    return out


def pack_linear(weight: Tensor) -> Tensor:
    """[out, in] -> [out/64, in/p, 64, p] with p numbers in 4 bytes; as it is where that form is not taken."""
    rows, width = weight.shape
    group = 4 // weight.element_size()
    if not packs() or rows % PANEL or width % group or weight.dtype not in (*DTYPES, torch.int8):
        return weight.contiguous()
    packed = torch.empty(rows // PANEL, width // group, PANEL, group, dtype=weight.dtype)
    call("ak_pack", weight.contiguous(), packed, rows, width, weight.element_size(), _threads())
    return packed


pack_int8 = pack_int8_weight = pack_linear


def _is_packed(weight: Tensor) -> bool:
    return weight.dim() == 4


def _width_out(weight: Tensor) -> int:
    return weight.shape[0] * PANEL if _is_packed(weight) else weight.shape[0]


def _width_in(weight: Tensor) -> int:
    return weight.shape[1] * weight.shape[3] if _is_packed(weight) else weight.shape[1]


def _check_product(width: int, weight: Tensor, *per_output: Tensor | None) -> None:
    """ValueError unless a product is of matching sizes: a kernel would read beyond the smaller one."""
    if width != _width_in(weight):
        raise ValueError(f"a product of rows of {width} numbers with a weight that takes {_width_in(weight)}")
    for tensor in per_output:
        if tensor is not None and tensor.numel() != _width_out(weight):
            raise ValueError(f"{tensor.numel()} biases or scales for a weight of {_width_out(weight)} outputs")


def _left_to_torch(rows: int, weight: Tensor) -> bool:
    """Whether torch has the faster product; a recording takes kernels only."""
    return not _is_packed(weight) and rows > MAX_UNPACKED_ROWS and Recording.active is None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As in reference."""
    rows, width = x.shape
    _check_product(width, weight, bias)
    if _left_to_torch(rows, weight):
        return torch.nn.functional.linear(x, weight, bias)
    out = empty(rows, _width_out(weight), dtype=x.dtype)
    name = "ak_packed_linear" if _is_packed(weight) else "ak_linear"
    _over_rows(name, x, weight, bias, out, *out.shape, width)
    return out


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference."""
    x = x.contiguous()
    codes, scale = empty(*x.shape, dtype=torch.int8), empty(x.shape[0], dtype=torch.float32)
    call("ak_quantize", DTYPES[x.dtype], x, codes, scale, x.shape[0], x.shape[1], _threads())
    return codes, scale


def int8_matmul(
    xq: Tensor, act_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As in reference."""
    rows, width = xq.shape
    _check_product(width, weight, weight_scale, bias)
    if _left_to_torch(rows, weight):
        return cpu.int8_matmul(xq, act_scale, weight.t(), weight_scale, bias, out_dtype)
    out = empty(rows, _width_out(weight), dtype=out_dtype)
    name = "ak_packed_linear_w8a8" if _is_packed(weight) else "ak_linear_w8a8"
    call(name, DTYPES[out_dtype], xq, act_scale, weight, weight_scale, bias, out, *out.shape, width, _threads())
    return out


def int8_weight_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As in reference."""
    rows, width = x.shape
    _check_product(width, weight, weight_scale, bias)
    if _left_to_torch(rows, weight):
        return cpu.int8_weight_matmul(x, weight, weight_scale, bias)
    out = empty(rows, _width_out(weight), dtype=x.dtype)
    name = "ak_packed_linear_w8a16" if _is_packed(weight) else "ak_linear_w8a16"
    _over_rows(name, x, weight, weight_scale, bias, out, *out.shape, width)
    return out


def pack_int4(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """uint8 [ceil(out/64), in/2, 64] of two codes each, columns in the kernel's order, scale and zero [groups, out]; as
    in reference where that form is not taken."""
    rows, width = codes.shape
    if not packs() or width // scale.shape[1] % 2:
        return cpu.pack_int4(codes, scale, zero)
    at = torch.arange(PANEL)
    columns = at % 16 // 4 * 16 + at // 16 * 4 + at % 4
    pairs = cpu.pack_int4(torch.nn.functional.pad(codes, (0, 0, 0, -rows % PANEL)), scale, zero)[0]
    packed = pairs.view(-1, PANEL, width // 2).index_select(1, columns).transpose(1, 2).contiguous()
    return packed, scale.t().contiguous(), None if zero is None else zero.t().contiguous()


def int4_weight_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """As in reference; sums of a group are scaled as a whole where the weight is packed."""
    rows, width = x.shape
    is_packed = weight.dim() == 3
    groups, outputs = scale.shape if is_packed else scale.shape[::-1]
    takes, panels = 2 * weight.shape[1], -(-outputs // PANEL) if is_packed else outputs
    if width != takes or len(weight) != panels or width % groups or (bias is not None and bias.numel() != outputs):
        raise ValueError(f"rows of {width} numbers times {outputs} outputs of {takes} in {groups} groups do not fit")
    if not is_packed and (width // groups % 2 or (rows > MAX_UNPACKED_ROWS and Recording.active is None)):
        return cpu.int4_weight_matmul(x, weight, scale, zero, bias)
    out = empty(rows, outputs, dtype=x.dtype)
    name = "ak_packed_linear_w4a16" if is_packed else "ak_linear_w4a16"
    _over_rows(name, x, weight, scale, zero, bias, out, rows, outputs, width, width // groups)
    return out


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """As in reference; the table may be a packed weight, which a tied head shares with the embedding."""
    name = "ak_gather_packed" if _is_packed(table) else "ak_gather"
    out = empty(ids.shape[0], _width_in(table), dtype=table.dtype)
    call(name, table, ids, out, ids.shape[0], out.shape[1] * table.element_size())
    return out


def argmax(logits: Tensor) -> Tensor:
    """As in reference; NaN is never the largest."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    _over_rows("ak_argmax", logits, out, *logits.shape)
    return out


def _over_rows(name: str, x: Tensor, *arguments: Any) -> None:
    """A kernel over the rows of x, which may be strided, in as many threads as torch uses."""
    call(name, DTYPES[x.dtype], x, x.stride(0), *arguments, _threads())


def _threads() -> int:
    return torch.get_num_threads()


# --- calls of kernels -------------------------------------------------------------------------------------------------


def call(name: str, *arguments: Any) -> None:
    """Run one kernel; tensors are passed as addresses and must stay alive while a recording holds them."""
    function = getattr(library(), name)
    addresses = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    if Recording.active is not None:
        Recording.active.note(function, addresses, arguments)
    _run(function, addresses)


def _run(function: Any, addresses: tuple) -> None:
    """Call it; under a profiler by its name, which torch would not see."""
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.autograd.profiler.record_function(getattr(function, "__name__", "operator")):
            function(*addresses)
    else:
        function(*addresses)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A result of a kernel; from the arena of the open recording, if there is one."""
    if Recording.active is None:
        return torch.empty(shape, dtype=dtype)
    return Recording.active.arena.empty(shape, dtype)


class Arena:
    """Memory that all recordings of one model share: only one of their steps runs at a time."""

    CHUNK_BYTES = 16 << 20

    def __init__(self) -> None:
        self.chunks: list[torch.Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        """Give everything out again from the start."""
        self.chunk, self.used = 0, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        while self.chunk < len(self.chunks) and self.used + size > self.chunks[self.chunk].numel():
            self.chunk, self.used = self.chunk + 1, 0
        if self.chunk == len(self.chunks):
            self.chunks.append(torch.empty(max(size, self.CHUNK_BYTES), dtype=torch.uint8))
        piece = self.chunks[self.chunk][self.used : self.used + size]
        self.used += -(-size // 64) * 64
        return piece.view(dtype).view(shape)


class Recording:
    """The kernel calls of one step over fixed buffers, to be repeated without the Python in between."""

    active: Recording | None = None

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.calls: list[tuple[Any, tuple]] = []
        self.kept: list[Any] = []  # keeps buffers alive: the calls hold bare addresses

    def __enter__(self) -> Recording:
        self.arena.rewind()
        Recording.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Recording.active = None

    def note(self, function: Any, addresses: tuple, arguments: Any) -> None:
        self.calls.append((function, addresses))
        self.kept.append(arguments)

    def replay(self) -> None:
        if torch.autograd.profiler._is_profiler_enabled:
            for function, addresses in self.calls:
                _run(function, addresses)
            return
        for function, addresses in self.calls:
            function(*addresses)
