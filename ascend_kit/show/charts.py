"""Charts of measured tables: a DataFrame in, a matplotlib Figure out, or None where there is nothing to compare.

Those of sweeps are in sweep_charts.py.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.runs import RATE
from ascend_kit.files import Table, write_atomic
from ascend_kit.messages import phrase
from ascend_kit.show import tables
from ascend_kit.show.drawing import (
    DASHES,
    FONT,
    GREY,
    PALETTE,
    RED,
    config_looks,
    finish,
    finished_rows,
    known,
    make_grid,
    tip,
    value_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ascend_kit.results import RunFolder

# Figures are saved with 150 dots per inch; on a page an inch has 96 pixels, and a little less reads better.
PAGE_SCALE = 0.58
BEST_AND_WORST = 10


def keep(folder: RunFolder, name: str, figure: Figure | None, caption: str, *, of_this_run: bool = True) -> Any:
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


# --- accuracy -----------------------------------------------------------------------------------------------


def accuracy(scores: Table, documents: Table | None = None, metric: str = "acc") -> Figure | None:
    """Bars of a metric per task with one standard error; a bar per `run` where the table has several.

    `documents` with choices give the score of guessing, drawn as a short red line: a bar at that height is an alarm.
    Of very many tasks the ten best and the ten worst are drawn.
    """
    table = finished_rows(scores)
    table = table[table["metric"] == metric] if not table.empty else table
    if len(table) < 2:
        return None
    runs = sorted(table["run"].unique()) if "run" in table else [metric]
    table = table.assign(run=table.get("run", metric))
    tasks, left_out = _ends(table)
    looks = config_looks(runs)
    figure, ((axes,),) = make_grid(1, 1, height=1.6 + 0.34 * len(tasks) * max(1, 0.6 * len(runs)), width=8)
    height = 0.8 / len(runs)
    for row in table[table["task"].isin(tasks)].itertuples():
        y = tasks.index(row.task) + (runs.index(row.run) - (len(runs) - 1) / 2) * height
        error = row.stderr * 100 if known(row.stderr) else None
        bars = axes.barh(y, row.value * 100, height * 0.92, color=looks[row.run]["color"], label=row.run, xerr=error,
                         capsize=3)  # fmt: skip
        tip(bars[0], [f"{row.task}: {row.value * 100:.1f} %" + (f" ± {error:.1f}" if error else "")])
        axes.annotate(f"{row.value * 100:.1f}", (row.value * 100 + (error or 0), y), (5, 0), textcoords="offset points",
                      va="center")  # fmt: skip
    for task, value in _guessing(table, documents).items():
        if task in tasks:
            y = tasks.index(task)
            for colour, width, style in (("#FFFFFF", 4, "-"), (RED, 2, "--")):  # a rim keeps red apart from the bar
                axes.plot([value * 100] * 2, [y - 0.42, y + 0.42], style, color=colour, linewidth=width,
                          label="guessing" if colour == RED else None)  # fmt: skip
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"{metric}, % (line: one standard error)", fontsize=FONT)
    title = f"Accuracy: the {BEST_AND_WORST} best and worst, {left_out} tasks between them" if left_out else "Accuracy"
    alt = ", ".join(f"{row.task} {row.value * 100:.1f} %" for row in table[table["task"].isin(tasks[:12])].itertuples())
    return finish(figure, title, alt, legend=len(runs) > 1 or documents is not None)


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
    looks = config_looks(table["run"])
    figure, ((axes,),) = make_grid(1, 1, height=4.2, width=7.5)
    rows = table.to_dict("records")
    for row in rows:
        x, y, look = float(row[RATE]), float(row["accuracy_percent"]), looks[row["run"]]
        x_error, y_error = (_reach(row, name) for name in (RATE, "accuracy_percent"))
        bars = axes.errorbar(x, y, y_error, x_error, fmt=look["marker"], markersize=9, capsize=4, color=look["color"],
                             label=row["run"])  # fmt: skip
        tip(bars[0], [f"{row['run']}: {y:.1f} %, {x:,.0f} tokens/s"])
    axes.margins(x=0.25, y=0.2)
    axes.set_ylabel("accuracy, % (95 % interval)", fontsize=FONT)
    value_axis(axes, "output tokens/s (range of repeats)", which="x", log=False, zero=False)
    alt = "; ".join(f"{row['run']}: {row['accuracy_percent']:.1f} %, {row[RATE]:,.0f} tokens/s" for row in rows)
    return finish(figure, "Accuracy against throughput", alt)


def _reach(row: dict[str, Any], name: str) -> list[list[float]] | None:
    """How far an interval reaches below and above its value, as matplotlib wants it; None where it is not known."""
    stem = name.removesuffix("_percent")
    unit = name.removeprefix(stem)
    low, high = row.get(f"{stem}_low{unit}"), row.get(f"{stem}_high{unit}")
    return [[row[name] - low], [high - row[name]]] if known(low) and known(high) else None


# --- quantisation and planning ------------------------------------------------------------------------------

_SCHEME_MARKS = {
    "w8a8": {"marker": "o"},
    "w8a16": {"marker": "s"},
    "w4a16": {"marker": "D"},
    "float": {"marker": "o", "fillstyle": "none"},
}
_MIX_NAMES = {
    "w8a8": "all int8",
    "w4a16": "all in 4 bits",
    "float": "sensitive ones in float",
    "w8a16": "sensitive ones in w8a16",
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


def sensitivity(rows: Table, schemes: Mapping[str, str] | None = None) -> Figure | None:
    """KL divergence that quantising one linear alone causes, by layer and kind of linear.

    `rows`: one per linear, with linear (its full name), layer, part and kl (nats per token). `schemes` is the
    mix that was chosen (linear -> scheme): a square is w8a16, a diamond w4a16, a hollow circle stays in float.
    """
    from matplotlib.ticker import MaxNLocator

    if rows.empty:
        return None
    smallest = rows.loc[rows["kl"] > 0, "kl"].min()
    rows = rows.assign(kl=rows["kl"].clip(lower=smallest))  # zero has no place on a logarithmic axis
    figure, ((axes,),) = make_grid(1, 1, height=4.6, width=9)
    for i, (name, part) in enumerate(rows.groupby("part", sort=True)):
        part, colour = part.sort_values("layer"), PALETTE[i % len(PALETTE)]
        axes.plot(part["layer"], part["kl"], linestyle=DASHES[i % len(DASHES)], color=colour, label=name, linewidth=1.2)
        kinds = part["linear"].map(lambda linear: "w8a8" if schemes is None else schemes.get(linear, "float"))
        for kind, marks in part.groupby(kinds):
            (dots,) = axes.plot(marks["layer"], marks["kl"], linestyle="", color=colour, markersize=6,
                                **_SCHEME_MARKS[kind])  # fmt: skip
            tip(dots, [f"{row.linear}: {row.kl:.3g} nats/token, {kind}" for row in marks.itertuples()])
    for kind, look in _SCHEME_MARKS.items() if schemes is not None else ():
        axes.plot([], [], linestyle="", color=GREY, markersize=6, label=f"chosen: {kind}", **look)
    axes.set_xlabel("layer", fontsize=FONT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    value_axis(axes, "KL divergence, nats/token", log=True)
    worst = rows.loc[rows["kl"].idxmax()]
    return finish(figure, "Cost of quantising one linear alone", f"largest: {worst['kl']:.3g} in {worst['linear']}")


def mixes(candidates: Table, chosen: str | None = None, max_kl: float | None = None) -> Figure | None:
    """Every measured mix of schemes: KL divergence against the weight bytes that a decode step reads.

    Columns: candidate (its name), weight_bytes, kl (nats per token). `max_kl` is drawn as a limit.
    """
    if len(candidates) < 2:
        return None
    figure, ((axes,),) = make_grid(1, 1, height=4.6, width=9)
    table = candidates.assign(kl=candidates["kl"].clip(lower=candidates.loc[candidates["kl"] > 0, "kl"].min()))
    table["mb"] = table["weight_bytes"] / 1e6
    for kind, look in _SCHEME_MARKS.items():
        part = table[table["candidate"].map(_mix_kind) == kind]
        if len(part):
            (dots,) = axes.plot(part["mb"], part["kl"], linestyle="", color=PALETTE[0], markersize=8,
                                label=_MIX_NAMES[kind], **look)  # fmt: skip
            tip(dots, [f"{row.candidate}: {row.mb:,.1f} MB, {row.kl:.3g} nats/token" for row in part.itertuples()])
    best = table[table["candidate"] == chosen]
    if len(best):
        axes.plot(best["mb"], best["kl"], "o", color=PALETTE[1], markersize=16, fillstyle="none", markeredgewidth=2,
                  label=f"chosen: {chosen}")  # fmt: skip
    if max_kl is not None:
        axes.axhline(max_kl, color=RED, linewidth=1, label="stated limit")
    value_axis(axes, "weights read per decode step, MB", which="x", log=False, zero=False)
    value_axis(axes, "KL divergence, nats/token", log=True)
    return finish(figure, "Mixes of schemes", f"chosen: {chosen}", legend=True)


def _mix_kind(candidate: str) -> str:
    return next((kind for kind in ("w8a16", "float", "w4a16") if candidate.endswith(kind)), "w8a8")
