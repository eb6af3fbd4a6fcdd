"""What runs hold, for looking around in it: a list of runs, points, requests, documents. Reads files only."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.compare import Run, pair_documents
from ascend_kit.evaluation.scores import load_scores
from ascend_kit.files import GIB, Table
from ascend_kit.measure.metrics import RequestRecord, itl_s, ttft_s
from ascend_kit.measure.rows import RATE, Point, key_of, load_rows
from ascend_kit.measure.verdict import fastest, measured_points
from ascend_kit.messages import Finding, phrase, say
from ascend_kit.params.engines import ENGINE_SWITCHES
from ascend_kit.results import run_records
from ascend_kit.show import drawing
from ascend_kit.show.drawing import GREY, LENGTHS, PALETTE
from ascend_kit.show.tables import cell_text
from ascend_kit.stages import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Axis -> column; what a row lacks cannot be chosen.
AXES = {
    "requests in flight": "concurrency",
    "rate, requests per second": "rate",
    "output tokens/s": RATE,
    "median TTFT, ms": "ttft_p50_ms",
    "median TPOT, ms": "tpot_p50_ms",
    "ITL p99, ms": "itl_p99_ms",
    "requests/s": "requests_per_s",
    "goodput, requests/s": "goodput_requests_per_s",
    "share of the ceiling": "ceiling_share",
    "MBU": "mbu",
    "MFU": "mfu",
    "peak memory, GiB": "peak_memory_gib",
}
MORE_IS_BETTER = ("output tokens/s", "requests/s", "goodput, requests/s", "share of the ceiling", "MBU", "MFU")
CEILING = "ceiling_tokens_per_s"
EXPLORING = "07_explore"
VEGA_LITE = "application/vnd.vegalite.v5+json"  # JupyterLab draws it by itself, offline, with hover and zoom


def find_runs(root: str | Path) -> dict[str, Run]:
    """experiment/run -> every run below `root` whose record can be read, the newest first; none that only explored."""
    found = [Run(folder) for folder, record in run_records(root) if not record.stages.keys() <= {EXPLORING}]
    return {run.name: run for run in found}


def run_list(runs: Iterable[Run]) -> Table:
    """One line per run: what it ran, its best throughput with the TTFT there, its accuracy, date and state."""
    import pandas

    return pandas.DataFrame([_line(run) for run in runs])


def _line(run: Run) -> dict[str, Any]:
    record, values = RunRecord.read(run.folder.path), run.parameters
    best, switches = fastest(measured_points(run.sweep)), [name for name in ENGINE_SWITCHES if values.get(name) is True]
    scores = load_scores(run.folder)
    right = scores[(scores["metric"] == "acc") & (scores["status"] == "ok")]
    return {
        "run": run.name,
        "model": ", ".join(
            str(values[name]) for name in ("model_name", "precision", "quantize") if values.get(name, "none") != "none"
        ),
        "engine, switches": ", ".join([*([best["backend"]] if best else []), *switches]),
        "tokens/s": best and best[RATE],
        "TTFT, ms": best and best.get("ttft_p50_ms"),
        "accuracy, %": 100 * (right["value"] * right["n"]).sum() / right["n"].sum() if len(right) else None,
        "changed": (record.updated or "")[:16].replace("T", " "),
        "state": replace(record, stages={name: one for name, one in record.stages.items() if name != EXPLORING}).state,
    }


def points(runs: Iterable[Run]) -> Table:
    """The measured points of several runs, each with its `run` and the `label` of its line."""
    import pandas

    parts = []
    for run in runs:
        rows = load_rows(run.folder)
        if len(rows):
            parts.append(rows.assign(run=run.name, label=[_label(run.name, row) for row in rows.to_dict("records")]))
    if not parts:
        return pandas.DataFrame()
    table = drawing.finished_rows(pandas.concat(parts, ignore_index=True))
    return table.assign(peak_memory_gib=table["peak_memory_bytes"] / GIB)


def _label(run: str, row: dict[str, Any]) -> str:
    cards = f", {row['cards']} cards" if row.get("cards", 1) > 1 else ""
    split = f", tensor parallel {row['tensor_parallel']}" if row.get("tensor_parallel", 1) > 1 else ""
    return run + (cards + split if row["backend"] == "ascend_kit" else f", {row['backend']}")


def means(table: Table, x: str, y: str) -> Table:
    """One line per label, lengths and load: mean of both columns, range of `y` over the repeats, ceiling."""
    if x not in table or y not in table:
        return table.head(0)
    table = table.dropna(subset=[x, y])
    rates = table["rate"].astype(float).fillna(0.0) if "rate" in table else 0.0  # without one: by requests in flight
    groups = table.assign(_rate=rates).groupby(["label", *LENGTHS, "concurrency", "_rate"], sort=True)
    columns = {"x": (x, "mean"), "y": (y, "mean"), "low": (y, "min"), "high": (y, "max"), "repeats": (y, "size")}
    found = groups.agg(**columns, ceiling=(CEILING, "mean")).reset_index()
    return found if y == RATE else found.assign(ceiling=None)


def chart(table: Table, x: str, y: str) -> Figure | None:
    """Any column against any other, a line per run through the means of its repeats; their range is a bar."""
    found = means(table, AXES[x], AXES[y]) if len(table) else table
    if len(found) < 2:
        return None
    found = found.assign(backend=found["label"])
    if drawing.is_many(found) and AXES[x] == "concurrency":
        good = "high" if y in MORE_IS_BETTER else "low"
        return drawing.heat_map(found, "y", f"{y} against {x}", y, good=good)
    figure, panels = drawing.make_panels(found)
    looks = drawing.config_looks(found["label"])
    for axes, part in panels:
        for label, line in part.groupby("label", sort=True):
            reach = [line["y"] - line["low"], line["high"] - line["y"]]
            drawn = axes.errorbar(line["x"], line["y"], reach, label=label, linewidth=1.8, capsize=3, **looks[label])
            drawing.tip(
                drawn[0], [f"{label}, {row.concurrency} in flight: {cell_text(row.y)}" for row in line.itertuples()]
            )
            if AXES[x] == "concurrency" and line["ceiling"].notna().any():
                axes.plot(line["x"], line["ceiling"], "--", linewidth=1, color=looks[label]["color"])
        if AXES[x] == "concurrency":
            drawing.log2_axis(axes, part.assign(_load=part["x"], _timed=False))
        else:
            drawing.value_axis(axes, x, which="x", zero=False)
        drawing.value_axis(axes, y)
    return drawing.finish(figure, f"{y} against {x}", f"{len(found)} points; {found['label'].nunique()} lines")


def vega(table: Table, x: str, y: str) -> dict[str, Any] | None:
    """The same chart for JupyterLab's own Vega-Lite: the mouse shows a point's values, drags and zooms."""
    found = means(table, AXES[x], AXES[y]) if len(table) else table
    if not len(found):
        return None
    values = [
        {**row, "lengths": drawing.lengths_text([row["prompt_len"], row["output_len"]])}
        for row in found.astype(object).where(found.notna(), None).to_dict("records")
    ]
    is_load = AXES[x] == "concurrency"
    scale = {"type": "log", "base": 2, "nice": False} if is_load else {"zero": False}
    wide = max(found["y"]) > 25 * max(min(found["y"]), 1e-9) > 0
    number = {"type": "quantitative"}
    across = {"field": "x", **number, "title": phrase(x), "scale": scale}
    up = {"field": "y", **number, "title": phrase(y), "scale": {"type": "log"} if wide else {"zero": True}}
    legend = {"orient": "bottom", "columns": 1, "labelLimit": 400}
    colour = {"field": "label", "type": "nominal", "title": None, "scale": {"range": list(PALETTE)}, "legend": legend}
    told = {"label": "run", "x": x, "y": y, "low": "least", "high": "most", "ceiling": "ceiling",
            "concurrency": "in flight", "repeats": "repeats"}  # fmt: skip
    tooltip = [{"field": name, "title": phrase(title), "format": ",.4~r"} for name, title in told.items()]
    tooltip[0].pop("format")
    shape, shared = {"field": "label", "type": "nominal", "legend": None}, {"x": across, "color": colour}
    reach = {"y": {"field": "low", **number}, "y2": {"field": "high"}}
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "line", "point": {"size": 60}},
            "params": [{"name": "zoom", "select": "interval", "bind": "scales"}],
            "encoding": {**shared, "y": up, "strokeDash": shape, "tooltip": tooltip, "order": {"field": "concurrency"}},
        },
        {"mark": "rule", "encoding": {**shared, **reach}},
    ]
    if is_load and found["ceiling"].notna().any():
        dashed = {"type": "line", "strokeDash": [5, 4]}
        layers.append({"mark": dashed, "encoding": {**shared, "y": {"field": "ceiling", **number}}})
    one = {"width": 460, "height": 300, "layer": layers}
    head = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "data": {"values": values}}
    if len({row["lengths"] for row in values}) == 1:
        return {**head, "title": values[0]["lengths"], **one}
    return {**head, "facet": {"field": "lengths", "type": "nominal", "title": None}, "columns": 2, "spec": one}


# --- one point --------------------------------------------------------------------------------------------------------


def point_names(table: Table) -> dict[str, int]:
    """A point in words -> its line in `points`."""
    return {f"{row['label']}: {Point(*key_of(row))}": place for place, row in enumerate(table.to_dict("records"))}


def lines_of(run: Run, table: str, point_id: str) -> Table:
    """The lines of `requests` or `samples` that belong to one point."""
    import pandas

    return pandas.DataFrame([row for row in run.folder.rows(table) if row.get("point_id") == point_id])


def histograms(requests: Table) -> Figure | None:
    """How TTFT and ITL are spread over the requests and gaps of one point, medians as dashed lines."""
    if requests.empty:
        return None
    records = [RequestRecord.from_row(row) for row in requests.to_dict("records")]
    spread = {
        "TTFT, ms": [value * 1e3 for record in records if (value := ttft_s(record)) is not None],
        "ITL, ms": [gap * 1e3 for record in records for gap in itl_s(record)],
    }
    figure, (line,) = drawing.make_grid(1, 2, height=3.2, width=5)
    for axes, (name, values) in zip(line, spread.items(), strict=True):
        if values:
            axes.hist(values, bins=min(40, max(5, len(values) // 2)), color=PALETTE[0], edgecolor="white")
            axes.axvline(statistics.median(values), linestyle="--", color=GREY)
            middle, most = cell_text(statistics.median(values)), cell_text(max(values))
            axes.set_title(f"median {middle}, most {most}")
        drawing.value_axis(axes, name, which="x", log=False, zero=False)
        drawing.value_axis(axes, "count", log=False)
    return drawing.finish(figure, "TTFT and ITL of one point", f"{len(records)} requests", legend=False)


# --- documents --------------------------------------------------------------------------------------------------------


def documents(run: Run, task: str, other: Run | None = None, search: str = "") -> Table:
    """The documents of a task that `run` got wrong or, with `other`, that only one of the two got right.

    `search` keeps the lines that hold it, in any column. Question and choices are shown where the run kept them.
    """
    import pandas

    if other is None:
        rows = [_document(row) for row in run.answers("acc").get(task, []) if row["acc"] < 1]
    else:
        pairs = [pair for pair in pair_documents(run, other, "acc").rows if pair[0]["task"] == task]
        rows = [
            _document(ours) | {"given by the other": _given(theirs), "right": (run if ours["acc"] == 1 else other).name}
            for ours, theirs in pairs
            if ours["acc"] != theirs["acc"]
        ]
    wanted = search.casefold()
    return pandas.DataFrame([row for row in rows if wanted in " ".join(map(str, row.values())).casefold()])


def _document(row: dict[str, Any]) -> dict[str, Any]:
    told = {"document": row["doc_id"], "question": row.get("question") or row.get("prompt"), "choices": _choices(row)}
    return {**told, "expected": _letter(row, row.get("target")), "given": _given(row)}


def _choices(row: dict[str, Any]) -> str:
    logprobs = row.get("choice_logprobs") or []
    texts = row.get("choices") or [""] * len(logprobs)
    parts = []
    for letter, text, logprob in zip(map(chr, range(65, 65 + len(texts))), texts, logprobs, strict=False):
        is_named = text.startswith((f"({letter})", f"{letter}."))  # AGIEval's name themselves
        parts.append(f"{text if is_named else f'{letter} {text}'} ({logprob:.2f})")
    return " ".join(" ".join(parts).split())


def _given(row: dict[str, Any]) -> str:
    return _letter(row, row["prediction"] if "prediction" in row else row.get("answer"))


def _letter(row: dict[str, Any], value: Any) -> str:
    """Places of choices as letters (several may be right, and lm-eval writes some as text), answers as they are."""
    values, are_places = value if isinstance(value, list) else [value], row.get("choice_logprobs") is not None
    texts = ("" if one is None else str(one) for one in values)
    return ", ".join(chr(65 + int(text)) if are_places and text.isdecimal() else text for text in texts)


def exploring_findings(listed: Table, table: Table) -> list[Finding]:
    """How many runs there are, and what became slower."""
    found = [say("explore.runs", count=len(listed))]
    if not len(table):
        return [*found, say("explore.no_history")]
    slower = table[table["regression"].eq(True)].to_dict("records")
    found += [say("explore.regression", "caution", run=row["run"], change=row["change, %"], at=row["at"],
                  changed=row["what changed"] or "nothing that is recorded") for row in slower]  # fmt: skip
    return found if slower else [*found, say("explore.steady", count=table["series"].nunique())]
