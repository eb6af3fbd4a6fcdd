"""Tables for people: at most eight columns, few digits, no cut-off text, all text escaped and visible.

What does not fit in eight columns, and what is beyond the first lines, stands in a fold below. pandas' Styler is not
used: it needs a style element, which JupyterLab, nbconvert and the report take out of a table for safety.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from html import escape
from numbers import Number
from typing import TYPE_CHECKING, Any

from ascend_kit.files import GIB, Table
from ascend_kit.measure import verdict as verdicts
from ascend_kit.measure.rows import load_profile
from ascend_kit.messages import keys as known_keys
from ascend_kit.messages import phrase, translate

if TYPE_CHECKING:
    from IPython.display import HTML

    from ascend_kit.results import RunFolder

LONGEST_TEXT = 300
WIDE_TEXT = 40
PROMPT_START = 90
FACTS_DEPTH = 2
MOST_COLUMNS = 8
MOST_LINES = 40
BEST_AND_WORST = 10
SWEEP = [
    *("backend", "concurrency", "rate", "prompt_len", "output_len", "output_tokens_per_s", "ttft_p50_ms"),
    *("tpot_p50_ms", "ceiling_share", "repeat", "cards", "tensor_parallel", "itl_p99_ms", "e2e_p99_ms"),
    *("requests_per_s", "goodput_requests_per_s", "mbu", "mfu", "kv_use_max", "running_mean", "waiting_mean"),
    *("prefix_hit_rate", "num_preemptions", "tokens_per_step", "energy_j_per_output_token", "power_w"),
    *("other_cpu_cores", "status", "error"),
]
EXPECTED = [
    *("cards", "tensor_parallel", "concurrency", "prompt_len", "output_len", "decode_floor_ms", "prefill_floor_ms"),
    *("ceiling_tokens_per_s", "predicted_tokens_per_s", "num_requests", "step_weight_bytes", "kv_bytes_per_token"),
]
SCORES = [
    *("set", "task", "metric", "value", "stderr", "unit", "n", "num_fewshot", "plain_ops", "kind", "status", "error")
]
PAIRED = [
    *("candidate", "set", "n", "difference_points", "low_points", "high_points", "p_holm"),
    *("difference_bits_per_byte", "low_bits_per_byte", "high_bits_per_byte", "outcome"),
    *("baseline_percent", "candidate_percent", "baseline_bits_per_byte", "candidate_bits_per_byte"),
]
VERDICT = [
    *("run", "output_tokens_per_s", "speedup", "accuracy_percent", "difference_points", "outcome", "qualifies"),
    *("verdict", "n", "low_points", "high_points"),
]
ANSWERS = ["index", "prompt", "text", "finish_reason", "num_prompt_tokens", "num_output_tokens", "error"]
CHECKS = ["section", "check", "status", "evidence", "remedy"]
BEST = [
    *("best_for", "backend", "concurrency", "rate", "prompt_len", "output_len", "output_tokens_per_s", "low", "high"),
    *("num_repeats", "ttft_mean_ms", "tpot_mean_ms", "ceiling_share", "cause", "evidence"),
]
OPERATORS = ["phase", "operator", "kind", "ms_per_step", "share", "calls_per_step"]
HOST_GAP = "host gap"
SERIOUS_FIRST = ("fail", "warn", "ok", "n/a")
# Columns that hold words of ours and no data: they are shown in the reader's language.
SPOKEN = frozenset((*CHECKS, "at", "set", "kind", "speedup", "figure", "state", "outcome", "verdict", "decision",
                    "direction", "reason", "cause", "best_for", "note", "unit", "what differs", "how much", "source",
                    "what changed", "rate_interval", "int8", "lacks", "limit", "async_scheduling"))  # fmt: skip
JOINERS = "\u200c\u200d"  # a part of ordinary words and emoji


def readable(table: Table, *, keys: int = 1) -> HTML | None:
    """The table as HTML for a notebook, None where it is empty; the index only where it means something.

    Columns and lines without any value are left out. The first `keys` columns stand again before those in the fold.
    """
    from IPython.display import HTML

    table = table.mask(table == "").dropna(axis="columns", how="all").dropna(how="all")
    if table.empty:
        return None
    names = list(table.columns)
    shown = _lines(table[names[:MOST_COLUMNS]])
    if len(names) <= MOST_COLUMNS:
        return HTML(shown)
    if len(table) == 1:
        rest = [_upright(table[names[MOST_COLUMNS:]])]
    else:
        steps = range(MOST_COLUMNS, len(names), MOST_COLUMNS - keys)
        rest = [_lines(table[names[:keys] + names[at : at + MOST_COLUMNS - keys]]) for at in steps]
    return HTML(shown + fold(translate("table.more_columns", count=len(names) - MOST_COLUMNS), *rest))


def _upright(line: Table) -> str:
    """A single line as two columns, name and value."""
    import pandas

    values = {name: getattr(value, "item", lambda v=value: v)() for name, value in line.iloc[0].items()}  # numpy's bool
    values |= {name: phrase(cell_text(value)) for name, value in values.items() if name in SPOKEN}
    return _html(pandas.DataFrame({"value": values}, dtype=object))


def _lines(table: Table) -> str:
    """The first lines as a table, the others in a fold below it."""
    if len(table) <= MOST_LINES + 1:
        return _html(table)
    more = fold(translate("table.more_lines", count=len(table) - MOST_LINES), _html(table[MOST_LINES:]))
    return _html(table[:MOST_LINES]) + more


def fold(title: str, *parts: str) -> str:
    """HTML parts that are hidden until the title is clicked."""
    return f"<details><summary>{markup(title)}</summary>{''.join(parts)}</details>"


def _html(table: Table) -> str:
    """Columns of numbers to the right, so that digits stand below each other. It is said for every cell: JupyterLab
    sets heads to the right, the report to the left.
    """
    import pandas

    has_names = table.index.name is not None or not pandas.api.types.is_integer_dtype(table.index)
    sides = ["right" if all(map(_is_number, values)) else "left" for _, values in table.items()]
    heads = zip([table.index.name or ""] * has_names + list(table), ["left"] * has_names + sides, strict=True)
    lines = [f"<tr>{''.join(_head(name, side) for name, side in heads)}</tr></thead><tbody>"]
    for name, row in zip(table.index, table.itertuples(index=False, name=None), strict=True):
        first = f'<th scope="row" style="text-align: left">{_label(name)}</th>' if has_names else ""
        cells = (_cell(value, column in SPOKEN, side) for column, value, side in zip(table, row, sides, strict=True))
        lines.append(f"<tr>{first}{''.join(cells)}</tr>")
    return f"<table><thead>{''.join(lines)}</tbody></table>"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, Number) and not isinstance(value, bool))


def _head(name: Any, side: str) -> str:
    """A column's head in the reader's language; the mouse shows the name that the files have."""
    title = "" if phrase(str(name)) == str(name) else f' title="{markup(str(name))}"'
    return f'<th scope="col"{title} style="text-align: {side}">{_label(name)}</th>'


def _label(name: Any) -> str:
    """A name in the reader's language; a long one breaks where its words end."""
    return re.sub(r"([_.])(?=\w)", r"\1<wbr>", markup(phrase(str(name))))


