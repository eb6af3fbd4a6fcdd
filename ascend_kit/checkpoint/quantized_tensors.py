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

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import regex
import torch
from torch import Tensor

from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, TensorSource, in_memory
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import layer_prefix

if TYPE_CHECKING:
    from ascend_kit.checkpoint.huggingface import Checkpoint

W4A8 = (
    "4-bit weights with 8-bit activations, for which no dense operator has a documented contract on this card; "
    "quantise again as W4A16 or W8A8, or convert the float model with quantize: w4a16"
)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
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


class Part(NamedTuple):
    """How one tensor of the common form lies in the files: what the layouts differ in."""

    stored: str  # its name there, behind the linear's
    stored_shapes: Sequence[tuple[int, ...]]  # those that it may have there
    shape: tuple[int, ...]
    unpack: Callable[[Tensor], Tensor] = lambda stored: stored  # of rows there (`turned`: columns) into rows here
    stored_dtypes: Sequence[torch.dtype] = ()  # those that it may have there; none: any
    dtype: torch.dtype = torch.float32
    rows_in_one: int = 1  # of its rows in one there
    turned: bool = False

    def open(self, stored: TensorSource) -> ByRows:
        """The tensor, unpacked as it is read; padding behind its last row and column is left out."""

        def rows(start: int, stop: int) -> Tensor:
            first, last = start // self.rows_in_one, -(-stop // self.rows_in_one)
            found = self.unpack(stored.read_slice(int(self.turned), first, last)).to(self.dtype)
            found = found.narrow(0, start - first * self.rows_in_one, stop - start)
            return found.narrow(-1, 0, self.shape[-1] if found.dim() > 1 else stop - start).contiguous()

        return ByRows(rows, self.dtype, self.shape, stored.origin)


def present(linear: str, sources: dict[str, TensorSource], parts: Mapping[str, Part]) -> None:
    """Put those of a linear's tensors that are stored into the common form, by their names in it.

    CheckpointError names one of another shape or dtype.
    """
    for name, part in parts.items():
        stored = sources.get(f"{linear}.{part.stored}")
        if stored is None:
            continue
        if stored.shape not in part.stored_shapes or (part.stored_dtypes and stored.dtype not in part.stored_dtypes):
            shapes = " or ".join(str(list(shape)) for shape in part.stored_shapes)
            raise CheckpointError(
                f"{stored.origin}: {linear}.{part.stored} is {stored.dtype} {list(stored.shape)}, expected "
                f"{' or '.join(map(str, part.stored_dtypes)) or 'numbers'} {shapes}"
            )
        if part.stored != name:
            del sources[f"{linear}.{part.stored}"]
        sources[f"{linear}.{name}"] = part.open(stored)


def present_int8(folder: Path, linear: str, sources: dict[str, TensorSource]) -> None:
    """Check an int8 linear and give its scale, where it has one, the common form."""
    weight = sources.get(f"{linear}.weight")
    if weight is None:
        raise CheckpointError(f"{folder}: {linear}.weight_scale has no {linear}.weight beside it")
    if weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight.origin}: {linear}.weight is {weight.dtype} {list(weight.shape)}, expected int8 [out, in]"
        )
    rows = weight.shape[0]
    scale = Part("weight_scale", [(rows,), (rows, 1)], (rows,), lambda found: found.reshape(-1), FLOATS)
    present(linear, sources, {"weight_scale": scale})


def add_static(linear: str, scale: TensorSource, offset: TensorSource | None, sources: dict[str, TensorSource]) -> None:
    """The scale and the offset of static activations, read now: one number each."""
    for name, source in (("input_scale", scale), ("input_offset", offset or in_memory(torch.zeros(1), scale.origin))):
        if math.prod(source.shape) != 1:
            raise CheckpointError(
                f"{source.origin}: {linear}.{name} has shape {list(source.shape)}; static activations are read with "
                "one scale and offset a tensor"
            )
        sources[f"{linear}.{name}"] = in_memory(source.read().reshape(1).float(), source.origin)
    if not 0 < float(sources[f"{linear}.input_scale"].read()) < math.inf:
        raise CheckpointError(f"{scale.origin}: {linear}.input_scale is no positive number")


def check_groups(linear: str, origin: str, group_size: Any, shape: tuple[int, int], groups: int) -> None:
    """CheckpointError unless the inputs of a weight [out, in] are in `groups` groups of a size that is read."""
    size = shape[1] if group_size in (-1, None) else group_size
    if size not in (32, 64, 128, shape[1]) or groups * size != shape[1]:
        raise CheckpointError(
            f"{origin}: {linear} has {groups} groups over {shape[1]} inputs, group_size is {group_size}; read are "
            "groups of 32, 64, 128 and the whole row"
        )


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., n] -> int8 [..., n, 8] in 0..15, the lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.int8)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 [out, in] in -8..7 -> int32 [out, in / 8], as compressed-tensors packs them."""
    low, high = (codes[:, 0::2] + 8).to(torch.uint8), (codes[:, 1::2] + 8).to(torch.uint8)
    return (low | high << 4).contiguous().view(torch.int32)


def unpack_int8(words: Tensor) -> Tensor:
    """int32 [out, n], of four numbers each (offset by 128, little-endian) -> int8 [out, 4 n]."""
    return (words.view(torch.uint8) ^ 128).view(torch.int8)


def pack_int8(values: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 4)], the inverse of `unpack_int8`; padding bytes are zero."""
    flipped = values.contiguous().view(torch.uint8) ^ 128
    return torch.nn.functional.pad(flipped, (0, -values.shape[1] % 4)).contiguous().view(torch.int32)


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
