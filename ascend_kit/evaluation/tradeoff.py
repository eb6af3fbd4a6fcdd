"""Accuracy against throughput of several runs, and which run to use.

Reads run folders only (`documents`, `rows`, `requests`, `answers`, params.yaml); no engine and no lm-eval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.compare import (
    ALL_SETS,
    CONFIDENCE,
    DEFAULT_MARGIN,
    PAIR_ON,
    CompareError,
    compare_accuracy,
    pick_baseline,
    run_name,
)
from ascend_kit.evaluation.paired import wilson_interval
from ascend_kit.evaluation.scores import load_documents
from ascend_kit.params import ENGINE_SWITCHES
from ascend_kit.results import RunFolder, run_parameters

if TYPE_CHECKING:
    import pandas

POINT = ["concurrency", "prompt_len", "output_len"]
LAYOUT = ["cards", "tensor_parallel"]
SHORTEST_ANSWERS = 0.9  # MLPerf: at least 90 % of the reference's generated tokens
ENGINE_BACKEND = "ascend_kit"
RATE = "output_tokens_per_s"
NUM_WINDOWS, T_9 = 10, 2.262  # t quantile, 97.5 %, nine degrees of freedom


def accuracy_throughput(
    folders: Sequence[RunFolder], *, metric: str = "acc", point: tuple[int, int, int] | None = None
) -> pandas.DataFrame:
    """One row per run: accuracy on the documents all runs answered, throughput at a point all runs measured.

    `point` is (concurrency, prompt_len, output_len), by default the heaviest common one. Accuracy carries a
    95 % Wilson interval. Throughput carries the range of its repeats or, for a single one, a 95 % interval
    over ten windows of that run; `rate_interval` says which. A run without evaluation or sweep has empty
    cells. A run that measured several layouts of cards shows its own (`cards`, `tensor_parallel`) or, where the sweep
    left that out, its fastest.
    """
    import pandas

    folders = list(folders)
    accuracy = _common_accuracy(folders, metric)
    rates = {run_name(folder): _engine_rows(folder) for folder in folders}
    point = point or _heaviest_common_point([rows for rows in rates.values() if len(rows)])
    rows = []
    for folder in folders:
        name, values = run_name(folder), run_parameters(folder)
        shown = {key: values[key] for key in ENGINE_SWITCHES}
        shown |= _layout_of(rates[name])
        rows.append({"run": name, **accuracy.get(name, {}), **_rate_at(folder, rates[name], point), **shown})
    empty = dict.fromkeys(("accuracy_percent", "accuracy_low_percent", "accuracy_high_percent", "n", RATE))
    return pandas.DataFrame([{**empty, **row} for row in rows])


def _common_accuracy(folders: list[RunFolder], metric: str) -> dict[str, dict[str, float]]:
    tables = {}
    for folder in folders:
        table = load_documents(folder)
        if metric in table:
            tables[run_name(folder)] = table[table[metric].notna()].set_index(PAIR_ON)[metric]
    if not tables:
        return {}
    common = set.intersection(*(set(table.index) for table in tables.values()))
    if not common:
        raise CompareError(f"the runs {', '.join(tables)} share no document; evaluate them on the same sets")
    result = {}
    for name, table in tables.items():
        values = table[table.index.isin(common)]
        low, high = wilson_interval(float(values.sum()), len(values))
        result[name] = {
            "accuracy_percent": 100 * float(values.mean()),
            "accuracy_low_percent": 100 * low,
            "accuracy_high_percent": 100 * high,
            "n": len(values),
        }
    return result


def _engine_rows(folder: RunFolder) -> pandas.DataFrame:
    rows = folder.load("rows")
    if rows.empty:
        return rows
    rows = rows[(rows["status"] == "ok") & (rows["backend"] == ENGINE_BACKEND)]
    if rows.empty or not set(LAYOUT) <= set(rows):
        return rows
    values = run_parameters(folder)
    own = rows[(rows[LAYOUT] == [values[name] for name in LAYOUT]).all(axis=1)]
    fastest = rows.loc[rows[RATE].idxmax(), LAYOUT]
    return own if len(own) else rows[(rows[LAYOUT] == fastest).all(axis=1)]


def _layout_of(rows: pandas.DataFrame) -> dict[str, int]:
    """The layout of rows that share one; nothing where it is not known."""
    if rows.empty or not set(LAYOUT) <= set(rows):
        return {}
    return {name: int(rows.iloc[0][name]) for name in LAYOUT}


def _heaviest_common_point(tables: list[pandas.DataFrame]) -> tuple[int, int, int] | None:
    if not tables:
        return None
    points = [set(table[POINT].itertuples(index=False, name=None)) for table in tables]
    common = set.intersection(*points)
    if not common:
        raise CompareError(
            "the runs have no common sweep point (concurrency, prompt_len, output_len): "
            + "; ".join(str(sorted(some)) for some in points)
        )
    return max(common, key=lambda item: (item[0], item[1] + item[2]))


def _rate_at(folder: RunFolder, rows: pandas.DataFrame, point: tuple[int, int, int] | None) -> dict[str, Any]:
    if rows.empty or point is None:
        return {}
    here = rows[(rows[POINT] == list(point)).all(axis=1)]
    if here.empty:
        return {}
    rates = [float(rate) for rate in here[RATE]]
    if len(rates) > 1:
        low, high, kind = min(rates), max(rates), f"range of {len(rates)} repeats"
    else:
        low, high, kind = _within_run(folder, here.iloc[0])
    tpot = float(here["tpot_p50_ms"].astype(float).mean())
    return {
        RATE: statistics.fmean(rates),
        f"{RATE}_low": low,
        f"{RATE}_high": high,
        "rate_interval": kind,
        **dict(zip(POINT, point, strict=True)),
        "tpot_p50_ms": tpot,
    }


def _within_run(folder: RunFolder, row: pandas.Series) -> tuple[float | None, float | None, str]:
    """95 % interval of one measurement's rate from the token counts of ten equal stretches of it."""
    requests = [r for r in folder.rows("requests") if r.get("point_id") == row.get("point_id")]
    times = sorted(time for request in requests for time in request["token_times_s"])
    if len(times) < 2 * NUM_WINDOWS:
        return None, None, "one measurement"
    start = min(request["arrival_s"] for request in requests)
    width = (times[-1] - start) / NUM_WINDOWS
    counts = [0] * NUM_WINDOWS
    for moment in times:
        counts[min(NUM_WINDOWS - 1, int((moment - start) / width))] += 1
    half = T_9 * statistics.stdev(counts) / math.sqrt(NUM_WINDOWS) / width
    rate = float(row[RATE])
    return max(0.0, rate - half), rate + half, f"{NUM_WINDOWS} windows of one measurement"


