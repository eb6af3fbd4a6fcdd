"""What the charts share: names, colours and marks of configurations, panels, axes with plain numbers, labels.

Figures are made without pyplot, so nothing is shown and nothing global changes. A chart is drawn twice, as PNG for
every reader and as SVG for the report, where `tip` makes a point tell its values.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ascend_kit.files import Table
from ascend_kit.messages import language_in_use, phrase
from ascend_kit.params.engines import ENGINE_SWITCHES
from ascend_kit.show.tables import cell_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = 12
# Okabe and Ito's palette, safe for most colour-blind readers; engines to compare with have fixed colours.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#B15928")
BASELINES = {"transformers": "#7F7F7F"}
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (6, 1.5)), (0, (4, 1, 1, 1)), (0, (2, 1)), (0, (6, 1, 1, 1, 1, 1)))
GREY, RED = "#444444", "#C00000"
LOADS = ("load", "burstiness", "shared_prefix", "turns", "length_spread")
SWITCHES = ("run", *ENGINE_SWITCHES, *LOADS)
LENGTHS = ["prompt_len", "output_len"]
MOST_PANELS = 6  # of more lengths a heat map is drawn
MOST_DIRECT_LABELS = 6
TICKS_IN_PANEL = 10  # numbers that fit side by side below a panel
LETTER_WIDTH, LABEL_HEIGHT, MARK = 7, 11, 4  # of a point's number and half its mark, typographic points with some air
LABEL_GAP = 0.27  # least distance of two labels at a line's end, inches
# In the order in which they are looked for: Noto, Adobe, Linux, Windows, macOS.
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
                 "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC")  # fmt: skip
TIP, TIP_SEPARATOR = "tip:", " ¦ "  # in an artist's id: the texts of its points


def config_labels(rows: Table) -> Table:
    """A short name per row: the engine, and those switches and kinds of load in which the rows of one engine differ."""
    names = rows["backend"].astype(str)
    labels = names.copy()
    for name in names.unique():
        part = rows[names == name]
        for switch in (s for s in SWITCHES if s in part and part[s].nunique() > 1):
            labels.loc[part.index] += part[switch].map(partial(_switch_text, switch))
    return labels


def _switch_text(switch: str, value: Any) -> str:
    if switch in LOADS and switch != "load":
        return f", {value if isinstance(value, str) else f'{switch} {value:g}'}" if known(value) else ""
    if switch in ("run", "precision", "quantize", "load"):
        return "" if value == "none" else f", {value}"
    if switch == "cards":
        return f", {value} card{'' if value == 1 else 's'}"
    if switch in ("kv_cache_dtype", "head_dtype"):
        return "" if value == "auto" else f", {value} {'KV cache' if switch == 'kv_cache_dtype' else 'head'}"
    if switch == "async_scheduling":  # of a row `on` or `off: why`, of a run its parameter
        return f", {switch} {str(value).partition(':')[0].lower()}"
    if switch in ("speculate", "graph_prompt_tokens"):
        return f", {switch} {value}" if value else ""
    if switch == "tensor_parallel":
        return "" if value == 1 else f", tensor parallel {value}"
    return f", {switch}" if value else f", no {switch}"


def config_looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, mark and line style per configuration: fixed for the baselines, by sorted name for the rest."""
    names = sorted(set(labels))
    own = [name for name in names if name.split(",")[0] not in BASELINES]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(own)}
    return {
        name: {"color": colours.get(name) or BASELINES[name.split(",")[0]],
               "marker": MARKS[(i + i // len(PALETTE)) % len(MARKS)],  # after all colours another mark for each
               "linestyle": DASHES[i % len(DASHES)]}
        for i, name in enumerate(names)
    }  # fmt: skip


def with_labels(rows: Table) -> Table:
    """The rows with their configuration's name as `_label`, and what they are drawn over as `_load`: the rate where
    requests come by the clock (`_timed`), else how many are in flight. `_kind` is all else of the load, as a text."""
    rates = rows["rate"].astype(float) if "rate" in rows else rows["concurrency"].astype(float) * math.nan
    load = rates.where(rates.notna(), rows["concurrency"].astype(float))
    kind = [str(values) for values in zip(*(rows[name] for name in LOADS if name in rows), strict=True)] or ""
    return rows.assign(_label=config_labels(rows), _load=load, _timed=rates.notna(), _kind=kind)


def panel_groups(rows: Table) -> list[tuple[Sequence[int], Table]]:
    """(prompt and output length, its rows with labels) for each panel; loads by the clock have panels of their own."""
    rows = with_labels(rows)
    return list(rows.groupby([*LENGTHS, "_timed"] if rows["_timed"].nunique() > 1 else LENGTHS, sort=True))


def load_text(rows: Table) -> str:
    """What `_load` of the rows is."""
    if not rows["_timed"].any():
        return "concurrency, requests in flight"
    is_trace = "load" in rows and (rows["load"] == "trace").all()
    return "speed of the trace, times" if is_trace else "rate, requests per second"


def finished_rows(rows: Table) -> Table:
    return rows[rows["status"] == "ok"] if "status" in rows else rows


def known(value: Any) -> bool:
    return value is not None and value == value


def tip(artist: Artist, texts: Iterable[str]) -> None:
    """What the artist's points say under the mouse, one text each, in the order in which they are drawn."""
    artist.set_gid(TIP + TIP_SEPARATOR.join(map(phrase, texts)))


def draw_points(axes: Axes, x: Any, y: Any, texts: Iterable[str], **look: Any) -> None:
    """A line or marks through points, each of which says its text under the mouse."""
    (line,) = axes.plot(x, y, **look)
    tip(line, texts)


def make_grid(lines: int, columns: int, *, height: float, width: float = 4.4) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 6.0), height * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.tick_params(labelsize=FONT - 1)
        axes.xaxis.label.set_fontsize(FONT)
        axes.yaxis.label.set_fontsize(FONT)
        axes.grid(True, color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def make_panels(rows: Table) -> tuple[Figure, list[tuple[Axes, Table]]]:
    """One panel per (prompt, output) length, three or four in a line; every panel knows all configurations."""
    groups = panel_groups(rows)
    columns = min(3 if len(groups) <= MOST_PANELS else 4, len(groups))
    width = {1: 7, 4: 3.6}.get(columns, 4.8)
    height = 0.75 * width if width < 4 else 3.6
    figure, grid = make_grid(math.ceil(len(groups) / columns), columns, height=height, width=width)
    for axes in list(grid.flat)[len(groups) :]:
        axes.remove()
    for axes, (lengths, _) in zip(grid.flat, groups, strict=False):
        axes.set_title(lengths_text(lengths))
    return figure, [(axes, part) for axes, (_, part) in zip(grid.flat, groups, strict=False)]


def is_many(rows: Table) -> bool:
    """Whether there are more pairs of lengths than panels can show."""
    return rows.groupby(LENGTHS).ngroups > MOST_PANELS


def lengths_text(lengths: Sequence[int]) -> str:
    return f"prompt {lengths[0]:,}, output {lengths[1]:,} tokens"


def series(axes: Axes, rows: Table, looks: dict[str, Any], column: str, unit: str, **style: Any) -> None:
    """A line through the median of the repeats per configuration; repeats themselves are points."""
    for label, part in rows.dropna(subset=[column]).groupby("_label", sort=True):
        look = {"markersize": 6, "linewidth": 1.8, **looks[label], **style}
        middle = part.groupby("_load")[column].median()
        texts = [f"{label}: {cell_text(float(value))} {unit} at {plain(c)}" for c, value in middle.items()]
        draw_points(axes, middle.index, middle, texts, label=label, **look)
        if len(part) > len(middle):
            axes.plot(part["_load"], part[column], look["marker"], color=look["color"], markersize=3, alpha=0.6)


def reference_line(axes: Axes, rows: Table, looks: dict[str, Any], column: str, style: str, text: str) -> None:
    """A ceiling or prediction per configuration, in its colour; equal ones are drawn once, in grey."""
    if column not in rows or rows[column].isna().all():
        return
    lines = {name: part.groupby("_load")[column].median().dropna() for name, part in rows.groupby("_label")}
    own = {n: line for n, line in lines.items() if n.split(",")[0] not in BASELINES} or lines
    distinct = {tuple(line.round(6).items()): name for name, line in own.items() if not line.empty}
    for name in distinct.values():
        colour, label = (GREY, text) if len(distinct) == 1 else (looks[name]["color"], f"{text}: {name}")
        look = {"linestyle": style, "linewidth": 1.4, "color": colour, "label": label}
        draw_points(axes, own[name].index, own[name], [f"{label}: {cell_text(float(own[name].max()))} at most"], **look)


def limit_line(axes: Axes, rows: Table, column: str) -> None:
    if column in rows and rows[column].notna().any():
        axes.axhline(rows[column].dropna().iloc[0], color=RED, linewidth=1, label="stated limit")


def log2_axis(axes: Axes, rows: Table) -> None:
    """A logarithmic axis of the loads measured; of those too close for their numbers one is named."""
    measured = sorted(rows["_load"].unique())
    ticks, room = measured[:1], math.log2(measured[-1] * 1.6 / measured[0]) / TICKS_IN_PANEL
    for value in measured[1:]:
        if math.log2(value / ticks[-1]) >= room:
            ticks.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(plain, ticks)), minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlim=(measured[0] / 1.25, measured[-1] * 1.25), xlabel=load_text(rows))


