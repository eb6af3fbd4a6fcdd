"""Charts of measured tables: a DataFrame in, a matplotlib Figure out, or None where there is nothing to compare.

Those of sweeps are in sweep_charts.py.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ascend_kit.files import Table, write_atomic
from ascend_kit.measure.rows import RATE, load_profile
from ascend_kit.messages import phrase
from ascend_kit.show import drawing, tables
from ascend_kit.show.drawing import DASHES, GREY, PALETTE, RED

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

    from ascend_kit.results import RunFolder

# Figures are saved with 150 dots per inch; on a page an inch has 96 pixels, and a little less reads better.
PAGE_SCALE = 0.58
METRIC = "acc"  # what the bars of `accuracy` show
BEST_AND_WORST = 10
ENOUGH = 10  # documents of a bin: its accuracy is known to some 30 points at worst
LONGEST = 9  # operators drawn by name
KIND_COLOURS = dict(zip(("product", "attention", "copy", "communication", "other"), PALETTE, strict=False))


def keep(
    folder: RunFolder, name: str, figure: Figure | None, caption: str, *, of_this_run: bool = True
) -> Image | None:
    """Save figures/<name>.png and .svg and return the picture for display; None, and no file, without a figure.

    The report's caption tells this run's conditions too, but for a figure of several runs, or of another.
    """
    from IPython.display import Image
    from matplotlib import rc_context

    caption = phrase(caption)
    if figure is None:
        for kind in ("png", "svg"):
            (folder.path / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
        return None
    path = folder.save_figure(name, figure)
    data, vector = path.read_bytes(), io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(vector, format="svg", bbox_inches="tight", metadata={"Date": None})
    write_atomic(path.with_suffix(".svg"), vector.getvalue())
    (pixels,) = struct.unpack(">I", data[16:20])  # width in the PNG header
    alt = ": ".join(filter(None, (caption, str(figure.get_label()))))
    about = {"figure": name, "caption": caption, "of_this_run": of_this_run}
    return Image(data=data, format="png", width=round(pixels * PAGE_SCALE), alt=alt, metadata=about)


def picture(figure: Figure | None) -> Image | None:
    """The figure as it is drawn for a screen alone, and kept nowhere."""
    from IPython.display import Image

    if figure is None:
        return None
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
    return Image(data=png.getvalue(), format="png")


# --- accuracy -----------------------------------------------------------------------------------------------


def accuracy(scores: Table, documents: Table | None = None) -> Figure | None:
    """Bars of the accuracy of each task with one standard error.

    `documents` with choices give the score of guessing, drawn as a short red line: a bar at that height is an alarm.
    Of very many tasks the ten best and the ten worst are drawn.
    """
    table = drawing.finished_rows(scores)
    table = table[table["metric"] == METRIC] if not table.empty else table
    if len(table) < 2:
        return None
    tasks, left_out = _ends(table)
    rows = [row for row in table.itertuples() if row.task in tasks]
    figure, ((axes,),) = drawing.make_grid(1, 1, height=1.6 + 0.34 * len(tasks), width=8)
    for row in rows:
        y, percent = tasks.index(row.task), row.value * 100
        error = row.stderr * 100 if drawing.known(row.stderr) else None
        bars = axes.barh(y, percent, 0.736, color=PALETTE[0], label=METRIC, xerr=error, capsize=3)
        drawing.tip(bars[0], [f"{row.task}: {percent:.1f} %" + (f" ± {error:.1f}" if error else "")])
        end = (percent + (error or 0), y)
        axes.annotate(f"{percent:.1f}", end, (5, 0), textcoords="offset points", va="center")
    for task, value in _guessing(table, documents).items():
        if task in tasks:
            y = tasks.index(task)
            for colour, width, style in (("#FFFFFF", 4, "-"), (RED, 2, "--")):  # a rim keeps red apart from the bar
                axes.plot([value * 100] * 2, [y - 0.42, y + 0.42], style, color=colour, linewidth=width,
                          label="guessing" if colour == RED else None)  # fmt: skip
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set(xlim=(0, 108), xlabel="acc, % (line: one standard error)")
    title = f"Accuracy: the {BEST_AND_WORST} best and worst, {left_out} tasks between them" if left_out else "Accuracy"
    alt = ", ".join(f"{row.task} {row.value * 100:.1f} %" for row in rows if row.task in tasks[:12])
    return drawing.finish(figure, title, alt, legend=documents is not None)


def _ends(table: Table) -> tuple[list[str], int]:
    """The tasks to draw, in the order of the table or, of many, from the best to the worst; how many are left out."""
    tasks = list(dict.fromkeys(table["task"]))
    if len(tasks) <= 3 * BEST_AND_WORST:
        return tasks, 0
    ranked = list(table.groupby("task")["value"].mean().sort_values(ascending=False).index)
    return ranked[:BEST_AND_WORST] + ranked[-BEST_AND_WORST:], len(tasks) - 2 * BEST_AND_WORST


def _guessing(table: Table, documents: Table | None) -> dict[str, float]:
    """Task or group -> share that guessing gets right, of those whose documents are choices."""
    if documents is None or "choice_logprobs" not in documents:
        return {}
    choices = documents[documents["choice_logprobs"].notna()]
    chance = 1 / choices["choice_logprobs"].map(len)
    by = {key: chance.groupby(choices[key]).mean().to_dict() for key in ("task", "set") if key in choices}
    sets = dict(zip(table["task"], table["set"], strict=True)) if "set" in table else {}
    found = {task: by.get("task", {}).get(task, by.get("set", {}).get(sets.get(task))) for task in table["task"]}
    return {task: value for task, value in found.items() if value is not None}


def accuracy_vs_throughput(table: Table) -> Figure | None:
    """One point per run of a comparison that has both values, with their intervals. Up and to the right is better."""
    table = table.dropna(subset=["accuracy_percent", RATE]) if len(table) else table
    if len(table) < 2:
        return None
    looks = drawing.config_looks(table["run"])
    figure, ((axes,),) = drawing.make_grid(1, 1, height=4.2, width=7.5)
    rows = table.to_dict("records")
    for row in rows:
        x, y, look = float(row[RATE]), float(row["accuracy_percent"]), looks[row["run"]]
        x_error, y_error = (_reach(row, name) for name in (RATE, "accuracy_percent"))
        bars = axes.errorbar(x, y, y_error, x_error, fmt=look["marker"], markersize=9, capsize=4, color=look["color"],
                             label=row["run"])  # fmt: skip
        drawing.tip(bars[0], [f"{row['run']}: {y:.1f} %, {x:,.0f} tokens/s"])
    axes.margins(x=0.25, y=0.2)
    axes.set_ylabel("accuracy, % (95 % interval)")
    drawing.value_axis(axes, "output tokens/s (range of repeats)", which="x", log=False, zero=False)
    alt = "; ".join(f"{row['run']}: {row['accuracy_percent']:.1f} %, {row[RATE]:,.0f} tokens/s" for row in rows)
    return drawing.finish(figure, "Accuracy against throughput", alt)


def _reach(row: dict[str, Any], name: str) -> list[list[float]] | None:
    """How far an interval reaches below and above its value, as matplotlib wants it; None where it is not known."""
    stem = name.removesuffix("_percent")
    unit = name.removeprefix(stem)
    low, high = row.get(f"{stem}_low{unit}"), row.get(f"{stem}_high{unit}")
    return [[row[name] - low], [high - row[name]]] if drawing.known(low) and drawing.known(high) else None


def reliability(table: Table) -> Figure | None:
    """Accuracy against mean confidence of each bin, a line per set; on the diagonal confidence is what it says.

    Bins of fewer than ten documents are grey points beside the lines.
    """
    if table.empty:
        return None
    looks = drawing.config_looks(table["set"])
    figure, ((axes,),) = drawing.make_grid(1, 1, height=4.4, width=6)
    axes.plot([0, 100], [0, 100], "--", color=GREY, label="as sure as right")
    for name, part in table.groupby("set", sort=True):
        is_known = part["documents"] >= ENOUGH
        for here, look in ((part[~is_known], {"color": GREY, "linestyle": "none", "marker": "."}),
                           (part[is_known], {**looks[str(name)], "label": str(name)})):  # fmt: skip
            if len(here):
                texts = [
                    f"{bin.accuracy:.0%} right of {bin.documents} at {bin.confidence:.0%}" for bin in here.itertuples()
                ]
                drawing.draw_points(axes, 100 * here["confidence"], 100 * here["accuracy"], texts, **look)
    axes.set(xlim=(0, 102), ylim=(0, 102), ylabel="right answers, %")
    axes.set_xlabel("confidence: share of the best choice's probability, % (mean of a bin)")
    alt = "accuracy against confidence in ten bins of each set; grey: fewer than ten documents"
    return drawing.finish(figure, "Calibration", alt)


# --- quantisation ------------------------------------------------------------------------------

# Scheme -> its mark, and what a mix is called that has it for its sensitive linears.
_SCHEMES = {
    "w8a8": ({"marker": "o"}, "all int8"),
    "w8a16": ({"marker": "s"}, "sensitive ones in w8a16"),
    "w4a16": ({"marker": "D"}, "all in 4 bits"),
    "float": ({"marker": "o", "fillstyle": "none"}, "sensitive ones in float"),
}


def show_choice(folder: RunFolder, quantization: dict[str, Any], max_kl: float | None) -> None:
    """Display sensitivity, candidates and the chosen mix of a manifest's `quantization`, where they were measured."""
    import pandas
    from IPython.display import display

    if not quantization.get("sensitivity"):
        return
    by_linear, candidates = (pandas.DataFrame(quantization[name]) for name in ("sensitivity", "candidates"))
    for name, figure, caption in (
        ("sensitivity", sensitivity(by_linear, quantization["linears"]), "KL divergence caused by each linear alone"),
        ("mixes", mixes(candidates, quantization["chosen"], max_kl), "KL divergence of each mix against its bytes"),
    ):
        display(keep(folder, name, figure, caption))
    columns = {
        "candidate": candidates["candidate"],
        "read per step, MB": candidates["weight_bytes"] / 1e6,
        "predicted step, ms": candidates["predicted_step_s"].astype(float) * 1e3,
        "KL, nats/token": candidates["kl"],
        "accuracy lost, %": candidates["accuracy_loss"] * 100,
    }
    display(tables.readable(pandas.DataFrame(columns)))
    print(phrase(f"Chosen: {quantization['chosen']}."))


