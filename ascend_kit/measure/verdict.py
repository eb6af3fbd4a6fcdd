"""What a sweep says: the best setting for throughput, for latency and within the limits, what stops it, what each step
of an ablation gave, and from where on int8 pays."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from ascend_kit.files import write_atomic
from ascend_kit.measure.metrics import mean_interval, ratio_interval
from ascend_kit.measure.rows import KEY, RATE
from ascend_kit.measure.search import breaches
from ascend_kit.params import Experiment
from ascend_kit.params.engines import OWN_SETTINGS
from ascend_kit.results import RunFolder

Rows = Sequence[dict[str, Any]]
LOAD = tuple(name for name in KEY if name != "repeat")
SETTINGS = ("backend", *OWN_SETTINGS)
# Shares of the measured ceilings from which on it is the limit; below all of them the host, which feeds the device, is.
BOUND_MBU, BOUND_MFU = 0.6, 0.5


def measured_points(rows: Rows) -> list[dict[str, Any]]:
    """One row per engine, setting, identity and load: means over repeats, and the 95 % interval of output tokens/s. The
    headline of a point is its mean, never its best repeat. Rows without a rate, as other tools may write, take no part.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("status") == "ok" and row.get(RATE) is not None:
            groups.setdefault(tuple(_plain(row.get(name)) for name in (*SETTINGS, "identity", *LOAD)), []).append(row)
    found = []
    for own in groups.values():
        numbers = {
            name: statistics.fmean(values)
            for name, value in own[0].items()
            if isinstance(value, float)
            and len(values := [r[name] for r in own if isinstance(r.get(name), float)]) == len(own)
        }
        rates = [row[RATE] for row in own]
        interval = mean_interval(rates)
        rate = {RATE: interval.mean, "rates": rates, "low": interval.low, "high": interval.high}
        found.append({**own[0], **numbers, **rate, "num_repeats": len(own)})
    return found


def cause(point: dict[str, Any]) -> tuple[str, str]:
    """(client, capacity, memory, arithmetic, host or unknown; the evidence): what keeps a point from being faster."""
    if point.get("is_client_limited"):
        return "client", f"the client's own lag is {max(point['client_lag_p99_ms'], point['send_lag_p99_ms']):.1f} ms"
    preempted = point.get("num_preemptions")
    if preempted:
        return "capacity", f"{preempted:g} requests gave their KV blocks back"
    mbu, mfu = point.get("mbu"), point.get("mfu")
    if mbu is None or mfu is None or mbu != mbu or mfu != mfu:
        return "unknown", "the limits of the machine are not known here"
    text = f"{mbu:.0%} of the read bandwidth, {mfu:.0%} of the arithmetic"
    if max(mbu / BOUND_MBU, mfu / BOUND_MFU) < 1:
        return "host", text
    return ("memory" if mbu / BOUND_MBU >= mfu / BOUND_MFU else "arithmetic"), text