def _cell(value: Any, is_spoken: bool, side: str) -> str:
    """A value; short text in one line, a longer one may break, at the strokes in the name of a run too."""
    text = phrase(cell_text(value)) if is_spoken or isinstance(value, bool) else cell_text(value)
    if side == "right":
        return f'<td style="text-align: right">{markup(text)}</td>'
    line = "" if len(text) > WIDE_TEXT else "; white-space: nowrap"
    shown = re.sub(r"(?<=\w)/(?=\w)", "/<wbr>", markup(text))
    return f'<td style="text-align: left{line}">{shown}</td>'


def markup(text: str) -> str:
    """Text as HTML that shows it as it is: escaped, no formula between dollar signs, nothing invisible."""
    return escape(visible(text)).replace("$", "<span>$</span>")


def visible(text: str) -> str:
    """The text with control, format and bidi characters and lone surrogates written out, as ⟨U+202E⟩."""
    return "".join(
        f"⟨U+{ord(sign):04X}⟩" if unicodedata.category(sign) in _UNSEEN and sign not in "\n\t" + JOINERS else sign
        for sign in text
    )


_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def shorten(text: str, most: int) -> str:
    """At most `most` characters; cut between words where the last third has a gap, else between characters."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    cut = text[: most - 2]
    return cut[: max(cut.rfind(" "), 0) if cut.rfind(" ") > most * 2 // 3 else len(cut)] + " …"


def note(text: str) -> HTML:
    """A sentence in place of a table."""
    from IPython.display import HTML

    return HTML(f"<p>{markup(text)}</p>")


def facts(values: dict[str, Any], *, title: str = "value") -> HTML | None:
    """A mapping as a table of two columns, without what is None; inner mappings become `outer.inner` rows."""
    import pandas

    return readable(pandas.DataFrame({title: _flat(values)}, dtype=object))


def memory(engine: Any) -> HTML | None:
    """What a loaded engine holds of a card's memory and what it keeps free for later, GiB of each rank; None of a
    server."""
    stats = getattr(engine, "stats", dict)()
    if "kv_block_bytes" not in stats:
        return None
    kept = {f"kept for {name}": size / GIB for name, size in stats.get("reserve_bytes", {}).items()}
    pool = stats["kv_blocks_total"] * stats["kv_block_bytes"] / GIB
    return facts({"weights": stats["weight_bytes"] / GIB, "KV cache": pool, **kept}, title="GiB")


def cell_text(value: Any) -> str:
    """A value in a cell: four significant digits, thousands apart, nothing for None and NaN."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value != value:
            return ""
        return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    item = getattr(value, "item", None)  # numpy scalars
    if callable(item) and getattr(value, "shape", None) == ():
        return cell_text(item())
    text = str(value).replace("\n", " ⏎ ")
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _flat(values: dict[str, Any], prefix: str = "", depth: int = FACTS_DEPTH) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict) and depth > 1:
            rows |= _flat(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, (dict, list, tuple)) and len(str(value)) > LONGEST_TEXT:
            rows[f"{prefix}{key}"] = phrase(f"{len(value)} entries")
        elif isinstance(value, (list, tuple)):
            rows[f"{prefix}{key}"] = ", ".join(map(cell_text, value))
        else:
            rows[f"{prefix}{key}"] = value
    return rows


