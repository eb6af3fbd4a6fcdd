"""How the self-test compares: relative errors, bounds from roundings, refusals as results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ascend_kit.device.device import Device
from ascend_kit.doctor.known_errors import explain
from ascend_kit.doctor.stages import OpCheck

ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def bound(dtype: torch.dtype, roundings: int) -> float:
    """Allowed error after so many roundings to `dtype`; float32 gets room for another summation order."""
    return max(roundings * ROUNDING[dtype], 2e-5 if dtype == torch.float32 else 0.0)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value; infinite for a NaN or another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found.detach().cpu().float() - wanted.float()).abs().max().item()
    return float("inf") if math.isnan(difference) else difference / max(wanted.float().abs().max().item(), 1e-30)


class Comparer:
    """Runs comparisons of one op table on one device, turning exceptions into failed results."""

    def __init__(self, device: Device, ops: ModuleType, stage: str, seed: int = 0) -> None:
        self.device, self.ops, self.stage = device, ops, stage
        self.generator = torch.Generator().manual_seed(seed)

    def values(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal values rounded to `dtype`, as float32 on the CPU."""
        return torch.randn(*shape, generator=self.generator).to(dtype).float()

    def place(self, *tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Copies on the device; integers keep their type."""
        return [
            tensor.to(self.device.torch_device, dtype if tensor.is_floating_point() else tensor.dtype).clone()
            for tensor in tensors
        ]

    def check(self, op: str, case: str, tolerance: float, measure: Callable[[], float]) -> OpCheck:
        """`measure` returns the error; ok when it is within `tolerance`."""
        start = time.perf_counter()
        try:
            error = measure()
            self.device.synchronize()
        except Exception as failure:  # any refusal of a kernel is a result of this test, to be shown with the others
            known = explain(str(failure))
            text = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            detail = f"{text} [{known[0].key}: {known[0].meaning}]" if known else text
            return OpCheck(self.stage, op, case, "fail", None, tolerance, time.perf_counter() - start, detail)
        status = "ok" if error <= tolerance else "fail"
        return OpCheck(self.stage, op, case, status, error, tolerance, time.perf_counter() - start)
