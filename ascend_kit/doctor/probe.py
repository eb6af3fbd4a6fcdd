"""Child process of the doctor: imports torch (and torch_npu), opens the device, prints what it saw."""

from __future__ import annotations

import json
import sys

from ascend_kit.doctor.stages import PREFIX


def probe(device_name: str) -> dict:
    """Versions, device name, memory in bytes and number of devices, as seen from inside a process."""
    import torch

    from ascend_kit.device.device import select_device

    device = select_device(device_name)
    return {
        "kind": device.kind,
        "index": device.index,
        "name": device.name,
        "versions": device.describe()["versions"],
        "count": 1 if device.kind == "cpu" else device.backend.device_count(),
        "free_bytes": device.free_memory_bytes(),
        "total_bytes": device.total_memory_bytes,
        "peak": device.peak.source if device.peak else None,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(PREFIX + json.dumps(probe(sys.argv[1] if len(sys.argv) > 1 else "auto")), flush=True)
