"""Nominal ceilings of known cards, by the name the run-time reports."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ascend_kit.files import GIB


@dataclass(frozen=True)
class HardwarePeak:
    """Nominal ceilings of one card, for rooflines.

    `bf16_flops` and `int8_ops` per second, `bandwidth_bytes_per_s` of device memory, `memory_bytes` as sold,
    `link_bytes_per_s` one direction to the peers of the node (None: unknown). `certain` is False where the
    mapping from the run-time name to these figures rests on no primary source.
    """

    name: str
    bf16_flops: float
    int8_ops: float
    bandwidth_bytes_per_s: float
    memory_bytes: int
    source: str
    link_bytes_per_s: float | None = None
    certain: bool = True

    @property
    def is_ascend(self) -> bool:
        """Whether it is one of Huawei's, by its name here or at run time."""
        return re.match(r"(ASCEND)?910|A3DIE", _squeeze(self.name)) is not None


# Ascend: Huawei's own performance model, Ascend/msmodeling tensor_cast/device.py. Its bf16 figures equal cube
# cores x 8192 FLOP x clock (24 x 1.8 GHz, 20 x 1.8, 20 x 1.5); the advertised fp16 numbers are boost-clock
# peaks. Link: 196 GB/s per direction over the full HCCS mesh of an A2 node, 224 GB/s between A3 dies.
_GRADE = "Ascend/msmodeling tensor_cast/device.py, grade "
_NVIDIA = "NVIDIA data sheet, dense, "
PEAKS: dict[str, HardwarePeak] = {
    peak.name: peak
    for peak in (
        HardwarePeak("910B1", 353.9e12, 752e12, 1.6e12, 64 * GIB, _GRADE + "376T", 196e9, certain=False),
        HardwarePeak("910B2", 353.9e12, 752e12, 1.6e12, 64 * GIB, _GRADE + "376T", 196e9),
        HardwarePeak("910B2C", 353.9e12, 752e12, 1.6e12, 64 * GIB, _GRADE + "376T", 196e9, certain=False),
        HardwarePeak("910B3", 294.9e12, 626e12, 1.6e12, 64 * GIB, _GRADE + "313T", 196e9),
        HardwarePeak("910B4", 245.8e12, 560e12, 0.8e12, 32 * GIB, _GRADE + "280T, 32 GB", 196e9),
        HardwarePeak("910B4-1", 245.8e12, 560e12, 1.6e12, 64 * GIB, _GRADE + "280T", 196e9, certain=False),
        HardwarePeak("A3-die", 353.9e12, 752e12, 1.6e12, 64 * GIB, _GRADE + "A3, per die", 224e9),
        HardwarePeak("H200", 989.4e12, 1978.9e12, 4.8e12, 141 * 10**9, _NVIDIA + "H200", 450e9),
        HardwarePeak("H100-SXM", 989.4e12, 1978.9e12, 3.35e12, 80 * GIB, _NVIDIA + "H100", 450e9),
        HardwarePeak("H100-PCIe", 756e12, 1513e12, 2.0e12, 80 * GIB, _NVIDIA + "H100"),
        HardwarePeak("A100-80GB", 312e12, 624e12, 1.935e12, 80 * GIB, _NVIDIA + "A100"),
        HardwarePeak("A100-40GB", 312e12, 624e12, 1.555e12, 40 * GIB, _NVIDIA + "A100"),
    )
}

# What a run-time name (upper case, without blanks, '_' and '-') holds where that is more than the name above.
_PATTERNS = {
    "A3-die": r"ASCEND91093|A3DIE",
    "H100-SXM": r"H100.*HBM3|H100SXM",
    "A100-80GB": r"A100.*80GB",
    "A100-40GB": r"A100.*40GB",
}


def find_peak(device_name: str, memory_bytes: int | None = None) -> HardwarePeak | None:
    """Ceilings for a run-time device name such as `Ascend910B3`; None when unknown, never a guess.

    Memory decides where a name covers two products: a B4 with 64 GB is the B4-1, a bare `910B`
    with 32 GB is a B4.
    """
    key = _squeeze(device_name)
    longest_first = sorted(PEAKS, key=len, reverse=True)
    name = next((name for name in longest_first if re.search(_PATTERNS.get(name, _squeeze(name)), key)), None)
    is_large = memory_bytes is not None and memory_bytes > 48 * GIB
    if name == "910B4" and is_large:
        name = "910B4-1"
    if name is None and "ASCEND910B" in key and memory_bytes is not None and not is_large:
        name = "910B4"
    return PEAKS[name] if name else None


def _squeeze(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name.upper())
