"""Charts of measured tables: a DataFrame in, a matplotlib Figure out, or None where there is nothing to compare.

Every axis carries its unit, concurrency axes are log2, ceilings are dashed, repeats are points and the line goes
through their median. A configuration has one colour, mark and line style wherever the same set of configurations is
drawn. Rows whose status is not ok are left out.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ascend_kit.files import GIB, Table, write_atomic
from ascend_kit.messages import phrase
from ascend_kit.show import tables
from ascend_kit.show.drawing import (
    BASELINES,
    DASHES,
    FONT,
    GREY,
    LENGTHS,
    PALETTE,
    RED,
    config_labels,
    config_looks,
    finish,
    finished_rows,
    heat_map,
    is_many,
    known,
    lengths_text,
    limit_line,
    log2_axis,
    make_grid,
    make_panels,
    reference_line,
    series,
    tip,
    value_axis,
    with_labels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ascend_kit.results import RunFolder

CEILING_LINES = (("ceiling_tokens_per_s", "--", "ceiling"), ("predicted_tokens_per_s", ":", "prediction"))
# Figures are saved with 150 dots per inch; on a page an inch has 96 pixels, and a little less reads better.
PAGE_SCALE = 0.58
BEST_AND_WORST = 10
RATE = "output_tokens_per_s"


def keep(folder: RunFolder, name: str, figure: Figure | None, caption: str) -> Any:
    """Save figures/<name>.png and .svg and return the picture for display; None, and no file, without a figure."""
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
    about = {"figure": name, "caption": caption}
    return Image(data=data, format="png", width=round(pixels * PAGE_SCALE), alt=alt, metadata=about)


# --- sweep --------------------------------------------------------------------------------------------------


def throughput(rows: Table) -> Figure | None:
    """Output tokens/s against concurrency, one panel per pair of lengths, ceilings dashed, prediction dotted."""
    rows = finished_rows(rows)
    if len(rows) < 2:
        return None
    if is_many(rows):
        return heat_map(rows, RATE, "Throughput", "output tokens/s")
    figure, looks = _panels(rows, RATE, "output tokens/s", CEILING_LINES)
    return finish(figure, "Throughput", _best_each(rows, looks))


def _panels(
    rows: Table, column: str, unit: str, references: tuple = (), log: bool | None = None
) -> tuple[Figure, dict]:
    figure, panels = make_panels(rows)
    looks = config_looks(config_labels(rows))
    for axes, part in panels:
        series(axes, part, looks, column, unit)
        for name, style, text in references:
            reference_line(axes, part, looks, name, style, text)
        log2_axis(axes, part["concurrency"])
        value_axis(axes, unit, log=log)
    return figure, looks


def _best_each(rows: Table, looks: dict[str, Any]) -> str:
    labels, parts = config_labels(rows), []
    for name in looks:
        best = rows.loc[rows[labels == name][RATE].idxmax()]
        parts.append(f"{name} {best[RATE]:,.0f} at {best['concurrency']} in flight")
    return "best " + ", ".join(parts)


def latency(rows: Table) -> Figure | None:
    """TTFT, TPOT and ITL against concurrency: median solid, p90 dashed, p99 dotted; stated limits in red."""
    rows = finished_rows(rows)
    if len(rows) < 2:
        return None
    if is_many(rows):
        return heat_map(rows, "tpot_p50_ms", "Median TPOT", "ms", good="low")
    looks, groups = config_looks(config_labels(rows)), list(with_labels(rows).groupby(LENGTHS, sort=True))
    figure, grid = make_grid(len(groups), 3, height=3.1)
    for line, (lengths, part) in zip(grid, groups, strict=True):
        for axes, metric in zip(line, ("ttft", "tpot", "itl"), strict=True):
            for q, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
                series(axes, part, looks, f"{metric}_{q}_ms", f"ms ({q})", linestyle=style)
                axes.plot([], [], linestyle=style, color=GREY, label={"p50": "median"}.get(q, q))
            limit_line(axes, part, f"{metric}_limit_ms")
            log2_axis(axes, part["concurrency"])
            value_axis(axes, f"{metric.upper()}, ms")
            axes.set_title(f"{metric.upper()}: {lengths_text(lengths)}", fontsize=FONT)
    fastest = rows.loc[rows[RATE].idxmax()]
    alt = f"at the fastest point TTFT {fastest['ttft_p50_ms']:.3g} ms, TPOT {fastest['tpot_p50_ms']:.3g} ms (medians)"
    return finish(figure, "Latency", alt)


def tradeoff(rows: Table) -> Figure | None:
    """Throughput against median TPOT; each point carries its concurrency. Up and to the left is better."""
    rows = finished_rows(rows).dropna(subset=["tpot_p50_ms"]) if not rows.empty else rows
    if len(rows) < 2 or is_many(rows):
        return None
    figure, panels = make_panels(rows)
    looks = config_looks(config_labels(rows))
    for axes, part in panels:
        for label, rest in part.groupby("_label", sort=True):
            one = rest.groupby("concurrency")[["tpot_p50_ms", RATE]].median()
            (line,) = axes.plot(*one.T.to_numpy(), label=label, linewidth=1.8, **looks[label])
            tip(line, [f"{label}, {c} in flight: {y:,.4g} tokens/s, {x:,.4g} ms" for c, (x, y) in one.iterrows()])
            for concurrency, (x, y) in one.iterrows():
                axes.annotate(
                    f"{concurrency}", (x, y), (8, -13), textcoords="offset points", color=looks[label]["color"]
                )
        axes.margins(x=0.12, y=0.15)
        value_axis(axes, "output tokens/s")
        value_axis(axes, "median TPOT, ms", which="x")
    return finish(figure, "Throughput against latency (numbers: requests in flight)", _best_each(rows, looks))


def memory(rows: Table) -> Figure | None:
    """Peak memory of all cards against concurrency in GiB; the weights alone, of every replica, are the dashed line."""
    rows = finished_rows(rows)
    if len(rows) < 2:
        return None
    copies = rows["cards"] / rows["tensor_parallel"] if "cards" in rows else 1
    rows = rows.assign(peak_gib=rows["peak_memory_bytes"] / GIB, weights_gib=rows["weight_bytes"] * copies / GIB)
    if is_many(rows):
        return heat_map(rows, "peak_gib", "Peak memory", "GiB", good="low")
    figure, _ = _panels(rows, "peak_gib", "peak memory, GiB", (("weights_gib", "--", "weights"),), log=False)
    return finish(
        figure, "Memory", f"at most {rows['peak_gib'].max():.3g} GiB, weights {rows['weights_gib'].max():.3g}"
    )


def speedup(rows: Table, baseline: str = "transformers") -> Figure | None:
    """Throughput over the baseline's at the same point, as bars; range over repeats as a line."""
    rows = finished_rows(rows)
    if rows.empty or not (rows["backend"] == baseline).any() or not (rows["backend"] != baseline).any():
        return None
    points = ["concurrency", *LENGTHS]
    base = rows[rows["backend"] == baseline].groupby(points)[RATE].median()
    own = rows[rows["backend"] != baseline]
    own = own.assign(ratio=own[RATE] / base.reindex(own[points].apply(tuple, axis=1)).to_numpy()).dropna(
        subset=["ratio"]
    )
    if len(own) < 2:
        return None
    title = f"Speed-up over {baseline}"
    if is_many(own):
        return heat_map(own, "ratio", title, "times as fast")
    looks = config_looks(config_labels(rows))
    figure, panels = make_panels(own.assign(_label=config_labels(rows).loc[own.index]))
    labels = config_labels(rows).loc[own.index]
    names = sorted(set(labels))
    for axes, part in panels:
        loads = sorted(part["concurrency"].unique())
        for place, name in enumerate(names):
            _ratio_bars(
                axes, part[labels.loc[part.index] == name], loads, name, looks[name]["color"], place, len(names)
            )
        axes.axhline(1, color=BASELINES.get(baseline, GREY), linestyle="--", label=baseline)
        axes.set_xticks(range(len(loads)), [str(c) for c in loads])
        axes.set_xlabel("concurrency, requests in flight", fontsize=FONT)
        axes.margins(y=0.15)
        value_axis(axes, f"output tokens/s, multiple of {baseline}", log=False)
    return finish(figure, title, f"{own['ratio'].min():.1f} to {own['ratio'].max():.1f} times {baseline}")


