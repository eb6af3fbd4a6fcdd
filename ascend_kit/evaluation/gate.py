"""May a quantised checkpoint be used? Accuracy, flips, running text, length of answers and speed in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ascend_kit.evaluation.compare import ALL_SETS, Run, certain_losses, compare_accuracy
from ascend_kit.evaluation.perplexity import compare_perplexity
from ascend_kit.evaluation.tradeoff import SHORTEST_ANSWERS, answer_length_ratio
from ascend_kit.files import Table
from ascend_kit.measure.metrics import ratio_interval
from ascend_kit.measure.rows import DEFAULTS, LOAD, RATE, load_of, load_text

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
        bits = self.bits_per_byte or {}
        names = ("difference_points", "low_points", "high_points", "only_baseline", "only_candidate", "n")
        return {
            "run": self.run,
            "decision": self.word,
            **{name: total.get(name) for name in names},
            "bits_per_byte_change": bits.get("difference_bits_per_byte"),
            "length_ratio": self.length_ratio,
            "speedup": _times(self.speeds) if self.speeds else None,
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
    """Output tokens/s of the candidate over the baseline's at each load and length that both measured, with the 95 %
    interval of the quotient (None where one of them was measured once). Loads of a given rate take no part: who keeps
    up with the arrivals is as fast as they are.
    """
    rates: list[dict[tuple, list[float]]] = []
    for run in (baseline, candidate):
        found: dict[tuple, list[float]] = {}
        for row in run.sweep:
            if row.get("rate") is None:
                found.setdefault(load_of(row), []).append(row[RATE])
        rates.append(found)
    return [
        {**{name: value for name, value in zip(LOAD, point, strict=True) if value != DEFAULTS[name]},
         "speedup": ratio.mean, "low": ratio.low, "high": ratio.high}
        for point in sorted(rates[0].keys() & rates[1].keys(), key=lambda point: (*point[:3], load_text(point)))
        for ratio in [ratio_interval(rates[1][point], rates[0][point])]
    ]  # fmt: skip


def break_even(speeds: list[dict[str, Any]]) -> int | None:
    """The smallest measured load from which on the candidate is surely faster at every load and length: the interval
    lies above 1, or the quotient itself where there is none. None where there is no such load.
    """
    unsure = [row["concurrency"] for row in speeds if _bound(row, "low") <= 1]
    faster = sorted({row["concurrency"] for row in speeds if row["concurrency"] > max(unsure, default=0)})
    return faster[0] if faster else None


def _bound(row: dict[str, Any], side: str) -> float:
    return row["speedup"] if row.get(side) is None else row[side]


def _times(speeds: list[dict[str, Any]]) -> str:
    """Quotients from the least to the greatest, with how sure they are."""
    ratios = [row["speedup"] for row in speeds]
    text = f"{min(ratios):.2f} to {max(ratios):.2f} times"
    if any(row.get("low") is None for row in speeds):
        return f"{text} (measured once)"
    bounds = [_bound(row, side) for row in speeds for side in ("low", "high")]
    return f"{text} (95 % intervals within {min(bounds):.2f} to {max(bounds):.2f})"


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
    lost = certain_losses(sets, margin)
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
    load, text = break_even(speeds), f"{total['verdict']}; {_times(speeds)} as fast"
    if load is not None:
        if load == min(row["concurrency"] for row in speeds):
            return "use it", text
        return "use it from a load on", f"{text}, faster from {load} requests in flight on"
    highest = max(row["concurrency"] for row in speeds)
    if any(row["concurrency"] == highest and _bound(row, "high") <= 1 for row in speeds):
        return "not", f"{text}, but not faster at the highest loads"
    return "undecided", f"{text}, which is not surely faster at the highest loads: raise sweep_repeats"
