"""What a quantised checkpoint says about itself, and its linears in one common form.

Read are compressed-tensors (`quantization_config` in config.json; also what we write), msModelSlim
(`quant_model_description*.json`, or the same inside config.json), GPTQ and AWQ. 4-bit linears have the form of
int4_layouts; whatever is on disk, an int8 linear `X` appears as

    X.weight        int8     [out, in]
    X.weight_scale  float32  [out]          weight = X.weight * X.weight_scale[:, None]
    X.bias          as stored, if any

    X.input_scale, X.input_offset  float32 [1], static activations only:  q = round(x / scale + offset), -128..127

Symmetric weights, one scale per output channel. Everything else (fp8, transforms, 4-bit weights with 8-bit activations,
an int8 KV cache) is refused by name. Of msModelSlim's static W8A8 the weight scale and the bias are recovered from the
folded `deq_scale` and `quant_bias`. Layout facts: compressed-tensors
0.20 (`compressors/`), https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0288.html
(tensor names, dtypes and shapes of W8A8).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ascend_kit.checkpoint.int4_layouts import present_awq, present_bytes, present_gptq, present_packed
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource, check_slice, read_json
from ascend_kit.files import one_line
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import expected_shapes

GPTQ_FILE, MSMODELSLIM_PATTERN = "quantize_config.json", "quant_model_description*.json"
MSMODELSLIM_SCHEMES = {"W8A8": "w8a8_static", "W8A8_DYNAMIC": "w8a8", "W8A8_MIX": "w8a8", "W8A16": "w8a16",
                       "W4A16": "w4a16", "FLOAT": "none"}  # fmt: skip
FORMATS = {"w8a8": "int-quantized", "w8a16": "pack-quantized", "w4a16": "pack-quantized"}
W4A8 = (
    "4-bit weights with 8-bit activations, for which no dense operator has a documented contract on this card; "
    "quantise again as W4A16 or W8A8, or convert the float model with quantize: w4a16"
)
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
STATIC_INPUTS = INPUTS | {"symmetric": (True, False), "strategy": ("tensor",), "dynamic": (False,)}
ARGS_UNUSED = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "format"})
CONFIG_KEYS = frozenset(
    {"quant_method", "version", "config_groups", "format", "quantization_status", "global_compression_ratio", "ignore"}
)


class _Group(TypedDict, total=False):
    targets: list[str] | None
    weights: dict[str, Any] | None
    input_activations: dict[str, Any] | None


class _Description(TypedDict, total=False):
    config_groups: dict[str, _Group] | None
    ignore: list[str] | None
    sparsity_config: dict[str, Any] | None


_DESCRIPTION = TypeAdapter(_Description)


@dataclass(frozen=True)
class QuantizationInfo:
    """Which linears are stored as int8 or in 4 bits. Names are module names without `.weight`."""

    layout: str = "none"  # none | compressed-tensors | msmodelslim
    schemes: Mapping[str, str] = field(
        default_factory=dict
    )  # linear -> w8a8 | w8a8_static | w8a16 | w4a16; absent = none

    def scheme(self, linear: str) -> str:
        """`none`, or the scheme's name."""
        return self.schemes.get(linear, "none")

    @property
    def summary(self) -> str:
        """none, the only scheme that occurs, or mixed."""
        kinds = set(self.schemes.values())
        return kinds.pop() if len(kinds) == 1 else ("mixed" if kinds else "none")


class ScaleColumn:
    """A stored scale [out] or [out, 1] of any float dtype, presented as float32 [out]."""

    dtype = torch.float32

    def __init__(self, inner: TensorSource) -> None:
        self.inner, self.shape, self.origin = inner, (inner.shape[0],), inner.origin

    def read(self) -> torch.Tensor:
        return self.inner.read().reshape(-1).float()

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_slice(dim, start, stop).reshape(-1).float()


