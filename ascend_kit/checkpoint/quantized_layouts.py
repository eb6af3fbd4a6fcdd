"""What a quantised checkpoint says about itself, and its linears in one common form.

Read are compressed-tensors (`quantization_config` in config.json; also what we write), msModelSlim
(`quant_model_description*.json`, or the same inside config.json), GPTQ and AWQ. 4-bit linears have the form of
int4_layouts; whatever is on disk, an int8 linear `X` appears as

    X.weight        int8     [out, in]
    X.weight_scale  float32  [out]          weight = X.weight * X.weight_scale[:, None]
    X.bias          as stored, if any

    X.input_scale, X.input_offset  float32 [1], static activations only:  q = round(x / scale + offset), -128..127

Symmetric int8 weights, one scale per output channel. Everything else (fp8, transforms, 4-bit weights with 8-bit
activations) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.compressed_tensors import present_compressed_tensors
from ascend_kit.checkpoint.int4_layouts import present_awq, present_gptq
from ascend_kit.checkpoint.msmodelslim import present_msmodelslim
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource, read_json

GPTQ_FILE, MSMODELSLIM_PATTERN = "quantize_config.json", "quant_model_description*.json"
PRESENT = {"compressed-tensors": present_compressed_tensors, "gptq": present_gptq, "awq": present_awq}


@dataclass(frozen=True)
class QuantizationInfo:
    """Which linears are stored as int8 or in 4 bits. Names are module names without `.weight`."""

    layout: str = "none"  # none | compressed-tensors | gptq | awq | msmodelslim
    schemes: Mapping[str, str] = field(default_factory=dict)  # linear -> w8a8, w8a8_static, w8a16 or w4a16

    def scheme(self, linear: str) -> str:
        """`none`, or the scheme's name."""
        return self.schemes.get(linear, "none")

    @property
    def summary(self) -> str:
        """none, the only scheme that occurs, or mixed."""
        kinds = set(self.schemes.values())
        return kinds.pop() if len(kinds) == 1 else ("mixed" if kinds else "none")


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
    result = dict(sources)
    if files:
        description = read_json(files[0], "msModelSlim's description")
        return result, QuantizationInfo("msmodelslim", present_msmodelslim(files[0], description, config, result))
    if not stored:
        return result, QuantizationInfo()
    if is_msmodelslim:
        return result, QuantizationInfo("msmodelslim", present_msmodelslim(where, stored, config, result))
    method = str(stored.get("quant_method"))
    if method not in PRESENT:
        raise CheckpointError(
            f"{where}: quant_method {stored.get('quant_method')!r} is not supported; readable are "
            f"{', '.join(PRESENT)} and msModelSlim, or start from the float model"
        )
    return result, QuantizationInfo(method, PRESENT[method](where, stored, result))
