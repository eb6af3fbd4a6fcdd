"""What a sweep comes to: verdict, ablation waterfall, map of where int8 pays; tables in, tables and figures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ascend_kit.measure import verdict
from ascend_kit.show.drawing import RATIO_UNIT, finish, heat_map, value_axis

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from ascend_kit.results import RunFolder

VERDICT = (
    "best_for", "backend", "concurrency", "rate", "prompt_len", "output_len", "output_tokens_per_s", "low", "high",
    "num_repeats", "ttft_mean_ms", "tpot_mean_ms", "ceiling_share", "cause", "evidence",
)  # fmt: skip


def verdict_table(rows: pandas.DataFrame, slo: dict[str, float]) -> pandas.DataFrame:
    """One row for throughput, one for latency, one within the limits where there are any."""
    import pandas

    best = verdict.best(rows.to_dict("records"), slo)
    return pandas.DataFrame([{name: {"best_for": kind, **point}.get(name) for name in VERDICT}
                             for kind, point in best.items()], columns=list(VERDICT))  # fmt: skip


def waterfall(rows: pandas.DataFrame, variants: Sequence[str]) -> Figure | None:
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
        value_axis(axes, "output tokens/s", which="x", log=False)  # what a step adds is a length: no logarithm
        axes.set_xlim(0, 1.55 * max(row["high"] or row["output_tokens_per_s"] for row in steps))  # room for the text
        axes.set_title(f"concurrency {concurrency:.0f}, prompt {prompt:.0f}, output {output:.0f}", fontsize=9)
    return finish(figure, "What each step gave", legend=False)


def break_even_map(rows: pandas.DataFrame) -> Figure | None:
    """Speed of int8 over unquantised by concurrency and lengths; None where not both were measured."""
    import pandas

    cells = pandas.DataFrame(verdict.break_even(rows.to_dict("records")))
    if cells.empty:
        return None
    return heat_map(cells, "ratio", "Speed of int8 over unquantised", RATIO_UNIT, good="ratio")


def more_table(folder: RunFolder, rows: pandas.DataFrame, variants: Sequence[str]) -> pandas.DataFrame:
    """The ablation's steps, from where on int8 pays, and the brackets of a search, one below the other."""
    import pandas

    records = rows.to_dict("records")
    steps = verdict.ablation(records, variants) if variants else []
    pays = verdict.use_from(verdict.break_even(records))
    texts = [{"int8": f"use it from {row['use_from']:.0f} on" if row["use_from"] else "not throughout", **row}
             for row in pays]  # fmt: skip
    return pandas.DataFrame([*steps, *texts, *(folder.read_json("search") or [])])
