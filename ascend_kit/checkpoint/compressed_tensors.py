"""Linears of compressed-tensors, int8 and 4-bit, in the common form of quantized_tensors (facts: version 0.20).

Of 4 bits: weight_packed [out, in/8], nibble = value + 8, the lowest first;  weight_zero_point [out/8, groups] alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ascend_kit.checkpoint.quantized_tensors import (
    COMPRESSED_TENSORS,
    W4A8,
    Part,
    add_static,
    check_groups,
    nibbles,
    pattern_fits,
    present,
    present_int8,
    present_kv_scales,
    refuse_unknown,
    unpack_int8,
)
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource
from ascend_kit.files import one_line

FORMATS = {"w8a8": "int-quantized", "w8a16": "pack-quantized", "w4a16": "pack-quantized"}
# What a compressed-tensors description may hold, and at which values.
WEIGHTS = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("channel",),
    "dynamic": (False,),
    "actorder": (None, "static", "weight"),  # the order in which GPTQ went; `group` would permute what is stored
}
WEIGHTS_4 = WEIGHTS | {
    "num_bits": (4,),
    "symmetric": (True, False),
    "strategy": ("group", "channel"),
    "group_size": (None, -1, 32, 64, 128),
    "actorder": (None, "static", "weight", "group", "dynamic"),
}
INPUTS = {"num_bits": (8,), "type": ("int",), "symmetric": (True,), "strategy": ("token",), "dynamic": (True,)}
KV_CACHE = WEIGHTS | {"symmetric": (True, False), "strategy": ("tensor", "attn_head"), "actorder": (None,)}
STATIC_INPUTS = INPUTS | {"symmetric": (True, False), "strategy": ("tensor",), "dynamic": (False,)}
ARGS_UNUSED = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "format"})
CONFIG_KEYS = frozenset((
    "quant_method", "version", "config_groups", "format", "quantization_status", "global_compression_ratio", "ignore",
    "kv_cache_scheme",
))  # fmt: skip


class _Group(TypedDict, total=False):
    targets: list[str] | None
    weights: dict[str, Any] | None
    input_activations: dict[str, Any] | None


class _Description(TypedDict, total=False):
    config_groups: dict[str, _Group] | None
    ignore: list[str] | None
    sparsity_config: dict[str, Any] | None
    kv_cache_scheme: dict[str, Any] | None


_DESCRIPTION = TypeAdapter(_Description)


def present_compressed_tensors(where: Path, stored: dict[str, Any], sources: dict[str, TensorSource]) -> dict[str, str]:
    """Replace compressed-tensors' tensors by the common form; linear -> scheme."""
    place = f"{where}, quantization_config"
    try:
        _DESCRIPTION.validate_python(stored, strict=True)
    except ValueError as error:
        raise CheckpointError(f"{place}: {one_line(error)}") from None
    is_dense = (stored.get("sparsity_config") or {}).get("format") == "dense"
    refuse_unknown(place, stored, CONFIG_KEYS | ({"sparsity_config"} if is_dense else set()))
    _check_format(place, stored, "mixed-precision")
    groups: list[tuple[str, int | None, list[str]]] = []
    for name, group in (stored.get("config_groups") or {}).items():
        place = f"{where}, quantization group {name}"
        size = (group.get("weights") or {}).get("group_size")
        groups.append((_group_scheme(place, group), size, group.get("targets") or []))
    if stored.get("kv_cache_scheme"):
        _check_args(f"{where}, kv_cache_scheme", stored["kv_cache_scheme"], KV_CACHE)
        present_kv_scales(COMPRESSED_TENSORS, sources)
    schemes = {}
    for scale_name in [name for name in sources if name.endswith(".weight_scale")]:
        linear = scale_name.removesuffix(".weight_scale")
        if any(_names(target, linear) for target in stored.get("ignore") or []):
            raise CheckpointError(f"{where}: `ignore` names {linear}, but {scale_name} is stored")
        # A target naming the module wins over one naming the class, as in compressed-tensors itself.
        fits = [group for group in groups if any(_names(target, linear) for target in group[2])]
        fits += [group for group in groups if ("Embedding" if "embed" in linear else "Linear") in group[2]]
        if not fits:
            raise CheckpointError(f"{where}: {scale_name} is stored, but no quantization group targets {linear}")
        schemes[linear], size, _ = fits[0]
        _present_linear(where.parent, linear, schemes[linear], size, sources)
    return schemes


def _check_format(where: str, found: Mapping[str, Any], *more: str) -> None:
    allowed = (*FORMATS.values(), "naive-quantized", *more)
    if found.get("format") not in (None, *allowed):
        raise CheckpointError(f"{where}: format={found['format']!r} is not supported; read are {', '.join(allowed)}")


