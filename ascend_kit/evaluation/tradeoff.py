"""Accuracy against throughput of several runs, each paired with a baseline, and which run to use.

Reads run folders only; no engine and no lm-eval. What a run lacks is listed; the others are compared all the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ascend_kit.evaluation.compare import (
    ALL_SETS,
    DEFAULT_MARGIN,
    LAYOUT,
    PAIR_ON,
    Pairs,
    Point,
    Row,
    Run,
    certain_losses,
    compare_accuracy,
    pair_documents,
    passage_of,
)
from ascend_kit.evaluation.perplexity import compare_perplexity
from ascend_kit.evaluation.runs import pick_baseline, pick_point
from ascend_kit.evaluation.scores import accuracy_interval
from ascend_kit.files import Table
from ascend_kit.measure.answers import asked_answers
from ascend_kit.measure.disturbed import disturbance
from ascend_kit.measure.rows import DEFAULTS, LOAD, RATE, load_of
from ascend_kit.messages import Finding, say
from ascend_kit.params.engines import ENGINE_SWITCHES

SHORTEST_ANSWERS = 0.9  # MLPerf: at least 90 % of the reference's generated tokens
NUM_WINDOWS = 10
VERDICT_COLUMNS = (
    *("n", "difference_points", "low_points", "high_points", "p_value"),
    *("min_detectable_points", "documents_needed", "outcome"),
)


@dataclass(frozen=True)
class Verdict:
    """Which run to use. `best` is the fastest run that loses no more than the margin, or `none` where no run can be
    recommended.

    `table`: one row per run with speedup, paired difference and whether it qualifies; `text` is for people; `point` is
    the load (the values of LOAD) whose speeds were compared.
    """

    best: str
    baseline: str
    text: str
    table: Table
    cautions: list[Finding] = field(default_factory=list)
    point: Point | None = None


class Comparison:
    """Runs beside each other: every table, pairing and the verdict, each worked out once.

    `margin_points` of accuracy may be lost. `baseline` is by default the plainest complete run, `point` the
    heaviest load that most runs share with it; given by concurrency, prompt_len, output_len and what else is unusual.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        margin_points: float = 100 * DEFAULT_MARGIN,
        *,
        baseline: Run | None = None,
        point: Row | None = None,
    ) -> None:
        self.runs = list(runs)
        self.margin = margin_points / 100
        self.baseline = baseline or pick_baseline(self.runs)
        self.point = load_of(point) if point else pick_point(self.runs, self.baseline)
        self.others = [run for run in self.runs if run is not self.baseline]

    @cached_property
    def table(self) -> Table:
        """One row per run: accuracy with its 95 % interval on the documents that the runs share, throughput at the
        point, and what the run lacks.

        Throughput carries the range of its repeats or, for a single one, a 95 % interval over ten windows of that run;
        `rate_interval` says which. Cells without a measurement are empty.
        """
        import pandas

        return pandas.DataFrame(list(self._rows.values()))

    @cached_property
    def paired(self) -> Table:
        """Accuracy of every other run against the baseline: a row per set, and one for all sets together."""
        import pandas

        rows = [row for run in self.others for row in self._paired(run)]
        return pandas.DataFrame(rows)

    @cached_property
    def perplexity(self) -> Table:
        """Bits per byte of every other run against the baseline, on common pages."""
        import pandas

        return pandas.DataFrame([row for run in self.others if (row := compare_perplexity(self.baseline, run))])

    @cached_property
    def verdict(self) -> Verdict:
        """The fastest run whose accuracy is shown to be at most the margin below the baseline's.

        A run qualifies when the 95 % interval of its paired difference over all documents lies above -margin, no set
        shows a significant loss (Holm) beyond it, everything it was asked could be paired, and no stage of it ended
        with an alarm. Faster runs that are merely undecided are named with what is missing.
        """
        import pandas

        rows = [self._judge(run) for run in self.runs]
        table = pandas.DataFrame(rows)
        lacking = self.baseline.lacks(self.point)
        able = [row for row in rows if row["qualifies"] and row[RATE] is not None]
        if not able or self._rows[self.baseline.name][RATE] is None or not self.baseline.has("acc"):
            text = f"No verdict: the baseline {self.baseline.name} lacks something ({'; '.join(lacking)})."
            return Verdict("none", self.baseline.name, text, table, self._cautions(None))
        best = max(able, key=lambda row: row[RATE])
        text = [_best_text(best, self.baseline.name, self.margin)]
        text += [_faster_text(row) for row in rows if not row["qualifies"] and row["speedup"] > best["speedup"]]
        return Verdict(best["run"], self.baseline.name, "\n".join(text), table, self._cautions(best), self.point)

    # --- one run ------------------------------------------------------------------------------------------------------

    @cached_property
    def _pairs(self) -> dict[str, Pairs]:
        return {run.name: pair_documents(self.baseline, run, "acc") for run in self.runs}

    @cached_property
    def _shared(self) -> set[tuple]:
        """The documents that all runs answered, but for runs that share none with those before them."""
        parts = [{_key(row) for row, _ in pairs.rows} for pairs in self._pairs.values()]
        common: set[tuple] = max(parts, key=len, default=set())
        for part in sorted(parts, key=len, reverse=True):
            common = common & part or common
        return common

    @cached_property
    def _rows(self) -> dict[str, Row]:
        rows = {}
        for run in self.runs:
            accuracy = self._accuracy(run)
            lacks = run.lacks(self.point) + [
                text for text in [self._pairs[run.name].why_not] if text and run.has("acc")
            ]
            if run.has("acc") and not accuracy:
                lacks.append("no document in common with the others")
            rows[run.name] = {
                "run": run.name,
                "lacks": "; ".join(lacks),
                **accuracy,
                **_rate_at(run, self.point),
                **{key: run.parameters.get(key) for key in ENGINE_SWITCHES},
                **{name: run.sweep[0][name] for name in LAYOUT if run.sweep and name in run.sweep[0]},
            }
        empty = dict.fromkeys(("accuracy_percent", "accuracy_low_percent", "accuracy_high_percent", "n", RATE))
        return {name: {**empty, **row} for name, row in rows.items()}

    def _accuracy(self, run: Run) -> Row:
        rows = [row for _, row in self._pairs[run.name].rows if _key(row) in self._shared]
        if not rows or len(rows) < len(self._shared):
            return {}
        right = [row["acc"] for row in rows]
        low, high = accuracy_interval(right, [passage_of(row) for row in rows])
        return {
            "accuracy_percent": 100 * statistics.fmean(right),
            "accuracy_low_percent": 100 * low,
            "accuracy_high_percent": 100 * high,
            "n": len(rows),
        }

    def _paired(self, run: Run) -> list[Row]:
        rows = compare_accuracy(self.baseline, run, margin=self.margin)
        if rows:
            return rows
        why = "; ".join(run.lacks()) or self._pairs[run.name].why_not or "no document in common"
        return [{"baseline": self.baseline.name, "candidate": run.name, "set": None, "outcome": "not compared: " + why}]

    def _judge(self, run: Run) -> Row:
        shown = self._rows[run.name]
        rate, start = shown[RATE], self._rows[self.baseline.name][RATE]
        head = {
            "run": run.name,
            RATE: rate,
            "speedup": rate / start if rate and start else math.nan,
            "accuracy_percent": shown["accuracy_percent"],
        }
        alarms = "".join(f"; alarm: {text}" for text in run.alarms)
        if run is self.baseline:
            return {**head, "difference_points": 0.0, "outcome": "baseline", "qualifies": not alarms,
                    "verdict": "baseline" + alarms}  # fmt: skip
        if not run.has("acc"):
            return {**head, "outcome": "not evaluated", "qualifies": False, "verdict": "not evaluated" + alarms}
        rows = {row["set"]: row for row in self._paired(run)}
        overall = rows.pop(ALL_SETS, None)
        if overall is None:
            text = "; ".join(row.get("verdict", row["outcome"]) for row in rows.values())
            return {**head, "outcome": "not paired", "qualifies": False, "verdict": text + alarms}
        lost = certain_losses(rows.values(), self.margin)
        pairs = self._pairs[run.name]
        text = overall["verdict"] + "".join(f"; {row['set']}: {row['verdict']}" for row in lost)
        return {
            **head,
            **{name: overall[name] for name in VERDICT_COLUMNS},
            "verdict": text + (f"; {pairs.why_not}" if pairs.why_not else "") + alarms,
            "qualifies": overall["outcome"] == "within margin" and not (lost or pairs.refused or alarms),
        }

    def _cautions(self, best: Row | None) -> list[Finding]:
        found = list[str]()
        if best is not None and best["run"] != self.baseline.name:
            low = self._rows[best["run"]].get(f"{RATE}_low")
            high = self._rows[self.baseline.name].get(f"{RATE}_high")
            if low is None or high is None or not low > high:
                found.append(
                    "the throughput intervals of the chosen run and the baseline overlap or are missing; raise "
                    "sweep_repeats before trusting the speed-up"
                )
        for run in self.others:
            stopped = (run.folder.read_json("evaluation") or {}).get("stopped")
            if stopped:
                found.append(
                    f"{run.name} was stopped by its sequential test after {stopped['documents']} documents "
                    f"({stopped['outcome']} against {stopped['baseline']}): that verdict counts the looks, these "
                    "intervals do not"
                )
            share = answer_length_ratio(self.baseline, run)
            if share is not None and share < SHORTEST_ANSWERS:
                found.append(
                    f"{run.name} writes answers of {100 * share:.0f} % of the baseline's length (MLPerf asks for "
                    "90 %): it may be stopping early"
                )
        busy = disturbance((run.name, row) for run in self.runs for row in run.sweep)
        return busy + [say("text", "caution", text=f"{text}.") for text in found]