def label_points(axes: Axes, points: Sequence[tuple[str, float, float]], colours: Sequence[str]) -> None:
    """The text of each point below and to the right of it, else above, else to its left: where it touches no other
    text, no mark and not the axis; nowhere, if there is no such place.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    to_points = 72 / figure.dpi  # of the panel before its layout, which changes its size little
    marks = [to_points * axes.transData.transform((x, y)) for _, x, y in points]
    taken = [(a - MARK, h - MARK, a + MARK, h + MARK) for a, h in marks]  # left, bottom, right, top
    left, floor = to_points * axes.transAxes.transform((0, 0)) + 2
    for (text, x, y), colour, (across, height) in zip(points, colours, marks, strict=True):
        width = LETTER_WIDTH * len(text)
        for offset in ((8, -13), (8, 4), (-8 - width, 4), (-8 - width, -13)):
            start, base = across + offset[0], height + offset[1]
            box = (start, base, start + width, base + LABEL_HEIGHT)
            if base >= floor and start >= left and not any(_touch(box, other) for other in taken):
                axes.annotate(text, (x, y), offset, textcoords="offset points", color=colour)
                taken.append(box)
                break


def _touch(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def value_axis(axes: Axes, text: str, *, which: str = "y", log: bool | None = None, zero: bool = True) -> None:
    """Label and plain-number ticks; logarithmic when asked, or by itself when the data span a factor of 25."""
    axis = getattr(axes, f"{which}axis")
    low, high = axes.dataLim.minpos["xy".index(which)], getattr(axes.dataLim, f"{which}1")  # type: ignore[index]
    if log is None:
        log = 0 < low < high / 25
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter

        getattr(axes, f"set_{which}scale")("log", nonpositive="mask")  # 0 has no place on it
        decades = math.log10(high / low) if high > low > 0 else 1
        axis.set_major_locator(LogLocator(10, subs=(1,) if decades > 3 else (1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    elif zero:
        axes.set(**{f"{which}lim": (0, None)})
    axis.set_major_formatter(lambda value, _position: _tick(value))
    getattr(axes, f"set_{which}label")(text, fontsize=FONT)


def _tick(value: float) -> str:
    """A tick in so many digits that those of a narrow axis differ."""
    return plain(value) if value == int(value) or abs(value) < 1 else f"{value:,.6g}"


def plain(value: float) -> str:
    """A number as a reader would write it: 1,000 and 0.00005, never powers; tiny ones keep their exponent."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.7f}".rstrip("0") if 1e-6 <= abs(value) < 1 else f"{value:.3g}"


