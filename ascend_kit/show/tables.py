"""Tables for people: few digits, no cut-off text, empty cells for what is unknown, all text escaped."""

from __future__ import annotations

import math
import textwrap
from html import escape
from numbers import Number
from typing import TYPE_CHECKING, Any

from ascend_kit.measure.load import total_load

if TYPE_CHECKING:
    import pandas

LONGEST_TEXT = 300
WIDE_TEXT = 40
PROMPT_START = 90
FACTS_DEPTH = 2
SWEEP = [
    *("backend", "concurrency", "prompt_len", "output_len", "repeat", "output_tokens_per_s", "ceiling_share"),
    *("ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms", "e2e_p99_ms", "requests_per_s", "goodput_requests_per_s"),
    *("mbu", "mfu", "status", "error"),
]
LAYOUT = ["cards", "tensor_parallel"]
SCORES = ["kind", "set", "task", "metric", "value", "stderr", "unit", "n", "num_fewshot", "status", "error"]
PAIRED = [
    *("candidate", "set", "n", "baseline_percent", "candidate_percent", "difference_points"),
    *("low_points", "high_points", "p_holm", "outcome"),
]
ANSWERS = ["index", "prompt", "text", "finish_reason", "num_prompt_tokens", "num_output_tokens", "error"]


def readable(table: pandas.DataFrame) -> Any:
    """The table as HTML for a notebook; the index only where it means something. Units stand in column names."""
    from IPython.display import HTML

    if table.empty:
        return HTML("<p>Nothing to show.</p>")
    has_names = not _is_counter(table.index)
    head = ([table.index.name or ""] if has_names else []) + list(table.columns)
    lines = [f"<tr>{''.join(f'<th>{escape(str(name))}</th>' for name in head)}</tr>"]
    lines.append("</thead><tbody>")
    for name, row in zip(table.index, table.itertuples(index=False, name=None), strict=True):
        first = f"<th>{escape(str(name))}</th>" if has_names else ""
        lines.append(f"<tr>{first}{''.join(_cell(value) for value in row)}</tr>")
    return HTML(f"<table><thead>{''.join(lines)}</tbody></table>")


def _is_counter(index: pandas.Index) -> bool:
    import pandas

    return index.name is None and pandas.api.types.is_integer_dtype(index)


def _cell(value: Any) -> str:
    """Numbers to the right, so that digits stand below each other; long text with room to be read."""
    text = cell_text(value)
    if isinstance(value, Number) and not isinstance(value, bool):
        style = "text-align: right"
    else:
        style = "text-align: left; " + ("min-width: 20em" if len(text) > WIDE_TEXT else "white-space: nowrap")
    return f'<td style="{style}">{escape(text)}</td>'


def facts(values: dict[str, Any], *, title: str = "value") -> Any:
    """A mapping as a table of two columns; inner mappings become `outer.inner` rows."""
    import pandas

    return readable(pandas.DataFrame({title: _flat(values)}, dtype=object))


def cell_text(value: Any) -> str:
    """A value in a cell: four significant digits, thousands apart, nothing for None and NaN."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    item = getattr(value, "item", None)  # numpy scalars
    if callable(item) and getattr(value, "shape", None) == ():
        return cell_text(item())
    text = str(value).replace("\n", " ⏎ ")
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    if math.isinf(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _flat(values: dict[str, Any], prefix: str = "", depth: int = FACTS_DEPTH) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and depth > 1:
            rows |= _flat(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, dict) and len(str(value)) > LONGEST_TEXT:
            rows[f"{prefix}{key}"] = f"{len(value)} entries"
        else:
            rows[f"{prefix}{key}"] = value
    return rows


def sweep(rows: pandas.DataFrame) -> Any:
    """The columns of a sweep that answer its question; everything else stays in the file."""
    layouts = [name for name in LAYOUT if name in rows and rows[name].nunique() > 1]
    shared = ["ran_with"] if "ran_with" in rows and (rows["ran_with"].str.len() > 0).any() else []
    columns = ["cell"] * bool(shared) + SWEEP[:1] + layouts + SWEEP[1:-2] + shared + SWEEP[-2:]
    return readable(rows.reindex(columns=columns))


def cards(rows: pandas.DataFrame) -> Any:
    """What each card did in all measured stretches together."""
    return readable(total_load(rows))


def scores(table: pandas.DataFrame) -> Any:
    """Scores with their standard error and the number of documents behind them."""
    return readable(table.reindex(columns=SCORES))


def answers(table: pandas.DataFrame) -> Any:
    """The first answers; all of them, and the whole prompts, are in the JSON file."""
    first = table.reindex(columns=ANSWERS).head(20)
    return readable(first.assign(prompt=first["prompt"].map(lambda text: textwrap.shorten(text, PROMPT_START))))


def paired(table: pandas.DataFrame) -> Any:
    """Each run against the baseline per set: percent, points and their interval, corrected p-value."""
    return readable(table.reindex(columns=PAIRED) if len(table) else table)


def runs(table: pandas.DataFrame) -> Any:
    """One line per run, its name first."""
    return readable(table[["run", *table.columns.drop("run")]])


def checks(table: pandas.DataFrame) -> Any:
    """The doctor's findings, the most serious first."""
    order = {"fail": 0, "warn": 1, "ok": 2, "n/a": 3}
    shown = table.sort_values("status", key=lambda column: column.map(order), kind="stable")
    return readable(shown.reindex(columns=["section", "check", "status", "evidence", "remedy"]))