# --- tables of the notebooks --------------------------------------------------------------------------------


def sweep(rows: Table) -> HTML | None:
    """The columns of a sweep that answer its question, repeats of a point below each other; all else is in the file."""
    from ascend_kit.show.drawing import config_labels

    if rows.empty:
        return None
    by = [name for name in ("prompt_len", "output_len", "concurrency", "rate", "repeat") if name in rows]
    named = rows.assign(backend=config_labels(rows), _place=rows["backend"].factorize()[0])  # engines as measured
    ranked = named.sort_values(["_place", "backend", *by], kind="stable", ignore_index=True)
    return readable(_chosen(ranked, SWEEP), keys=4)


def expected(limits: Table) -> HTML | None:
    """Floors, ceiling and prediction of each point, before it is measured."""
    return readable(_chosen(limits, EXPECTED), keys=3)


def _chosen(table: Table, columns: list[str]) -> Table:
    """Those columns that the table has; layouts of cards only where there are several."""
    alike = {name for name in ("cards", "tensor_parallel") if name in table and table[name].nunique() <= 1}
    return table[[name for name in columns if name in table and name not in alike]]


def best_points(rows: Table, slo: dict[str, float]) -> HTML | None:
    """One line for throughput, one for latency, one within the limits where there are any."""
    import pandas

    best = [{"best_for": kind, **point} for kind, point in verdicts.best(rows.to_dict("records"), slo).items()]
    return readable(pandas.DataFrame(best, columns=BEST))


def steps(folder: RunFolder, rows: Table, variants: Sequence[str]) -> HTML | None:
    """The ablation's steps, from where on int8 pays, and the brackets of a search, one below the other."""
    import pandas

    records = rows.to_dict("records")
    gains = verdicts.ablation(records, variants) if variants else []
    pays = verdicts.use_from(verdicts.break_even(records))
    texts = [{"int8": f"use it from {row['use_from']:.0f} on" if row["use_from"] else "not throughout", **row}
             for row in pays]  # fmt: skip
    return readable(pandas.DataFrame([*gains, *texts, *(folder.read_json("search") or [])]))


