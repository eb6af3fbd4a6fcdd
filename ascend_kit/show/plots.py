"""Figures of measured tables: a DataFrame in, a matplotlib Figure out; nothing is shown and no global style
set.

Every axis carries its unit, batch and concurrency axes are log2, ceilings are dashed, repeats are points and
the line goes through their median. A configuration has one colour wherever the same set of configurations is
drawn. Rows whose status is not ok are left out. A table without anything to draw gives a figure that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ascend_kit.files import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from ascend_kit.show.drawing import (
    BASELINES,
    FONT,
    LENGTHS,
    PALETTE,
    config_colours,
    config_labels,
    finish,
    finished_rows,
    known,
    lengths_text,
    limit_line,
    log2_axis,
    make_grid,
    make_panels,
    nothing,
    reference_line,
    series,
    value_axis,
    whole_numbers,
)

GIB = 2**30
CEILING_LINES = (("ceiling_tokens_per_s", "--", "ceiling"), ("predicted_tokens_per_s", ":", "prediction"))


def throughput(rows: Table) -> Figure:
    """Output tokens/s against concurrency, one panel per pair of lengths, ceilings dashed, prediction
    dotted.
    """
    rows = finished_rows(rows)
    if rows.empty:
        return nothing("no finished point to draw")
    figure, panels = make_panels(rows)
    for axes, part in panels:
        series(axes, part, "output_tokens_per_s")
        for column, style, text in CEILING_LINES:
            reference_line(axes, part, column, style, text)
        log2_axis(axes, part["concurrency"])
        value_axis(axes, "output tokens/s")
    return finish(figure, "Throughput")


def latency(rows: Table) -> Figure:
    """TTFT, TPOT and ITL against concurrency: median solid, p90 dashed, p99 dotted; stated limits in red."""
    rows = finished_rows(rows)
    if rows.empty:
        return nothing("no finished point to draw")
    groups = list(rows.groupby(LENGTHS, sort=True))
    figure, grid = make_grid(len(groups), 3, height=3.1)
    for line, (lengths, part) in zip(grid, groups, strict=True):
        for axes, metric in zip(line, ("ttft", "tpot", "itl"), strict=True):
            for q, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
                series(axes, part, f"{metric}_{q}_ms", style=style, points=q == "p50", named=q == "p50")
                axes.plot([], [], style, color="#444444", label={"p50": "median"}.get(q, q))
            limit_line(axes, part, f"{metric}_limit_ms")
            log2_axis(axes, part["concurrency"])
            value_axis(axes, f"{metric.upper()}, ms")
            axes.set_title(f"{metric.upper()}: {lengths_text(lengths)}", fontsize=FONT)
    return finish(figure, "Latency")


def tradeoff(rows: Table) -> Figure:
    """Throughput against median TPOT; each point carries its concurrency. Up and to the left is better."""
    rows = finished_rows(rows).dropna(subset=["tpot_p50_ms"]) if not rows.empty else rows
    if rows.empty:
        return nothing("no finished point with more than one output token")
    figure, panels = make_panels(rows)
    for axes, part in panels:
        for (label, colour), rest in part.groupby(["_label", "_colour"], sort=True):
            one = rest.groupby("concurrency")[["tpot_p50_ms", "output_tokens_per_s"]].median()
            axes.plot(*one.T.to_numpy(), "o-", color=colour, label=label)
            for concurrency, (x, y) in one.iterrows():
                axes.annotate(f"{concurrency}", (x, y), (8, -12), textcoords="offset points", color=colour)
        axes.margins(x=0.12, y=0.15)
        value_axis(axes, "output tokens/s")
        value_axis(axes, "median TPOT, ms", which="x")
    return finish(figure, "Throughput against latency (numbers: requests in flight)")


def memory(rows: Table) -> Figure:
    """Peak memory of all cards against concurrency in GiB; the weights alone, of every replica, are the dashed line."""
    rows = finished_rows(rows)
    if rows.empty:
        return nothing("no finished point to draw")
    copies = rows["cards"] / rows["tensor_parallel"] if "cards" in rows else 1
    rows = rows.assign(peak_gib=rows["peak_memory_bytes"] / GIB, weights_gib=rows["weight_bytes"] * copies / GIB)
    figure, panels = make_panels(rows)
    for axes, part in panels:
        series(axes, part, "peak_gib")
        reference_line(axes, part, "weights_gib", "--", "weights")
        log2_axis(axes, part["concurrency"])
        value_axis(axes, "peak memory, GiB", log=False)
    return finish(figure, "Memory")


def speedup(rows: Table, baseline: str = "transformers") -> Figure:
    """Throughput over the baseline's at the same point, as bars; range over repeats as a line."""
    rows = finished_rows(rows)
    if rows.empty or not (rows["backend"] == baseline).any() or not (rows["backend"] != baseline).any():
        return nothing(f"needs finished points of {baseline} and of another engine")
    labels = config_labels(rows)
    colours = config_colours(labels)
    names = [name for name in sorted(set(labels)) if name.split(",")[0] != baseline]
    figure, panels = make_panels(rows)
    for axes, part in panels:
        base = part[part["backend"] == baseline].groupby("concurrency")["output_tokens_per_s"].median()
        for place, name in enumerate(names):
            _ratio_bars(axes, part[labels.loc[part.index] == name], base, name, colours[name], place, len(names))
        axes.axhline(1, color=BASELINES.get(baseline, "#444444"), linestyle="--", label=baseline)
        axes.set_xticks(range(len(base)), [str(c) for c in base.index])
        axes.set_xlabel("concurrency, requests in flight", fontsize=FONT)
        axes.margins(y=0.15)
        value_axis(axes, f"output tokens/s, multiple of {baseline}", log=False)
    return finish(figure, f"Speed-up over {baseline}")