def _ratio_bars(axes: Axes, part: Table, loads: list, name: str, colour: str, place: int, count: int) -> None:
    width = 0.8 / count
    for x, concurrency in enumerate(loads):
        ratios = part[part["concurrency"] == concurrency]["ratio"]
        if ratios.empty:
            continue
        left, middle = x + (place - (count - 1) / 2) * width, ratios.median()
        (bar,) = axes.bar(left, middle, width * 0.92, color=colour, label=name)
        tip(bar, [f"{name}: {middle:.2f} times at {concurrency}"])
        axes.plot([left, left], [ratios.min(), ratios.max()], color="#222222", linewidth=1.5)
        axes.annotate(f"{middle:.1f}x", (left, ratios.max()), (0, 3), textcoords="offset points", ha="center")


def request_timeline(requests: Table, max_requests: int = 64) -> Figure | None:
    """When each request waited, was prefilled and decoded: time on the x axis, one line per request."""
    if len(requests) < 2:
        return None
    table = requests.sort_values("arrival_s").head(max_requests)
    start = table["arrival_s"].min()
    figure, ((axes,),) = make_grid(1, 1, height=max(3.0, 1.6 + 0.11 * len(table)), width=9)
    for line, row in enumerate(table.itertuples()):
        times = [t - start for t in row.token_times_s]
        arrival = row.arrival_s - start
        begin = row.scheduled_s - start if known(row.scheduled_s) else arrival
        axes.barh(line, begin - arrival, left=arrival, color="#D9D9D9", label="waiting")
        if times:
            axes.barh(line, times[0] - begin, left=begin, color=PALETTE[4], label="prefill", hatch="//")
            axes.barh(line, times[-1] - times[0], left=times[0], color=PALETTE[0], label="decode")
        else:
            axes.plot(arrival, line, "x", color=RED, label="failed")
    axes.invert_yaxis()
    axes.set_xlabel("time since the first arrival, s", fontsize=FONT)
    axes.set_ylabel("request, by arrival", fontsize=FONT)
    more = f" (the first {max_requests} of {len(requests)})" if len(requests) > max_requests else ""
    return finish(figure, f"Requests over time{more}", f"{len(table)} requests")


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
            axes.plot([value * 100] * 2, [y - 0.42, y + 0.42], "--", color=RED, label="guessing")
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
        bars = axes.errorbar(x, y, y_error, x_error, fmt=look["marker"], markersize=9, capsize=4, color=look["color"])
        tip(bars[0], [f"{row['run']}: {y:.1f} %, {x:,.0f} tokens/s"])
        axes.annotate(row["run"], (x, y), (9, 8), textcoords="offset points", color=look["color"], fontsize=FONT)
    axes.margins(x=0.25, y=0.2)
    axes.set_ylabel("accuracy, % (95 % interval)", fontsize=FONT)
    value_axis(axes, "output tokens/s (range of repeats)", which="x", log=False, zero=False)
    alt = ", ".join(f"{row['run']} {row['accuracy_percent']:.1f} % and {row[RATE]:,.0f} tokens/s" for row in rows)
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
    print(f"Chosen: {quantization['chosen']}.")


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
    return finish(figure, "Cost of quantising one linear alone", f"largest {worst['kl']:.3g} in {worst['linear']}")


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
            tip(dots, [f"{row.candidate}: {row.mb:,.4g} MB, {row.kl:.3g} nats/token" for row in part.itertuples()])
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


