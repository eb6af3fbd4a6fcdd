"""The same load on the same engine over versions: what has become slower, and what changed in between."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.compare import Run
from ascend_kit.files import Table, hash_value
from ascend_kit.identity import MUST_AGREE, Identity
from ascend_kit.measure.rows import RATE, Point, key_of
from ascend_kit.show import drawing
from ascend_kit.show.drawing import RED
from ascend_kit.show.tables import cell_text
from ascend_kit.stages import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_CHANGE = 0.03  # a rate that fell by less is no regression, whatever its repeats say


@dataclass
class Repeated:
    """What one run measured of one load under one engine."""

    run: Run
    record: RunRecord
    identity: Identity
    at: str
    rates: list[float] = field(default_factory=list)


def history(runs: Iterable[Run]) -> Table:
    """The same load on the same engine over versions of CANN, driver, adapter and this package, oldest first.

    A series holds runs whose load and whose identity agree, see MUST_AGREE; of the loads that the same runs share it
    is the heaviest. `change, %` compares with the run before; `regression` says that all repeats are slower than all
    of that run's, by more than 3 %.
    """
    import pandas

    found: dict[tuple[str, tuple], dict[str, Repeated]] = {}
    for run in runs:
        record, identities = RunRecord.read(run.folder.path), run.folder.identities()
        for row in run.sweep:
            if identity := identities.get(row.get("identity", "")):
                point = Point(*key_of(row))
                entry = Repeated(run, record, identity, point.place)
                load = (point.concurrency, point.prompt_len, point.output_len, repr(point.load_parts))
                found.setdefault((_history_key(identity), load), {}).setdefault(run.name, entry).rates.append(row[RATE])
    lines: list[dict[str, Any]] = []
    told: set[tuple[str, str]] = set()
    for (key, _), entries in sorted(found.items(), key=lambda item: (len(item[1]), item[0][1]), reverse=True):
        names = {(key, name) for name in entries}
        if len(entries) > 1 and names - told:
            told |= names
            ordered = sorted(entries.values(), key=lambda entry: entry.record.created or "")
            series = len({line["series"] for line in lines}) + 1
            pairs = zip([None, *ordered], ordered, strict=False)
            lines += [{"series": series, **_line_of_history(now, before)} for before, now in pairs]
    return pandas.DataFrame(lines)


def _history_key(identity: Identity) -> str:
    return hash_value([getattr(identity, part) for part in MUST_AGREE["history"]])


def _line_of_history(now: Repeated, before: Repeated | None) -> dict[str, Any]:
    row = {
        "at": now.at,
        "run": now.run.name,
        "created": (now.record.created or "")[:16].replace("T", " "),
        "tokens/s": statistics.fmean(now.rates),
    }
    if before is None:
        return row | {"change, %": None, "regression": None, "what changed": ""}
    change = row["tokens/s"] / statistics.fmean(before.rates) - 1
    commits = [str(one.record.source.get("commit"))[:10] for one in (before, now)]
    changed = before.identity.differences(now.identity, "line")
    changed += [f"commit: {commits[0]} -> {commits[1]}"] if commits[0] != commits[1] else []
    is_slower = change < -LEAST_CHANGE and max(now.rates) < min(before.rates)
    return row | {"change, %": 100 * change, "regression": is_slower, "what changed": "; ".join(changed)}


def history_chart(table: Table) -> Figure | None:
    """Output tokens/s of each run of a series, oldest first; regressions are red crosses."""
    if len(table) < 2:
        return None
    figure, ((axes,),) = drawing.make_grid(1, 1, height=3.6, width=8)
    names = table["series"].astype(str) + ": " + table["at"]
    looks = drawing.config_looks(names)
    for name, part in table.groupby(names, sort=True):
        places = range(1, len(part) + 1)
        texts = [f"{row['run']}: {cell_text(row['tokens/s'])}" for row in part.to_dict("records")]
        drawing.draw_points(axes, places, part["tokens/s"], texts, label=name, **looks[name])
        for x, y, is_slower in zip(places, part["tokens/s"], part["regression"], strict=True):
            if is_slower:
                axes.plot(x, y, "x", color=RED, markersize=14, markeredgewidth=3, label="regression")
    axes.set_xticks(range(1, table.groupby("series").size().max() + 1))
    axes.set_xlabel("run of the series, oldest first")
    drawing.value_axis(axes, "output tokens/s", log=False)
    return drawing.finish(figure, "History", f"{int(table['regression'].eq(True).sum())} regressions")
