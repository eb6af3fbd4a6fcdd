"""Reads what `npu-smi` prints: the `info` table, "key : value" listings (`-t usages` and others), `-t topo`.

Columns are found through the header words, so that the extra Phy-ID column of Atlas A3, wider tables of
newer drivers, missing columns and "-" or "NA" values are all accepted. HBM-Usage is the memory that
matters: on 910B the Memory-Usage column reads 0 / 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

IDLE_HBM_MB = 3600  # an idle 64 GB card shows about 3.2-3.5 GB in use


@dataclass(frozen=True)
class Chip:
    """One die of the `npu-smi info` table; memory in MB as printed, None where the tool prints no number."""

    npu: int
    chip: int
    name: str
    health: str
    bus_id: str = ""
    phy_id: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    aicore_percent: float | None = None
    hbm_used_mb: int | None = None
    hbm_total_mb: int | None = None

    @property
    def is_healthy(self) -> bool:
        return self.health.upper() == "OK"


@dataclass(frozen=True)
class SmiProcess:
    """A row of the process table; the name may be empty, and `pid` is the host's, not the container's."""

    npu: int
    chip: int
    pid: int
    name: str
    memory_mb: int | None


@dataclass(frozen=True)
class SmiInfo:
    version: str | None
    chips: tuple[Chip, ...]
    processes: tuple[SmiProcess, ...]


@dataclass(frozen=True)
class Topology:
    """Links between NPUs by their printed index ("HCCS", "PIX", "SYS", ...), and the CPUs near each."""

    links: dict[tuple[int, int], str] = field(default_factory=dict)
    cpu_affinity: dict[int, str] = field(default_factory=dict)

    def pairs_without(self, kind: str) -> list[tuple[int, int]]:
        """Pairs (a < b) not joined by the kind of link named."""
        return sorted(pair for pair, link in self.links.items() if pair[0] < pair[1] and link != kind)


def parse_info(text: str) -> SmiInfo:
    """`npu-smi info` -> chips and processes; ValueError when the text is not that table."""
    version = re.search(r"npu-smi\s+(\S+)", text)
    rows = [_cells(line) for line in text.splitlines() if line.lstrip().startswith("|")]
    first_header, second_header, process_header = None, None, None
    upper: dict[str, str] = {}
    chips: list[Chip] = []
    processes: list[SmiProcess] = []
    for cells in rows:
        joined = " ".join(cells)
        if "Process id" in joined:
            process_header = cells
        elif cells[0].startswith("NPU") and "Health" in joined:
            first_header = cells
        elif cells[0].startswith("Chip") and "Bus-Id" in joined:
            second_header = cells
        elif process_header:
            processes += _process_row(process_header, cells)
        elif first_header and second_header and len(cells) >= 3:
            if ":" not in cells[1]:  # health; a bus id always has colons
                upper = _by_header(first_header, cells)
            else:
                chips.append(_chip(upper, _by_header(second_header, cells)))
    if not first_header or not second_header:
        start = text.strip().splitlines()[0][:80] if text.strip() else "nothing"
        raise ValueError(f"not an `npu-smi info` table: no NPU and Chip header rows (it starts with: {start})")
    return SmiInfo(version.group(1) if version else None, tuple(chips), tuple(processes))


def parse_key_values(text: str) -> list[dict[str, str]]:
    """Lines of `Key : value` -> one dict per chip; a new block begins where a key comes again.

    Keys stay as printed ("HBM Usage Rate(%)"); values are stripped strings. Lines without a colon are
    skipped. A header given once ("NPU ID" and "Chip Count" before several chips) is copied into each block.
    """
    blocks: list[dict[str, str]] = []
    current: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or not key:
            continue
        if key in current:
            blocks.append(current)
            current = {} if key == "NPU ID" else {k: current[k] for k in ("NPU ID", "Chip Count") if k in current}
        current[key] = value
    return [*blocks, current] if current else blocks


def parse_usages(text: str) -> list[dict[str, float | None]]:
    """`npu-smi info -t usages` -> per chip: npu, chip, hbm_capacity_mb, hbm_usage_percent, ...

    A key the card does not print is None; small edge chips print "Memory ..." in place of "HBM ...".
    """
    names = {
        "npu": ("NPU ID",),
        "chip": ("Chip ID",),
        "hbm_capacity_mb": ("HBM Capacity(MB)", "Memory Capacity(MB)"),
        "hbm_usage_percent": ("HBM Usage Rate(%)", "Memory Usage Rate(%)"),
        "hbm_bandwidth_percent": ("HBM Bandwidth Usage Rate(%)", "Memory Bandwidth Usage Rate(%)"),
        "aicore_percent": ("Aicore Usage Rate(%)",),
        "aivector_percent": ("Aivector Usage Rate(%)",),
        "aicpu_percent": ("Aicpu Usage Rate(%)",),
        "ctrlcpu_percent": ("Ctrlcpu Usage Rate(%)",),
        "npu_percent": ("NPU Utilization(%)",),
    }
    return [
        {name: next((_number(block[key]) for key in keys if key in block), None) for name, keys in names.items()}
        for block in parse_key_values(text)
    ]


def parse_topo(text: str) -> Topology:
    """`npu-smi info -t topo` -> links and CPU affinity; empty where the driver prints no matrix."""
    columns: list[int] = []
    links: dict[tuple[int, int], str] = {}
    affinity: dict[int, str] = {}
    for line in text.splitlines():
        words = line.split()
        if not columns and re.match(r"(Phy-ID|NPU)\d+$", words[0] if words else ""):
            columns = [int(re.sub(r"\D", "", word)) for word in words if re.match(r"(Phy-ID|NPU)\d+$", word)]
        elif columns and words and re.match(r"(Phy-ID|NPU)\d+$", words[0]):
            row = int(re.sub(r"\D", "", words[0]))
            links |= {(row, column): word for column, word in zip(columns, words[1:], strict=False) if column != row}
            if len(words) > len(columns) + 1:
                affinity[row] = words[len(columns) + 1]
    return Topology(links, affinity)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _by_header(header: list[str], cells: list[str]) -> dict[str, str]:
    """Pair header words with value words cell by cell; "3335 / 65536" counts as one word."""
    values: dict[str, str] = {}
    for names, cell in zip(header, cells, strict=False):
        words = re.sub(r"\s*/\s*", "/", cell).split()
        values |= dict(zip(names.split(), words, strict=False))
    return values


def _chip(upper: dict[str, str], lower: dict[str, str]) -> Chip:
    used, _, total = lower.get("HBM-Usage(MB)", lower.get("Memory-Usage(MB)", "")).partition("/")
    phy_id = _number(lower.get("Phy-ID", lower.get("Device", "")))
    return Chip(
        npu=int(_number(upper.get("NPU", "")) or 0),
        chip=int(_number(lower.get("Chip", "")) or 0),
        name=upper.get("Name", ""),
        health=upper.get("Health", "unknown"),
        bus_id=lower.get("Bus-Id", ""),
        phy_id=None if phy_id is None else int(phy_id),
        power_w=_number(upper.get("Power(W)", "")),
        temperature_c=_number(upper.get("Temp(C)", "")),
        aicore_percent=_number(lower.get("AICore(%)", "")),
        hbm_used_mb=_whole(used),
        hbm_total_mb=_whole(total),
    )


def _process_row(header: list[str], cells: list[str]) -> list[SmiProcess]:
    values = dict(zip((name.lower() for name in header), cells, strict=False))
    pid = values.get("process id", "")
    if not pid.isdigit():  # "No running processes found in NPU 0"
        return []
    where = [int(word) for word in cells[0].split() if word.isdigit()] + [0, 0]
    return [
        SmiProcess(
            where[0], where[1], int(pid), values.get("process name", ""), _whole(values.get("process memory(mb)", ""))
        )
    ]


def _number(text: str) -> float | None:
    match = re.fullmatch(r"-?\d+(\.\d+)?", text.strip())
    return float(match.group()) if match else None


def _whole(text: str) -> int | None:
    number = _number(text)
    return None if number is None else int(number)
