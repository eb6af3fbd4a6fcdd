"""Ends a local Ray when the process it was started for is gone: `python ray_watch.py FOLDER PID`.

When a driver is killed with signal 9, Ray's main processes end with it, but its agents stay for a minute and its files
for good (seen in Ray 2.60). Run as a script, so that it needs nothing but Python's own library.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

EVERY_S = 0.5
LOOK_EVERY = 10  # times that; a look goes through all processes of the machine
TRIES = 20  # workers whose Ray has ended may write their last lines for a while

Family = dict[int, str]  # process id -> start time, which tells a process from a later one with the same id


def family_of(folder: Path) -> Family:
    """The processes with this session's folder in their command line, the name occurs nowhere else, and all that they
    have started: Ray's agents and workers overwrite their command lines."""
    parents: dict[int, int] = {}
    starts: Family = {}
    front: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            pid = int(entry.name)
            parents[pid], starts[pid] = int(fields[1]), fields[19].decode()
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                front.add(pid)
    found = set(front)
    while front:
        front = {pid for pid, parent in parents.items() if parent in front} - found
        found |= front
    return {pid: starts[pid] for pid in found}


def end_processes(folder: Path, keep: int | None = None, known: Family | None = None) -> None:
    """Kill the session's processes, those `known` from before among them; not this one and not the process `keep`."""
    doomed = {**(known or {}), **family_of(folder)}
    for pid in doomed.keys() - {os.getpid(), keep}:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode() == doomed[pid]:
                os.kill(pid, signal.SIGKILL)


def watch(folder: Path, parent: int) -> None:
    """Return once the parent has gone and nothing of its Ray is left."""
    known: Family = {}
    number = 0
    while os.getppid() == parent:
        if number % LOOK_EVERY == 0 or number < LOOK_EVERY:  # at first often: Ray is starting
            known.update(family_of(folder))
        number += 1
        time.sleep(EVERY_S)
    for _ in range(TRIES):
        end_processes(folder, known=known)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(EVERY_S)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
