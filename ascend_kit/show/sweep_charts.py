"""Charts of a sweep, of what was predicted for it, and of what happened over time at one of its points.

Every axis carries its unit, concurrency axes are log2, ceilings are dashed, repeats are points and the line goes
through their median. A configuration has one colour, mark and line style wherever the same set of configurations is
drawn. Rows whose status is not ok are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.runs import RATE
from ascend_kit.files import GIB, Table
from ascend_kit.show.drawing import (
    BASELINES,
    DASHES,
    FONT,
    GREY,
    LABELLED_BARS,
    LENGTHS,
    PALETTE,
    RATIO_UNIT,
    RED,
    TICKS_IN_PANEL,
    config_labels,
    config_looks,
    finish,
    finished_rows,
    heat_map,
    is_many,
    known,
    label_points,
    lengths_text,
    limit_line,
    load_text,
    log2_axis,
    make_grid,
    make_panels,
    panel_groups,
    plain,
    reference_line,
    series,
    tip,
    value_axis,
    with_labels,
)
from ascend_kit.show.tables import cell_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CEILING_LINES = (("ceiling_tokens_per_s", "--", "ceiling"), ("predicted_tokens_per_s", ":", "prediction"))
# What is drawn above each other: unit, columns of `samples`, factor.
OVER_TIME = (
    ("requests", ("running", "waiting"), 1),
    ("KV blocks in use, %", ("kv_use",), 100),
    ("memory, GiB", ("memory_bytes",), 1 / GIB),
)


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
        log2_axis(axes, part)
        value_axis(axes, unit, log=log)
    return figure, looks


def _best_each(rows: Table, looks: dict[str, Any]) -> str:
    rows, parts = with_labels(rows), []
    for name in looks:
        best = rows.loc[rows[rows["_label"] == name][RATE].idxmax()]
        parts.append(f"best of {name}: {best[RATE]:,.0f} tokens/s at {plain(best['_load'])}")
    return "; ".join(parts)


def latency(rows: Table) -> Figure | None:
    """TTFT, TPOT and ITL against concurrency: median solid, p90 dashed, p99 dotted; stated limits in red."""
    rows = finished_rows(rows)
    if len(rows) < 2:
        return None
    if is_many(rows):
        return heat_map(rows, "tpot_p50_ms", "Median TPOT", "ms", good="low")
    looks, groups = config_looks(config_labels(rows)), panel_groups(rows)
    figure, grid = make_grid(len(groups), 3, height=3.1)
    for line, (lengths, part) in zip(grid, groups, strict=True):
        for axes, metric in zip(line, ("ttft", "tpot", "itl"), strict=True):
            for q, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
                series(axes, part, looks, f"{metric}_{q}_ms", f"ms ({q})", linestyle=style)
                axes.plot([], [], linestyle=style, color=GREY, label={"p50": "median"}.get(q, q))
            limit_line(axes, part, f"{metric}_limit_ms")
            log2_axis(axes, part)
            value_axis(axes, f"{metric.upper()}, ms")
            axes.set_title(f"{metric.upper()}: {lengths_text(lengths)}", fontsize=FONT)
    fastest = rows.loc[rows[RATE].idxmax()]
    alt = f"fastest point: TTFT {fastest['ttft_p50_ms']:.3g} ms, TPOT {fastest['tpot_p50_ms']:.3g} ms"
    return finish(figure, "Latency", alt)


def tradeoff(rows: Table) -> Figure | None:
    """Throughput against median TPOT; each point carries its load. Up and to the left is better."""
    rows = finished_rows(rows).dropna(subset=["tpot_p50_ms"]) if not rows.empty else rows
    if len(rows) < 2:
        return None
    figure, panels = make_panels(rows)
    looks = config_looks(config_labels(rows))
    for axes, part in panels:
        named: list[tuple[str, float, float]] = []
        colours: list[str] = []
        for label, rest in part.groupby("_label", sort=True):
            one = rest.groupby("_load")[["tpot_p50_ms", RATE]].median()
            (line,) = axes.plot(*one.T.to_numpy(), label=label, linewidth=1.8, **looks[label])
            tip(
                line,
                [f"{label} at {plain(c)}: {cell_text(y)} tokens/s, {cell_text(x)} ms" for c, (x, y) in one.iterrows()],
            )
            named += [(plain(c), x, y) for c, (x, y) in (one.iloc[[0, -1]] if is_many(rows) else one).iterrows()]
            colours += [looks[label]["color"]] * (len(named) - len(colours))
        axes.margins(x=0.12, y=0.15)
        value_axis(axes, "output tokens/s")
        value_axis(axes, "median TPOT, ms", which="x")
        label_points(axes, named, colours)
    is_timed = rows["rate"].notna().all() if "rate" in rows else False
    numbers = "requests per second" if is_timed else "requests in flight"
    return finish(figure, f"Throughput against latency (numbers: {numbers})", _best_each(rows, looks))


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
        figure, "Memory", f"at most {rows['peak_gib'].max():.3g} GiB; weights {rows['weights_gib'].max():.3g} GiB"
    )


def speedup(rows: Table, baseline: str = "transformers") -> Figure | None:
    """Throughput over the baseline's at the same point, as bars; range over repeats as a line."""
    rows = finished_rows(rows)
    if rows.empty or not (rows["backend"] == baseline).any() or not (rows["backend"] != baseline).any():
        return None
    rows, points = with_labels(rows), ["_load", "_timed", "_kind", *LENGTHS]
    base = rows[rows["backend"] == baseline].groupby(points)[RATE].median()
    own = rows[rows["backend"] != baseline]
    own = own.assign(ratio=own[RATE] / base.reindex(own[points].apply(tuple, axis=1)).to_numpy()).dropna(
        subset=["ratio"]
    )
    if len(own) < 2:
        return None
    title = f"Speed-up over {baseline}"
    if is_many(own):
        return heat_map(own, "ratio", title, RATIO_UNIT, good="ratio")
    looks = config_looks(rows["_label"])
    figure, panels = make_panels(own)
    labels = own["_label"]
    names = sorted(set(labels))
    for axes, part in panels:
        loads = sorted(part["_load"].unique())
        for place, name in enumerate(names):
            _ratio_bars(
                axes, part[labels.loc[part.index] == name], loads, name, looks[name]["color"], place, len(names)
            )
        axes.axhline(1, color=BASELINES.get(baseline, GREY), linestyle="--", label=baseline)
        every = -(-len(loads) // TICKS_IN_PANEL)
        axes.set_xticks(range(0, len(loads), every), list(map(plain, loads[::every])))
        axes.set_xlabel(load_text(part), fontsize=FONT)
        axes.margins(y=0.15)
        value_axis(axes, f"output tokens/s, multiple of {baseline}", log=False)
    return finish(figure, title, f"{own['ratio'].min():.1f} to {own['ratio'].max():.1f} times the speed of {baseline}")


def _ratio_bars(axes: Axes, part: Table, loads: list, name: str, colour: str, place: int, count: int) -> None:
    width = 0.8 / count
    for x, load in enumerate(loads):
        ratios = part[part["_load"] == load]["ratio"]
        if ratios.empty:
            continue
        left, middle = x + (place - (count - 1) / 2) * width, ratios.median()
        (bar,) = axes.bar(left, middle, width * 0.92, color=colour, label=name)
        tip(bar, [f"{name}: {middle:.2f} times at {plain(load)}"])
        axes.plot([left, left], [ratios.min(), ratios.max()], color="#222222", linewidth=1.5)
        if len(loads) * count <= LABELLED_BARS:
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


def over_time(samples: Table, rows: Table) -> Figure | None:
    """Requests running and waiting, KV blocks in use and memory while the fastest point of `rows` was measured."""
    rows = finished_rows(rows)
    if rows.empty or samples.empty:
        return None
    point = rows.loc[rows[RATE].idxmax()]
    own = samples[samples["point_id"] == point["point_id"]].dropna(axis="columns", how="all")
    panels = [panel for panel in OVER_TIME if own.columns.isin(panel[1]).any()]
    if len(own) < 3 or not panels:
        return None
    seconds = own["time_s"] - own["time_s"].min()
    figure, grid = make_grid(len(panels), 1, height=2.2, width=8)
    for (axes,), (unit, names, factor) in zip(grid, panels, strict=True):
        for place, name in enumerate(name for name in names if name in own):
            axes.plot(seconds, own[name] * factor, drawstyle="steps-post", linestyle=DASHES[place],
                      label=name if len(names) > 1 else None, color=PALETTE[place])  # fmt: skip
        value_axis(axes, unit, log=False)
        axes.set_ylim(0, 1.15 * axes.dataLim.y1 or 1)  # a level line stays apart from the frame
        axes.set_xlim(0, seconds.max())
        axes.set_xlabel("time, s", fontsize=FONT)
    load = f"{point['concurrency']} in flight"
    if known(point.get("rate")):
        load = f"{point['load']}, {plain(point['rate'])}" + ("" if point["load"] == "trace" else " requests/s")
    place = f"{point['backend']}, {load}, {lengths_text(point[LENGTHS].tolist())}"
    grid[0][0].set_title(place, fontsize=FONT)
    return finish(
        figure,
        "One point over time",
        f"at most {own['running'].max():.0f} requests at once" if "running" in own else "",
    )


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
                tip(
                    drawn,
                    [
                        f"{name}: {row.output_tokens_per_s:,.0f} output tokens/s at {row.concurrency}"
                        for row in one.itertuples()
                    ],
                )
            log2_axis(axes, part.assign(_load=part["concurrency"], _timed=False))
            value_axis(axes, "predicted output tokens/s", log=True)
            axes.set_title(f"{model} on {count} cards", fontsize=FONT)
    return finish(figure, "The same cards as replicas or tensor parallel: simulated, not measured")
