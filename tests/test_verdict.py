"""Other tools' numbers from recorded streams, worked out by hand; the verdict, the ablation and int8's break-even."""

from __future__ import annotations

import json

import pandas
import pytest

from ascend_kit.measure.conventions import by_tool, vllm_bench
from ascend_kit.measure.metrics import RequestRecord, summarize
from ascend_kit.measure.verdict import ablation, best, break_even, cause, measured_points, use_from, vllm_command
from ascend_kit.params import ParameterError, build_experiment
from ascend_kit.show import sweep_charts


def stream(sent, *chunks, tokens, counted="usage", error=None):
    times = [at for at, kind in chunks if kind == "text"]
    times += times[-1:] * (tokens - len(times))
    return RequestRecord(
        0, 8, tokens, sent, tuple(times), "error" if error else "stop", error, num_asked_tokens=5, sent_s=sent,
        chunks=tuple((at, kind, None, 9) for at, kind in chunks), tokens_counted_by=counted,
    )  # fmt: skip


STREAMS = [
    stream(0.0, (0.1, "role"), (0.5, "text"), (0.6, "text"), (0.7, "text"), (0.8, "text"), (0.81, "usage"),
           (0.82, "done"), tokens=5),
    stream(0.2, (0.3, "role"), (0.7, "text"), (0.71, "usage"), (0.72, "done"), tokens=1),
    stream(0.4, (0.5, "role"), (0.9, "text"), (1.0, "error"), (1.01, "done"), tokens=1, counted="chunks",
           error="broke"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "ok", "ttft", "e2e", "tpot", "itl", "tokens_per_s", "requests_per_s"),
    [
        # By hand from the sources of the tools: the gaps, counts and windows of the three streams above.
        ("vllm", 3, 0.10, 0.60, 0.175, 0.25, 7 / 1.01, 3 / 1.01),
        ("guidellm", 2, 0.50, 0.67, (0.80 + 0.50) / 6, 0.3 / 4, 6.0, 2.0),
        ("evalscope", 3, 0.10, (0.81 + 0.51 + 0.60) / 3, 0.1775 / 3, 0.25, 7.0, 3.0),
        ("aisbench", 3, 0.10, (0.81 + 0.51 + 0.60) / 3, 0.1775 / 3, (0.71 + 0.41 + 0.50) / 9, 6.0, 3.0),
    ],
)
def test_each_tool_sees_its_own_numbers_in_the_same_streams(
    tool, ok, ttft, e2e, tpot, itl, tokens_per_s, requests_per_s
):
    found = by_tool(STREAMS)[tool]

    assert found["num_ok"] == ok
    assert [found[f"{name}_ms"] / 1e3 for name in ("ttft", "e2e", "tpot", "itl")] == pytest.approx(
        [ttft, e2e, tpot, itl]
    )
    assert (found["output_tokens_per_s"], found["requests_per_s"]) == pytest.approx((tokens_per_s, requests_per_s))


def test_an_export_has_vllms_fields_and_our_numbers():
    row = {**summarize(STREAMS), "concurrency": 3, "backend": "server"}

    found = json.loads(json.dumps(vllm_bench(STREAMS, row)))

    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 1, 6)
    assert found["mean_ttft_ms"] == pytest.approx(500) and found["p99_tpot_ms"] == pytest.approx(75)
    assert found["itls"][0] == pytest.approx([0.1, 0.1, 0.1, 0.0]) and found["errors"] == ["", "", "broke"]
    assert found["request_throughput"] == pytest.approx(2 / found["duration"])


def row(rate, backend="ascend_kit", concurrency=4, **rest):
    return {
        "status": "ok", "backend": backend, "concurrency": concurrency, "prompt_len": 64, "output_len": 32,
        "num_requests": 8, "seed": 0, "load": "closed", "turns": 1, "output_tokens_per_s": float(rate),
        "tpot_mean_ms": 1e3 / rate, "mbu": 0.7, "mfu": 0.1, "num_preemptions": 0, **rest,
    }  # fmt: skip


def test_the_headline_is_the_mean_and_not_the_best_repeat():
    rows = [row(100), row(200), row(160, concurrency=8), row(165, concurrency=8), row(900, status="failed")]

    found = best(rows, {"tpot_mean_ms": 6.5})

    assert found["throughput"]["concurrency"] == 8  # 162.5 against a mean of 150, though 200 was the best repeat
    assert found["within_limits"]["output_tokens_per_s"] == pytest.approx(162.5)
    assert found["throughput"]["cause"] == "memory" and "70%" in found["throughput"]["evidence"]
    point = measured_points(rows)[0]
    assert point["num_repeats"] == 2 and point["low"] < 100 < 200 < point["high"]  # t of one degree of freedom


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"is_client_limited": True, "client_lag_p99_ms": 9.0, "send_lag_p99_ms": 1.0}, "client"),
        ({"num_preemptions": 3}, "capacity"),
        ({"mbu": 0.1, "mfu": 0.2}, "host"),
        ({"mbu": 0.1, "mfu": 0.7}, "arithmetic"),
        ({"mbu": None}, "unknown"),
    ],
)
def test_the_cause_follows_from_the_evidence(changes, expected):
    assert cause(row(10, **changes))[0] == expected