def planner(plans: Table) -> Figure | None:
    """Predicted output tokens/s by cards, a bar per tensor-parallel size; a panel per `model` where given.

    Hatched bars break a limit. A split that does not fit or does not divide has no bar.
    """
    drawable = plans.dropna(subset=[RATE]) if not plans.empty else plans
    if len(drawable) < 2:
        return None
    models = list(dict.fromkeys(plans["model"])) if "model" in plans else [None]
    sizes, cards = sorted(drawable["tensor_parallel"].unique()), sorted(plans["cards"].unique())
    figure, (line,) = make_grid(1, len(models), height=4.2, width=6.5)
    for axes, model in zip(line, models, strict=True):
        part = drawable if model is None else drawable[drawable["model"] == model]
        for row in part.itertuples():
            place = sizes.index(row.tensor_parallel)
            x = cards.index(row.cards) + (place - (len(sizes) - 1) / 2) * 0.8 / len(sizes)
            (bar,) = axes.bar(x, row.output_tokens_per_s, 0.74 / len(sizes), color=PALETTE[place % len(PALETTE)],
                              label=f"tensor parallel {row.tensor_parallel}", edgecolor="white",
                              hatch="///" if known(row.reason) else None)  # fmt: skip
            tip(
                bar,
                [f"{row.cards} cards, tensor parallel {row.tensor_parallel}: {row.output_tokens_per_s:,.0f} tokens/s"],
            )
        for place, size in enumerate(sizes):
            axes.bar(0, 0, color=PALETTE[place % len(PALETTE)], label=f"tensor parallel {size}")
        if part["reason"].notna().any():
            axes.bar(0, 0, color="#BBBBBB", edgecolor="white", hatch="///", label="breaks a limit")
        axes.set_xticks(range(len(cards)), [str(c) for c in cards])
        axes.set_xlabel("cards (replicas = cards / tensor parallel)", fontsize=FONT)
        axes.set_title(model or "", fontsize=FONT)
        value_axis(axes, "predicted output tokens/s", log=False)
    return finish(figure, "Cards as replicas or tensor parallel", f"at most {drawable[RATE].max():,.0f} tokens/s")