def _ratio_bars(axes: Axes, part: Table, base: Table, name: str, colour: str, place: int, count: int) -> None:
    width = 0.8 / count
    for x, (concurrency, reference) in enumerate(base.items()):
        ratios = part[part["concurrency"] == concurrency]["output_tokens_per_s"] / reference
        if ratios.empty:
            continue
        left, middle = x + (place - (count - 1) / 2) * width, ratios.median()
        axes.bar(left, middle, width * 0.92, color=colour, label=name)
        axes.plot([left, left], [ratios.min(), ratios.max()], color="#222222", linewidth=1.5)
        axes.annotate(f"{middle:.1f}x", (left, ratios.max()), (0, 3), textcoords="offset points", ha="center")


def request_timeline(requests: Table, max_requests: int = 64) -> Figure:
    """When each request waited, was prefilled and decoded: time on the x axis, one line per request."""
    if requests.empty:
        return nothing("no request to draw")
    table = requests.sort_values("arrival_s").head(max_requests)
    start = table["arrival_s"].min()
    figure, ((axes,),) = make_grid(1, 1, height=max(3.0, 1.6 + 0.11 * len(table)), width=9)
    for line, row in enumerate(table.itertuples()):
        times = [t - start for t in row.token_times_s]
        marks = [row.arrival_s - start, row.scheduled_s - start if known(row.scheduled_s) else None]
        begin = marks[1] if marks[1] is not None else marks[0]
        axes.barh(line, begin - marks[0], left=marks[0], color="#D9D9D9", label="waiting")
        if times:
            axes.barh(line, times[0] - begin, left=begin, color=PALETTE[4], label="prefill")
            axes.barh(line, times[-1] - times[0], left=times[0], color=PALETTE[0], label="decode")
        else:
            axes.plot(marks[0], line, "x", color="#C00000", label="failed")
    axes.invert_yaxis()
    axes.set_xlabel("time since the first arrival, s", fontsize=FONT)
    axes.set_ylabel("request, by arrival", fontsize=FONT)
    more = f" (the first {max_requests} of {len(requests)})" if len(requests) > max_requests else ""
    return finish(figure, f"Requests over time{more}")


# ----------------------------------------------------------------------------------------------- accuracy