def sensitivity(rows: Table, schemes: Mapping[str, str]) -> Figure | None:
    """KL divergence that quantising one linear alone causes, by layer and kind of linear.

    `rows`: one per linear, with linear (its full name), layer, part and kl (nats per token). `schemes` is the
    mix that was chosen (linear -> scheme): a square is w8a16, a diamond w4a16, a hollow circle stays in float.
    """
    from matplotlib.ticker import MaxNLocator

    if rows.empty:
        return None
    rows = _above_zero(rows)
    figure, ((axes,),) = drawing.make_grid(1, 1, height=4.6, width=9)
    for i, (name, part) in enumerate(rows.groupby("part", sort=True)):
        part, colour = part.sort_values("layer"), PALETTE[i % len(PALETTE)]
        axes.plot(part["layer"], part["kl"], linestyle=DASHES[i % len(DASHES)], color=colour, label=name, linewidth=1.2)
        kinds = part["linear"].map(lambda linear: schemes.get(linear, "float"))
        for kind, marks in part.groupby(kinds):
            look = {"linestyle": "", "color": colour, "markersize": 6, **_SCHEMES[kind][0]}
            texts = [f"{row.linear}: {row.kl:.3g} nats/token, {kind}" for row in marks.itertuples()]
            drawing.draw_points(axes, marks["layer"], marks["kl"], texts, **look)
    for kind, (look, _) in _SCHEMES.items():
        axes.plot([], [], linestyle="", color=GREY, markersize=6, label=f"chosen: {kind}", **look)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.value_axis(axes, "KL divergence, nats/token", log=True)
    worst = rows.loc[rows["kl"].idxmax()]
    alt = f"largest: {worst['kl']:.3g} in {worst['linear']}"
    return drawing.finish(figure, "Cost of quantising one linear alone", alt)


