"""Small tables to draw, and every figure drawn from them."""

import itertools

import numpy as np
import pandas

from ascend_kit.measure.planner import server_plans
from ascend_kit.show import charts, sweep_charts


def sweep_rows(lengths=((64, 32),), repeats=2, variants=({},), concurrency=(1, 4, 16)):
    """Rows as a sweep writes them, from a saturating model with a little noise."""
    rng = np.random.default_rng(0)
    rows = []
    engines = [("ascend_kit", 1.0, v) for v in variants] + [("transformers", 0.35, {})]
    for number, (backend, speed, variant) in enumerate(engines):
        for (prompt, output), c, repeat in itertools.product(lengths, concurrency, range(repeats)):
            rate = speed * 900 * c / (c + 6) * rng.normal(1, 0.06) * (1 + 0.3 * number * (backend == "ascend_kit"))
            tpot = 1e3 * c / rate
            rows.append(
                {
                    "status": "ok",
                    "backend": backend,
                    "concurrency": c,
                    "prompt_len": prompt,
                    "output_len": output,
                    "repeat": repeat,
                    "output_tokens_per_s": rate,
                    "ceiling_tokens_per_s": 1500 * c / (c + 3),
                    "predicted_tokens_per_s": 1100 * c / (c + 5),
                    "peak_memory_bytes": (1.4 + 0.05 * c) * 2**30,
                    "weight_bytes": 1.2 * 2**30,
                    "ttft_limit_ms": 200.0,
                    "tpot_limit_ms": 25.0,
                    "precision": "bf16",
                    "quantize": "none",
                    "graph_mode": True,
                    **{
                        f"{m}_{q}_ms": v * f
                        for m, v in (("ttft", 8 * tpot), ("tpot", tpot), ("itl", tpot))
                        for q, f in (("p50", 1), ("p90", 1.3), ("p99", 2.5))
                    },
                    **variant,
                }
            )
    return pandas.DataFrame(rows)


def score_table():
    rows = [
        {"status": "ok", "task": task, "metric": "acc", "value": value, "stderr": 0.03}
        for task, value in (("mmlu", 0.62), ("ceval-valid", 0.55), ("agieval", 0.41))
    ]
    return pandas.DataFrame(rows)


def choice_documents():
    """Ten documents of four choices in each set: guessing gets a quarter right."""
    rows = [
        {"task": name, "set": name, "choice_logprobs": [-1.0] * 4} for name in ("mmlu", "agieval") for _ in range(9)
    ]
    return pandas.DataFrame(rows)


def many_scores(tasks=130):
    return pandas.DataFrame(
        [{"status": "ok", "task": f"mmlu_subject_{i:03}", "set": "mmlu", "metric": "acc", "value": 0.3 + i / 260,
          "stderr": 0.03} for i in range(tasks)]
    )  # fmt: skip


EIGHT_LENGTHS = tuple((p, o) for p in (128, 512, 2048, 8192) for o in (128, 1024))


def tradeoff_table():
    rows = [("plain", 62.0, 210, 200, 225), ("fused", 62.0, 640, 600, 660), ("w8a8", 60.5, 900, None, None)]
    return pandas.DataFrame(
        [{"run": run, "accuracy_percent": value, "accuracy_low_percent": value - 5, "accuracy_high_percent": value + 6,
          "output_tokens_per_s": rate, "output_tokens_per_s_low": low, "output_tokens_per_s_high": high}
         for run, value, rate, low, high in rows]
    )  # fmt: skip


PARTS = {"q_proj": 1, "k_proj": 0.8, "v_proj": 2, "o_proj": 1.5, "gate_proj": 3, "up_proj": 3, "down_proj": 12}


def sensitivity_table(layers=12):
    rng = np.random.default_rng(1)
    return pandas.DataFrame(
        [
            {"linear": f"model.layers.{i}.x.{part}", "layer": i, "part": part, "kl": f * 1e-5 * rng.lognormal(0, 0.5)}
            for i in range(layers)
            for part, f in PARTS.items()
        ]
    )


def chosen_schemes(layers=12):
    kinds = {"down_proj": None, "v_proj": "w8a16"}
    return {f"model.layers.{i}.x.{p}": kinds.get(p, "w8a8") for i in range(layers) for p in PARTS if p != "down_proj"}