def accuracy(scores: Table, metric: str = "acc", chance: dict[str, float] | None = None) -> Figure:
    """Bars of a metric per task with one standard error; one bar per `run` where the table has several.

    `chance` gives the score of guessing per task, drawn as a short line: a bar at that height is an alarm.
    """
    table = finished_rows(scores)
    table = table[table["metric"] == metric] if not table.empty else table
    if table.empty:
        return nothing(f"no finished task with the metric {metric}")
    runs = sorted(table["run"].unique()) if "run" in table else [metric]
    tasks = list(dict.fromkeys(table["task"]))
    colours = config_colours(runs)
    figure, ((axes,),) = make_grid(1, 1, height=1.6 + 0.34 * len(tasks) * max(1, 0.6 * len(runs)), width=8)
    height = 0.8 / len(runs)
    for place, run in enumerate(runs):
        part = table[table["run"] == run] if "run" in table else table
        for row in part.itertuples():
            y = tasks.index(row.task) + (place - (len(runs) - 1) / 2) * height
            error = row.stderr * 100 if known(row.stderr) else None
            axes.barh(y, row.value * 100, height * 0.92, color=colours[run], label=run, xerr=error, capsize=3)
            end = row.value * 100 + (error or 0)
            axes.annotate(f"{row.value * 100:.1f}", (end, y), (5, 0), textcoords="offset points", va="center")
    for task, value in (chance or {}).items():
        if task in tasks:
            y = tasks.index(task)
            axes.plot([value * 100] * 2, [y - 0.42, y + 0.42], "--", color="#C00000", label="chance")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"{metric}, % (line: one standard error)", fontsize=FONT)
    return finish(figure, "Accuracy", legend=len(runs) > 1 or bool(chance))


def accuracy_vs_throughput(table: Table) -> Figure:
    """One point per run with 95 % intervals on both axes. Up and to the right is better.

    Columns: run, accuracy and accuracy_stderr (fractions), tokens_per_s, and where repeats were made
    tokens_per_s_low and tokens_per_s_high.
    """
    if table.empty:
        return nothing("no run with both accuracy and throughput")
    colours = config_colours(table["run"])
    figure, ((axes,),) = make_grid(1, 1, height=4.6, width=7.5)
    for row in table.to_dict("records"):
        x, y = row["tokens_per_s"], row["accuracy"] * 100
        low, high = row.get("tokens_per_s_low"), row.get("tokens_per_s_high")
        x_error = [[x - low], [high - x]] if known(low) and known(high) else None
        y_error = 1.96 * row["accuracy_stderr"] * 100 if known(row.get("accuracy_stderr")) else None
        axes.errorbar(x, y, y_error, x_error, fmt="o", markersize=8, capsize=4, color=colours[row["run"]],
                      label=row["run"])  # fmt: skip
    axes.margins(x=0.2, y=0.2)
    axes.set_ylabel("accuracy, % (95 % interval)", fontsize=FONT)
    value_axis(axes, "output tokens/s (range of repeats)", which="x", log=False, zero=False)
    return finish(figure, "Accuracy against throughput")


def sensitivity(rows: Table, schemes: Mapping[str, str] | None = None) -> Figure:
    """KL divergence that quantising one linear alone causes, by layer and kind of linear.

    `rows`: one per linear, with linear (its full name), layer, part and kl (nats per token). `schemes` is the
    mix that was chosen (linear -> scheme): a square is w8a16, a hollow circle stays in float.
    """
    if rows.empty:
        return nothing("no sensitivity was measured")
    smallest = rows.loc[rows["kl"] > 0, "kl"].min()
    rows = rows.assign(kl=rows["kl"].clip(lower=smallest))  # zero has no place on a logarithmic axis
    figure, ((axes,),) = make_grid(1, 1, height=4.6, width=9)
    for colour, (name, part) in zip(PALETTE, rows.groupby("part", sort=True), strict=False):
        part = part.sort_values("layer")
        axes.plot(part["layer"], part["kl"], "-", color=colour, label=name, linewidth=1.2)
        kinds = part["linear"].map(lambda linear: "w8a8" if schemes is None else schemes.get(linear, "float"))
        for kind, marks in part.groupby(kinds):
            look = {"marker": "s" if kind == "w8a16" else "o", "fillstyle": "none" if kind == "float" else "full"}
            axes.plot(marks["layer"], marks["kl"], linestyle="", color=colour, markersize=6, **look)
    for kind, look in _SCHEME_MARKS if schemes is not None else ():
        axes.plot([], [], linestyle="", color="#444444", label=f"chosen: {kind}", **look)
    axes.set_xlabel("layer", fontsize=FONT)
    whole_numbers(axes)
    value_axis(axes, "KL divergence, nats/token", log=True)
    return finish(figure, "Cost of quantising one linear alone")