# --- the verdict --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Which run to use. `best` is the fastest run that loses no more than the margin; at least the baseline.

    `table`: one row per run with speedup, paired difference and whether it qualifies; `text` is for people.
    """

    best: str
    baseline: str
    text: str
    table: pandas.DataFrame
    cautions: list[str] = field(default_factory=list)


def verdict(
    folders: Sequence[RunFolder],
    *,
    baseline: RunFolder | None = None,
    margin: float = DEFAULT_MARGIN,
    metric: str = "acc",
    point: tuple[int, int, int] | None = None,
) -> Verdict:
    """The fastest run whose accuracy is shown to be at most `margin` (a fraction) below the baseline's.

    A run qualifies when the 95 % interval of its paired difference over all documents lies above -margin and
    no set shows a significant loss (Holm) beyond it. Faster runs that are merely undecided are named with
    what is missing. Raises CompareError when accuracy or throughput of the baseline is missing.
    """
    import pandas

    baseline = baseline or pick_baseline(folders)
    table = accuracy_throughput(folders, metric=metric, point=point).set_index("run", drop=False)
    start = table.loc[run_name(baseline)]
    for column, stage in (("accuracy_percent", "05_evaluate"), (RATE, "04_throughput")):
        if pandas.isna(start[column]):
            raise CompareError(f"baseline run {start['run']} has no {column}: run {stage} for it")
    rows = [
        _judge(folder, baseline, table.loc[run_name(folder)], float(start[RATE]), metric, margin) for folder in folders
    ]
    able = [row for row in rows if row["qualifies"] and not pandas.isna(row[RATE])]
    best = max(able, key=lambda row: row[RATE])
    text = [_best_text(best, start["run"], margin)]
    text += [_faster_text(row) for row in rows if not row["qualifies"] and row["speedup"] > best["speedup"]]
    return Verdict(
        best["run"], start["run"], "\n".join(text), pandas.DataFrame(rows), _cautions(folders, baseline, table, best)
    )


def _judge(
    folder: RunFolder, baseline: RunFolder, row: pandas.Series, start_rate: float, metric: str, margin: float
) -> dict[str, Any]:
    import pandas

    speedup = None if pandas.isna(row[RATE]) else float(row[RATE]) / start_rate
    head = {
        "run": row["run"],
        RATE: row[RATE],
        "speedup": speedup or math.nan,
        "accuracy_percent": row["accuracy_percent"],
    }
    if run_name(folder) == run_name(baseline):
        return {**head, "difference_points": 0.0, "outcome": "baseline", "qualifies": True, "verdict": "baseline"}
    if pandas.isna(row["accuracy_percent"]):
        return {**head, "outcome": "not evaluated", "qualifies": False, "verdict": "not evaluated"}
    paired = compare_accuracy(baseline, folder, metric=metric, margin=margin).set_index("set")
    overall, sets = paired.loc[ALL_SETS], paired.drop(index=ALL_SETS)
    lost = sets[(sets["p_holm"] < 1 - CONFIDENCE) & (sets["difference_points"] < -100 * margin)]
    text = overall["verdict"] + "".join(f"; {name}: {row['verdict']}" for name, row in lost.iterrows())
    columns = [
        "n",
        "difference_points",
        "low_points",
        "high_points",
        "p_value",
        "min_detectable_points",
        "documents_needed",
        "outcome",
    ]
    return {
        **head,
        **overall[columns].to_dict(),
        "verdict": text,
        "qualifies": overall["outcome"] == "within margin" and lost.empty,
    }


def _best_text(best: dict[str, Any], baseline: str, margin: float) -> str:
    if best["run"] == baseline:
        return (
            f"Use {baseline} (the baseline, {best[RATE]:.1f} output tokens/s): no faster run is shown to "
            f"lose at most {100 * margin:g} points."
        )
    return (
        f"Use {best['run']}: {best[RATE]:.1f} output tokens/s, {best['speedup']:.2f} times {baseline}; "
        f"{best['verdict']}."
    )


def _faster_text(row: dict[str, Any]) -> str:
    return f"{row['run']} is {row['speedup']:.2f} times as fast as the baseline but does not qualify: {row['verdict']}."


def _cautions(
    folders: Sequence[RunFolder], baseline: RunFolder, table: pandas.DataFrame, best: dict[str, Any]
) -> list[str]:
    found = []
    if best["run"] != run_name(baseline):
        low = table.loc[best["run"]].get(f"{RATE}_low")
        high = table.loc[run_name(baseline)].get(f"{RATE}_high")
        if low is None or high is None or not low > high:
            found.append(
                "the throughput intervals of the chosen run and the baseline overlap or are missing"
                "; raise sweep_repeats before trusting the speed-up"
            )
    for folder in folders:
        share = answer_length_ratio(baseline, folder)
        if share is not None and share < SHORTEST_ANSWERS:
            found.append(
                f"{run_name(folder)} writes answers of {100 * share:.0f} % of the "
                "baseline's length (MLPerf asks for 90 %): it may be stopping early"
            )
    return found


def answer_length_ratio(baseline: RunFolder, candidate: RunFolder) -> float | None:
    """Generated tokens of the candidate over the baseline's, on prompts both answered; None without any."""
    lengths = []
    for folder in (baseline, candidate):
        rows = [row for row in folder.rows("answers") if row["status"] == "ok"]
        lengths.append({(row["index"], row["prompt"]): row["num_output_tokens"] for row in rows})
    common = lengths[0].keys() & lengths[1].keys()
    total = sum(lengths[0][key] for key in common)
    return sum(lengths[1][key] for key in common) / total if total else None