def mixes(candidates: Table, chosen: str, max_kl: float | None) -> Figure | None:
    """Every measured mix of schemes: KL divergence against the weight bytes that a decode step reads.

    Columns: candidate (its name), weight_bytes, kl (nats per token). `max_kl` is drawn as a limit.
    """
    if len(candidates) < 2:
        return None
    figure, ((axes,),) = drawing.make_grid(1, 1, height=4.6, width=9)
    table = _above_zero(candidates).assign(mb=candidates["weight_bytes"] / 1e6)
    kinds = table["candidate"].map(lambda name: next((kind for kind in _SCHEMES if name.endswith(kind)), "w8a8"))
    for kind, (mark, name) in _SCHEMES.items():
        part = table[kinds == kind]
        if len(part):
            look = {"linestyle": "", "color": PALETTE[0], "markersize": 8, "label": name, **mark}
            texts = [f"{row.candidate}: {row.mb:,.1f} MB, {row.kl:.3g} nats/token" for row in part.itertuples()]
            drawing.draw_points(axes, part["mb"], part["kl"], texts, **look)
    best = table[table["candidate"] == chosen]
    if len(best):
        axes.plot(best["mb"], best["kl"], "o", color=PALETTE[1], markersize=16, fillstyle="none", markeredgewidth=2,
                  label=f"chosen: {chosen}")  # fmt: skip
    if max_kl is not None:
        axes.axhline(max_kl, color=RED, linewidth=1, label="stated limit")
    drawing.value_axis(axes, "weights read per decode step, MB", which="x", log=False, zero=False)
    drawing.value_axis(axes, "KL divergence, nats/token", log=True)
    return drawing.finish(figure, "Mixes of schemes", f"chosen: {chosen}")


