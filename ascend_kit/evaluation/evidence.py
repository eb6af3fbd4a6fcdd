"""What stands behind the scores: letters, calibration, how answers ended, and documents that flip between two runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Any

from ascend_kit.evaluation.compare import Run, pair_documents
from ascend_kit.evaluation.judge import letter
from ascend_kit.files import Table

Row = dict[str, Any]
BINS = 10
EXAMPLES = 3  # flipped documents shown in each direction and set
SHOWN = 160  # characters of a question


def letters(documents: Table) -> Table:
    """How often each letter was given and how often it was right, in percent, a row per set and letter."""
    import pandas

    rows = []
    for name, part in _by_set(_choice_rows(documents)).items():
        given = Counter(row["prediction"] for row in part)
        right = Counter(place for row in part for place in _places(row["target"]))
        rows += [
            {
                "set": name,
                "letter": letter(place),
                "given_percent": 100 * given[place] / len(part),
                "right_percent": 100 * right[place] / len(part),
                "documents": len(part),
            }
            for place in range(max(len(row["choice_logprobs"]) for row in part))
        ]
    return pandas.DataFrame(rows)


def confidence(logprobs: Sequence[float]) -> float:
    """The share that the best choice has of all choices' probability: the softmax of their log-probabilities."""
    best = max(logprobs)
    return 1.0 / math.fsum(math.exp(value - best) for value in logprobs)


def reliability(documents: Table) -> Table:
    """A row per set and bin of confidence with documents in it: mean confidence against accuracy (Guo et al. 2017)."""
    bins = _sure(documents).groupby(["set", "bin"], observed=True)
    found = bins.agg(documents=("right", "size"), confidence=("confidence", "mean"), accuracy=("right", "mean"))
    return found.reset_index().astype({"set": object})


def calibration(documents: Table) -> Table:
    """Expected calibration error (the mean distance of accuracy from confidence over documents, in ten bins) and Brier
    score (the mean squared distance of the choices' probabilities from right and wrong, summed over choices) per set.
    """
    bins = reliability(documents)
    gaps = ((bins["accuracy"] - bins["confidence"]).abs() * bins["documents"]).groupby(bins["set"]).sum()
    sets = _sure(documents).astype({"set": object}).groupby("set", sort=False)
    found = sets.agg(documents=("right", "size"), brier=("brier", "mean"), mean_confidence=("confidence", "mean"),
                     accuracy=("right", "mean"))  # fmt: skip
    found.insert(1, "expected_calibration_error", gaps / found["documents"])
    return found.reset_index()


def _sure(documents: Table) -> Table:
    """Each multiple-choice document: its set, how confident the answer is, in which bin, whether right, Brier score."""
    import pandas

    rows = _choice_rows(documents)
    sets, sure = [row["set"] for row in rows], [confidence(row["choice_logprobs"]) for row in rows]
    return pandas.DataFrame(
        {
            "set": pandas.Categorical(sets, list(dict.fromkeys(sets))),
            "bin": [min(BINS - 1, int(value * BINS)) for value in sure],
            "confidence": sure,
            "right": [row["acc"] for row in rows],
            "brier": list(map(_brier, rows)),
        }
    )


def ends(documents: Table) -> Table:
    """How written answers ended: cut off, empty, and tokens of thought and answer, a row per set."""
    import pandas

    rows = []
    texts = [row for row in documents.to_dict("records") if isinstance(row.get("finish_reason"), str)]
    for name, part in _by_set(texts).items():
        several = [row["answers"] if isinstance(row.get("answers"), list) else [row["answer"]] for row in part]
        given = [answer for answers in several for answer in answers]
        lengths, thought = (_numbers(part, f"num_{what}_tokens") for what in ("output", "thinking"))
        rows.append(
            {
                "set": name,
                "documents": len(part),
                "cut_percent": 100 * sum(row["finish_reason"] == "length" for row in part) / len(part),
                "empty_percent": 100 * sum(not answer.strip() for answer in given) / len(given),
                "mean_answer_tokens": math.fsum(lengths) / len(lengths),
                "mean_thinking_tokens": math.fsum(thought) / len(thought) if thought else None,
            }
        )
    return pandas.DataFrame(rows)


def flips(baseline: Run, candidates: Iterable[Run], metric: str = "acc") -> Table:
    """Documents that one run answers right and the other does not: counts in both directions a run and set, and the
    first examples of each.
    """
    import pandas

    rows = []
    for candidate in candidates:
        sets: dict[str, list[tuple[Row, Row]]] = {}
        for pair in pair_documents(baseline, candidate, metric).rows:
            sets.setdefault(pair[0]["set"], []).append(pair)
        for name, pairs in sets.items():
            for direction, wanted in (("lost", (1, 0)), ("won", (0, 1))):
                found = [pair for pair in pairs if (pair[0][metric], pair[1][metric]) == wanted]
                head = {"run": candidate.name, "set": name, "direction": direction, "documents": len(found)}
                rows += [head | _example(*pair) for pair in found[:EXAMPLES]] or [head]
    return pandas.DataFrame(rows)


def _example(ours: Row, theirs: Row) -> Row:
    question = " ".join(str(ours.get("question") or "").split())
    return {
        "task": ours["task"],
        "doc_id": ours["doc_id"],
        "question": question if len(question) <= SHOWN else f"... {question[-SHOWN:]}",
        "expected": _name(ours, ours.get("target")),
        "baseline": _name(ours, ours.get("prediction", ours.get("answer"))),
        "candidate": _name(theirs, theirs.get("prediction", theirs.get("answer"))),
    }


def _name(row: Row, value: Any) -> str:
    places = _places(value) if row.get("choice_logprobs") else []
    return ", ".join(map(letter, places)) if places else str(value)


def _places(target: Any) -> list[int]:
    """The places of the right choices: a number, a list of numbers, or a letter."""
    if isinstance(target, str):
        return [ascii_uppercase.index(target)] if target in tuple(ascii_uppercase) else []
    return [int(place) for place in _list(target) if isinstance(place, (int, float))]


def _brier(row: Row) -> float:
    best = max(row["choice_logprobs"])
    weights = [math.exp(value - best) for value in row["choice_logprobs"]]
    right = _places(row["target"])
    # Of several right choices the probability counts for whichever the model prefers.
    hit = max(right, key=weights.__getitem__, default=-1)
    return math.fsum((weight / math.fsum(weights) - (place == hit)) ** 2 for place, weight in enumerate(weights))


def _choice_rows(documents: Table) -> list[Row]:
    if "choice_logprobs" not in documents:
        return []
    rows = documents[documents["choice_logprobs"].notna() & documents["acc"].notna()].to_dict("records")
    return [{**row, "prediction": int(row["prediction"])} for row in rows if len(row["choice_logprobs"]) > 1]


def _by_set(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["set"], []).append(row)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _numbers(rows: Iterable[Row], name: str) -> list[float]:
    """The values of all samples, where a document has one at all."""
    values = [value for row in rows for value in _list(row.get(name))]
    return [value for value in values if value is not None and value == value]
