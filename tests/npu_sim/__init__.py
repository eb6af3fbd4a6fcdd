"""The real torch_npu on a machine without an NPU, for tests.

`start()` loads a stub CANN runtime, imports torch_npu over it and pushes the simulator's dispatch mode. It
has to run before transformers is imported, which imports torch_npu as soon as it finds it. What stays real:
torch_npu's operator schemas, argument checks, shape functions, device strings, streams, allocator, and its
graph-capture code. What is not: speed, numerics of the NPU kernels, FRACTAL_NZ storage, HCCL (collectives
run over gloo).
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from npu_sim.install import Unavailable, ensure

__all__ = ["Unavailable", "current", "ensure", "start"]

_simulator: Any = None


def start(devices: int = 1) -> Any:
    """The process's Simulator, started on the first call. Raises Unavailable with the reason."""
    global _simulator
    if _simulator is not None:
        return _simulator
    if "torch_npu" in sys.modules:
        raise Unavailable("torch_npu was imported before the simulation started")
    # Level 1 as on hardware: calls of the launch thread come late, and capture refuses level 2.
    os.environ |= {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "NPU_SIM_DEVICES": str(devices),
        "TASK_QUEUE_ENABLE": os.environ.get("TASK_QUEUE_ENABLE", "1"),
    }
    wheel, stub = ensure()
    sys.path.append(str(wheel))
    from npu_sim.runtime import Runtime

    runtime = Runtime(stub)
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"torch_npu does not load over the stub runtime: {error}") from error
    from npu_sim import attention, kernels, quant_kernels  # noqa: F401 - registers the CPU kernels of the npu:: operators
    from npu_sim.simulator import Simulator

    _simulator = Simulator(runtime)
    _simulator.__enter__()
    _in_every_thread(_simulator)
    return _simulator


def current() -> Any:
    """The running Simulator."""
    if _simulator is None:
        raise RuntimeError("npu_sim.start() has not been called")
    return _simulator


def _in_every_thread(mode: Any) -> None:
    """Dispatch modes belong to a thread; push this one in threads started from now on, too."""
    run = threading.Thread.run

    def run_simulated(self: threading.Thread) -> None:
        mode.runtime.mark_thread()
        with mode:
            run(self)

    threading.Thread.run = run_simulated
