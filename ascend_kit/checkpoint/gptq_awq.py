"""4-bit linears of GPTQ and AWQ in the common form of quantized_tensors, unpacked as they are read.

w: a word of 32 bits, nibble 0 its lowest 4 bits;  weight = (nibble - zero) * scale
    GPTQ    qweight [in/8, out]: nibble j of row r is input 8r + j;  qzeros [groups, out/8], one too small in the first
            version of the format;  scales [groups, out];  g_idx [in]
    AWQ     qweight [in, out/8]: nibble i of word c is output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i];  qzeros the same
Facts: ModelCloud/GPTQModel, casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascend_kit.checkpoint.quantized_tensors import Unpacked, check_groups, check_shapes, nibbles, refuse_unknown
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource

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
Unpack = Callable[[Tensor], Tensor]
GPTQ_KEYS, AWQ_KEYS = frozenset(_GPTQ_WORDS.split()), frozenset(_AWQ_WORDS.split())


def present_gptq(where: Path, stored: Mapping[str, Any], sources: dict[str, TensorSource]) -> dict[str, str]:
    """Replace GPTQ's tensors by the common form; linear -> scheme."""
    formats = (None, "gptq", "gptq_v2")
    allowed = {"format": formats, "checkpoint_format": formats, "pack_dtype": (None, "int32"), "lm_head": (None, False)}
    _check_config(where, stored, GPTQ_KEYS, {**allowed, "dynamic": (None, {})})
    step = 0 if "gptq_v2" in (stored.get("checkpoint_format"), stored.get("format")) else 1

    def weight(words: Tensor) -> Tensor:
        return nibbles(words).transpose(1, 2).flatten(0, 1).t() - 8

    def zero(words: Tensor) -> Tensor:
        return nibbles(words).flatten(1).t() + step - 8

    return _present(stored, sources, weight, zero, packed_dim=1, more=("g_idx",))


def present_awq(where: Path, stored: Mapping[str, Any], sources: dict[str, TensorSource]) -> dict[str, str]:
    """Replace AWQ's tensors by the common form; linear -> scheme."""
    stored = {**stored, "bits": stored.get("bits", stored.get("w_bit"))}
    stored.setdefault("group_size", stored.get("q_group_size"))
    _check_config(where, stored, AWQ_KEYS, {"version": (None, "gemm", "GEMM")})
    order = torch.tensor(AWQ_NIBBLE)

    def ordered(words: Tensor) -> Tensor:
        return nibbles(words)[..., order].flatten(1).t() - 8

    return _present(stored, sources, ordered, ordered, packed_dim=0)


def _present(
    stored: Mapping[str, Any], sources: dict[str, TensorSource], weight: Unpack, zero: Unpack, *, packed_dim: int,
    more: tuple[str, ...] = (),
) -> dict[str, str]:  # fmt: skip
    """The linears of `sources` in the common form, by how words of weights [in, out] and of zeros become [out, ...]."""
    linears = [name.removesuffix(".qweight") for name in sources if name.endswith(".qweight")]
    if not linears:
        raise CheckpointError("the weights hold no .qweight, though config.json describes 4-bit linears")
    for linear in linears:
        words, zeros, scales, *group_of = _take(linear, sources, "qweight", "qzeros", "scales", *more)
        rows, width = (count * (8 if dim == packed_dim else 1) for dim, count in enumerate(reversed(words.shape)))
        groups, name = scales.shape[0], f"{linear}.weight"
        check_shapes(linear, {"qzeros": (zeros, (groups, -(-rows // 8))), "scales": (scales, (groups, rows))})
        check_groups(linear, words, stored, (rows, width), groups)
        sources[name] = Unpacked(words, (rows, width), weight, packed_dim=packed_dim, turned=True)
        table = {"shape": (rows, groups), "turned": True, "dtype": torch.float32}
        sources[f"{name}_scale"] = Unpacked(scales, unpack=torch.t, packed_dim=None, **table)
        sources[f"{name}_zero_point"] = Unpacked(zeros, unpack=zero, packed_dim=0, **table)
        for source in group_of:
            check_shapes(linear, {"g_idx": (source, (width,))})
            sources[f"{name}_g_idx"] = source
    return dict.fromkeys(linears, "w4a16")


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


def _check_config(
    where: Path, stored: Mapping[str, Any], known: frozenset[str], allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    place = f"{where}, quantization_config"
    if stored.get("bits") != 4:
        raise CheckpointError(f"{place}: bits={stored.get('bits')!r}; only 4 bits are read")
    for key, values in allowed.items():
        if stored.get(key) not in values:
            raise CheckpointError(f"{place}: {key}={stored[key]!r}; read are {values}")
    refuse_unknown(place, stored, known)
