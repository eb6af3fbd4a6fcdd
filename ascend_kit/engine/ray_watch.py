"""Ends a local Ray that nobody needs any more or that has lost a part: `python ray_watch.py FOLDER PID`.

When a driver is killed with signal 9, Ray's main processes end with it, but its agents stay for a minute and its files
for good; when gcs_server is killed, agents stay for minutes (seen in Ray 2.60). FOLDER is that of the session, PID the
driver. A line on standard input is a JSON object of the processes whose end is that of the session; an empty one, like
the end of the input, ends it at once. Run so, this file needs nothing but Python's own library.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

CORE = ("gcs_server", "raylet")  # without them a session is of no use; raylet ends when one of its agents has
EVERY_S = 0.5
LOOK_EVERY = 10  # times that; a look goes through all processes of the machine
TRIES = 20  # workers whose Ray has ended may write their last lines for a while

Family = dict[int, str]  # process id -> start time, which tells a process from a later one with the same id


def family_of(folder: Path, named: tuple[str, ...] | None = None) -> Family:
    """The processes with this session's folder in their command line, the name occurs nowhere else, and all that they
    have started: Ray's agents and workers overwrite their command lines. Only those `named` so, where that is given."""
    names: dict[int, str] = {}
    parents: dict[int, int] = {}
    starts: Family = {}
    front: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(entry.name)
            names[pid], _, parent, starts[pid] = _stat(pid)
            parents[pid] = int(parent)
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                front.add(pid)
    found = set(front)
    while front:
        front = {pid for pid, parent in parents.items() if parent in front} - found
        found |= front
    return {pid: starts[pid] for pid in found if named is None or names[pid] in named}


def is_alive(pid: int, start: str) -> bool:
    """Whether this process still runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(OSError):
        _, state, _, started = _stat(pid)
        return state != "Z" and started == start
    return False


def end_processes(folder: Path, keep: int | None = None, known: Family | None = None) -> None:
    """Kill the session's processes, those `known` from before among them; not this one and not the process `keep`."""
    doomed = {**(known or {}), **family_of(folder)}
    for pid in doomed.keys() - {os.getpid(), keep}:
        with contextlib.suppress(OSError):
            if is_alive(pid, doomed[pid]):
                os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> tuple[str, str, str, str]:
    """Name, state, parent and start time."""
    head, _, tail = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], fields[0], fields[1], fields[19]


def watch(folder: Path, parent: int) -> None:
    """Return once the session is over and nothing of it is left."""
    known: Family = {}
    core: Family = {}
    number = 0
    while os.getppid() == parent and all(is_alive(*process) for process in core.items()):
        if number % LOOK_EVERY == 0 or number < LOOK_EVERY:  # at first often: Ray is starting
            known.update(family_of(folder))
        number += 1
        if select.select([sys.stdin], [], [], EVERY_S)[0]:
            line = sys.stdin.readline().strip()
            if not line:
                break
            core = {int(pid): start for pid, start in json.loads(line).items()}
    for _ in range(TRIES):
        end_processes(folder, known=known)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(EVERY_S)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