def _above_zero(rows: Table) -> Table:
    """Zero has no place on a logarithmic axis: it is drawn at the smallest other value."""
    return rows.assign(kl=rows["kl"].clip(lower=rows.loc[rows["kl"] > 0, "kl"].min()))


# --- operators ------------------------------------------------------------------------------------------------


def profile(folder: RunFolder) -> Figure | None:
    """Milliseconds a step of the longest operators, the rest together and the host's gap, a panel for each phase."""
    steps, operators = load_profile(folder)
    if steps.empty:
        return None
    figure, grid = drawing.make_grid(len(steps), 1, height=3.6, width=8)
    texts = []
    for (axes,), step in zip(grid, steps.to_dict("records"), strict=True):
        lines = [row for row in operators.to_dict("records") if row["profile_id"] == step["profile_id"]]
        every = [(row["operator"], row["ms_per_step"], row["calls_per_step"], row["kind"]) for row in lines]
        every.sort(key=lambda bar: -bar[1])
        bars, rest = every[:LONGEST], every[LONGEST:]
        if rest:
            bars.append((phrase("all others"), sum(bar[1] for bar in rest), sum(bar[2] for bar in rest), "other"))
        for place, (_, time_ms, calls, kind) in enumerate(bars):
            axes.barh(place, time_ms, color=KIND_COLOURS[kind], label=kind)
            axes.annotate(f"{time_ms:.3g} ms, {calls:.3g}x", (time_ms, place), (4, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
        gap = step["host_gap_ms"]
        axes.barh(len(bars), gap, color="#BBBBBB", hatch="//", label=tables.HOST_GAP)
        axes.annotate(f"{gap:.3g} ms", (gap, len(bars)), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(bars) + 1), [name[-44:] for name, *_ in bars] + [phrase(tables.HOST_GAP)], fontsize=9)
        axes.invert_yaxis()
        drawing.value_axis(axes, "ms per step", which="x", log=False)
        axes.set_xlim(0, 1.25 * max(gap, *(bar[1] for bar in bars)))
        axes.set_title(f"{step['phase']}, batch {step['batch']}: {step['counted_step_ms']:.3g} ms", fontsize=10)
        texts.append(f"{step['phase']} {step['counted_step_ms']:.3g} ms, {step['bound']}")
    return drawing.finish(figure, "Operators of a step", "; ".join(texts))
