"""What cards and processors do while something is measured, as the cards' tool and the kernel tell it.

The tool runs in a process of its own that writes to a file, which is read when the measurement is over: the measuring
process has neither a thread nor a pipe to look after. A CPU's energy is a counter of the kernel's (RAPL), read at the
start and at the end where that is allowed. Processor time, ours and what other processes took meanwhile, is from
Linux's counters, read at the start and at the end; a process of ours is counted with all that it has started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from ascend_kit.device.environment import VISIBLE
from ascend_kit.device.npu_smi import number, parse_info

INTERVAL_S = 1.0
MARK = "@@"
GPU_QUERY = "--query-gpu=index,power.draw,utilization.gpu,memory.used,temperature.gpu"
TOOLS = {"npu": ["npu-smi", "info"], "cuda": ["nvidia-smi", "--format=csv,noheader,nounits", GPU_QUERY]}
RAPL = Path("/sys/class/powercap")


class Reading(NamedTuple):
    """One card at one moment; None where the tool prints no number."""

    card: int
    power_w: float | None
    use_percent: float | None
    memory_mb: float | None
    temperature_c: float | None


class PowerMeter:
    """Watches `cards` (numbers as the tool has them) of a kind of device during a with block."""

    def __init__(self, kind: str, cards: Sequence[int], interval_s: float | None = None, rapl: Path = RAPL) -> None:
        self._kind, self._cards, self._interval_s, self._rapl = kind, set(cards), interval_s or INTERVAL_S, rapl
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> PowerMeter:
        self._joules = rapl_joules(self._rapl) if self._kind == "cpu" else {}
        self._start_s = time.perf_counter()
        name, *arguments = TOOLS.get(self._kind, [""])
        if self._cards and name and shutil.which(name):
            # It ends by itself when this process is gone, however it went.
            loop = f'while kill -0 {os.getpid()} 2>/dev/null; do echo {MARK}; "$0" "$@"; sleep {self._interval_s}; done'
            self._output = tempfile.TemporaryFile()  # closed at the end of the block
            self._process = subprocess.Popen(
                ["sh", "-c", loop, name, *arguments], stdin=subprocess.DEVNULL, stdout=self._output,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._wall_s = time.perf_counter() - self._start_s
        after = rapl_joules(self._rapl) if self._joules else {}
        self._used_j = [(now - self._joules[name][0]) % size for name, (now, size) in after.items()]
        self._moments = self._stop()

    def columns(self, output_tokens: int) -> dict[str, float | int | str | None]:
        """Mean power of all cards together, mean use, highest memory and temperature of a card, and energy per output
        token; None where nothing says so, as where the block was too short for two readings."""
        moments = self._moments if len(self._moments) > 1 else []
        readings = [reading for moment in moments for reading in moment]
        use, memory, heat = (_known(readings, name) for name in ("use_percent", "memory_mb", "temperature_c"))
        watts = [sum(power) for moment in moments if len(power := _known(moment, "power_w")) == len(moment)]
        power_w = statistics.fmean(watts) if watts else sum(self._used_j) / self._wall_s if self._used_j else None
        energy_j = None if power_w is None else power_w * self._wall_s
        return {
            "energy_j_per_output_token": energy_j / output_tokens if energy_j is not None and output_tokens else None,
            "power_w": power_w,
            "card_use_percent": statistics.fmean(use) if use else None,
            "card_memory_mb": max(memory, default=None),
            "temperature_c": max(heat, default=None),
            "power_source": None if power_w is None else TOOLS[self._kind][0] if watts else "rapl",
        }

    def _stop(self) -> list[list[Reading]]:
        """Readings of our cards, moment by moment; moments that miss one are left out."""
        if self._process is None or self._output is None:
            return []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with self._output as file:
            file.seek(0)
            texts = file.read().decode(errors="replace").split(MARK)[1:]
        parse = npu_readings if self._kind == "npu" else gpu_readings
        moments = [[one for one in parse(text) if one.card in self._cards] for text in texts]
        return [moment for moment in moments if {one.card for one in moment} == self._cards]


def npu_readings(text: str) -> list[Reading]:
    """From the table of `npu-smi info`, by physical number where it has one; nothing from a table cut off."""
    try:
        chips = parse_info(text).chips
    except ValueError:
        return []
    return [
        Reading(chip.npu if chip.phy_id is None else chip.phy_id, chip.power_w, chip.aicore_percent, chip.hbm_used_mb,
                chip.temperature_c)
        for chip in chips
    ]  # fmt: skip


def gpu_readings(text: str) -> list[Reading]:
    """From lines of index, power, use, memory and temperature; "[N/A]" is no number."""
    lines = [[number(cell) for cell in line.split(",")] for line in text.splitlines()]
    return [Reading(int(line[0]), *line[1:]) for line in lines if len(line) == 5 and line[0] is not None]


def rapl_joules(folder: Path = RAPL) -> dict[str, tuple[float, float]]:
    """(joules so far, joules at which the counter starts again) of each processor; empty where they cannot be read."""
    try:
        zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        read = [
            [int((zone / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")] for zone in zones
        ]
        return {zone.name: (joules, size) for zone, (joules, size) in zip(zones, read, strict=True)}
    except (OSError, ValueError):
        return {}


def physical_cards(kind: str, indices: Sequence[int], env: Mapping[str, str]) -> list[int]:
    """The tool's numbers of cards that this process numbers from 0 over those it may see."""
    visible = env.get(VISIBLE.get(kind, ""), "").split(",")
    if not all(part.strip().isdigit() for part in visible):
        return list(indices)
    return [int(visible[index]) for index in indices if index < len(visible)]


def _known(readings: Sequence[Reading], name: str) -> list[float]:
    return [value for value in (getattr(one, name) for one in readings) if value is not None]


# --- processor time ---------------------------------------------------------------------------------------------------

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