def answer_length_ratio(baseline: Run, candidate: Run) -> float | None:
    """Generated tokens of the candidate over the baseline's, on prompts both answered; None without any."""
    lengths = []
    for run in (baseline, candidate):
        rows = [row for row in asked_answers(run.folder) if row["status"] == "ok"]
        lengths.append({(row["index"], row["prompt"]): row["num_output_tokens"] for row in rows})
    common = lengths[0].keys() & lengths[1].keys()
    total = sum(lengths[0][key] for key in common)
    return sum(lengths[1][key] for key in common) / total if total else None


def _key(row: Row) -> tuple:
    return (row["task"], *(row[name] for name in PAIR_ON))


def _rate_at(run: Run, point: Point | None) -> Row:
    here = [row for row in run.sweep if load_of(row) == point]
    if not here or point is None:
        return {}
    rates = [float(row[RATE]) for row in here]
    if len(rates) > 1:
        low, high, kind = min(rates), max(rates), f"range of {len(rates)} repeats"
    else:
        low, high, kind = _within_run(run, here[0])
    return {
        RATE: statistics.fmean(rates),
        f"{RATE}_low": low,
        f"{RATE}_high": high,
        "rate_interval": kind,
        **{name: value for name, value in zip(LOAD, point, strict=True) if value != DEFAULTS[name]},
        "tpot_p50_ms": statistics.fmean(float(row["tpot_p50_ms"]) for row in here),
    }