def layouts_by_load(simulate: Callable[[], Table], cards: int = 2) -> Figure | None:
    """Predicted output tokens/s of `simulate()` against requests in flight, a line per tensor-parallel size.

    A panel per `model` and number of `cards`; None for a run on one card. A split that does not divide the model, or a
    load that does not fit, has no point.
    """
    plans = simulate() if cards > 1 else None
    if plans is None or plans.empty or plans[RATE].isna().all():
        return None
    drawable = plans.dropna(subset=[RATE])
    models, counts = list(dict.fromkeys(drawable["model"])), sorted(drawable["cards"].unique())
    names = {size: "replicas of one card" if size == 1 else f"tensor parallel {size}"
             for size in sorted(drawable["tensor_parallel"].unique())}  # fmt: skip
    looks = config_looks(names.values())
    figure, grid = make_grid(len(counts), len(models), height=3.4, width=5.4)
    for line, count in zip(grid, counts, strict=True):
        for axes, model in zip(line, models, strict=True):
            part = drawable[(drawable["model"] == model) & (drawable["cards"] == count)]
            for size, name in names.items():
                one = part[part["tensor_parallel"] == size].sort_values("concurrency")
                (drawn,) = axes.plot(one["concurrency"], one[RATE], markersize=5, label=name, **looks[name])
                tip(drawn, [f"{name}: {row.output_tokens_per_s:,.0f} at {row.concurrency}" for row in one.itertuples()])
            log2_axis(axes, part["concurrency"])
            value_axis(axes, "predicted output tokens/s", log=True)
            axes.set_title(f"{model} on {count} cards", fontsize=FONT)
    return finish(figure, "The same cards as replicas or tensor parallel: simulated, not measured")
