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

from ascend_kit.checkpoint.quantized_tensors import Part, check_groups, nibbles, present, refuse_unknown
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

    return _present(stored, sources, weight, zero, needed=("qzeros", "scales", "g_idx"))


def present_awq(where: Path, stored: Mapping[str, Any], sources: dict[str, TensorSource]) -> dict[str, str]:
    """Replace AWQ's tensors by the common form; linear -> scheme."""
    stored = {**stored, "bits": stored.get("bits", stored.get("w_bit"))}
    stored.setdefault("group_size", stored.get("q_group_size"))
    _check_config(where, stored, AWQ_KEYS, {"version": (None, "gemm", "GEMM")})
    order = torch.tensor(AWQ_NIBBLE)

    def ordered(words: Tensor) -> Tensor:
        return nibbles(words)[..., order].flatten(1).t() - 8

    return _present(stored, sources, ordered, ordered, outputs_in_one=8)


def _present(
    stored: Mapping[str, Any], sources: dict[str, TensorSource], weight: Unpack, zero: Unpack, *,
    outputs_in_one: int = 1, needed: tuple[str, ...] = ("qzeros", "scales"),
) -> dict[str, str]:  # fmt: skip
    """The linears of `sources` in the common form, by how words of weights [in, out] and of zeros become [out, ...]."""
    linears = [name.removesuffix(".qweight") for name in sources if name.endswith(".qweight")]
    if not linears:
        raise CheckpointError("the weights hold no .qweight, though config.json describes 4-bit linears")
    words_of = {"stored_dtypes": [torch.int32], "turned": True}
    for linear in linears:
        words = sources[f"{linear}.qweight"]
        for part in needed:
            if f"{linear}.{part}" not in sources:
                raise CheckpointError(f"{words.origin}: {linear}.{part} is missing beside {linear}.qweight")
        forms = words.shape, sources[f"{linear}.scales"].shape
        if any(len(form) != 2 for form in forms):
            raise CheckpointError(f"{words.origin}: {linear}.qweight is {forms[0]}, .scales {forms[1]}; not two tables")
        (width, rows), groups = forms[0], forms[1][0]
        width, rows = width * 8 // outputs_in_one, rows * outputs_in_one
        check_groups(linear, words.origin, stored.get("group_size"), (rows, width), groups)
        table = (rows, groups)
        form = {"dtype": torch.int8, "rows_in_one": outputs_in_one, **words_of}
        parts = {
            "weight": Part("qweight", [words.shape], (rows, width), weight, **form),
            "weight_scale": Part("scales", [(groups, rows)], table, torch.t, turned=True),
            "weight_zero_point": Part("qzeros", [(groups, -(-rows // 8))], table, zero, rows_in_one=8, **words_of),
            "weight_g_idx": Part("g_idx", [(width,)], (width,), dtype=torch.int32),
        }
        present(linear, sources, parts)
    return dict.fromkeys(linears, "w4a16")


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