def _within_run(run: Run, row: Row) -> tuple[float | None, float | None, str]:
    """95 % interval of one measurement's rate from the token counts of ten equal stretches of it."""
    from scipy.stats import t

    requests = [entry for entry in run.folder.rows("requests") if entry.get("point_id") == row.get("point_id")]
    times = sorted(time for request in requests for time in request["token_times_s"])
    if len(times) < 2 * NUM_WINDOWS:
        return None, None, "one measurement"
    start = min(request["arrival_s"] for request in requests)
    width = (times[-1] - start) / NUM_WINDOWS
    counts = [0] * NUM_WINDOWS
    for moment in times:
        counts[min(NUM_WINDOWS - 1, int((moment - start) / width))] += 1
    half = float(t.ppf(0.975, NUM_WINDOWS - 1)) * statistics.stdev(counts) / math.sqrt(NUM_WINDOWS) / width
    rate = float(row[RATE])
    return max(0.0, rate - half), rate + half, f"{NUM_WINDOWS} windows of one measurement"


def _best_text(best: Row, baseline: str, margin: float) -> str:
    if best["run"] == baseline:
        return (
            f"Use {baseline} (the baseline, {best[RATE]:,.0f} output tokens/s): no faster run is shown to lose at most "
            f"{100 * margin:g} points."
        )
    return (
        f"Use {best['run']}: {best[RATE]:,.0f} output tokens/s, {best['speedup']:.2f} times {baseline}; "
        f"{best['verdict']}."
    )


def _faster_text(row: Row) -> str:
    return f"{row['run']} is {row['speedup']:.2f} times as fast as the baseline but does not qualify: {row['verdict']}."