class PackedInt8:
    """int8 values packed four to an int32 (offset by 128, little-endian, rows padded), as int8 [out, in]."""

    dtype = torch.int8

    def __init__(self, inner: TensorSource, shape: tuple[int, int]) -> None:
        self.inner, self.shape, self.origin = inner, shape, inner.origin

    def read(self) -> torch.Tensor:
        return self._unpack(self.inner.read())[:, : self.shape[1]].contiguous()

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        check_slice("packed weight", self.shape, dim, start, stop)
        if dim == 0:
            return self._unpack(self.inner.read_slice(0, start, stop))[:, : self.shape[1]].contiguous()
        first = start // 4
        block = self._unpack(self.inner.read_slice(1, first, (stop + 3) // 4))
        return block[:, start - 4 * first : stop - 4 * first].contiguous()

    @staticmethod
    def _unpack(packed: torch.Tensor) -> torch.Tensor:
        return (packed.view(torch.uint8) ^ 128).view(torch.int8)


def pack_int8(values: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 4)], the inverse of PackedInt8; padding bytes are zero."""
    flipped = values.contiguous().view(torch.uint8) ^ 128
    missing = -values.shape[1] % 4
    return torch.nn.functional.pad(flipped, (0, missing)).contiguous().view(torch.int32)


class RecoveredScale:
    """Weight scale of a static W8A8 linear: deq_scale / input_scale, float32 [out]."""

    dtype = torch.float32

    def __init__(self, deq_scale: TensorSource, input_scale: TensorSource) -> None:
        self.deq_scale, self.input_scale = deq_scale, input_scale
        self.shape, self.origin = (deq_scale.shape[0],), deq_scale.origin

    def read(self) -> torch.Tensor:
        return self.read_slice(0, 0, self.shape[0])

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.dequantization(start, stop) / self.input_scale.read().reshape(-1).float()

    def dequantization(self, start: int, stop: int) -> torch.Tensor:
        """deq_scale as float32; int64 storage carries the float's bit pattern in its low half."""
        raw = self.deq_scale.read_slice(0, start, stop).reshape(-1)
        return (raw & 0xFFFFFFFF).to(torch.int32).view(torch.float32) if raw.dtype == torch.int64 else raw.float()


class RecoveredBias:
    """Float bias of a static W8A8 linear, float32 [out].

    Stored is quant_bias = bias / deq_scale - input_offset * (row sum of the int8 weight).
    """

    dtype = torch.float32

    def __init__(
        self, quant_bias: TensorSource, input_offset: TensorSource, weight: TensorSource, scale: RecoveredScale
    ) -> None:
        self.quant_bias, self.input_offset, self.weight, self.scale = quant_bias, input_offset, weight, scale
        self.shape, self.origin = (quant_bias.shape[0],), quant_bias.origin

    def read(self) -> torch.Tensor:
        return self.read_slice(0, 0, self.shape[0])

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        row_sums = self.weight.read_slice(0, start, stop).sum(dim=1, dtype=torch.int64)
        offset = int(self.input_offset.read().float().round().item())
        total = self.quant_bias.read_slice(0, start, stop).reshape(-1).to(torch.int64) + offset * row_sums
        return (total.double() * self.scale.dequantization(start, stop).double()).float()


def present_quantized(
    folder: Path, config: dict[str, Any], sources: dict[str, TensorSource]
) -> tuple[dict[str, TensorSource], QuantizationInfo]:
    """Sources in the common form and the description; a float checkpoint passes through unchanged."""
    stored, where = config.get("quantization_config") or {}, folder / "config.json"
    if not stored and (folder / GPTQ_FILE).is_file():
        where = folder / GPTQ_FILE
        stored = {"quant_method": "gptq", **read_json(where, "GPTQ's settings")}
    if not isinstance(stored, dict):
        raise CheckpointError(f"{where}: quantization_config must be an object, found {type(stored).__name__}")
    files = sorted(folder.glob(MSMODELSLIM_PATTERN))
    is_msmodelslim = "model_quant_type" in stored or stored.get("quant_method") == "ascend"
    if len(files) > 1 or (files and stored and not (is_msmodelslim and stored == read_json(files[0], "description"))):
        names = ", ".join([*map(str, files), *([f"quantization_config in {where}"] if stored else [])])
        raise CheckpointError(
            f"{folder} describes its int8 tensors more than once: {names}; keep the one that is right"
        )
    if files:
        return _present_msmodelslim(files[0], read_json(files[0], "msModelSlim's description"), config, sources)
    if not stored:
        return sources, QuantizationInfo()
    if is_msmodelslim:
        return _present_msmodelslim(where, stored, config, sources)
    packed = {"gptq": present_gptq, "awq": present_awq}.get(str(stored.get("quant_method")))
    if packed is not None:
        result = dict(sources)
        return result, QuantizationInfo(stored["quant_method"], packed(where, stored, result))
    if stored.get("quant_method") != "compressed-tensors":
        raise CheckpointError(
            f"{where}: quant_method {stored.get('quant_method')!r} is not supported; readable are "
            "compressed-tensors, gptq, awq and msModelSlim, or start from the float model"
        )
    return _present_compressed_tensors(where, stored, sources)


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def _present_compressed_tensors(
    where: Path, stored: dict[str, Any], sources: dict[str, TensorSource]
) -> tuple[dict[str, TensorSource], QuantizationInfo]:
    place = f"{where}, quantization_config"
    try:
        _DESCRIPTION.validate_python(stored, strict=True)
    except ValueError as error:
        raise CheckpointError(f"{place}: {one_line(error)}") from None
    is_dense = (stored.get("sparsity_config") or {}).get("format") == "dense"
    _refuse_others(place, stored, CONFIG_KEYS | ({"sparsity_config"} if is_dense else set()))
    _check_format(place, stored, "mixed-precision")
    groups: list[tuple[str, list[str]]] = []
    sizes: list[int | None] = []
    for name, group in (stored.get("config_groups") or {}).items():
        place = f"{where}, quantization group {name}"
        groups.append((_group_scheme(place, group), group.get("targets") or []))
        sizes.append((group.get("weights") or {}).get("group_size"))
    result, schemes = dict(sources), {}
    for scale_name in [name for name in sources if name.endswith(".weight_scale")]:
        linear = scale_name.removesuffix(".weight_scale")
        if any(_names(target, linear) for target in stored.get("ignore") or []):
            raise CheckpointError(f"{where}: `ignore` names {linear}, but {scale_name} is stored")
        at = _group_of_linear(where, linear, groups)
        schemes[linear] = groups[at][0]
        _present_linear(where.parent, linear, groups[at][0], sizes[at], result)
    return result, QuantizationInfo("compressed-tensors", schemes)


def _refuse_others(where: str, found: Mapping[str, Any], known: frozenset[str]) -> None:
    """CheckpointError for a setting that is not understood; null, false and empty settings say nothing."""
    for key, value in found.items():
        if key not in known and value not in (None, False, {}, []):
            raise CheckpointError(f"{where}: {key}={value!r} is not supported")


def _check_format(where: str, found: Mapping[str, Any], *more: str) -> None:
    allowed = (*FORMATS.values(), "naive-quantized", *more)
    if found.get("format") not in (None, *allowed):
        raise CheckpointError(f"{where}: format={found['format']!r} is not supported; read are {', '.join(allowed)}")


def _group_scheme(where: str, group: dict[str, Any]) -> str:
    _refuse_others(where, group, GROUP_KEYS)
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
                "activations in float, dynamic per token or static per tensor, and 4-bit weights in groups with float "
                "activations"
            )
    _refuse_others(where, args, ARGS_UNUSED | allowed.keys())


