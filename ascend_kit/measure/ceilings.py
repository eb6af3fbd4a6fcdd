"""What this machine reaches when nothing is in the way: read bandwidth, matrix rates, cost of a launch.

Each figure is the median of several timed repeats after a warm-up, taken with every thread torch uses; the
samples are kept beside it. A dtype the device cannot multiply gives None, never a guess. About 2-4 s in all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ascend_kit.device.device import Device, select_device
from ascend_kit.model.config import DTYPES

if TYPE_CHECKING:
    from ascend_kit.params import Experiment

_SIZES = (512, 1024, 2048, 4096, 8192)
_REPEATS = 5
_LONG_ENOUGH_S = 0.02  # a sample this long makes clock resolution and launch cost negligible
_BUDGET_S = 0.6  # per figure


def measure_ceilings(
    device: Device, *, dtypes: Sequence[str] = ("bf16", "fp32", "int8"), buffer_bytes: int | None = None
) -> dict[str, Any]:
    """Measured ceilings of `device` as plain values, units in the names.

    `read_bytes_per_s` reads a buffer of `buffer_bytes` (default: large, so that memory and not a cache is
    measured; give the size of a small model's weights to get the rate at which *those* can be read).
    `<dtype>_flops_per_s` and `int8_ops_per_s` are square products; `launch_s` the cost of one
    operator that has next to nothing to compute.
    """
    device.make_current()
    large = 2**29 if device.kind == "cpu" else 2**30  # well above any cache, yet a small part of what is free
    size = buffer_bytes or min(large, device.free_memory_bytes() // 4)
    read = read_bandwidth(device, size)
    result: dict[str, Any] = {
        "device": device.name,
        "kind": device.kind,
        "threads": torch.get_num_threads(),
        "read_bytes_per_s": statistics.median(read),
        "read_buffer_bytes": size,
        "read_samples": read,
    }
    for name in dtypes:
        samples = matrix_rate(device, name)
        key = "int8_ops_per_s" if name == "int8" else f"{name}_flops_per_s"
        result[key] = statistics.median(samples) if samples else None
        result[f"{name}_samples"] = samples
    result["launch_s"] = statistics.median(launch_cost(device))
    return result


def device_ceilings(experiment: Experiment) -> dict[str, Any]:
    """`measure_ceilings` of the experiment's device, which this process opens."""
    return measure_ceilings(select_device(experiment.device, experiment.device_id))


@torch.inference_mode()
def read_bandwidth(device: Device, buffer_bytes: int, repeats: int = _REPEATS) -> list[float]:
    """Bytes per second of summing a float32 buffer, one value per repeat."""
    buffer = torch.ones(max(1, buffer_bytes // 4), dtype=torch.float32, device=device.torch_device)
    seconds = _sample(device, buffer.sum, repeats)
    return [buffer.numel() * 4 / s for s in seconds]


@torch.inference_mode()
def matrix_rate(device: Device, dtype: str, repeats: int = _REPEATS) -> list[float] | None:
    """FLOPs (or int8 operations) per second of a square product, at the largest size the time budget allows.

    None when the device cannot do it. Raises ValueError for an unknown dtype name.
    """
    if dtype not in (*DTYPES, "int8"):
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join([*DTYPES, 'int8'])}")
    best: list[float] | None = None
    for size in _SIZES:
        try:
            product = _int8_product(device, size) if dtype == "int8" else _float_product(device, size, dtype)
            seconds = _sample(device, product, repeats)
        except (RuntimeError, ImportError, AttributeError):
            return best
        samples = [2.0 * size**3 / s for s in seconds]
        if best is None or statistics.median(samples) > statistics.median(best):
            best = samples
        if 8 * statistics.median(seconds) * (repeats + 1) > _BUDGET_S:  # the next size costs eight times this one
            break
    return best


@torch.inference_mode()
def launch_cost(device: Device, repeats: int = _REPEATS) -> list[float]:
    """Seconds per operator of a chain of a decoder's usual kinds, on one token too narrow to cost anything
    else.
    """
    functional, width, rounds = torch.nn.functional, 32, 25
    weight = torch.randn(width, width, device=device.torch_device).to(torch.bfloat16)
    token, gain = weight[:1].contiguous(), weight[0].contiguous()

    def chain() -> None:
        value = token
        for _ in range(rounds):
            value = functional.rms_norm(value, (width,), gain)
            value = functional.linear(value, weight)
            value = functional.silu(value) * value

    return [s / (4 * rounds) for s in _sample(device, chain, repeats)]


def _float_product(device: Device, size: int, dtype: str) -> Callable[[], Any]:
    left = torch.randn(size, size, device=device.torch_device).to(DTYPES[dtype])
    return lambda: torch.nn.functional.linear(left, left)


def _int8_product(device: Device, size: int) -> Callable[[], Any]:
    """The engine's own int8 product, so that each backend brings the layout it wants."""
    from ascend_kit.device.ops import select_ops

    ops = select_ops(device.kind, True)
    # Random values: a product of constants draws less power and would flatter the clock of an accelerator.
    weight = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device.torch_device)
    scale = torch.ones(size, device=device.torch_device)
    packed = ops.pack_int8(weight)
    return lambda: ops.int8_matmul(weight, scale, packed, scale, None, torch.bfloat16)


def _sample(device: Device, call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds per call, one value per repeat; each repeat calls often enough to last `_LONG_ENOUGH_S`."""
    call()
    once = _timed(device, call, 1)
    calls = max(1, min(1000, math.ceil(_LONG_ENOUGH_S / max(once, 1e-7))))
    return [_timed(device, call, calls) for _ in range(repeats)]


def _timed(device: Device, call: Callable[[], Any], calls: int) -> float:
    device.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    device.synchronize()
    return (time.perf_counter() - start) / calls
