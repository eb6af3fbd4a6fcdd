"""Environment variables that decide what a process sees of the cards, and how torch_npu launches on them.

Its launch queue: level 1 launches from a thread of its own, 0 in the caller's, 2 refuses captures.

In an interactive session torch_npu sets 0 when it is imported, whatever was asked for, and leaves that to children.
"""

from __future__ import annotations

import os
import sys

VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}  # the cards, by kind of device
TASK_QUEUE = "TASK_QUEUE_ENABLE"


def level_set() -> str:
    """The level that this process's environment asks for."""
    return os.environ.get(TASK_QUEUE, "1")


def level_for_worker() -> str:
    """The level a process of its own should have: what was asked for, but not the 0 of an interactive session."""
    return "1" if level_set() == "0" else level_set()


def check_level(wanted: str) -> None:
    """RuntimeError when torch_npu was imported here and has changed the level."""
    if "torch_npu" in sys.modules and level_set() != wanted:
        raise RuntimeError(
            f"torch_npu runs with {TASK_QUEUE}={level_set()} although {wanted} was set before its import"
        )