def mix_table():
    rows = [("float", 15136, 0.0), ("w8a16", 8200, 3e-4), ("w8a8", 8190, 4e-3)]
    rows += [
        (f"w8a8, {n} of 72 units {kind}", 8190 + n * (96 if kind == "float" else 0.1), 4e-3 / (1 + n * f))
        for n in (4, 7, 14, 22, 36, 54)
        for kind, f in (("w8a16", 0.1), ("float", 0.15))
    ]
    return pandas.DataFrame([{"candidate": c, "weight_bytes": b * 1e6, "kl": k} for c, b, k in rows])


def request_table():
    rows = [
        {
            "arrival_s": 5 + 0.1 * (i // 4),
            "scheduled_s": 5 + 0.1 * (i // 4) + 0.03 * (i % 4),
            "token_times_s": [5.2 + 0.1 * i + 0.02 * t for t in range(20)],
        }
        for i in range(11)
    ]
    return pandas.DataFrame([*rows, {"arrival_s": 5.3, "scheduled_s": None, "token_times_s": []}])


def held_samples(point_id):
    """16 requests at a time of 24, whose KV fills slowly."""
    rows = [
        {"point_id": point_id, "time_s": 7 + 0.1 * i, "running": min(16, 24 - i // 4), "waiting": max(0, 8 - i // 4),
         "kv_use": min(0.9, 0.01 * i), "memory_bytes": (1.5 + 0.001 * i) * 2**30}
        for i in range(96)
    ]  # fmt: skip
    return pandas.DataFrame(rows)


def held_rows():
    return sweep_rows().assign(point_id=lambda rows: [f"p{i}" for i in range(len(rows))])


def fastest(rows):
    return rows.loc[rows["output_tokens_per_s"].idxmax(), "point_id"]


def plan_table():
    rows = [
        {
            "cards": c,
            "tensor_parallel": t,
            "output_tokens_per_s": None if t == 8 else 2000 * c / t**0.3,
            "reason": "does not divide" if t == 8 else "TPOT above the limit" if t == 1 else None,
        }
        for c in (1, 2, 4, 8)
        for t in (1, 2, 4, 8)
        if t <= c
    ]
    return pandas.DataFrame(rows)


TWO_VARIANTS = ({"quantize": "none"}, {"quantize": "w8a8"})
EXAMPLES = {
    "throughput": lambda: sweep_charts.throughput(sweep_rows()),
    "throughput_lengths": lambda: sweep_charts.throughput(
        sweep_rows(((64, 32), (256, 32), (256, 128), (1024, 128)), 1, TWO_VARIANTS)
    ),
    "latency": lambda: sweep_charts.latency(sweep_rows(variants=TWO_VARIANTS)),
    "tradeoff": lambda: sweep_charts.tradeoff(sweep_rows(variants=TWO_VARIANTS)),
    "memory": lambda: sweep_charts.memory(sweep_rows()),
    "speedup": lambda: sweep_charts.speedup(sweep_rows(variants=TWO_VARIANTS)),
    "request_timeline": lambda: sweep_charts.request_timeline(request_table()),
    "over_time": lambda: sweep_charts.over_time(held_samples(fastest(held_rows())), held_rows()),
    "accuracy": lambda: charts.accuracy(score_table(), choice_documents()),
    "accuracy_130_tasks": lambda: charts.accuracy(many_scores(), choice_documents()),
    "throughput_8_lengths": lambda: sweep_charts.throughput(sweep_rows(EIGHT_LENGTHS, concurrency=(1, 4, 16, 64))),
    "latency_8_lengths": lambda: sweep_charts.latency(sweep_rows(EIGHT_LENGTHS, concurrency=(1, 4, 16, 64))),
    "speedup_8_lengths": lambda: sweep_charts.speedup(sweep_rows(EIGHT_LENGTHS, concurrency=(1, 4, 16, 64))),
    "accuracy_vs_throughput": lambda: charts.accuracy_vs_throughput(tradeoff_table()),
    "sensitivity": lambda: charts.sensitivity(sensitivity_table(), chosen_schemes()),
    "mixes": lambda: charts.mixes(mix_table(), "w8a8, 7 of 72 units float", max_kl=2e-3),
    "planner": lambda: sweep_charts.planner(plan_table()),
    "layouts_by_load": lambda: sweep_charts.layouts_by_load(server_plans),
}
