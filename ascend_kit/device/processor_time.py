"""Processor time of this machine while something is measured: ours, and what other processes took meanwhile.

From Linux's counters, read at the start and at the end; a process of ours is counted with all that it has started.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
SHORTEST_S = 0.5  # the counters go on in hundredths of a second, and a short block is mostly their rounding
LONGEST_S = 5.0  # what began longer ago says little of now
COLUMNS = ("cpu_cores", "own_cpu_cores", "other_cpu_cores")


class ProcessorMeter:
    """Counts during a with block, on the cores that this process may use. `pids` are processes of ours that this one
    has not started; None where ours are not all known, and nothing can be told. A block shorter than `SHORTEST_S` is
    told together with those of `before` that began within `LONGEST_S`, and the time between them."""

    def __init__(self, pids: Iterable[int] | None = (), before: ProcessorMeter | None = None) -> None:
        self._roots = None if pids is None or not (PROC / "stat").exists() else {os.getpid(), *pids}
        self._starts = before._starts[-64:] if before is not None and before._roots == self._roots else []

    def __enter__(self) -> ProcessorMeter:
        self._starts.append(_read(self._roots or set()))
        return self

    def __exit__(self, *_: object) -> None:
        self._end = _read(self._roots or set())

    def columns(self) -> dict[str, float | int | None]:
        """Cores that may be used, and how many of them we and others kept busy on average (0 to all of them).

        Others' is the busy time less ours: the kernel and guests beside this machine (steal) count among them. None
        outside Linux and where all that can be told is shorter than `SHORTEST_S`.
        """
        *earlier, start = self._starts
        if self._end[0] - start[0] < SHORTEST_S:
            ages = ((self._end[0] - one[0], one) for one in reversed(earlier))
            start = next((one for age, one in ages if SHORTEST_S <= age <= LONGEST_S), start)
        wall_s, busy_s, own_s = (after - before for before, after in zip(start, self._end, strict=True))
        if self._roots is None or wall_s < SHORTEST_S:
            return dict.fromkeys(COLUMNS)
        return dict(zip(COLUMNS, (len(_cores()), own_s / wall_s, max(0.0, busy_s - own_s) / wall_s), strict=True))


class Process(NamedTuple):
    """What /proc says of one: who started it, whose session it is in, seconds of it and its ended children."""

    parent: int
    session: int
    cpu_s: float


def processes() -> dict[int, Process]:
    """Every process of this machine by its number."""
    found = {}
    for entry in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            found[int(entry.name)] = Process(int(fields[1]), int(fields[3]), sum(map(int, fields[11:15])) / _HZ)
    return found


def own_processes(roots: Iterable[int], every: dict[int, Process]) -> set[int]:
    """`roots`, all that they have started, and what is left in a session that one of these leads: a server's workers
    stay in its session when their parent has ended."""
    own, new = set[int](), every.keys() & set(roots)
    while new:
        own |= new
        new = {pid for pid, one in every.items() if one.parent in own or one.session in own} - own
    return own


def _read(roots: set[int]) -> tuple[float, float, float]:
    """The time, and seconds that the cores were busy and that ours ran; without `roots` nothing is read."""
    every = processes() if roots else {}
    own_s = sum(every[pid].cpu_s for pid in own_processes(roots, every))
    return time.perf_counter(), _busy_s() if roots else 0.0, own_s


def _busy_s() -> float:
    cores = {f"cpu{number}" for number in _cores()}
    lines = (line.split() for line in (PROC / "stat").read_text().splitlines())
    # user, nice, system, irq, softirq, steal: less idle and iowait; guests are in user.
    return sum(sum(map(int, [*line[1:4], *line[6:9]])) for line in lines if line[:1] and line[0] in cores) / _HZ


def _cores() -> set[int]:
    """Those of all threads together: OpenMP may have bound each to one."""
    cores = set[int]()
    for thread in (PROC / "self" / "task").iterdir():
        with contextlib.suppress(OSError):
            cores |= os.sched_getaffinity(int(thread.name))
    return cores


_HZ = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