def _group_scheme(where: str, group: dict[str, Any]) -> str:
    refuse_unknown(where, group, GROUP_KEYS)
    _check_format(where, group)
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    has_four = weights.get("num_bits") == 4
    _check_args(f"{where}, weights", weights, WEIGHTS_4 if has_four else WEIGHTS)
    if inputs is None:
        return "w4a16" if has_four else "w8a16"
    if has_four:
        raise CheckpointError(f"{where}: {W4A8}")
    is_static = isinstance(inputs, dict) and not inputs.get("dynamic")
    _check_args(f"{where}, input_activations", inputs, STATIC_INPUTS if is_static else INPUTS)
    return "w8a8_static" if is_static else "w8a8"


def _check_args(where: str, args: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    defaults = {"type": "int", "symmetric": True, "dynamic": False, "strategy": allowed["strategy"][0]}
    for key, values in allowed.items():
        found = args.get(key) if args.get(key) is not None else defaults.get(key)
        if found not in values:
            raise CheckpointError(
                f"{where}: {key}={found!r}; read are int8 weights, symmetric with one scale per channel, with "
                "activations in float, dynamic per token or static per tensor, 4-bit weights in groups with float "
                "activations, and an int8 KV cache with a static scale a tensor or head"
            )
    refuse_unknown(where, args, ARGS_UNUSED | allowed.keys())


def _names(target: str, linear: str) -> bool:
    return target == linear or (target.startswith("re:") and pattern_fits("quantization_config", target[3:], linear))


def _present_linear(
    folder: Path, linear: str, scheme: str, group_size: int | None, result: dict[str, TensorSource]
) -> None:
    extras = ["weight_zero_point", "weight_g_idx"] * (scheme != "w4a16")
    for extra in extras + ["input_scale", "input_zero_point"] * (scheme != "w8a8_static"):
        if f"{linear}.{extra}" in result:
            raise CheckpointError(f"{folder}: {linear}.{extra} is stored, which a {scheme} linear does not have")
    if f"{linear}.weight_packed" in result:
        shape = rows, width = _shape_of_packed(linear, result)
        if scheme == "w4a16":
            _present_groups(linear, result, shape, group_size)
            return
        stored = [(rows, -(-width // 4))]
        packed = Part("weight_packed", stored, shape, unpack_int8, [torch.int32], torch.int8)
        present(linear, result, {"weight": packed})
    elif scheme == "w4a16":
        raise CheckpointError(f"{folder}: {linear}.weight_packed is missing; 4 bits are read packed only")
    present_int8(folder, linear, result)
    if scheme == "w8a8_static":
        if f"{linear}.input_scale" not in result:
            raise CheckpointError(f"{folder}: {linear}.input_scale is missing, though its activations are static")
        offset = result.pop(f"{linear}.input_zero_point", None)
        add_static(linear, result[f"{linear}.input_scale"], offset, result)


def _shape_of_packed(linear: str, result: dict[str, TensorSource]) -> tuple[int, int]:
    named = result.pop(f"{linear}.weight_shape", None)
    shape = [] if named is None else named.read().tolist()
    if len(shape) != 2 or not all(0 < number < 1 << 31 for number in shape):
        origin = result[f"{linear}.weight_packed"].origin
        raise CheckpointError(f"{origin}: {linear}.weight_shape is {shape}, expected two numbers beside weight_packed")
    return shape[0], shape[1]


def _present_groups(
    linear: str, sources: dict[str, TensorSource], shape: tuple[int, int], group_size: int | None
) -> None:
    """Replace one 4-bit linear by the common form."""
    rows, width = shape
    groups = 1 if group_size in (None, -1) else -(-width // group_size)
    check_groups(linear, sources[f"{linear}.weight_packed"].origin, group_size, shape, groups)
    table, words = (rows, groups), [torch.int32]
    by_columns = lambda found: nibbles(found).flatten(1) - 8  # noqa: E731
    by_rows = lambda found: nibbles(found).transpose(1, 2).flatten(0, 1) - 8  # noqa: E731
    zeros = [(-(-rows // 8), groups)]
    parts = {
        "weight": Part("weight_packed", [(rows, -(-width // 8))], shape, by_columns, words, torch.int8),
        "weight_scale": Part("weight_scale", [table], table),
        "weight_zero_point": Part("weight_zero_point", zeros, table, by_rows, words, rows_in_one=8),
        "weight_g_idx": Part("weight_g_idx", [(width,)], (width,), dtype=torch.int32),
    }
    present(linear, sources, parts)