def _names(target: str, linear: str) -> bool:
    try:
        return target == linear or (target.startswith("re:") and re.match(target[3:], linear) is not None)
    except re.error as error:
        raise CheckpointError(f"quantization_config: {target!r} is no regular expression: {error}") from None


def _group_of_linear(where: Path, linear: str, groups: list[tuple[str, list[str]]]) -> int:
    # A target naming the module wins over one naming the class, as in compressed-tensors itself.
    kind = "Embedding" if "embed" in linear else "Linear"
    for fits in (lambda target: _names(target, linear), lambda target: target == kind):
        found = next((at for at, (_, targets) in enumerate(groups) if any(map(fits, targets))), None)
        if found is not None:
            return found
    raise CheckpointError(f"{where}: {linear}.weight_scale is stored, but no quantization group targets {linear}")


def _present_linear(
    folder: Path, linear: str, scheme: str, group_size: int | None, result: dict[str, TensorSource]
) -> None:
    extras = ["weight_zero_point", "weight_g_idx"] * (scheme != "w4a16")
    for extra in extras + ["input_scale", "input_zero_point"] * (scheme != "w8a8_static"):
        if f"{linear}.{extra}" in result:
            raise CheckpointError(f"{folder}: {linear}.{extra} is stored, which a {scheme} linear does not have")
    if f"{linear}.weight_packed" in result:
        shape = _shape_of_packed(linear, result)
        if scheme == "w4a16":
            present_packed(linear, result, shape, None if group_size in (None, -1) else group_size)
            return
        packed = result.pop(f"{linear}.weight_packed")
        if packed.dtype != torch.int32 or packed.shape != (shape[0], (shape[1] + 3) // 4):
            raise CheckpointError(
                f"{packed.origin}: {linear}.weight_packed is {packed.dtype} {list(packed.shape)}, expected int32 with "
                f"four numbers an element for weight_shape {list(shape)}"
            )
        result[f"{linear}.weight"] = PackedInt8(packed, shape)
    elif scheme == "w4a16":
        raise CheckpointError(f"{folder}: {linear}.weight_packed is missing; 4 bits are read packed only")
    _check_linear(folder, linear, result)
    result[f"{linear}.weight_scale"] = ScaleColumn(result[f"{linear}.weight_scale"])
    if scheme == "w8a8_static":
        offset = result.pop(f"{linear}.input_zero_point", None)
        _add_static(folder, linear, result.get(f"{linear}.input_scale"), offset, result)


def _shape_of_packed(linear: str, result: dict[str, TensorSource]) -> tuple[int, int]:
    named = result.pop(f"{linear}.weight_shape", None)
    shape = [] if named is None else named.read().tolist()
    if len(shape) != 2 or not all(0 < number < 1 << 31 for number in shape):
        origin = result[f"{linear}.weight_packed"].origin
        raise CheckpointError(f"{origin}: {linear}.weight_shape is {shape}, expected two numbers beside weight_packed")
    return shape[0], shape[1]


def _add_static(
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
        result[f"{linear}.{name}"] = _Number(source, folder)
    if not 0 < float(result[f"{linear}.input_scale"].read()) < float("inf"):
        raise CheckpointError(f"{folder}: {linear}.input_scale is no positive number")


class _Number:
    """One stored number as float32 [1]; 0 where nothing is stored."""

    dtype, shape = torch.float32, (1,)

    def __init__(self, inner: TensorSource | None, folder: Path) -> None:
        self.inner, self.origin = inner, str(folder) if inner is None else inner.origin

    def read(self) -> torch.Tensor:
        return torch.zeros(1) if self.inner is None else self.inner.read().reshape(1).float()

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.read()[start:stop]


def _check_linear(folder: Path, linear: str, result: dict[str, TensorSource]) -> None:
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


# --- msModelSlim ------------------------------------------------------------------------------------------------------


def _present_msmodelslim(
    path: Path, described: dict[str, Any], config: dict[str, Any], sources: dict[str, TensorSource]
) -> tuple[dict[str, TensorSource], QuantizationInfo]:
    result, schemes = dict(sources), {}
    for name, kind in described.items():
        if not name.endswith(".weight") or name not in sources or kind == "FLOAT":
            continue
        if not isinstance(kind, str) or kind not in MSMODELSLIM_SCHEMES:
            why = f": {W4A8}" if str(kind).startswith("W4A8") else f"; readable: {', '.join(MSMODELSLIM_SCHEMES)}"
            raise CheckpointError(f"{path}: {name} is stored as {kind}{why}")
        linear = name.removesuffix(".weight")
        schemes[linear] = MSMODELSLIM_SCHEMES[kind]
        if kind != "W4A16":
            _present_msmodelslim_linear(path, linear, kind, result)
            continue
        shape = expected_shapes(ModelConfig.from_dict(config, where=f"{path.parent}/config.json")).get(name)
        if shape is None or f"{linear}.weight_scale" not in sources:
            raise CheckpointError(f"{path}: {name} is stored as W4A16 and has no weight_scale, or fits no linear")
        present_bytes(linear, result, (shape[0], shape[1]))
    return result, QuantizationInfo("msmodelslim", schemes)


def _present_msmodelslim_linear(path: Path, linear: str, kind: str, result: dict[str, TensorSource]) -> None:
    _check_linear(path.parent, linear, result)
    offset = result.pop(f"{linear}.weight_offset", None)
    if offset is not None and bool(offset.read().ne(0).any()):
        raise CheckpointError(
            f"{offset.origin}: {linear}.weight_offset is not zero; only symmetric weights are read. "
            "Quantise again with w_sym=True"
        )
    scale, deq = result.get(f"{linear}.weight_scale"), result.pop(f"{linear}.deq_scale", None)
    input_scale, input_offset, quant_bias = (
        result.pop(f"{linear}.{key}", None) for key in ("input_scale", "input_offset", "quant_bias")
    )
    if scale is not None and kind != "W8A8":  # W8A8_MIX holds both
        result[f"{linear}.weight_scale"] = ScaleColumn(scale)
        return
    if deq is None or input_scale is None or input_offset is None or quant_bias is None:
        raise CheckpointError(
            f"{path}: {linear} needs weight_scale, or deq_scale with input_scale, input_offset and quant_bias"
        )
    rows = result[f"{linear}.weight"].shape[0]
    for part, count in ((deq, rows), (quant_bias, rows), (input_scale, 1), (input_offset, 1)):
        if torch.Size(part.shape).numel() != count:
            raise CheckpointError(
                f"{part.origin}: a part of static {linear} has shape {list(part.shape)}, expected {count} numbers"
            )
    recovered = RecoveredScale(deq, input_scale)
    result[f"{linear}.weight_scale"] = recovered
    result[f"{linear}.bias"] = RecoveredBias(quant_bias, input_offset, result[f"{linear}.weight"], recovered)
    if kind == "W8A8":
        _add_static(path.parent, linear, input_scale, input_offset, result)
