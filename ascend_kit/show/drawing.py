"""What the figures share: names and colours of configurations, panels, axes with plain numbers, one legend.

Figures are made without pyplot, so nothing is shown and nothing global changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ascend_kit.files import Table
from ascend_kit.params import ENGINE_SWITCHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = 11
# Okabe and Ito's palette, safe for most colour-blind readers; engines to compare with have fixed colours.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#B15928")
BASELINES = {"transformers": "#7F7F7F", "vllm": "#111111"}
SWITCHES = ("run", *ENGINE_SWITCHES)
LENGTHS = ["prompt_len", "output_len"]


def config_labels(rows: Table) -> Table:
    """A short name per row: the engine, and those switches in which the rows of one engine differ."""
    names = rows["backend"].astype(str) if "backend" in rows else rows["run"].astype(str)
    labels = names.copy()
    for name in names.unique():
        part = rows[names == name]
        for switch in (s for s in SWITCHES if s in part and part[s].nunique() > 1):
            labels.loc[part.index] += part[switch].map(lambda value, s=switch: _switch_text(s, value))
    return labels


def config_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour per configuration: fixed for the baselines, by sorted name for the rest."""
    names = sorted(set(labels))
    own = [name for name in names if name.split(",")[0] not in BASELINES]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(own)}
    return {name: colours.get(name) or BASELINES[name.split(",")[0]] for name in names}


def _switch_text(switch: str, value: Any) -> str:
    if switch in ("run", "precision", "quantize"):
        return "" if value == "none" else f", {value}"
    if switch == "cards":
        return f", {value} card{'' if value == 1 else 's'}"
    if switch == "tensor_parallel":
        return "" if value == 1 else f", tensor parallel {value}"
    return f", {switch}" if value else f", no {switch}"


def finished_rows(rows: Table) -> Table:
    return rows[rows["status"] == "ok"] if "status" in rows else rows


def known(value: Any) -> bool:
    return value is not None and value == value


def make_grid(lines: int, columns: int, *, height: float, width: float = 4.4) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 6.0), height * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.tick_params(labelsize=FONT - 1)
        axes.grid(True, color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def make_panels(rows: Table) -> tuple[Figure, list[tuple[Axes, Table]]]:
    """One panel per (prompt, output) length, at most three in a line; every panel knows all
    configurations.
    """
    rows = rows.assign(_label=config_labels(rows))
    rows["_colour"] = rows["_label"].map(config_colours(rows["_label"]))
    groups = list(rows.groupby(LENGTHS, sort=True))
    columns = min(3, len(groups))
    figure, grid = make_grid(math.ceil(len(groups) / columns), columns, height=3.6, width=5.2 if columns > 1 else 7)
    for axes in list(grid.flat)[len(groups) :]:
        axes.remove()
    panels = []
    for axes, (lengths, part) in zip(grid.flat, groups, strict=False):
        axes.set_title(lengths_text(lengths), fontsize=FONT)
        panels.append((axes, part))
    return figure, panels


def lengths_text(lengths: Sequence[int]) -> str:
    return f"prompt {lengths[0]:,}, output {lengths[1]:,} tokens"


def series(axes: Axes, rows: Table, column: str, *, style: str = "-", points: bool = True, named: bool = True) -> None:
    """A line through the median of the repeats per configuration, and the repeats themselves as points."""
    if "_label" not in rows:
        rows = rows.assign(_label=config_labels(rows))
        rows["_colour"] = rows["_label"].map(config_colours(rows["_label"]))
    for (label, colour), part in rows.dropna(subset=[column]).groupby(["_label", "_colour"], sort=True):
        middle = part.groupby("concurrency")[column].median()
        axes.plot(middle.index, middle, style, color=colour, label=label if named else None)
        if points:
            axes.plot(part["concurrency"], part[column], "o", color=colour, markersize=5, alpha=0.75)


def reference_line(axes: Axes, rows: Table, column: str, style: str, text: str) -> None:
    """A ceiling or prediction per configuration, in its colour; equal ones are drawn once, in grey."""
    if column not in rows or rows[column].isna().all():
        return
    lines = {name: part.groupby("concurrency")[column].median() for name, part in rows.groupby("_label")}
    colours = dict(zip(rows["_label"], rows["_colour"], strict=True))
    own = {n: line.dropna() for n, line in lines.items() if n.split(",")[0] not in BASELINES} or lines
    distinct = {tuple(line.round(6).items()): name for name, line in own.items() if not line.empty}
    for name in distinct.values():
        colour, label = ("#444444", text) if len(distinct) == 1 else (colours[name], f"{text}: {name}")
        axes.plot(own[name].index, own[name], style, color=colour, label=label)


def limit_line(axes: Axes, rows: Table, column: str) -> None:
    if column in rows and rows[column].notna().any():
        axes.axhline(rows[column].dropna().iloc[0], color="#C00000", linewidth=1, label="stated limit")


def log2_axis(axes: Axes, values: Table) -> None:
    ticks = sorted(values.unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xlabel("concurrency, requests in flight", fontsize=FONT)


def value_axis(axes: Axes, text: str, *, which: str = "y", log: bool | None = None, zero: bool = True) -> None:
    """Label and plain-number ticks; logarithmic when asked, or by itself when the data span a factor of
    25.
    """
    axis = getattr(axes, f"{which}axis")
    low, high = axes.dataLim.minpos["xy".index(which)], getattr(axes.dataLim, f"{which}1")
    if log is None:
        log = 0 < low < high / 25
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter

        getattr(axes, f"set_{which}scale")("log")
        decades = math.log10(high / low) if high > low > 0 else 1
        axis.set_major_locator(LogLocator(10, subs=(1,) if decades > 3 else (1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    elif zero:
        getattr(axes, f"set_{which}lim")(**{"bottom" if which == "y" else "left": 0})
    axis.set_major_formatter(_plain)
    getattr(axes, f"set_{which}label")(text, fontsize=FONT)


def _plain(value: float, _position: int | None = None) -> str:
    """A number as a reader would write it: 1,000 and 0.00005, never powers; tiny ones keep their exponent."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.7f}".rstrip("0") if 1e-6 <= abs(value) < 1 else f"{value:.3g}"


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def finish(figure: Figure, title: str, legend: bool = True) -> Figure:
    """Title, and one legend below all panels, where it can hide nothing."""
    figure.suptitle(title, fontsize=FONT + 2)
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    if legend and entries:
        columns = _legend_columns(list(entries), figure.get_figwidth())
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=FONT - 1,
                      frameon=False)  # fmt: skip
    return figure


def _legend_columns(labels: list[str], width_in: float) -> int:
    """The most columns whose widest labels and handles fit beside each other, at about 12 letters an inch."""
    for columns in range(len(labels), 1, -1):
        lines = math.ceil(len(labels) / columns)
        widths = [max(map(len, labels[i : i + lines])) + 8 for i in range(0, len(labels), lines)]
        if sum(widths) <= 12 * width_in:
            return columns
    return 1


def nothing(reason: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.2))
    figure.text(0.5, 0.5, f"Nothing to draw: {reason}", ha="center", va="center", fontsize=FONT)
    return figure
