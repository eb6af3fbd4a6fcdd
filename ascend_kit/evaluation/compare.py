"""Two runs on the same documents: accuracy and perplexity, paired. Only what was asked alike is paired."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ascend_kit.evaluation.paired import PairedCounts, bootstrap_ratio_difference, holm, paired_counts
from ascend_kit.evaluation.runs import Run

Row = dict[str, Any]
PAIR_ON = ("doc_id", "doc_hash", "prompt_hash")
ALL_SETS = "all"
DEFAULT_MARGIN = 0.01  # one point, in the order of MLPerf's 99 % of the reference accuracy
CONFIDENCE = 0.95
# Parts of an identity in the words of a benchmark.
WORDS = {
    "task.num_fewshot": "shots",
    "task.chat_template": "chat template",
    "task.thinking": "thinking",
    "task.version": "task version",
    "task.metrics": "metrics",
}


@dataclass
class Pairs:
    """Documents that two runs were asked alike, as (baseline, candidate) rows, and what could not be paired.

    `refused`: set -> what differs, in words. `missing`: sets that only one of the runs has.
    """

    rows: list[tuple[Row, Row]] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def why_not(self) -> str:
        """What could not be paired and why; empty where everything was."""
        texts = [f"{name} is not paired ({'; '.join(dict.fromkeys(why))})" for name, why in self.refused.items()]
        return "; ".join(texts + [f"only one of the runs has {name}" for name in self.missing])


def pair_documents(baseline: Run, candidate: Run, value: str) -> Pairs:
    """The documents with `value` that both runs answered, of tasks whose data, shots, template and version agree."""
    found = Pairs()
    ours, theirs = baseline.answers(value), candidate.answers(value)
    for task in (task for task in ours if task in theirs):
        name = ours[task][0]["set"]
        unlike = baseline.identities[task].differences(candidate.identities[task], "pair")
        if unlike:
            found.refused.setdefault(name, []).extend(map(_in_words, unlike))
            continue
        pairs = _same_documents(ours[task], theirs[task])
        num_common = len({row["doc_id"] for row in ours[task]} & {row["doc_id"] for row in theirs[task]})
        if len(pairs) < num_common:
            text = (
                f"{task}: {num_common - len(pairs)} of {num_common} documents have other prompts or were cut in one run"
            )
            found.refused.setdefault(name, []).append(text)
        found.rows += pairs
    found.missing = sorted({rows[0]["set"] for rows in ours.values()} ^ {rows[0]["set"] for rows in theirs.values()})
    return found


def _same_documents(ours: list[Row], theirs: list[Row]) -> list[tuple[Row, Row]]:
    known = {tuple(row[name] for name in PAIR_ON): row for row in theirs}
    pairs = ((row, known.get(tuple(row[name] for name in PAIR_ON))) for row in ours)
    return [(a, b) for a, b in pairs if b and bool(a.get("cut_tokens")) == bool(b.get("cut_tokens"))]


def _in_words(difference: str) -> str:
    part, _, change = difference.partition(": ")
    return f"{WORDS.get(part, part)}: {change}"


def compare_accuracy(
    baseline: Run, candidate: Run, *, metric: str = "acc", margin: float = DEFAULT_MARGIN
) -> list[Row]:
    """One row per set and one for all documents that can be paired; a set that cannot has a row that says why.

    Percent and points; `p_value` is exact, `p_holm` corrected over the sets; the interval covers 95 %, both over whole
    passages where questions share them. `outcome`: `within margin` (a loss above `margin`, a fraction, is excluded),
    `worse` (any loss is certain, its size may exceed the margin), `undecided` or `not paired`.
    """
    pairs = pair_documents(baseline, candidate, metric)
    head = {"baseline": baseline.name, "candidate": candidate.name, "metric": metric}
    sets: dict[str, list[tuple[Row, Row]]] = {}
    for pair in pairs.rows:
        sets.setdefault(pair[0]["set"], []).append(pair)
    counts = {name: _counts(part, metric) for name, part in sets.items()}
    adjusted = holm([counts[name].p_value for name in sets])
    rows = [
        {**head, "set": name, **_paired_row(counts[name], p_holm, margin)}
        for name, p_holm in zip(sets, adjusted, strict=True)
    ]
    if pairs.rows:
        total = _counts(pairs.rows, metric)
        rows.append({**head, "set": ALL_SETS, **_paired_row(total, total.p_value, margin)})
    for name, why in pairs.refused.items():
        if name not in sets:
            text = f"not paired: {'; '.join(dict.fromkeys(why))}"
            rows.append({**head, "set": name, "outcome": "not paired", "verdict": text})
    return rows


def compare_perplexity(baseline: Run, candidate: Run) -> Row | None:
    """Bits per byte of the common WikiText pages: both, difference and its 95 % paired bootstrap interval.

    None where no page can be paired; bits per byte also compares across tokenizers.
    """
    pages = pair_documents(baseline, candidate, "logprob").rows
    if not pages:
        return None
    bits = [[-row["logprob"] / math.log(2) for row in side] for side in zip(*pages, strict=True)]
    sizes = [float(row["bytes"]) for row, _ in pages]
    change, low, high = bootstrap_ratio_difference(bits[0], bits[1], sizes)
    return {
        "baseline": baseline.name,
        "candidate": candidate.name,
        "n": len(pages),
        "baseline_bits_per_byte": sum(bits[0]) / sum(sizes),
        "candidate_bits_per_byte": sum(bits[1]) / sum(sizes),
        "difference_bits_per_byte": change,
        "low_bits_per_byte": low,
        "high_bits_per_byte": high,
        "outcome": "worse" if low > 0 else "better" if high < 0 else "no difference seen",
    }


def passage_of(row: Row) -> tuple[str, str] | None:
    """What a document shares with others of its task; None for a document of its own."""
    return (row["task"], row["passage"]) if row.get("passage") else None


def _counts(pairs: list[tuple[Row, Row]], metric: str) -> PairedCounts:
    ours, theirs = ([row[metric] for row in side] for side in zip(*pairs, strict=True))
    return paired_counts(ours, theirs, [passage_of(row) for row, _ in pairs])


def _paired_row(counts: PairedCounts, p_holm: float, margin: float) -> Row:
    low, high = counts.interval(CONFIDENCE)
    row = {
        "n": counts.n,
        "num_passages": counts.n if counts.passages is None else len(counts.passages.sizes),
        "baseline_percent": 100 * counts.baseline_accuracy,
        "candidate_percent": 100 * counts.candidate_accuracy,
        "difference_points": 100 * counts.difference,
        "low_points": 100 * low,
        "high_points": 100 * high,
        "p_value": counts.p_value,
        "p_holm": p_holm,
        "only_baseline": counts.only_baseline,
        "only_candidate": counts.only_candidate,
        "min_detectable_points": 100 * counts.min_detectable(),
        "margin_points": 100 * margin,
        "documents_needed": counts.documents_needed(margin),
        "outcome": "within margin" if low > -margin else "worse" if high < 0 else "undecided",
    }
    return {**row, "verdict": _accuracy_text(row)}


def _accuracy_text(row: Row) -> str:
    shown = (
        f"{row['difference_points']:+.2f} points, 95 % interval {row['low_points']:+.2f} to "
        f"{row['high_points']:+.2f}, n = {row['n']}"
    )
    if row["outcome"] == "within margin":
        return f"no loss above {row['margin_points']:g} points ({shown})"
    if row["outcome"] == "worse":
        return f"less accurate ({shown}, p = {row['p_value']:.2g})"
    return (
        f"undecided ({shown}): a loss of {-row['low_points']:.1f} points cannot be excluded; "
        f"differences below {row['min_detectable_points']:.1f} points go unseen here, about "
        f"{row['documents_needed']} documents would settle it"
    )
