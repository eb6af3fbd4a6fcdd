"""Reads what `npu-smi` prints: the `info` table, and the links of `-t topo`.

Columns are found through the header words, so that the extra Phy-ID column of Atlas A3, wider tables of
newer drivers, missing columns and "-" or "NA" values are all accepted. HBM-Usage is the memory that
matters: on 910B the Memory-Usage column reads 0 / 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

IDLE_HBM_MB = 3600  # an idle 64 GB card shows about 3.2-3.5 GB in use
TOPO_HEAD = re.compile(r"(?:Phy-ID|NPU)(\d+)")


@dataclass(frozen=True)
class Chip:
    """One die of the `npu-smi info` table; memory in MB as printed, None where the tool prints no number."""

    npu: int
    chip: int
    name: str
    health: str
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


def parse_topo(text: str) -> dict[tuple[int, int], str]:
    """`npu-smi info -t topo` -> links between NPUs by their printed index ("HCCS", "PIX", "SYS", ...); empty where the
    driver prints no matrix."""
    columns: list[int] = []
    links: dict[tuple[int, int], str] = {}
    for words in map(str.split, text.splitlines()):
        if not words or not TOPO_HEAD.fullmatch(words[0]):
            continue
        numbers = [int(found[1]) for word in words if (found := TOPO_HEAD.fullmatch(word))]
        if columns:
            row = numbers[0]
            links |= {(row, column): word for column, word in zip(columns, words[1:], strict=False) if column != row}
        columns = columns or numbers
    return links


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
    return Chip(
        npu=_whole(upper.get("NPU", "")) or 0,
        chip=_whole(lower.get("Chip", "")) or 0,
        name=upper.get("Name", ""),
        health=upper.get("Health", "unknown"),
        phy_id=_whole(lower.get("Phy-ID", lower.get("Device", ""))),
        power_w=number(upper.get("Power(W)", "")),
        temperature_c=number(upper.get("Temp(C)", "")),
        aicore_percent=number(lower.get("AICore(%)", "")),
        hbm_used_mb=_whole(used),
        hbm_total_mb=_whole(total),
    )


def _process_row(header: list[str], cells: list[str]) -> list[SmiProcess]:
    values = dict(zip((name.lower() for name in header), cells, strict=False))
    pid = values.get("process id", "")
    if not pid.isdigit():  # "No running processes found in NPU 0"
        return []
    npu, chip, *_ = [*(int(word) for word in cells[0].split() if word.isdigit()), 0, 0]
    memory_mb = _whole(values.get("process memory(mb)", ""))
    return [SmiProcess(npu, chip, int(pid), values.get("process name", ""), memory_mb)]


def number(text: str) -> float | None:
    """The number that a text is; None where a tool prints a dash, NA or the like."""
    match = re.fullmatch(r"-?\d+(\.\d+)?", text.strip())
    return float(match.group()) if match else None


def _whole(text: str) -> int | None:
    found = number(text)
    return None if found is None else int(found)