def mixes(candidates: Table, chosen: str | None = None, max_kl: float | None = None) -> Figure:
    """Every measured mix of schemes: KL divergence against the weight bytes that a decode step reads.

    Columns: candidate (its name), weight_bytes, kl (nats per token). `max_kl` is drawn as a limit.
    """
    if candidates.empty:
        return nothing("no mix was measured")
    figure, ((axes,),) = make_grid(1, 1, height=4.6, width=9)
    table = candidates.assign(kl=candidates["kl"].clip(lower=candidates.loc[candidates["kl"] > 0, "kl"].min()))
    for kind, look in _SCHEME_MARKS:
        part = table[table["candidate"].map(_mix_kind) == kind]
        if len(part):
            axes.plot(
                part["weight_bytes"] / 1e6,
                part["kl"],
                linestyle="",
                color=PALETTE[0],
                markersize=8,
                label={"w8a8": "all int8", "float": "sensitive ones in float", "w8a16": "sensitive ones in w8a16"}[
                    kind
                ],
                **look,
            )
    best = table[table["candidate"] == chosen]
    if len(best):
        axes.plot(
            best["weight_bytes"] / 1e6,
            best["kl"],
            "o",
            color=PALETTE[1],
            markersize=16,
            fillstyle="none",
            markeredgewidth=2,
            label=f"chosen: {chosen}",
        )
    if max_kl is not None:
        axes.axhline(max_kl, color="#C00000", linewidth=1, label="stated limit")
    value_axis(axes, "weights read per decode step, MB", which="x", log=False, zero=False)
    value_axis(axes, "KL divergence, nats/token", log=True)
    return finish(figure, "Mixes of schemes")


_SCHEME_MARKS = (("w8a8", {"marker": "o"}), ("w8a16", {"marker": "s"}), ("float", {"marker": "o", "fillstyle": "none"}))


def _mix_kind(candidate: str) -> str:
    return "w8a16" if candidate.endswith("w8a16") else "float" if candidate.endswith("float") else "w8a8"


# ------------------------------------------------------------------------------------------------ planning


def planner(plans: Table) -> Figure:
    """Predicted output tokens/s by cards, a bar per tensor-parallel size; a panel per `model` where given.

    Hatched bars break a limit. A split that does not fit or does not divide has no bar.
    """
    drawable = plans.dropna(subset=["output_tokens_per_s"]) if not plans.empty else plans
    if drawable.empty:
        return nothing("no plan fits: use a larger card, more cards or a smaller precision")
    models = list(dict.fromkeys(plans["model"])) if "model" in plans else [None]
    sizes, cards = sorted(drawable["tensor_parallel"].unique()), sorted(plans["cards"].unique())
    figure, (line,) = make_grid(1, len(models), height=4.2, width=6.5)
    for axes, model in zip(line, models, strict=True):
        part = drawable if model is None else drawable[drawable["model"] == model]
        for row in part.itertuples():
            place = sizes.index(row.tensor_parallel)
            x = cards.index(row.cards) + (place - (len(sizes) - 1) / 2) * 0.8 / len(sizes)
            axes.bar(x, row.output_tokens_per_s, 0.74 / len(sizes), color=PALETTE[place % len(PALETTE)],
                     label=f"tensor parallel {row.tensor_parallel}", edgecolor="white",
                     hatch="///" if known(row.reason) else None)  # fmt: skip
        for place, size in enumerate(sizes):
            axes.bar(0, 0, color=PALETTE[place % len(PALETTE)], label=f"tensor parallel {size}")
        if part["reason"].notna().any():
            axes.bar(0, 0, color="#BBBBBB", edgecolor="white", hatch="///", label="breaks a limit")
        axes.set_xticks(range(len(cards)), [str(c) for c in cards])
        axes.set_xlabel("cards (replicas = cards / tensor parallel)", fontsize=FONT)
        axes.set_title(model or "", fontsize=FONT)
        value_axis(axes, "predicted output tokens/s", log=False)
    return finish(figure, "Cards as replicas or tensor parallel")
