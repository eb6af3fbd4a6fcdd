"""Charts of a sweep, of what was predicted for it, and of what happened over time at one of its points.

Every axis carries its unit, concurrency axes are log2, ceilings are dashed, repeats are points and the line goes
through their median. A configuration has one colour, mark and line style wherever the same set of configurations is
drawn. Rows whose status is not ok are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ascend_kit.files import GIB, Table
from ascend_kit.measure import verdict
from ascend_kit.measure.rows import RATE
from ascend_kit.show import drawing
from ascend_kit.show.drawing import BASELINES, DASHES, GREY, LENGTHS, PALETTE, RED, TICKS_IN_PANEL
from ascend_kit.show.tables import cell_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED_BARS = 16  # of more in a panel the numbers above would touch
RATIO_UNIT = "times (blue: above 1, red: below 1)"
CEILING_LINES = (("ceiling_tokens_per_s", "--", "ceiling"), ("predicted_tokens_per_s", ":", "prediction"))
# What is drawn above each other: unit, columns of `samples`, factor.
OVER_TIME = (
    ("requests", ("running", "waiting"), 1),
    ("KV blocks in use, %", ("kv_use",), 100),
    ("memory, GiB", ("memory_bytes",), 1 / GIB),
)


def throughput(rows: Table) -> Figure | None:
    """Output tokens/s against concurrency, one panel per pair of lengths, ceilings dashed, prediction dotted."""
    rows = drawing.finished_rows(rows)
    if len(rows) < 2:
        return None
    if drawing.is_many(rows):
        return drawing.heat_map(rows, RATE, "Throughput", "output tokens/s")
    figure = _panels(rows, RATE, "output tokens/s", CEILING_LINES)
    return drawing.finish(figure, "Throughput", _best_each(rows))


def _panels(rows: Table, column: str, unit: str, references: tuple, log: bool | None = None) -> Figure:
    figure, panels = drawing.make_panels(rows)
    looks = drawing.config_looks(drawing.config_labels(rows))
    for axes, part in panels:
        drawing.series(axes, part, looks, column, unit)
        for name, style, text in references:
            drawing.reference_line(axes, part, looks, name, style, text)
        drawing.log2_axis(axes, part)
        drawing.value_axis(axes, unit, log=log)
    return figure


def _best_each(rows: Table) -> str:
    rows = drawing.with_labels(rows)
    best = rows.loc[rows.groupby("_label")[RATE].idxmax()].to_dict("records")
    told = (f"best of {row['_label']}: {row[RATE]:,.0f} tokens/s at {drawing.plain(row['_load'])}" for row in best)
    return "; ".join(told)


def latency(rows: Table) -> Figure | None:
    """TTFT, TPOT and ITL against concurrency: median solid, p90 dashed, p99 dotted; stated limits in red."""
    rows = drawing.finished_rows(rows)
    if len(rows) < 2:
        return None
    if drawing.is_many(rows):
        return drawing.heat_map(rows, "tpot_p50_ms", "Median TPOT", "ms", good="low")
    looks, groups = drawing.config_looks(drawing.config_labels(rows)), drawing.panel_groups(rows)
    figure, grid = drawing.make_grid(len(groups), 3, height=3.1)
    for line, (lengths, part) in zip(grid, groups, strict=True):
        for axes, metric in zip(line, ("ttft", "tpot", "itl"), strict=True):
            for q, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
                drawing.series(axes, part, looks, f"{metric}_{q}_ms", f"ms ({q})", linestyle=style)
                axes.plot([], [], linestyle=style, color=GREY, label={"p50": "median"}.get(q, q))
            drawing.limit_line(axes, part, f"{metric}_limit_ms")
            drawing.log2_axis(axes, part)
            drawing.value_axis(axes, f"{metric.upper()}, ms")
            axes.set_title(f"{metric.upper()}: {drawing.lengths_text(lengths)}")
    fastest = rows.loc[rows[RATE].idxmax()]
    alt = f"fastest point: TTFT {fastest['ttft_p50_ms']:.3g} ms, TPOT {fastest['tpot_p50_ms']:.3g} ms"
    return drawing.finish(figure, "Latency", alt)


def tradeoff(rows: Table) -> Figure | None:
    """Throughput against median TPOT; each point carries its load. Up and to the left is better."""
    rows = drawing.finished_rows(rows).dropna(subset=["tpot_p50_ms"]) if not rows.empty else rows
    if len(rows) < 2:
        return None
    figure, panels = drawing.make_panels(rows)
    looks = drawing.config_looks(drawing.config_labels(rows))
    for axes, part in panels:
        named: list[tuple[str, float, float]] = []
        colours: list[str] = []
        for label, rest in part.groupby("_label", sort=True):
            one = rest.groupby("_load")[["tpot_p50_ms", RATE]].median()
            points = [(drawing.plain(load), x, y) for load, (x, y) in one.iterrows()]
            texts = [f"{label} at {load}: {cell_text(y)} tokens/s, {cell_text(x)} ms" for load, x, y in points]
            drawing.draw_points(axes, one["tpot_p50_ms"], one[RATE], texts, label=label, linewidth=1.8, **looks[label])
            named += [points[0], points[-1]] if drawing.is_many(rows) else points
            colours += [looks[label]["color"]] * (len(named) - len(colours))
        axes.margins(x=0.12, y=0.15)
        drawing.value_axis(axes, "output tokens/s")
        drawing.value_axis(axes, "median TPOT, ms", which="x")
        drawing.label_points(axes, named, colours)
    numbers = "requests per second" if "rate" in rows and rows["rate"].notna().all() else "requests in flight"
    return drawing.finish(figure, f"Throughput against latency (numbers: {numbers})", _best_each(rows))


def memory(rows: Table) -> Figure | None:
    """Peak memory of all cards against concurrency in GiB; the weights alone, of every replica, are the dashed line."""
    rows = drawing.finished_rows(rows)
    if len(rows) < 2:
        return None
    copies = rows["cards"] / rows["tensor_parallel"] if "cards" in rows else 1
    rows = rows.assign(peak_gib=rows["peak_memory_bytes"] / GIB, weights_gib=rows["weight_bytes"] * copies / GIB)
    if drawing.is_many(rows):
        return drawing.heat_map(rows, "peak_gib", "Peak memory", "GiB", good="low")
    figure = _panels(rows, "peak_gib", "peak memory, GiB", (("weights_gib", "--", "weights"),), log=False)
    alt = f"at most {rows['peak_gib'].max():.3g} GiB; weights {rows['weights_gib'].max():.3g} GiB"
    return drawing.finish(figure, "Memory", alt)


def speedup(rows: Table, baseline: str = "transformers") -> Figure | None:
    """Throughput over the baseline's at the same point, as bars; range over repeats as a line."""
    rows = drawing.finished_rows(rows)
    if rows.empty or not (rows["backend"] == baseline).any() or not (rows["backend"] != baseline).any():
        return None
    rows, points = drawing.with_labels(rows), ["_load", "_timed", "_kind", *LENGTHS]
    is_base, title = rows["backend"] == baseline, f"Speed-up over {baseline}"
    own = rows[~is_base].join(rows[is_base].groupby(points)[RATE].median().rename("base"), on=points)
    own = own.assign(ratio=own[RATE] / own["base"]).dropna(subset=["ratio"])
    if len(own) < 2:
        return None
    if drawing.is_many(own):
        return drawing.heat_map(own, "ratio", title, RATIO_UNIT, good="ratio")
    looks, names = drawing.config_looks(rows["_label"]), sorted(set(own["_label"]))
    figure, panels = drawing.make_panels(own)
    for axes, part in panels:
        loads = sorted(part["_load"].unique())
        _ratio_bars(axes, part, loads, names, looks)
        axes.axhline(1, color=BASELINES.get(baseline, GREY), linestyle="--", label=baseline)
        every = -(-len(loads) // TICKS_IN_PANEL)
        axes.set_xticks(range(0, len(loads), every), list(map(drawing.plain, loads[::every])))
        axes.set_xlabel(drawing.load_text(part))
        axes.margins(y=0.15)
        drawing.value_axis(axes, f"output tokens/s, multiple of {baseline}", log=False)
    alt = f"{own['ratio'].min():.1f} to {own['ratio'].max():.1f} times the speed of {baseline}"
    return drawing.finish(figure, title, alt)


def _ratio_bars(axes: Axes, rows: Table, loads: list, names: list[str], looks: dict[str, Any]) -> None:
    """A bar for each load and name, all names beside each other whether or not they are among these rows."""
    width = 0.8 / len(names)
    for (name, load), ratios in rows.groupby(["_label", "_load"])["ratio"]:
        left, middle = loads.index(load) + (names.index(name) - (len(names) - 1) / 2) * width, ratios.median()
        (bar,) = axes.bar(left, middle, width * 0.92, color=looks[name]["color"], label=name)
        drawing.tip(bar, [f"{name}: {middle:.2f} times at {drawing.plain(load)}"])
        axes.plot([left, left], [ratios.min(), ratios.max()], color="#222222", linewidth=1.5)
        if len(loads) * len(names) <= LABELLED_BARS:
            axes.annotate(f"{middle:.1f}x", (left, ratios.max()), (0, 3), textcoords="offset points", ha="center")


def request_timeline(requests: Table, max_requests: int = 64) -> Figure | None:
    """When each request waited, was prefilled and decoded: time on the x axis, one line per request."""
    if len(requests) < 2:
        return None
    table = requests.sort_values("arrival_s").head(max_requests)
    start = table["arrival_s"].min()
    figure, ((axes,),) = drawing.make_grid(1, 1, height=max(3.0, 1.6 + 0.11 * len(table)), width=9)
    for line, row in enumerate(table.itertuples()):
        times = [t - start for t in row.token_times_s]
        arrival = row.arrival_s - start
        begin = row.scheduled_s - start if drawing.known(row.scheduled_s) else arrival
        axes.barh(line, begin - arrival, left=arrival, color="#D9D9D9", label="waiting")
        if times:
            axes.barh(line, times[0] - begin, left=begin, color=PALETTE[4], label="prefill", hatch="//")
            axes.barh(line, times[-1] - times[0], left=times[0], color=PALETTE[0], label="decode")
        else:
            axes.plot(arrival, line, "x", color=RED, label="failed")
    axes.invert_yaxis()
    axes.set(xlabel="time since the first arrival, s", ylabel="request, by arrival")
    more = f" (the first {max_requests} of {len(requests)})" if len(requests) > max_requests else ""
    return drawing.finish(figure, f"Requests over time{more}", f"{len(table)} requests")


def over_time(samples: Table, rows: Table) -> Figure | None:
    """Requests running and waiting, KV blocks in use and memory while the fastest point of `rows` was measured."""
    rows = drawing.finished_rows(rows)
    if rows.empty or samples.empty:
        return None
    point = rows.loc[rows[RATE].idxmax()]
    own = samples[samples["point_id"] == point["point_id"]].dropna(axis="columns", how="all")
    panels = [panel for panel in OVER_TIME if own.columns.isin(panel[1]).any()]
    if len(own) < 3 or not panels:
        return None
    seconds = own["time_s"] - own["time_s"].min()
    figure, grid = drawing.make_grid(len(panels), 1, height=2.2, width=8)
    for (axes,), (unit, names, factor) in zip(grid, panels, strict=True):
        for place, name in enumerate(name for name in names if name in own):
            axes.plot(seconds, own[name] * factor, drawstyle="steps-post", linestyle=DASHES[place],
                      label=name if len(names) > 1 else None, color=PALETTE[place])  # fmt: skip
        drawing.value_axis(axes, unit, log=False)
        highest = 1.15 * axes.dataLim.y1 or 1  # a level line stays apart from the frame
        axes.set(ylim=(0, highest), xlim=(0, seconds.max()), xlabel="time, s")
    load = f"{point['concurrency']} in flight"
    if drawing.known(point.get("rate")):
        load = f"{point['load']}, {drawing.plain(point['rate'])}" + ("" if point["load"] == "trace" else " requests/s")
    place = f"{point['backend']}, {load}, {drawing.lengths_text(point[LENGTHS].tolist())}"
    grid[0][0].set_title(place)
    alt = f"at most {own['running'].max():.0f} requests at once" if "running" in own else ""
    return drawing.finish(figure, "One point over time", alt)


def planner(plans: Table) -> Figure | None:
    """Predicted output tokens/s by cards, a bar per tensor-parallel size.

    Hatched bars break a limit. A split that does not fit or does not divide has no bar.
    """
    drawable = plans.dropna(subset=[RATE]) if not plans.empty else plans
    if len(drawable) < 2:
        return None
    sizes, cards = sorted(drawable["tensor_parallel"].unique()), sorted(plans["cards"].unique())
    colours = {size: PALETTE[place % len(PALETTE)] for place, size in enumerate(sizes)}
    figure, ((axes,),) = drawing.make_grid(1, 1, height=4.2, width=6.5)
    for size, colour in colours.items():
        axes.bar(0, 0, color=colour, label=f"tensor parallel {size}")
    for row in drawable.itertuples():
        colour = colours[row.tensor_parallel]
        x = cards.index(row.cards) + (sizes.index(row.tensor_parallel) - (len(sizes) - 1) / 2) * 0.8 / len(sizes)
        hatch = "///" if drawing.known(row.reason) else None
        (bar,) = axes.bar(x, row.output_tokens_per_s, 0.74 / len(sizes), edgecolor="white", hatch=hatch, color=colour)
        told = f"{row.cards} cards, tensor parallel {row.tensor_parallel}: {row.output_tokens_per_s:,.0f} tokens/s"
        drawing.tip(bar, [told])
    if drawable["reason"].notna().any():
        axes.bar(0, 0, color="#BBBBBB", edgecolor="white", hatch="///", label="breaks a limit")
    axes.set_xticks(range(len(cards)), list(map(str, cards)))
    axes.set_xlabel("cards (replicas = cards / tensor parallel)")
    drawing.value_axis(axes, "predicted output tokens/s", log=False)
    alt = f"at most {drawable[RATE].max():,.0f} tokens/s"
    return drawing.finish(figure, "Cards as replicas or tensor parallel", alt)


def layouts_by_load(simulate: Callable[[], Table], cards: int = 2) -> Figure | None:
    """Predicted output tokens/s of `simulate()` against requests in flight, a line per tensor-parallel size.

    A panel per `model` and number of `cards`; None for a run on one card. A split that does not divide the model, or a
    load that does not fit, has no point.
    """
    plans = simulate() if cards > 1 else None
    if plans is None or plans.empty or plans[RATE].isna().all():
        return None
    names = plans["tensor_parallel"].map(lambda size: f"tensor parallel {size}" if size > 1 else "replicas of one card")
    drawable = plans.assign(_label=names, _load=plans["concurrency"], _timed=False).dropna(subset=[RATE])
    models, counts = list(dict.fromkeys(drawable["model"])), sorted(drawable["cards"].unique())
    looks, style = drawing.config_looks(drawable["_label"]), {"markersize": 5, "linewidth": 1.5}
    figure, grid = drawing.make_grid(len(counts), len(models), height=3.4, width=5.4)
    for line, count in zip(grid, counts, strict=True):
        for axes, model in zip(line, models, strict=True):
            part = drawable[(drawable["model"] == model) & (drawable["cards"] == count)]
            drawing.series(axes, part, looks, RATE, "output tokens/s", **style)
            drawing.log2_axis(axes, part)
            drawing.value_axis(axes, "predicted output tokens/s", log=True)
            axes.set_title(f"{model} on {count} cards")
    return drawing.finish(figure, "The same cards as replicas or tensor parallel: simulated, not measured")


def waterfall(rows: Table, variants: Sequence[str]) -> Figure | None:
    """Output tokens/s of each step of an ablation with its 95 % interval, a panel for each load; None without steps."""
    from matplotlib.figure import Figure

    table = verdict.ablation(rows.to_dict("records"), variants) if variants else []
    if not table:
        return None
    loads: dict[tuple, list[dict]] = {}
    for row in table:
        loads.setdefault((row["concurrency"], row["prompt_len"], row["output_len"], row["load"]), []).append(row)
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(table) + 0.5 * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), 1, squeeze=False)[:, 0]
    for axes, ((concurrency, prompt, output, _), steps) in zip(panels, loads.items(), strict=True):
        before = 0.0
        for place, row in enumerate(steps):
            rate = row["output_tokens_per_s"]
            axes.barh(place, rate - before, left=before, color="#2E7D32" if rate >= before else "#B3261E", height=0.6)
            if row["low"] is not None:
                axes.errorbar(rate, place, xerr=[[rate - row["low"]], [row["high"] - rate]], color="black", capsize=3)
            sure = "" if row["gain_low"] is None else f" ({row['gain_low']:.2f}-{row['gain_high']:.2f})"
            text = f"{rate:,.0f}" + (f"  x{row['gain']:.2f}{sure}" if place else "")
            axes.annotate(text, (max(rate, before, row["high"] or 0), place), xytext=(8, 0),
                          textcoords="offset points", va="center", fontsize=8)  # fmt: skip
            before = rate
        axes.set_yticks(range(len(steps)), [row["variant"].replace("_", " ") for row in steps])
        axes.invert_yaxis()
        drawing.value_axis(axes, "output tokens/s", which="x", log=False)  # what a step adds is a length: no logarithm
        axes.set_xlim(0, 1.55 * max(row["high"] or row["output_tokens_per_s"] for row in steps))  # room for the text
        axes.set_title(f"concurrency {concurrency:.0f}, prompt {prompt:.0f}, output {output:.0f}", fontsize=9)
    return drawing.finish(figure, "What each step gave", legend=False)


def break_even_map(rows: Table) -> Figure | None:
    """Speed of int8 over unquantised by concurrency and lengths; None where not both were measured."""
    import pandas

    cells = pandas.DataFrame(verdict.break_even(rows.to_dict("records")))
    if cells.empty:
        return None
    return drawing.heat_map(cells, "ratio", "Speed of int8 over unquantised", RATIO_UNIT, good="ratio")
