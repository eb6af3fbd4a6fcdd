"""4-bit linears of GPTQ, AWQ, compressed-tensors and msModelSlim in one common form, unpacked as they are read.

    X.weight             int8     [out, in]       in -8..7
    X.weight_scale       float32  [out, groups]
    X.weight_zero_point  float32  [out, groups]   where there is one: weight = (X.weight - zero point) * scale
    X.weight_g_idx       int32    [in]            the group of each input, where groups are not of neighbours

How they are stored (w: a word of 32 bits, nibble 0 its lowest 4 bits):
    GPTQ    qweight [in/8, out]: nibble j of row r is input 8r + j;  qzeros [groups, out/8], one too small in the first
            version of the format;  scales [groups, out];  g_idx [in];  weight = (nibble - zero) * scale
    AWQ     qweight [in, out/8]: nibble i of word c is output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i];  qzeros the same
    compressed-tensors  weight_packed [out, in/8], nibble = value + 8;  weight_zero_point [out/8, groups], packed alike
    msModelSlim  two's complement nibbles in bytes, along inputs (per channel) or outputs (per group), or one a byte
Facts: ModelCloud/GPTQModel, casper-hansen/AutoAWQ, vllm-project/compressed-tensors, Ascend/msmodelslim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource, check_slice

AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of 8 neighbouring outputs
_GPTQ_WORDS = (
    "quant_method bits group_size desc_act sym static_groups true_sequential checkpoint_format format damp_percent "
    "damp_auto_increment is_marlin_format model_name_or_path model_file_base_name meta quantizer pack_dtype lm_head "
    "backend use_exllama exllama_config max_input_length cache_block_outputs dataset tokenizer block_name_to_quantize "
    "module_name_preceding_first_block modules_in_block_to_quantize disable_exllama use_cuda_fp16 model_seqlen "
    "batch_size pad_token_id dynamic"
)
_AWQ_WORDS = (
    "quant_method bits group_size zero_point version modules_to_not_convert backend do_fuse exllama_config "
    "fuse_max_seq_len modules_to_fuse q_group_size w_bit"
)
GPTQ_KEYS, AWQ_KEYS = frozenset(_GPTQ_WORDS.split()), frozenset(_AWQ_WORDS.split())


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
        check_slice("of 4 bits", self.shape, dim, start, stop)
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


def present_gptq(where: Path, stored: Mapping[str, Any], sources: dict[str, TensorSource]) -> dict[str, str]:
    """Replace GPTQ's tensors by the common form; linear -> scheme."""
    formats = (None, "gptq", "gptq_v2")
    allowed = {"format": formats, "checkpoint_format": formats, "pack_dtype": (None, "int32"), "lm_head": (None, False)}
    _check_config(where, stored, GPTQ_KEYS, "bits", {**allowed, "dynamic": (None, {})})
    is_second = "gptq_v2" in (stored.get("checkpoint_format"), stored.get("format"))
    schemes = {}
    for linear in _linears(sources, "qweight"):
        words, zeros, scales, group_of = _take(linear, sources, "qweight", "qzeros", "scales", "g_idx")
        shape, groups = (words.shape[1], words.shape[0] * 8), scales.shape[0]
        _check_shapes(linear, {"qzeros": (zeros, (groups, -(-shape[0] // 8))), "scales": (scales, (groups, shape[0])),
                      "g_idx": (group_of, (shape[1],))})  # fmt: skip
        _check_group(linear, words, stored, shape, groups)
        sources[f"{linear}.weight"] = Unpacked(
            words, shape, lambda w: nibbles(w).transpose(1, 2).flatten(0, 1).t() - 8, packed_dim=1, turned=True
        )
        _add_grouped(
            linear, sources, scales, zeros, lambda w: nibbles(w).flatten(1).t() + (0 if is_second else 1) - 8, shape[0]
        )
        sources[f"{linear}.weight_g_idx"] = group_of
        schemes[linear] = "w4a16"
    return schemes


def present_awq(where: Path, stored: Mapping[str, Any], sources: dict[str, TensorSource]) -> dict[str, str]:
    """Replace AWQ's tensors by the common form; linear -> scheme."""
    stored = {**stored, "bits": stored.get("bits", stored.get("w_bit"))}
    stored.setdefault("group_size", stored.get("q_group_size"))
    _check_config(where, stored, AWQ_KEYS, "bits", {"version": (None, "gemm", "GEMM")})
    order = torch.tensor(AWQ_NIBBLE)
    schemes = {}
    for linear in _linears(sources, "qweight"):
        words, zeros, scales = _take(linear, sources, "qweight", "qzeros", "scales")
        shape, groups = (words.shape[1] * 8, words.shape[0]), scales.shape[0]
        _check_shapes(linear, {"qzeros": (zeros, (groups, words.shape[1])), "scales": (scales, (groups, shape[0]))})
        _check_group(linear, words, stored, shape, groups)

        def ordered(w: Tensor) -> Tensor:
            return nibbles(w)[..., order].flatten(1).t() - 8

        sources[f"{linear}.weight"] = Unpacked(words, shape, ordered, packed_dim=0, turned=True)
        _add_grouped(linear, sources, scales, zeros, ordered, shape[0])
        schemes[linear] = "w4a16"
    return schemes


def present_packed(
    linear: str, sources: dict[str, TensorSource], shape: tuple[int, int], group_size: int | None
) -> None:
    """Replace one 4-bit linear of compressed-tensors (weight_packed) by the common form."""
    words, scale = sources.pop(f"{linear}.weight_packed"), sources[f"{linear}.weight_scale"]
    groups = 1 if group_size is None else -(-shape[1] // group_size)
    _check_shapes(
        linear, {"weight_packed": (words, (shape[0], -(-shape[1] // 8))), "weight_scale": (scale, (shape[0], groups))}
    )
    _check_group(linear, words, {"group_size": group_size or -1}, shape, groups)
    sources[f"{linear}.weight"] = Unpacked(words, shape, lambda w: nibbles(w).flatten(1) - 8, packed_dim=1)
    sources[f"{linear}.weight_scale"] = Unpacked(
        scale, (shape[0], groups), lambda s: s, packed_dim=None, dtype=torch.float32
    )
    zeros = sources.get(f"{linear}.weight_zero_point")
    if zeros is not None:
        _check_shapes(linear, {"weight_zero_point": (zeros, (-(-shape[0] // 8), groups))})
        sources[f"{linear}.weight_zero_point"] = Unpacked(
            zeros,
            (shape[0], groups),
            lambda w: nibbles(w).transpose(1, 2).flatten(0, 1) - 8,
            packed_dim=0,
            dtype=torch.float32,
        )
    group_of = sources.get(f"{linear}.weight_g_idx")
    if group_of is not None:
        _check_shapes(linear, {"weight_g_idx": (group_of, (shape[1],))})


def present_bytes(linear: str, sources: dict[str, TensorSource], shape: tuple[int, int]) -> None:
    """Replace one W4A16 linear of msModelSlim (two nibbles a byte, or one) by the common form."""
    weight, scale = sources[f"{linear}.weight"], sources[f"{linear}.weight_scale"]
    offset = sources.pop(f"{linear}.weight_offset", None)
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    forms: dict[tuple[int, ...], int | None] = {shape: None, (shape[0], shape[1] // 2): 1, (shape[0] // 2, shape[1]): 0}
    if weight.dtype not in (torch.int8, torch.uint8) or weight.shape not in forms or shape[1] % groups:
        raise CheckpointError(
            f"{weight.origin}: {linear}.weight is {weight.dtype} {list(weight.shape)} with {groups} groups; W4A16 of "
            f"shape {list(shape)} is stored as int8 of {', '.join(str(list(form)) for form in forms)}"
        )
    dim = forms[weight.shape]

    def signed(block: Tensor) -> Tensor:
        if dim is None:
            return block
        low, high = (block.view(torch.int8) << 4) >> 4, block.view(torch.int8) >> 4
        return torch.stack([low, high], dim + 1).flatten(dim, dim + 1)

    sources[f"{linear}.weight"] = Unpacked(weight, shape, signed, packed_dim=dim, pack=2)
    for name, source in (("weight_scale", scale), ("weight_zero_point", offset)):
        if source is not None:
            _check_shapes(linear, {name: (source, (shape[0], groups))})
            sources[f"{linear}.{name}"] = Unpacked(
                source, (shape[0], groups), lambda s: s, packed_dim=None, dtype=torch.float32
            )


def _linears(sources: Mapping[str, TensorSource], part: str) -> list[str]:
    found = [name.removesuffix(f".{part}") for name in sources if name.endswith(f".{part}")]
    if not found:
        raise CheckpointError(f"the weights hold no .{part}, though config.json describes 4-bit linears")
    return found


def _take(linear: str, sources: dict[str, TensorSource], *parts: str) -> list[TensorSource]:
    missing = next((part for part in parts if f"{linear}.{part}" not in sources), None)
    if missing is not None:
        origin = sources[f"{linear}.{parts[0]}"].origin
        raise CheckpointError(f"{origin}: {linear}.{missing} is missing beside {linear}.{parts[0]}")
    taken = [sources.pop(f"{linear}.{part}") for part in parts]
    for part, source in zip(parts, taken, strict=True):
        if part in (parts[0], "qzeros") and (source.dtype != torch.int32 or len(source.shape) != 2):
            raise CheckpointError(
                f"{source.origin}: {linear}.{part} is {source.dtype} {list(source.shape)}, not a table of int32"
            )
    return taken


def _check_shapes(linear: str, parts: Mapping[str, tuple[TensorSource, tuple[int, ...]]]) -> None:
    for name, (source, wanted) in parts.items():
        if source.shape != wanted:
            raise CheckpointError(
                f"{source.origin}: {linear}.{name} has shape {list(source.shape)}, expected {list(wanted)}"
            )


def _check_group(
    linear: str, words: TensorSource, stored: Mapping[str, Any], shape: tuple[int, int], groups: int
) -> None:
    size = stored.get("group_size")
    size = shape[1] if size in (-1, None) else size
    if size not in (32, 64, 128, shape[1]) or groups * size != shape[1]:
        raise CheckpointError(
            f"{words.origin}: {linear} has {groups} groups over {shape[1]} inputs, group_size is "
            f"{stored.get('group_size')}; read are groups of 32, 64, 128 and the whole row"
        )


def _add_grouped(
    linear: str,
    sources: dict[str, TensorSource],
    scales: TensorSource,
    zeros: TensorSource,
    unpack: Callable[[Tensor], Tensor],
    rows: int,
) -> None:
    shape = (rows, scales.shape[0])
    sources[f"{linear}.weight_scale"] = Unpacked(
        scales, shape, lambda s: s.t(), packed_dim=None, turned=True, dtype=torch.float32
    )
    sources[f"{linear}.weight_zero_point"] = Unpacked(
        zeros, shape, unpack, packed_dim=0, turned=True, dtype=torch.float32
    )


def _check_config(
    where: Path, stored: Mapping[str, Any], known: frozenset[str], bits: str, allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    if stored.get(bits) != 4:
        raise CheckpointError(f"{where}, quantization_config: bits={stored.get(bits)!r}; only 4 bits are read")
    for key, values in allowed.items():
        if stored.get(key) not in values:
            raise CheckpointError(f"{where}, quantization_config: {key}={stored[key]!r}; read are {values}")
    for key, value in stored.items():
        if key not in known and value not in (None, False, {}, []):
            raise CheckpointError(f"{where}, quantization_config: {key}={value!r:.80} is not supported")
