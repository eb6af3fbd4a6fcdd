"""Quantised linears in one common form, whatever is on disk, and what the readers of their layouts share.

    X.weight             int8     [out, in]    of 4 bits in -8..7
    X.weight_scale       float32  [out]        of 4 bits [out, groups];  weight = X.weight * X.weight_scale
    X.weight_zero_point  float32  [out, groups]  4 bits, where there is one: (X.weight - zero point) * scale
    X.weight_g_idx       int32    [in]         4 bits: the group of each input, where groups are not of neighbours
    X.bias               as stored, if any
    X.input_scale, X.input_offset  float32 [1], static activations only:  q = round(x / scale + offset), -128..127

Everything else (fp8, transforms, 4-bit weights with 8-bit activations) is refused by name. Scales of an int8 KV cache:

    <layer>.self_attn.{k,v}_cache_scale, {k,v}_cache_offset    code = round(x / scale + offset) of keys after rotary
one number, one a head or one a channel: msModelSlim's C8 ({k,v}_proj.kv_cache_scale, kv_cache_offset) and
compressed-tensors' kv_cache_scheme ({k,v}_scale, {k,v}_zero_point) in int8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor

from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, MemoryTensor, TensorSource, check_slice
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import layer_prefix

if TYPE_CHECKING:
    from ascend_kit.checkpoint.huggingface import Checkpoint

W4A8 = (
    "4-bit weights with 8-bit activations, for which no dense operator has a documented contract on this card; "
    "quantise again as W4A16 or W8A8, or convert the float model with quantize: w4a16"
)
MSMODELSLIM = re.compile(r"(.*\.self_attn\.)([kv])_proj\.kv_cache_(scale|offset)")
COMPRESSED_TENSORS = re.compile(r"(.*\.self_attn\.)([kv])_(scale|zero_point)")
LIMIT_S = 0.2  # a name has some fifty characters: what takes longer tries the same thing again and again


# --- what a description may say ---------------------------------------------------------------------------------------


def pattern_fits(where: Path | str, pattern: str, name: str) -> bool:
    """Whether `name` begins with what `pattern` describes. CheckpointError naming `where` if it is none or hangs."""
    try:
        return regex.match(pattern, name, timeout=LIMIT_S) is not None
    except regex.error as error:
        raise CheckpointError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    except TimeoutError:
        raise CheckpointError(f"{where}: {pattern!r} did not end within {LIMIT_S} s on {name!r}") from None


def refuse_unknown(
    where: Path | str, found: Mapping[str, Any], known: Collection[str], said: str = "is not supported"
) -> None:
    """CheckpointError for a setting that is not understood; null, false, zero and empty ones say nothing."""
    for key, value in found.items():
        if key not in known and value not in (None, False, 0, "", [], {}):
            raise CheckpointError(f"{where}: {key}={value!r:.80} {said}")


# --- stored forms of tensors ------------------------------------------------------------------------------------------


class Unpacked:
    """A packed tensor presented unpacked: `unpack(block)` turns blocks of `inner`, whose packed dimension holds `pack`
    numbers an element, into blocks of this one; `turned`: the two have their dimensions the other way round."""

    def __init__(
        self,
        inner: TensorSource,
        shape: tuple[int, int],
        unpack: Callable[[Tensor], Tensor],
        *,
        packed_dim: int | None,
        turned: bool = False,
        pack: int = 8,
        dtype: torch.dtype = torch.int8,
    ) -> None:
        self.inner, self.shape, self.unpack, self.dtype, self.origin = inner, shape, unpack, dtype, inner.origin
        self.packed_dim, self.turned, self.pack = packed_dim, turned, pack

    def read(self) -> Tensor:
        return self.read_slice(0, 0, self.shape[0])

    def read_slice(self, dim: int, start: int, stop: int) -> Tensor:
        check_slice("of packed numbers", self.shape, dim, start, stop)
        inner_dim = 1 - dim if self.turned else dim
        first, last = start, stop
        if dim == self.packed_dim:
            first, last = start // self.pack, -(-stop // self.pack)
        found = self.unpack(self.inner.read_slice(inner_dim, first, last)).to(self.dtype)
        offset = start - first * self.pack if dim == self.packed_dim else 0
        found = found.narrow(dim, offset, stop - start)
        # Padding beyond the last number of the other dimension.
        return found.narrow(1 - dim, 0, self.shape[1 - dim]).contiguous()


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., n] -> int8 [..., n, 8] in 0..15, the lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.int8)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 [out, in] in -8..7 -> int32 [out, in / 8], as compressed-tensors packs them."""
    low, high = (codes[:, 0::2] + 8).to(torch.uint8), (codes[:, 1::2] + 8).to(torch.uint8)
    return (low | high << 4).contiguous().view(torch.int32)