def fastest(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The point that wrote the most output tokens/s; None without any."""
    return max(points, key=lambda point: point[RATE], default=None)


def best(rows: Rows, slo: dict[str, float]) -> dict[str, dict[str, Any]]:
    """`throughput`, `latency` (least mean TPOT), with limits `within_limits`: each a point, its cause and evidence."""
    points = measured_points(rows)
    timed = [point for point in points if point.get("tpot_mean_ms")]
    choices = {
        "throughput": fastest(points),
        "latency": min(timed, key=lambda point: point["tpot_mean_ms"], default=None),
        "within_limits": fastest([point for point in points if slo and not breaches(point, slo)]),
    }
    return {name: {**point, **dict(zip(("cause", "evidence"), cause(point), strict=True))}
            for name, point in choices.items() if point}  # fmt: skip


def recommended(experiment: Experiment, point: dict[str, Any]) -> Experiment:
    """The experiment with the settings of a point of ours, and nothing left to vary."""
    spec = next((spec for spec in experiment.engine_specs if spec.name == point["backend"]), None)
    own = {} if spec is None else dict(spec.settings)
    own |= {key: point[key] for key in experiment.sweep if key in OWN_SETTINGS and point.get(key) is not None}
    lengths = {"concurrency": [int(point["concurrency"])], "prompt_len": [int(point["prompt_len"])],
               "output_len": [int(point["output_len"])]}  # fmt: skip
    return experiment.alone(**own).with_changes(concurrency=int(point["concurrency"]), sweep=lengths, variants=[])


def write_recommended(folder: RunFolder, experiment: Experiment, rows: Rows) -> dict[str, str]:
    """`recommended.yaml` in the run folder, for the best point of ours (within the limits where there are any); its
    path and vLLM-Ascend's command line. {} where none of ours was measured."""
    names = [spec.name for spec in experiment.engine_specs if spec.kind == "ascend_kit"]
    chosen = best([row for row in rows if row["backend"] in names], experiment.slo)
    point = chosen.get("within_limits") or chosen.get("throughput")
    if point is None:
        return {}
    plan, path = recommended(experiment, point), folder.path / "recommended.yaml"
    write_atomic(path, plan.to_yaml())
    return {"parameters": str(path), "vllm_ascend": vllm_command(plan)}


def vllm_command(experiment: Experiment) -> str:
    """The settings as `vllm serve` of vLLM-Ascend takes them. What has no flag there (fused operators are always on) is
    left out; w8a8 needs a checkpoint in ModelSlim's format."""
    words: list[str] = ["vllm", "serve", str(experiment.input_model)]
    words += ["--dtype", {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[experiment.precision]]
    flags = {
        "max-model-len": experiment.max_seq_length, "max-num-seqs": experiment.batch_size,
        "max-num-batched-tokens": max(experiment.max_tokens_per_step, experiment.batch_size),
        "tensor-parallel-size": experiment.tensor_parallel, "data-parallel-size": experiment.replicas,
        "block-size": experiment.block_size, "seed": experiment.seed,
    }  # fmt: skip
    for name, value in flags.items():
        if value is not None and (value != 1 or not name.endswith("parallel-size")):
            words += [f"--{name}", str(value)]
    words.append("--enable-prefix-caching" if experiment.memory_optimize else "--no-enable-prefix-caching")
    words += ["--quantization", "ascend"] if experiment.quantize != "none" else []
    words += [] if experiment.graph_mode else ["--enforce-eager"]
    if experiment.speculate:
        words += ["--speculative-config",
                  f'{{"method": "ngram", "num_speculative_tokens": {experiment.speculate}}}']  # fmt: skip
    return shlex.join(words)


def ablation(rows: Rows, variants: Sequence[str]) -> list[dict[str, Any]]:
    """One row per load and variant, in the order given: output tokens/s with its interval, the gain over the variant
    before and over the first, each with its 95 % interval. Only loads that every variant served are compared."""
    points = {(p["backend"], tuple(_plain(p.get(n)) for n in LOAD)): p for p in measured_points(rows)}
    loads = dict.fromkeys(load for _, load in points)
    found = []
    for load in loads:
        own = [points[name, load] for name in variants if (name, load) in points]
        if len(own) < len(variants):
            continue
        for before, point in zip([own[0], *own], own, strict=False):
            step, total = (
                ratio_interval(point["rates"], before["rates"]),
                ratio_interval(point["rates"], own[0]["rates"]),
            )
            found.append({
                "variant": point["backend"], **dict(zip(LOAD, load, strict=True)),
                "output_tokens_per_s": point["output_tokens_per_s"], "low": point["low"], "high": point["high"],
                "gain": step.mean, "gain_low": step.low, "gain_high": step.high, "total": total.mean,
                "num_repeats": point["num_repeats"],
            })  # fmt: skip
    return found


def break_even(rows: Rows, scheme: str = "w8a8") -> list[dict[str, Any]]:
    """int8 over unquantised at equal engine, settings and load: `ratio`, above 1 where faster, and its interval."""
    others = [name for name in (*SETTINGS, *LOAD) if name not in ("quantize", "use_model", "output_model")]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for point in measured_points(rows):
        groups.setdefault(tuple(_plain(point.get(n)) for n in others), {})[str(point.get("quantize"))] = point
    found = []
    for own in groups.values():
        if "none" in own and scheme in own:
            ratio = ratio_interval(own[scheme]["rates"], own["none"]["rates"])
            base = own["none"]
            place = {name: base.get(name) for name in ("backend", "concurrency", "prompt_len", "output_len", "load")}
            found.append({**place, "ratio": ratio.mean, "low": ratio.low, "high": ratio.high})
    return found


def use_from(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each pair of lengths the least concurrency from which on every ratio's lower bound (the ratio itself where
    there is one repeat) is above 1: `use_from`, None where int8 never pays throughout."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["backend"], cell["prompt_len"], cell["output_len"]), []).append(cell)
    found = []
    for (backend, prompt_len, output_len), own in groups.items():
        start = None
        for cell in sorted(own, key=lambda c: -c["concurrency"]):
            if (cell["ratio"] if cell["low"] is None else cell["low"]) <= 1:
                break
            start = cell["concurrency"]
        found.append({"backend": backend, "prompt_len": prompt_len, "output_len": output_len, "use_from": start})
    return found


def _plain(value: Any) -> Any:
    """A value that can be compared: lists as tuples, NaN as None."""
    if isinstance(value, list):
        return tuple(value)
    return None if isinstance(value, float) and value != value else value
