"""Tables for people: few digits, no cut-off text, empty cells for what is unknown, all text escaped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

LONGEST_TEXT = 300
FACTS_DEPTH = 2
SWEEP = [
    *("backend", "concurrency", "prompt_len", "output_len", "repeat", "output_tokens_per_s", "ceiling_share"),
    *("ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms", "e2e_p99_ms", "requests_per_s", "goodput_requests_per_s"),
    *("mbu", "mfu", "status", "error"),
]
SCORES = ["kind", "set", "task", "metric", "value", "stderr", "unit", "n", "num_fewshot", "status", "error"]
ANSWERS = ["index", "prompt", "text", "finish_reason", "num_prompt_tokens", "num_output_tokens", "error"]


def readable(table: pandas.DataFrame) -> Any:
    """The table as HTML for a notebook; the index only where it means something."""
    from IPython.display import HTML

    if table.empty:
        return HTML("<p>Nothing to show.</p>")
    has_names = table.index.name is not None or not isinstance(table.index[0], int)
    shown = table.map(cell_text)
    # DataFrame.to_html escapes; the widest text must not be cut by pandas' own limit of 50 characters.
    import pandas

    with pandas.option_context("display.max_colwidth", None):
        return HTML(shown.to_html(index=has_names, border=0, na_rep=""))


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
    text = str(value)
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
        else:
            rows[f"{prefix}{key}"] = value
    return rows


def sweep(rows: pandas.DataFrame) -> Any:
    """The columns of a sweep that answer its question; everything else stays in the file."""
    return readable(rows.reindex(columns=SWEEP))


def scores(table: pandas.DataFrame) -> Any:
    """Scores with their standard error and the number of documents behind them."""
    return readable(table.reindex(columns=SCORES))


def answers(table: pandas.DataFrame) -> Any:
    """The first answers; all of them are in the JSON file."""
    return readable(table.reindex(columns=ANSWERS).head(20))
