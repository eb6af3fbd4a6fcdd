"""May a quantised checkpoint be used? Accuracy, flips, running text, length of answers and speed in one line."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ascend_kit.evaluation.compare import ALL_SETS, CONFIDENCE, compare_accuracy, compare_perplexity
from ascend_kit.evaluation.runs import RATE, Run
from ascend_kit.evaluation.tradeoff import SHORTEST_ANSWERS, answer_length_ratio
from ascend_kit.files import Table

Word = Literal["use it", "use it from a load on", "not", "undecided"]


@dataclass(frozen=True)
class Gate:
    """`word` decides, `text` is the line for people; `sets` has the paired loss of each set, `speeds` a row a load."""

    run: str
    word: Word
    text: str
    sets: list[dict[str, Any]]
    speeds: list[dict[str, Any]]
    bits_per_byte: dict[str, Any] | None
    length_ratio: float | None

    def to_row(self) -> dict[str, Any]:
        """One line of a table."""
        total = next((row for row in self.sets if row["set"] == ALL_SETS), {})
        bits, ratios = self.bits_per_byte or {}, [row["speedup"] for row in self.speeds]
        names = ("difference_points", "low_points", "high_points", "only_baseline", "only_candidate", "n")
        return {
            "run": self.run,
            "decision": self.word,
            **{name: total.get(name) for name in names},
            "bits_per_byte_change": bits.get("difference_bits_per_byte"),
            "length_ratio": self.length_ratio,
            "speedup": f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else None,
            "reason": self.text,
        }


def gate(baseline: Run, candidate: Run, margin: float) -> Gate:
    """Use the candidate instead of the baseline, from which load on, or not. `margin` is a fraction of accuracy.

    It must lose less than the margin over all documents (95 % interval), no set may show a significant loss beyond it
    (Holm), nothing may have ended with an alarm, and answers must not be shorter than 90 % of the baseline's (MLPerf);
    then speed decides, load by load.
    """
    sets = compare_accuracy(baseline, candidate, margin=margin)
    bits, ratio = compare_perplexity(baseline, candidate), answer_length_ratio(baseline, candidate)
    speeds = speed_ratios(baseline, candidate)
    word, text = _decide(sets, speeds, ratio, [*baseline.alarms, *candidate.alarms], margin)
    return Gate(candidate.name, word, f"{candidate.name}: {word}: {text}", sets, speeds, bits, ratio)


def gates(baseline: Run, candidates: list[Run], margin: float) -> Table:
    """The gate of each run against the baseline, a line each."""
    import pandas

    return pandas.DataFrame([gate(baseline, candidate, margin).to_row() for candidate in candidates])


def speed_ratios(baseline: Run, candidate: Run) -> list[dict[str, Any]]:
    """Output tokens/s of the candidate over the baseline's at each load and length that both measured."""
    rates: list[dict[tuple, list[float]]] = []
    for run in (baseline, candidate):
        found: dict[tuple, list[float]] = {}
        for row in run.sweep:
            found.setdefault((row["concurrency"], row["prompt_len"], row["output_len"]), []).append(row[RATE])
        rates.append(found)
    return [
        {"concurrency": point[0], "prompt_len": point[1], "output_len": point[2],
         "speedup": fmean(rates[1][point]) / fmean(rates[0][point])}
        for point in sorted(rates[0].keys() & rates[1].keys())
    ]  # fmt: skip


def break_even(speeds: list[dict[str, Any]]) -> int | None:
    """The smallest measured load from which on the candidate is faster at every load and length; None where there is
    none.
    """
    slower = [row["concurrency"] for row in speeds if row["speedup"] <= 1]
    faster = sorted({row["concurrency"] for row in speeds if row["concurrency"] > max(slower, default=0)})
    return faster[0] if faster else None


def _decide(
    sets: list[dict[str, Any]], speeds: list[dict[str, Any]], ratio: float | None, alarms: list[str], margin: float
) -> tuple[Word, str]:
    total = next((row for row in sets if row["set"] == ALL_SETS), None)
    if alarms:
        return "not", f"alarm: {alarms[0]}"
    if total is None:
        return "undecided", "no document can be paired with the baseline's"
    if total["outcome"] == "worse":
        return "not", total["verdict"]
    lost = [
        row
        for row in sets
        if row["set"] != ALL_SETS and row.get("p_holm", 1) < 1 - CONFIDENCE and row["difference_points"] < -100 * margin
    ]
    if lost:
        return "not", f"{lost[0]['set']}: {lost[0]['verdict']}"
    if ratio is not None and ratio < SHORTEST_ANSWERS:
        return "not", f"its answers have {ratio:.0%} of the baseline's length; it may be stopping early"
    if total["outcome"] != "within margin":
        return "undecided", total["verdict"]
    if not speeds:
        return (
            "undecided",
            f"{total['verdict']}; its speed was not measured at a load of the baseline's: run 04_throughput",
        )
    load, best = break_even(speeds), max(row["speedup"] for row in speeds)
    if load is None:
        return "not", f"{total['verdict']}, but it is not faster at the highest loads ({best:.2f} times at best)"
    if load == min(row["concurrency"] for row in speeds):
        return "use it", f"{total['verdict']}; {min(r['speedup'] for r in speeds):.2f} to {best:.2f} times as fast"
    return (
        "use it from a load on",
        f"{total['verdict']}; faster from {load} requests in flight on, up to {best:.2f} times",
    )