def heat_map(rows: Table, column: str, title: str, unit: str, *, good: str = "high") -> Figure:
    """Median of a column as colour and number: lengths down, concurrency across, a panel per configuration.

    `good` is high, low or ratio: there 1 is white, more is blue and less is red. Equal values have a middle colour.
    """
    import numpy
    from matplotlib.colors import CenteredNorm, Normalize

    groups = list(with_labels(rows).groupby("_label", sort=True))
    lengths = sorted(rows.groupby(LENGTHS).groups)
    columns = max(part["_load"].nunique() for _, part in groups)
    size = {"height": 1.5 + 0.42 * len(lengths), "width": max(5.6, 1.2 + 0.6 * columns)}
    figure, grid = make_grid(1, len(groups), **size)
    most, least = rows[column].max(), rows[column].min()
    shades = {"high": "YlGnBu", "low": "YlOrRd", "ratio": "RdBu"}[good]
    norm = Normalize(0, most if most > least else 2 * most)
    if good == "ratio":
        norm = CenteredNorm(1, max(most - 1, 1 - least, 0.05))
    for axes, (label, part) in zip(grid.flat, groups, strict=True):
        table = part.pivot_table(index=LENGTHS, columns="_load", values=column, aggfunc="median").reindex(lengths)
        values = table.to_numpy()
        axes.imshow(values, cmap=shades, norm=norm, aspect="auto")
        for (y, x), value in numpy.ndenumerate(values):
            depth = abs(2 * norm(value) - 1) > 0.7 if good == "ratio" else norm(value) > 0.6
            style = {"ha": "center", "va": "center", "color": "#FEFEFE" if depth else "#111111", "fontsize": FONT - 1}
            axes.text(x, y, plain(float(f"{value:.3g}")) if known(value) else "", **style)
        axes.grid(False)
        axes.set_xticks(range(len(table.columns)), list(map(plain, table.columns)))
        axes.set_yticks(range(len(lengths)), [f"{p:,} + {o:,}" for p, o in lengths])
        axes.set(xlabel=load_text(part), ylabel="prompt + output tokens", title=label)
    best = with_labels(rows).loc[rows[column].idxmin() if good == "low" else rows[column].idxmax()]
    value, place = cell_text(float(best[column])), lengths_text(list(best[LENGTHS]))
    alt = f"best {value} {unit} at {plain(best['_load'])}, {place}"
    between = "\n" if good == "ratio" else ", "
    return finish(figure, f"{title}{between}{unit}", alt, legend=False)


