"""What each card did during a stretch of work: requests, tokens, busy time and peak memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

COUNTERS = ("requests", "output_tokens", "restarts", "busy_s")


def cards_of(engine: Any) -> list[dict[str, Any]]:
    """One row per card with counters since load and memory in bytes; empty for an engine that keeps none.

    The cards of one replica share its requests and tokens, and are busy together. `busy_s` is the time in steps,
    as the replica's process sees it; one card in this process keeps no such account and has None, as it has no
    count of requests.
    """
    stats = engine.stats()
    if "replicas" not in stats:
        if "output_tokens" not in stats:
            return []
        device = engine.device
        return [_row(f"{device.kind} {device.index or 0}", 0, stats["output_tokens"], device.peak_memory_bytes())]
    return [
        _row(
            name,
            row["replica"],
            row["output_tokens"],
            row["peak_memory_bytes"] / row["cards"],
            requests=row["finished"],
            restarts=row["restarts"],
            busy_s=row["busy_s"],
        )
        for row in stats["replicas"]
        for name in row["card_names"]
    ]


class CardMeter:
    """Starts counting, and new peaks of memory, when it is made."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        engine.device.reset_peak_memory()
        self._before, self._start = cards_of(engine), time.perf_counter()

    def rows(self) -> list[dict[str, Any]]:
        """One row per card: what was counted since the start, `wall_s` since then, and `busy_share` of it (0..1)."""
        wall_s = time.perf_counter() - self._start
        return [_since(old, now, wall_s) for old, now in zip(self._before, cards_of(self._engine), strict=True)]


def total_load(rows: pandas.DataFrame) -> pandas.DataFrame:
    """One row per card over all stretches: sums, the share of the whole time that was busy, the highest peak, GiB."""
    import pandas

    if rows.empty:
        return rows
    totals = []
    for card, part in rows.groupby("card", sort=False):
        wall_s, busy = part["wall_s"].sum(), part["busy_share"]
        totals.append(
            {
                "card": card,
                "replica": ", ".join(map(str, sorted(set(part["replica"])))),
                "requests": part["requests"].sum(min_count=1),
                "output_tokens": part["output_tokens"].sum(),
                "measured_s": wall_s,
                "busy_share": None if bool(busy.isna().all()) else (busy * part["wall_s"]).sum() / wall_s,
                "peak_memory_gib": part["peak_memory_bytes"].max() / 2**30,
                "restarts": part["restarts"].sum(),
            }
        )
    return pandas.DataFrame(totals)


def _since(old: dict[str, Any], now: dict[str, Any], wall_s: float) -> dict[str, Any]:
    counted = {name: None if now[name] is None else now[name] - old[name] for name in COUNTERS}
    busy_s = counted.pop("busy_s")
    row = {name: value for name, value in now.items() if name != "busy_s"}
    return {**row, **counted, "wall_s": wall_s, "busy_share": None if busy_s is None else busy_s / wall_s}


def _row(
    card: str,
    replica: int,
    output_tokens: int,
    peak_memory_bytes: float,
    *,
    requests: int | None = None,
    restarts: int = 0,
    busy_s: float | None = None,
) -> dict[str, Any]:
    return {
        "card": card,
        "replica": replica,
        "requests": requests,
        "output_tokens": output_tokens,
        "restarts": restarts,
        "busy_s": busy_s,
        "peak_memory_bytes": int(peak_memory_bytes),
    }
