"""From the turns of compare.py to numbers: medians, ranges, ratios, goals; tables.py shows them."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tables import HEADLINES, INT8, OURS, OURS_INT8, draw, markdown

from ascend_kit.files import write_atomic
from ascend_kit.measure.metrics import percentile

if TYPE_CHECKING:
    from make_model import Shape


@dataclass(frozen=True)
class Goal:
    """Speed of this engine over that of others (median of the rounds' ratios) that has to be reached."""

    workload: str
    against: str  # "fastest" of the 16-bit ones, or the name of one engine
    bound: float
    is_time: bool = False  # the bound is on our time over theirs, from above


GOALS = (
    Goal("W1", "fastest", 1.1),
    Goal("W2", "fastest", 0.8, is_time=True),
    Goal("W3", "fastest", 1.1),
    Goal("W4", "vllm", 1.3),
    Goal("W4", "lm_eval_hflm", 15.0),
    Goal("W5", "fastest", 1.0, is_time=True),
)
BANDWIDTH_GOAL = 0.8


def write(out: Path, shape: Shape) -> dict[str, Any]:
    """Read the turns in `out`, write results.json, table.md and comparison.png there, print the table."""
    context = json.loads((out / "settings.json").read_text())
    turns = [json.loads(path.read_text()) for path in sorted((out / "turns").glob("*.json"))]
    ceilings = ceiling_summary(turns)
    rows = [row for turn in turns for row in turn_rows(turn, shape, ceilings)]
    results = {
        **context,
        "ceilings": ceilings,
        "summary": summarise(rows),
        "ratios": {ours: ratios(rows, ours) for ours in (OURS, *OURS_INT8)},
        "agreement": agreement(turns),
        "failed": failures(turns),
        "rows": rows,
        "versions": {turn["engine"]: turn.get("versions") for turn in turns},
        "peak_bytes": peaks(turns),
        "num_rounds": {t["engine"]: sum(o["engine"] == t["engine"] for o in turns) for t in turns},
        "load_s": {t["engine"]: t["load_s"] for t in turns if "load_s" in t},
    }
    results["goals"] = goals(results) + shares(results) + best_of_all(rows)
    text = markdown(results)
    write_atomic(out / "results.json", json.dumps(results, indent=1))
    write_atomic(out / "table.md", text)
    if rows:
        draw(results, out / "comparison.png", shape)
    print(text)
    return results


# --- numbers ---


def turn_rows(turn: dict[str, Any], shape: Shape, ceilings: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One row per timed pass. Limits are the run's medians: what is measured beside a turn need not be what the machine
    did during it."""
    read, matrix = (ceilings[name] and ceilings[name]["median"] for name in ("read_bytes_per_s", "bf16_flops_per_s"))
    for name, result in turn["workloads"].items():
        for number, sample in enumerate(result.get("samples", ())):
            row = {
                "engine": turn["engine"],
                "workload": name,
                "round": turn["round"],
                "repeat": number,
                **METRICS[name](sample),
            }
            if name == "W1" and read and turn["engine"] not in INT8:
                row["of_bandwidth_limit"] = row["decode_tokens_per_s"] * shape.read_bytes_per_token / read
            if name == "W3" and matrix and turn["engine"] not in INT8:
                row["of_matrix_limit"] = row["prompt_tokens_per_s"] * shape.flops_per_prompt_token / matrix
            yield row


def _one_stream(sample: dict[str, Any]) -> dict[str, float]:
    times = sample["token_times_s"][0]
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return {"wall_s": sample["wall_s"], "ttft_ms": times[0] * 1e3, "decode_tokens_per_s": rate}


def _many(sample: dict[str, Any]) -> dict[str, float | None]:
    """All requests arrive at time 0, so the first token's time is the TTFT."""
    lines = sample["token_times_s"]
    first = [times[0] * 1e3 for times in lines]
    per_token = [(times[-1] - times[0]) * 1e3 / (len(times) - 1) for times in lines if len(times) > 1]
    gaps = [(late - early) * 1e3 for times in lines for early, late in itertools.pairwise(times)]
    columns = {
        f"{name}_p{q}_ms": percentile(values, q)
        for name, values in (("ttft", first), ("tpot", per_token), ("itl", gaps))
        for q in (50, 90, 99)
    }
    return {"wall_s": sample["wall_s"], "output_tokens_per_s": sample["output_tokens"] / sample["wall_s"], **columns}


def _prefill(sample: dict[str, Any]) -> dict[str, float]:
    return {"wall_s": sample["wall_s"], "prompt_tokens_per_s": sample["prompt_tokens"] / sample["wall_s"]}


def _scoring(sample: dict[str, Any]) -> dict[str, float]:
    return {"wall_s": sample["wall_s"], "requests_per_s": sample["num_requests"] / sample["wall_s"]}


METRICS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "W1": _one_stream,
    "W2": _many,
    "W3": _prefill,
    "W4": _scoring,
    "W4U": _scoring,
    "W5": _one_stream,
}


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """engine -> workload -> column -> median, min, max and the number of passes."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        grouped.setdefault(row["engine"], {}).setdefault(row["workload"], []).append(row)
    return {engine: {workload: _columns(part) for workload, part in parts.items()} for engine, parts in grouped.items()}


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in rows[0] if name not in ("engine", "workload", "round", "repeat")]
    result: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            result[name] = {**_spread(values), "n": len(values)}
    return result


def ratios(rows: list[dict[str, Any]], ours: str) -> dict[str, dict[str, dict[str, float]]]:
    """workload -> engine -> how many times as fast `ours` was: a ratio per round, their median and range."""
    speeds = speeds_by_round(rows)
    found: dict[str, dict[str, list[float]]] = {}
    for (workload, _), engines in speeds.items():
        for engine, speed in engines.items():
            if ours in engines and engine != ours:
                found.setdefault(workload, {}).setdefault(engine, []).append(engines[ours] / speed)
    return {
        workload: {engine: _spread(values) for engine, values in engines.items()} for workload, engines in found.items()
    }


def speeds_by_round(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, float]]:
    """(workload, round) -> engine -> median of its passes, as a number that is higher for the faster."""
    passes: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        headline = HEADLINES[row["workload"]]
        value = row[headline.column]
        engines = passes.setdefault((row["workload"], row["round"]), {})
        engines.setdefault(row["engine"], []).append(value if headline.higher_is_better else 1 / value)
    return {key: {name: statistics.median(v) for name, v in engines.items()} for key, engines in passes.items()}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was reached; `met` is None when what it compares with did not run."""
    judged = []
    for goal in GOALS:
        candidates = {
            name: value["median"]
            for name, value in results["ratios"][OURS].get(goal.workload, {}).items()
            if name not in INT8 and goal.against in ("fastest", name)
        }
        name = min(candidates, key=candidates.get) if candidates else None
        reached = candidates[name] if name else None
        if reached and goal.is_time:
            reached = 1 / reached
        whom = f"the fastest 16-bit peer{f' ({name})' if name else ''}" if goal.against == "fastest" else goal.against
        judged.append(
            {
                "workload": goal.workload,
                "what": f"{'time' if goal.is_time else 'speed'} over that of {whom}",
                "goal": goal.bound,
                "bound": "at most" if goal.is_time else "at least",
                "reached": reached,
                "met": None if reached is None else (reached <= goal.bound if goal.is_time else reached >= goal.bound),
            }
        )
    return judged


def shares(results: dict[str, Any]) -> list[dict[str, Any]]:
    """How much of the machine's limits was used; the one of the matrix rate has no goal."""
    judged = []
    for workload, column, words, goal in (
        ("W1", "of_bandwidth_limit", "share of the bandwidth limit", BANDWIDTH_GOAL),
        ("W3", "of_matrix_limit", "share of the matrix limit", None),
    ):
        share = results["summary"].get(OURS, {}).get(workload, {}).get(column)
        reached = share["median"] if share else None
        met = None if reached is None or goal is None else reached >= goal
        judged.append(
            {"workload": workload, "what": words, "goal": goal, "bound": "at least", "reached": reached, "met": met}
        )
    return judged


def best_of_all(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whatever the precision: our fastest setting over the fastest setting of anyone else. Without a goal."""
    ratio: dict[str, list[float]] = {}
    names: dict[str, tuple[str, str]] = {}
    for (workload, _), engines in sorted(speeds_by_round(rows).items()):
        mine = {name: speed for name, speed in engines.items() if name in (OURS, *OURS_INT8)}
        others = {name: speed for name, speed in engines.items() if name not in mine}
        if mine and others:
            names[workload] = (max(mine, key=mine.get), max(others, key=others.get))
            ratio.setdefault(workload, []).append(max(mine.values()) / max(others.values()))
    return [
        {
            "workload": workload,
            "what": "best setting ({}) over the best of the others ({}), int8 included, speed".format(*names[workload]),
            "goal": None,
            "bound": "at least",
            "reached": statistics.median(values),
            "met": None,
        }
        for workload, values in ratio.items()
    ]


def agreement(turns: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Against ours, round by round: equal leading tokens of W1 (of 16), largest difference of W4's scores."""
    first = {(turn["round"], turn["engine"]): turn for turn in turns}
    found: dict[str, dict[str, float]] = {}
    for (number, engine), turn in first.items():
        ours = first.get((number, OURS))
        if ours is None or engine == OURS:
            continue
        values = found.setdefault(engine, {})
        pair = [_first_sample(t, "W1") for t in (ours, turn)]
        if all(pair):
            values["equal_tokens_w1"] = _equal_start(*(sample["first_tokens"][0] for sample in pair))
        pair = [_first_sample(t, "W4") for t in (ours, turn)]
        if all(sample and sample["scores"] for sample in pair):
            values["score_difference_w4"] = max(abs(a - b) for a, b in zip(*(s["scores"] for s in pair), strict=True))
    return found


def _first_sample(turn: dict[str, Any], workload: str) -> dict[str, Any] | None:
    samples = turn["workloads"].get(workload, {}).get("samples")
    return samples[0] if samples else None


def _equal_start(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def ceiling_summary(turns: list[dict[str, Any]]) -> dict[str, dict[str, float] | None]:
    """Median and range over all turns."""
    summary: dict[str, dict[str, float] | None] = {}
    for name in ("read_bytes_per_s", "bf16_flops_per_s", "int8_ops_per_s"):
        values = [c[name] for turn in turns for c in turn.get("ceilings", ()) if c[name]]
        summary[name] = _spread(values) if values else None
    return summary


def peaks(turns: list[dict[str, Any]]) -> dict[str, int]:
    """Most resident memory of each engine while a workload ran, over all turns."""
    found: dict[str, int] = {}
    for turn in turns:
        values = [w["peak_bytes"] for w in turn["workloads"].values() if w.get("peak_bytes")]
        found[turn["engine"]] = max([found.get(turn["engine"], 0), *values])
    return found


def failures(turns: list[dict[str, Any]]) -> list[str]:
    whole = [f"round {t['round'] + 1} {t['engine']}: {t['error']}" for t in turns if t.get("error")]
    return whole + [
        f"round {t['round'] + 1} {t['engine']} {name}: {w['error']}"
        for t in turns
        for name, w in t["workloads"].items()
        if w["status"] != "ok"
    ]