def finish(figure: Figure, title: str, alt: str = "", legend: bool = True) -> Figure:
    """Title, names of the lines and `alt`, the key values for who cannot see, parted by semicolons.

    A line's name stands at its end where there is one panel with few lines, else in one legend below, where it can
    hide nothing.
    """
    figure.suptitle(title, fontsize=FONT + 2)
    figure.set_label(phrase(alt))
    if legend:
        _name_lines(figure)
    _localize(figure)
    return figure


def _name_lines(figure: Figure) -> None:
    entries: dict[str, Any] = {}
    named = [axes for axes in figure.axes if axes.get_legend_handles_labels()[1]]
    for axes in named:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)  # of several lines with one name the first: the median, solid
    if len(named) == 1 and len(entries) <= MOST_DIRECT_LABELS and _label_ends(named[0], entries):
        return
    if entries:
        columns = _legend_columns(list(entries), figure.get_figwidth())
        style = {"loc": "outside lower center", "ncols": columns, "fontsize": FONT - 1, "frameon": False}
        figure.legend(entries.values(), entries, **style)


def _localize(figure: Figure) -> None:
    """Every text in the language in use and in fonts that have its signs; in English, with a warning, without such."""
    from matplotlib.text import Text

    font = _chinese_font()
    needs = language_in_use() == "zh"
    if needs and font is None:
        warnings.warn(f"charts are in English: none of the fonts {', '.join(CHINESE_FONTS)} is installed", stacklevel=3)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if needs and font:
            text.set_text(phrase(text.get_text()))
        if font and not text.get_text().isascii():
            text.set_fontfamily(["DejaVu Sans", font])


@cache
def _chinese_font() -> str | None:
    from matplotlib.font_manager import fontManager

    installed = {entry.name for entry in fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in installed), None)


def _label_ends(axes: Axes, entries: dict[str, Any]) -> bool:
    """Write each line's name at its right end, apart from the others; False where an entry is no line with points."""
    from matplotlib.lines import Line2D

    ends = []
    for label, line in entries.items():
        points: Any = line.get_xydata() if isinstance(line, Line2D) and line.get_linestyle() != "None" else None
        if points is None or not len(points):
            return False
        height = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))[1]
        ends.append((float(height), label, line.get_color()))
    figure, place = axes.get_figure(root=True), -math.inf
    assert figure is not None
    gap = LABEL_GAP / (figure.get_figheight() * axes.get_position().height)
    for height, label, colour in sorted(ends):
        place = max(height, place + gap)
        axes.text(1.01, place, label, color=colour, transform=axes.transAxes, va="center", fontsize=FONT)
    return True


def _legend_columns(labels: list[str], width_in: float) -> int:
    """The most columns whose widest labels and handles fit beside each other, at about 11 letters an inch."""
    for columns in range(len(labels), 1, -1):
        lines, longer = divmod(len(labels), columns)  # matplotlib's first columns have the lines that are over
        starts = [column * lines + min(column, longer) for column in range(columns + 1)]
        widths = [max(map(len, labels[start:end])) + 8 for start, end in itertools.pairwise(starts)]
        if sum(widths) <= 11 * width_in:
            return columns
    return 1
