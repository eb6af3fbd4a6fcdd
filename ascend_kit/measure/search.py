"""The highest rate or concurrency that meets the limits, in few runs: doubling, then halving the bracket."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ascend_kit.identity import Identity
from ascend_kit.measure.metrics import RequestRecord, percentile_interval, samples_s
from ascend_kit.measure.rows import Point

if TYPE_CHECKING:
    from ascend_kit.measure.points import PointRunner
    from ascend_kit.params import Experiment

MAX_RUNS = 16
USUAL_PROBES = 10  # for the progress line: searches that begin at 1 took 10 to 12 runs
ATTAINMENT = 0.95  # share of requests that must meet limits of every request
SECONDS = 10  # of arrivals that a probe of a rate lasts at least


@dataclass(frozen=True)
class Bracket:
    """The highest value that met the limits and the lowest that did not; None where none was found."""

    met: float | None
    missed: float | None
    num_runs: int


def find_highest(
    meets: Callable[[float], bool], start: float, precision: float, *, whole: bool = False, max_runs: int = MAX_RUNS
) -> Bracket:
    """Doubles or halves from `start` until one value meets and the next misses, then bisects on a logarithmic scale
    until they are within `precision` of each other (whole numbers: neighbours), or `max_runs` are used."""
    met: float | None = None
    missed: float | None = None
    value = start
    for run in range(1, max_runs + 1):
        if meets(value):
            met = value
        else:
            missed = value
        if met is not None and missed is not None:
            if missed / met <= 1 + precision or (whole and missed - met <= 1):
                return Bracket(met, missed, run)
            middle = math.sqrt(met * missed)
            value = min(max(round(middle), met + 1), missed - 1) if whole else middle
        elif met is not None:
            value = met * 2
        elif missed is not None:
            if whole and missed <= 1:
                return Bracket(None, missed, run)
            value = max(1, missed // 2) if whole else missed / 2
    return Bracket(met, missed, max_runs)


def breaches(row: dict[str, Any], slo: dict[str, float]) -> list[str]:
    """The limits that a row misses, as `metric value > limit`; a row without a measurement misses all."""
    if row.get("status") != "ok":
        return [str(row.get("error"))]
    found = []
    for name, limit in slo.items():
        if name.count("_") == 2:  # of a summary, such as ttft_p99_ms
            value = row.get(name)
            if value is not None and value > limit:
                found.append(f"{name} {value:.1f} > {limit:g}")
    share = row.get("good_request_share")
    if any(name.count("_") == 1 for name in slo) and share is not None and share < ATTAINMENT:
        found.append(f"{share:.0%} of the requests met the limits, {ATTAINMENT:.0%} must")
    return found


def searched_loads(points: Sequence[Point], axis: str) -> list[Point]:
    """The loads among `points` that differ in more than what is searched."""
    blank = {"concurrency": 1} if axis == "concurrency" else {"rate": None}
    return list(dict.fromkeys(replace(point, repeat=0, num_requests=0, **blank) for point in points))


def search_points(
    runner: PointRunner,
    points: Sequence[Point],
    experiment: Experiment,
    ask: Callable[[Identity, list[Point]], None],
    tell: Callable[[float, str], None],
) -> None:
    """Search for each load of `points` and keep the brackets in the folder's `search`. Probes are rows like others, so
    that a search that was interrupted goes on from them. To `tell`, each load is as long as USUAL_PROBES points."""
    axis = experiment.search
    results = [entry for entry in runner.folder.read_json("search") or [] if entry["identity"] != runner.identity.id]
    loads = searched_loads(points, axis)
    for number, base in enumerate(loads):
        probes: list[Point] = []

        def meets(value: float, number: int = number, base: Point = base, probes: list[Point] = probes) -> bool:
            point, done = _probe(base, axis, value, experiment), min(len(probes), USUAL_PROBES - 1)
            probes.append(point)
            ask(runner.identity, [point])
            runner.run([point], lambda _, text: tell(number * USUAL_PROBES + done, f"search: {text}"))
            return not breaches(runner.measured([point])[point], experiment.slo)

        start = experiment.rate if axis == "rate" else experiment.sweep["concurrency"][0]
        bracket = find_highest(meets, start, experiment.search_precision, whole=axis == "concurrency")
        rows = {getattr(point, axis): row for point, row in runner.measured(probes).items()}
        results.append({
            "backend": runner.backend.name, "identity": runner.identity.id, **runner.settings, "axis": axis,
            "load": base.load, "prompt_len": base.prompt_len, "output_len": base.output_len, "slo": experiment.slo,
            **asdict(bracket), "binding": breaches(rows[bracket.missed], experiment.slo) if bracket.missed else [],
            "at_met": _bounds(runner, rows[bracket.met], experiment.slo) if bracket.met else {},
        })  # fmt: skip
        runner.folder.write_json("search", results)
        tell((number + 1) * USUAL_PROBES, "search")


def _probe(base: Point, axis: str, value: float, experiment: Experiment) -> Point:
    if axis == "concurrency":
        count = experiment.sweep_requests_per_point or max(4 * int(value), 16)
        return replace(base, concurrency=int(value), num_requests=count * base.turns)
    load = "poisson" if base.load in ("closed", "all_at_once") else base.load
    count = experiment.sweep_requests_per_point or max(64, math.ceil(SECONDS * value))
    return replace(base, load=load, rate=value, concurrency=4096, num_requests=count * base.turns)


def _bounds(runner: PointRunner, row: dict[str, Any], slo: dict[str, float]) -> dict[str, Any]:
    """Each limited metric at a row: the value and, for percentiles, its distribution-free 95 % bounds."""
    own = (r for r in runner.folder.rows("requests") if r.get("point_id") == row["point_id"])
    samples = samples_s([RequestRecord.from_row(one) for one in own])
    found: dict[str, Any] = {}
    for name in slo:
        metric, *rest = name.removesuffix("_ms").split("_")
        found[name] = {"value": row.get(name)}
        if rest and rest[0].startswith("p") and metric != "itl":  # gaps of one answer are not independent
            values = [value * 1e3 for value in samples[metric]]
            low, high = percentile_interval(values, float(rest[0][1:]))
            found[name] |= {"low": low, "high": high, "count": len(values)}
    return found
