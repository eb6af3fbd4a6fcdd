"""A profile for people: what bounds each phase in a sentence, its operators in a table and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascend_kit.files import Table
from ascend_kit.measure.rows import load_profile
from ascend_kit.messages import Finding, phrase, say
from ascend_kit.show.drawing import PALETTE, finish, known, make_grid, value_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ascend_kit.results import RunFolder

LONGEST = 9  # operators drawn by name
COLOURS = dict(zip(("product", "attention", "copy", "communication", "other"), PALETTE, strict=False))
HOST = "host gap"
COLUMNS = ["phase", "operator", "kind", "ms_per_step", "share", "calls_per_step"]


def profile_findings(folder: RunFolder) -> list[Finding]:
    """What bounds prefill and decode, with the evidence; nothing where nothing was profiled."""
    steps, _ = load_profile(folder)
    found = []
    for row in steps.to_dict("records"):
        values: dict[str, Any] = {
            name: value for name, value in row.items() if isinstance(value, (str, int, float)) and known(value)
        }
        for floor in ("memory_floor_ms", "arithmetic_floor_ms"):
            values[floor.replace("floor_ms", "share")] = values.get(floor, 0.0) / values["counted_step_ms"]
        found.append(say(f"profile.{row['bound']}", **values))
    return found


def operator_table(folder: RunFolder) -> Table:
    """Operators of both phases, the longest first, below the host's gap where no operator runs."""
    import pandas

    steps, operators = load_profile(folder)
    if steps.empty:
        return operators
    gaps = [
        {"phase": row["phase"], "operator": phrase(HOST), "ms_per_step": row["host_gap_ms"], "share": row["host_share"]}
        for row in steps.to_dict("records")
    ]
    table: Table = pandas.concat([pandas.DataFrame(gaps), operators], ignore_index=True)[COLUMNS]
    return table.sort_values(["phase", "ms_per_step"], ascending=[False, False], ignore_index=True)


def profile_figure(folder: RunFolder) -> Figure | None:
    """Milliseconds a step of the longest operators, the rest together and the host's gap, a panel for each phase."""
    steps, operators = load_profile(folder)
    if steps.empty:
        return None
    figure, grid = make_grid(len(steps), 1, height=3.6, width=8)
    texts = []
    for (axes,), step in zip(grid, steps.to_dict("records"), strict=True):
        lines = [row for row in operators.to_dict("records") if row["profile_id"] == step["profile_id"]]
        every = [(row["operator"], row["ms_per_step"], row["calls_per_step"], row["kind"]) for row in lines]
        every.sort(key=lambda bar: -bar[1])
        bars, rest = every[:LONGEST], every[LONGEST:]
        if rest:
            bars.append((phrase("all others"), sum(bar[1] for bar in rest), sum(bar[2] for bar in rest), "other"))
        for place, (_, time_ms, calls, kind) in enumerate(bars):
            axes.barh(place, time_ms, color=COLOURS[kind], label=kind)
            axes.annotate(f"{time_ms:.3g} ms, {calls:.3g}x", (time_ms, place), (4, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
        gap = step["host_gap_ms"]
        axes.barh(len(bars), gap, color="#BBBBBB", hatch="//", label=HOST)
        axes.annotate(f"{gap:.3g} ms", (gap, len(bars)), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(bars) + 1), [name[-44:] for name, *_ in bars] + [phrase(HOST)], fontsize=9)
        axes.invert_yaxis()
        value_axis(axes, "ms per step", which="x", log=False)
        axes.set_xlim(0, 1.25 * max(gap, *(bar[1] for bar in bars)))
        axes.set_title(f"{step['phase']}, batch {step['batch']}: {step['counted_step_ms']:.3g} ms", fontsize=10)
        texts.append(f"{step['phase']} {step['counted_step_ms']:.3g} ms, {step['bound']}")
    return finish(figure, "Operators of a step", "; ".join(texts))