def test_an_ablation_gives_each_step_and_the_whole_with_intervals():
    rates = {"padded": [10, 11, 9], "continuous_batching": [20, 21, 19], "graphs": [30, 33, 27]}
    rows = [row(rate, backend=name, repeat=n) for name, own in rates.items() for n, rate in enumerate(own)]
    rows += [row(50, backend="padded", concurrency=9)]  # a load that only one of them served

    found = ablation(rows, list(rates))

    assert [one["variant"] for one in found] == list(rates)
    assert [one["gain"] for one in found] == pytest.approx([1.0, 2.0, 1.5])
    assert found[-1]["total"] == pytest.approx(3.0) and found[1]["gain_low"] < 2.0 < found[1]["gain_high"]
    assert sweep_charts.waterfall(pandas.DataFrame(rows), []) is None


def test_a_waterfall_is_linear_and_its_texts_stay_within_the_panel():
    rates = {"padded": [10, 11, 9], "continuous_batching": [200, 900, 100], "graphs": [3000, 900, 2700]}
    rows = [row(rate, backend=name, repeat=n) for name, own in rates.items() for n, rate in enumerate(own)]

    figure = sweep_charts.waterfall(pandas.DataFrame(rows), list(rates))
    figure.canvas.draw()

    (axes,) = figure.axes
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0
    assert all(text.get_window_extent().x1 <= axes.bbox.x1 for text in axes.texts)


def test_int8_pays_from_the_concurrency_on_after_which_it_is_never_slower():
    speeds = {1: (10, 12), 4: (40, 38), 16: (100, 130), 64: (200, 290)}
    rows = [row(rate, concurrency=c, quantize=scheme, precision="bf16")
            for c, pair in speeds.items() for scheme, rate in zip(("none", "w8a8"), pair, strict=True)]  # fmt: skip

    cells = break_even(rows)

    assert {cell["concurrency"]: round(cell["ratio"], 2) for cell in cells} == {1: 1.2, 4: 0.95, 16: 1.3, 64: 1.45}
    assert [one["use_from"] for one in use_from(cells)] == [16]
    assert use_from(break_even(rows[:4]))[0]["use_from"] is None
    assert sweep_charts.break_even_map(pandas.DataFrame(rows)) is not None


def test_settings_translate_into_vllms_words_and_variants_into_engines():
    values = {"input_model": "/m/q", "quantize": "w8a8", "graph_mode": False, "cards": 4, "tensor_parallel": 2}
    experiment = build_experiment({**values, "variants": ["padded", "continuous_batching", "int8"]})

    command = vllm_command(experiment)
    padded, plain, int8 = experiment.engine_specs

    assert "--quantization ascend" in command and "--enforce-eager" in command and "--data-parallel-size 2" in command
    assert (padded.kind, padded.padding) == ("transformers", "longest")
    steps_before = build_experiment(
        {**values, "variants": ["padded", "transformers_continuous", "graphs"]}
    ).engine_specs
    assert [spec.batching for spec in steps_before] == ["padded", "continuous", "padded"]
    with pytest.raises(ParameterError, match=r"engines\[0\]: padding: continuous batching pads nothing"):
        build_experiment({"engines": [{"kind": "transformers", "batching": "continuous", "padding": "max"}]})
    with pytest.raises(ParameterError, match=r"engines\[0\]: batching: .*'padded' or 'continuous'.*, got 'paged'"):
        build_experiment({"engines": [{"kind": "transformers", "batching": "paged"}]})
    for entry in ({"kind": "ascend_kit", 3: 4}, {"base_url": "http://a", "model": "m", 3: 4}):
        with pytest.raises(ParameterError, match=r"engines\[0\]: the names of settings are texts, got 3"):
            build_experiment({"engines": [entry]})
    assert plain.settings["quantize"] == "none" and int8.settings == {**plain.settings, "quantize": "w8a8"}
    with pytest.raises(ParameterError, match="variants: unknown parameter 'int4'; did you mean 'int8'"):
        build_experiment({"variants": ["int4"]})