def operators(folder: RunFolder) -> Table:
    """Operators of both profiled phases, the longest first, below the host's gap where no operator runs."""
    import pandas

    phases, found = load_profile(folder)
    if phases.empty:
        return found
    names = {"host_gap_ms": "ms_per_step", "host_share": "share"}
    gaps = phases.rename(columns=names).reindex(columns=OPERATORS).assign(operator=phrase(HOST_GAP))
    table: Table = pandas.concat([gaps, found], ignore_index=True)[OPERATORS]
    return table.sort_values(["phase", "ms_per_step"], ascending=[False, False], ignore_index=True)


def cards(rows: Table) -> HTML | None:
    """What each card did in all measured stretches together."""
    return readable(total_load(rows))


def total_load(rows: Table) -> Table:
    """One row per card over all stretches: sums, the share of the whole time that was busy, the highest peak, GiB."""
    if rows.empty:
        return rows
    known = {name: rows[name].astype(float) for name in ("requests", "busy_share")}  # empty where nobody counts
    cards = rows.assign(**known, busy_s=known["busy_share"] * rows["wall_s"]).groupby("card", sort=False)
    sums = cards[["requests", "output_tokens", "wall_s", "busy_s", "restarts"]].sum(min_count=1)
    table = sums.rename(columns={"wall_s": "measured_s"})
    table.insert(0, "replica", cards["replica"].agg(lambda found: ", ".join(map(str, sorted(set(found))))))
    table.insert(4, "busy_share", table.pop("busy_s") / table["measured_s"])
    table.insert(5, "peak_memory_gib", cards["peak_memory_bytes"].max() / GIB)
    return table.reset_index()


def scores(table: Table) -> HTML | None:
    """Scores with their standard error; of very many tasks the sets, ten best and ten worst, the rest folded."""
    from IPython.display import HTML

    shown = _chosen(table, SCORES)
    if len(shown) <= MOST_LINES or "kind" not in shown:
        return readable(shown, keys=3)
    import pandas

    tasks = shown[(shown["kind"] == "task") & (shown["metric"] == "acc")].sort_values("value", ascending=False)
    if len(tasks) <= 2 * BEST_AND_WORST:
        return readable(shown, keys=3)
    ends = pandas.concat([shown[shown["kind"] == "group"], tasks[:BEST_AND_WORST], tasks[-BEST_AND_WORST:]])
    rest = shown.drop(ends.index)
    folded = fold(translate("table.more_tasks", count=len(rest)), _html(rest[[c for c in rest if c != "kind"][:8]]))
    return HTML(_html(ends.dropna(axis="columns", how="all").iloc[:, :MOST_COLUMNS]) + folded)


def answers(table: Table) -> HTML | None:
    """The first answers; all of them, and the whole prompts, are in the JSON file."""
    first = _chosen(table, ANSWERS).head(20)
    return readable(first.assign(prompt=first["prompt"].map(lambda text: shorten(str(text), PROMPT_START))))


def paired(table: Table) -> HTML | None:
    """Each run against the baseline, per set or over running text: difference with its interval, outcome, then both."""
    return readable(_chosen(table, PAIRED), keys=2)


def runs(table: Table) -> HTML | None:
    """One line per run, its name first."""
    return readable(table[["run", *table.columns.drop("run")]])


def verdict(table: Table) -> HTML | None:
    """One line per run: speed, accuracy, and what is decided about it."""
    first = [name for name in VERDICT if name in table]
    return readable(table[[*first, *table.columns.difference(first, sort=False)]])


def checks(table: Table) -> HTML:
    """What the doctor found wrong, the most serious first; what is fine in a fold."""
    from IPython.display import HTML

    order = table["status"].map(SERIOUS_FIRST.index)
    shown = table.iloc[order.argsort(kind="stable")].reindex(columns=CHECKS)
    bad = shown["status"].isin(["fail", "warn"])
    title = translate("table.checks_rest" if bad.any() else "table.checks_fine", count=int((~bad).sum()))
    fine = shown[~bad].mask(shown == "").dropna(axis="columns", how="all")
    return HTML((_html(shown[bad]) if bad.any() else "") + fold(title, _html(fine)))


def parity(figures: Table) -> HTML | None:
    """Figures of a parity check with what each of them says."""
    known = known_keys()
    meaning = figures["figure"].map(lambda name: translate(f"parity.{name}") if f"parity.{name}" in known else "")
    return readable(figures.assign(meaning=meaning))
