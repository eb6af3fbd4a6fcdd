"""torch_npu's launch queue: level 1 launches from a thread of its own, 0 in the caller's, 2 refuses captures.

In an interactive session torch_npu sets 0 when it is imported, whatever was asked for, and leaves that to children.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "TASK_QUEUE_ENABLE"


def level_set() -> str:
    """The level that this process's environment asks for."""
    return os.environ.get(VARIABLE, "1")


def level_for_worker() -> str:
    """The level a process of its own should have: what was asked for, but not the 0 of an interactive session."""
    return "1" if level_set() == "0" else level_set()


def check_level(wanted: str) -> None:
    """RuntimeError when torch_npu was imported here and has changed the level."""
    if "torch_npu" in sys.modules and level_set() != wanted:
        raise RuntimeError(f"torch_npu runs with {VARIABLE}={level_set()} although {wanted} was set before its import")