def packed_int8(inner: TensorSource, shape: tuple[int, int]) -> Unpacked:
    """int8 values packed four to an int32 (offset by 128, little-endian, rows padded), as int8 [out, in]."""
    return Unpacked(inner, shape, lambda w: (w.view(torch.uint8) ^ 128).view(torch.int8), packed_dim=1, pack=4)


def pack_int8(values: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 4)], the inverse of `packed_int8`; padding bytes are zero."""
    flipped = values.contiguous().view(torch.uint8) ^ 128
    return torch.nn.functional.pad(flipped, (0, -values.shape[1] % 4)).contiguous().view(torch.int32)


def in_float32(inner: TensorSource, shape: tuple[int, int]) -> Unpacked:
    """A table of scales or zero points of any dtype as float32."""
    return Unpacked(inner, shape, lambda stored: stored, packed_dim=None, dtype=torch.float32)


def scale_column(inner: TensorSource) -> ByRows:
    """A stored scale [out] or [out, 1] of any float dtype, presented as float32 [out]."""
    rows = lambda start, stop: inner.read_slice(0, start, stop).reshape(-1).float()  # noqa: E731
    return ByRows(rows, torch.float32, (inner.shape[0],), inner.origin)


def add_static(
    folder: Path, linear: str, scale: TensorSource | None, offset: TensorSource | None, result: dict[str, TensorSource]
) -> None:
    for name, source in (("input_scale", scale), ("input_offset", offset)):
        if source is None and name == "input_scale":
            raise CheckpointError(f"{folder}: {linear}.input_scale is missing, though its activations are static")
        if source is not None and torch.Size(source.shape).numel() != 1:
            raise CheckpointError(
                f"{source.origin}: {linear}.{name} has shape {list(source.shape)}; static activations are read with "
                "one scale and offset a tensor"
            )
        value = torch.zeros(1) if source is None else source.read().reshape(1).float()
        result[f"{linear}.{name}"] = MemoryTensor(value, str(folder) if source is None else source.origin)
    if not 0 < float(result[f"{linear}.input_scale"].read()) < float("inf"):
        raise CheckpointError(f"{folder}: {linear}.input_scale is no positive number")


def check_linear(folder: Path, linear: str, result: dict[str, TensorSource]) -> None:
    weight, scale = result.get(f"{linear}.weight"), result.get(f"{linear}.weight_scale")
    if weight is None:
        raise CheckpointError(f"{folder}: {linear}.weight_scale has no {linear}.weight beside it")
    if weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight.origin}: {linear}.weight is {weight.dtype} {weight.shape}, expected int8 [out, in]"
        )
    if scale is not None and (
        scale.shape not in ((weight.shape[0],), (weight.shape[0], 1)) or not scale.dtype.is_floating_point
    ):
        raise CheckpointError(
            f"{scale.origin}: {linear}.weight_scale is {scale.dtype} {scale.shape}, expected "
            f"float [{weight.shape[0]}] (one per output channel)"
        )


def check_shapes(linear: str, parts: Mapping[str, tuple[TensorSource, tuple[int, ...]]]) -> None:
    for name, (source, wanted) in parts.items():
        if source.shape != wanted:
            raise CheckpointError(
                f"{source.origin}: {linear}.{name} has shape {list(source.shape)}, expected {list(wanted)}"
            )


def check_groups(
    linear: str, words: TensorSource, stored: Mapping[str, Any], shape: tuple[int, int], groups: int
) -> None:
    size = stored.get("group_size")
    size = shape[1] if size in (-1, None) else size
    if size not in (32, 64, 128, shape[1]) or groups * size != shape[1]:
        raise CheckpointError(
            f"{words.origin}: {linear} has {groups} groups over {shape[1]} inputs, group_size is "
            f"{stored.get('group_size')}; read are groups of 32, 64, 128 and the whole row"
        )


# --- scales of a KV cache ---------------------------------------------------------------------------------------------


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
