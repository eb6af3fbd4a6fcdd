"""Which measurements other processes of the machine may have slowed, as a caution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ascend_kit.device.meters import COLUMNS
from ascend_kit.messages import Finding, say

# Of the cores. Measured by benchmarks/busy_machine.py on two of them: others that took 6 to 12 % cost 26 % of the speed
# in the median, those below 6 % cost 14 %, and quiet repeats lie within -17 and +11 %. A sixteenth of two cores is over
# half a second six ticks of the kernel's counters, above their rounding.
SHARE = 1 / 16
MOST_NAMES = 6


def is_disturbed(row: dict[str, Any]) -> bool:
    """Whether others took more than `SHARE` of the cores. Beside a card they cost nothing while cores are idle: there
    only where less than that share was left, too. False where it was not counted."""
    cores, own, other = (row.get(name) or 0 for name in COLUMNS)
    return other > SHARE * cores and (row.get("device_kind") == "cpu" or own + other > (1 - SHARE) * cores)


def _place(row: dict[str, Any]) -> str:
    """Requests per second where they come by the clock, else requests in flight; prompt and output length."""
    rate = row.get("rate")
    load = row["concurrency"] if rate is None or rate != rate else rate
    return f"{load:g}/{row['prompt_len']:g}/{row['output_len']:g}"


def disturbance(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Finding]:
    """A caution that names the points, the worst first, each with the name given for its row; nothing without any."""
    found = [(name, row) for name, row in rows if row.get("status") == "ok" and is_disturbed(row)]
    if not found:
        return []
    found.sort(key=lambda named: -named[1]["other_cpu_cores"])
    points = list(dict.fromkeys((name, _place(row)) for name, row in found))
    places: dict[str, list[str]] = {}
    for name, place in points[:MOST_NAMES]:
        places.setdefault(name, []).append(place)
    named = "; ".join(f"{name} {', '.join(each)}" for name, each in places.items())
    worst = found[0][1]
    return [say("sweep.disturbed", "caution", count=len(found), most=float(worst["other_cpu_cores"]),
                cores=int(worst["cpu_cores"]),
                points=named + (" …" if len(points) > MOST_NAMES else ""))]  # fmt: skip
