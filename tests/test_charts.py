"""Figures drawn from small tables; what is asserted is what a reader would miss: units, scales, data,
colours.
"""

import itertools
import math
import re

import numpy as np
import pandas
import pytest

from ascend_kit.measure.planner import server_plans
from ascend_kit.results import RunFolder
from ascend_kit.show import charts, sweep_charts
from ascend_kit.show.drawing import (
    BASELINES,
    TIP,
    config_labels,
    config_looks,
    heat_map,
    label_points,
    make_grid,
    value_axis,
)


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
        {"status": "ok", "run": run, "task": task, "metric": "acc", "value": value, "stderr": 0.03}
        for run, shift in (("plain", 0.0), ("w8a8", -0.02))
        for task, value in (("mmlu", 0.62 + shift), ("ceval-valid", 0.55 + shift), ("agieval", 0.41 + shift))
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
            "model": model,
            "cards": c,
            "tensor_parallel": t,
            "output_tokens_per_s": None if t == 8 else 2000 * c / t**0.3,
            "reason": "does not divide" if t == 8 else "TPOT above the limit" if t == 1 else None,
        }
        for model in ("Qwen2.5-7B", "Qwen3-8B")
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
    "sensitivity_plain": lambda: charts.sensitivity(sensitivity_table()),
    "mixes": lambda: charts.mixes(mix_table(), "w8a8, 7 of 72 units float", max_kl=2e-3),
    "planner": lambda: sweep_charts.planner(plan_table()),
    "layouts_by_load": lambda: sweep_charts.layouts_by_load(server_plans),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_figure_is_saved_with_labelled_axes_and_a_title(name, tmp_path):
    figure = EXAMPLES[name]()
    figure.savefig(tmp_path / "figure.png")

    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_xlabel() and (axes.get_ylabel() or name.startswith("accuracy"))


def test_concurrency_axis_is_log2_with_plain_numbers_and_ceiling_is_dashed():
    figure = sweep_charts.throughput(sweep_rows())
    figure.canvas.draw()

    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "4", "16"]
    ceiling = next(line for line in axes.lines if line.get_label() == "ceiling")
    assert ceiling.get_linestyle() == "--"
    assert not any("^" in t.get_text() or "times" in t.get_text() for t in axes.get_yticklabels())


def test_every_repeat_is_a_point_and_the_line_is_their_median():
    rows = sweep_rows(repeats=3)
    figure = sweep_charts.throughput(rows)

    own = rows[rows["backend"] == "ascend_kit"]
    (axes,) = figure.axes
    line = next(line for line in axes.lines if line.get_label() == "ascend_kit")
    points = next(
        line for line in axes.lines if line.get_linestyle() == "None" and line.get_color() == line_colour(axes)
    )
    assert line.get_ydata() == pytest.approx(own.groupby("concurrency")["output_tokens_per_s"].median())
    assert sorted(points.get_ydata()) == pytest.approx(sorted(own["output_tokens_per_s"]))


def line_colour(axes):
    return next(line for line in axes.lines if line.get_label() == "ascend_kit").get_color()


def test_failed_rows_are_not_drawn_and_an_empty_table_gives_no_figure():
    rows = sweep_rows()
    rows.loc[rows["concurrency"] == 16, "status"] = "failed"

    (axes,) = sweep_charts.throughput(rows).axes
    assert max(line.get_xdata().max() for line in axes.lines if len(line.get_xdata())) == 4
    for draw in (
        sweep_charts.throughput,
        sweep_charts.latency,
        sweep_charts.tradeoff,
        sweep_charts.memory,
        sweep_charts.speedup,
        charts.accuracy,
        sweep_charts.request_timeline,
        charts.sensitivity,
        charts.mixes,
        sweep_charts.planner,
        charts.accuracy_vs_throughput,
    ):
        assert draw(pandas.DataFrame()) is None


def test_what_was_held_over_time_is_that_of_the_fastest_point():
    rows, other = held_rows(), held_samples("p0").assign(running=99)
    samples = pandas.concat([other, held_samples(fastest(rows))])

    requests, kv, memory = sweep_charts.over_time(samples, rows).axes

    running, waiting = requests.lines
    assert list(running.get_ydata()[[0, -1]]) == [16, 1] and list(waiting.get_ydata()[[0, -1]]) == [8, 0]
    assert running.get_xdata()[[0, -1]] == pytest.approx([0, 9.5])
    assert kv.lines[0].get_ydata().max() == pytest.approx(90) and memory.lines[0].get_ydata()[0] == 1.5
    assert sweep_charts.over_time(other, rows) is None


def test_over_time_the_names_stand_in_the_panel_they_are_of_and_level_lines_stay_apart_from_the_frame():
    rows = held_rows()
    figure = sweep_charts.over_time(held_samples(fastest(rows)).assign(memory_bytes=2**30), rows)

    requests, kv, memory = figure.axes
    assert {"running", "waiting"} == {text.get_text() for text in requests.texts} and not figure.legends
    assert memory.get_ylim()[1] == pytest.approx(1.15) and not kv.texts


def test_in_the_legend_of_latencies_an_engine_has_its_medians_line():
    figure = sweep_charts.latency(sweep_rows())

    (legend,) = figure.legends
    drawn = dict(zip((text.get_text() for text in legend.get_texts()), legend.get_lines(), strict=True))
    assert {name: drawn[name].get_linestyle() for name in ("ascend_kit", "transformers", "p90", "p99")} == {
        "ascend_kit": "-", "transformers": "-", "p90": "--", "p99": ":"}  # fmt: skip


def test_the_number_of_a_point_near_the_axis_stands_above_it():
    _, ((axes,),) = make_grid(1, 1, height=3)
    axes.set(xlim=(0, 1), ylim=(0, 1))

    label_points(axes, [("1", 0.2, 0.02), ("4", 0.6, 0.5)], ["#000000"] * 2)

    assert [text.get_position()[1] > 0 for text in axes.texts] == [True, False]


def test_configuration_has_one_colour_in_every_figure():
    rows = sweep_rows(variants=TWO_VARIANTS)
    seen = {}
    for draw in (sweep_charts.throughput, sweep_charts.latency, sweep_charts.tradeoff):
        for axes in draw(rows).axes:
            for line in axes.lines:
                if line.get_label() in set(config_labels(rows)):
                    seen.setdefault(line.get_label(), set()).add(line.get_color())

    assert set(seen) == {"ascend_kit", "ascend_kit, w8a8", "transformers"}
    assert all(len(colours) == 1 for colours in seen.values())
    assert len(set.union(*seen.values())) == 3
    assert seen["transformers"] == {BASELINES["transformers"]}


def test_ratio_one_is_white_and_equal_values_have_a_middle_colour():
    rows = sweep_rows(repeats=1, concurrency=(1, 4)).query("backend == 'ascend_kit'").assign(ratio=[0.8, 1.0])

    (ratios,) = heat_map(rows, "ratio", "Speed", "times", good="ratio").axes[0].images
    (equal,) = heat_map(rows.assign(ratio=3.0), "ratio", "Speed", "times").axes[0].images

    red, white = ratios.to_rgba(ratios.get_array())[0][:, :3]
    assert red[0] > 3 * red[2] and white.min() > 0.95
    assert list(equal.norm(equal.get_array())[0]) == [0.5, 0.5]


def test_tradeoff_of_many_lengths_has_a_small_panel_for_each():
    figure = sweep_charts.tradeoff(sweep_rows(lengths=EIGHT_LENGTHS))

    assert len(figure.axes) == 8 and figure.get_figwidth() < 16
    assert {text.get_text() for text in figure.axes[0].texts} == {"1", "16"}


def test_in_a_small_panel_numbers_keep_the_distance_that_their_size_needs():
    figure, ((axes,),) = make_grid(1, 1, height=1.2)
    points = [(str(32 + n), 0.2, n * 0.075) for n in range(13)]
    axes.set(xlim=(0, 1), ylim=(0, 1))

    label_points(axes, points, ["#000000"] * len(points))
    figure.canvas.draw()

    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 4
    assert not [(a, b) for number, a in enumerate(boxes) for b in boxes[:number] if a.overlaps(b)]


def test_runs_close_together_are_named_where_no_name_hides_another():
    table = tradeoff_table()
    table = pandas.concat([table, table.assign(run=table["run"] + "-again")], ignore_index=True)  # at the same places

    figure = charts.accuracy_vs_throughput(table)

    assert list(figure.axes[0].texts) == []
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*table["run"]}


SEARCHED = (1, 2, 4, 8, 16, 32, 38, 45, 54, 59, 64, 76, 83, 91, 128, 181, 235, 256)


@pytest.mark.parametrize("name", ["throughput", "latency", "tradeoff", "speedup", "break_even"])
def test_no_two_numbers_touch_although_a_search_measured_loads_close_together(name):
    lengths = ((32, 16), (128, 48))
    rows = sweep_rows(lengths=lengths, variants=TWO_VARIANTS, concurrency=SEARCHED, repeats=1)
    if name == "break_even":
        figure = heat_map(rows.query("backend == 'ascend_kit'").assign(ratio=0.586), "ratio", "Speed", "times")
    else:
        figure = getattr(sweep_charts, name)(rows)
    figure.canvas.draw()

    for axes in figure.axes:
        left, right = axes.bbox.intervalx
        seen = [tick for tick in axes.get_xticklabels() if left <= sum(tick.get_window_extent().intervalx) / 2 <= right]
        for texts in (seen, axes.texts):
            boxes = [text.get_window_extent() for text in texts if text.get_text()]
            touching = [(a, b) for number, a in enumerate(boxes) for b in boxes[:number] if a.overlaps(b)]
            assert not touching
        assert len(seen) >= 5


def test_label_names_only_the_switches_that_differ():
    rows = sweep_rows(variants=({"graph_mode": True}, {"graph_mode": False}))

    assert set(config_labels(rows)) == {"ascend_kit, graph_mode", "ascend_kit, no graph_mode", "transformers"}


def test_speedup_divides_by_the_baseline_of_the_same_point():
    rows = sweep_rows(repeats=1, concurrency=(1, 4))
    figure = sweep_charts.speedup(rows)

    rate = rows.set_index(["backend", "concurrency"])["output_tokens_per_s"]
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights == pytest.approx([rate["ascend_kit", c] / rate["transformers", c] for c in (1, 4)])


def test_accuracy_bars_carry_values_in_percent_and_missing_errors_are_left_out():
    table = score_table()
    table.loc[0, "stderr"] = math.nan
    figure = charts.accuracy(table)

    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches[:3]] == pytest.approx([62, 55, 41])
    assert len([c for c in axes.collections if len(c.get_segments())]) == 5  # one error line per known error


def test_linears_kept_in_float_are_hollow_and_weight_only_ones_square():
    (axes,) = charts.sensitivity(sensitivity_table(), chosen_schemes()).axes

    marks = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert sum(line.get_fillstyle() == "none" for line in marks) == 1  # down_proj
    assert sum(line.get_marker() == "s" for line in marks) == 1  # v_proj
    assert len(marks) == len(PARTS)


def test_infeasible_plan_has_no_bar_and_a_broken_limit_is_hatched():
    figure = sweep_charts.planner(plan_table())

    left, right = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["Qwen2.5-7B", "Qwen3-8B"]
    bars = [patch for patch in left.patches if patch.get_height() > 0]
    assert len(bars) == 9  # ten splits, tensor parallel 8 does not divide
    assert sum(patch.get_hatch() is not None for patch in bars) == 4


def test_loads_have_a_line_per_split_that_divides_the_model():
    figure = sweep_charts.layouts_by_load(server_plans)

    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"{model} on {cards} cards" for cards in (4, 8) for model in ("Qwen2.5-7B", "Qwen3-8B")]
    drawn = [sum(len(line.get_xdata()) > 0 for line in axes.lines) for axes in figure.axes]
    assert drawn == [3, 3, 3, 4]  # tensor parallel 8 does not divide the 28 heads of Qwen2.5-7B


def test_layouts_are_told_apart_and_memory_counts_the_weights_of_every_replica():
    rows = pandas.DataFrame(
        [
            {"backend": "ascend_kit", "cards": cards, "tensor_parallel": size, "concurrency": c, "prompt_len": 8,
             "output_len": 4, "peak_memory_bytes": 8 * 2**30, "weight_bytes": 2**30, "status": "ok"}
            for cards, size in ((1, 1), (4, 1), (4, 4))
            for c in (1, 4)
        ]
    )  # fmt: skip

    assert list(dict.fromkeys(config_labels(rows))) == [
        "ascend_kit, 1 card",
        "ascend_kit, 4 cards",
        "ascend_kit, 4 cards, tensor parallel 4",
    ]
    dashed = [line for line in sweep_charts.memory(rows).axes[0].lines if line.get_label().startswith("weights")]
    assert sorted(float(max(line.get_ydata())) for line in dashed)[-1] == 4


def test_plotting_leaves_no_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    for draw in EXAMPLES.values():
        draw()

    assert dict(matplotlib.rcParams) == before
    pyplot = __import__("sys").modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_one_bar_is_no_figure_and_simulated_layouts_are_drawn_for_several_cards_only():
    one_plan = plan_table().query("model == 'Qwen3-8B' and cards == 1 and tensor_parallel == 1")

    assert sweep_charts.planner(one_plan) is None
    assert charts.accuracy(score_table()[:1]) is None
    assert sweep_charts.layouts_by_load(server_plans, cards=1) is None


def test_figures_keep_the_size_of_a_page_when_there_are_130_tasks_or_8_lengths():
    drawn = [EXAMPLES[name]() for name in ("accuracy_130_tasks", "throughput_8_lengths", "latency_8_lengths")]

    assert all(figure.get_figheight() <= 12 and figure.get_figwidth() <= 12 for figure in drawn)
    names = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert names == [f"mmlu_subject_{i:03}" for i in (*range(129, 119, -1), *range(9, -1, -1))]
    assert "110 tasks between them" in drawn[0].get_suptitle()


def test_guessing_is_a_line_at_one_over_the_number_of_choices():
    (axes,) = charts.accuracy(score_table(), choice_documents()).axes

    lines = [line for line in axes.lines if line.get_label() == "guessing"]
    assert [set(line.get_xdata()) for line in lines] == [{25.0}, {25.0}]  # mmlu and agieval; ceval has no documents


def test_lines_differ_in_mark_and_dash_besides_colour_and_their_names_stand_at_their_ends():
    figure = sweep_charts.throughput(sweep_rows(variants=TWO_VARIANTS))

    (axes,) = figure.axes
    names = set(config_labels(sweep_rows(variants=TWO_VARIANTS)))
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in names}
    looks = config_looks(names).values()
    assert len({look["marker"] for look in looks}) == len({look["linestyle"] for look in looks}) == 3
    assert {line.get_marker() for line in lines.values()} == {look["marker"] for look in looks}
    assert set(lines) <= {text.get_text() for text in axes.texts} and not figure.legends


def test_a_point_of_many_tokens_tells_them_without_an_exponent():
    rows = sweep_rows()
    figure = sweep_charts.throughput(rows.assign(output_tokens_per_s=rows["output_tokens_per_s"] * 100))

    told = " ".join(filter(None, (artist.get_gid() for artist in figure.findobj())))
    assert re.search(r"ascend_kit: \d\d,\d{3} output tokens/s at 16", told) and "e+" not in told


def test_a_kept_figure_is_png_and_svg_whose_points_tell_their_values(tmp_path):
    folder = RunFolder(tmp_path)

    image = charts.keep(folder, "throughput", sweep_charts.throughput(sweep_rows()), "Output tokens per second")

    vector = (tmp_path / "figures/throughput.svg").read_text()
    assert f'id="{TIP}ascend_kit: ' in vector and len(vector) < 60_000
    assert "best of ascend_kit" in image.alt and image.metadata["figure"] == "throughput"
    assert charts.keep(folder, "throughput", None, "gone") is None and not list((tmp_path / "figures").iterdir())


def test_ticks_of_a_narrow_axis_differ():
    figure, ((axes,),) = make_grid(1, 1, height=3)
    axes.hist([30.42, 30.44, 30.47, 30.48])
    value_axis(axes, "TTFT, ms", which="x", log=False, zero=False)
    figure.canvas.draw()

    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) > 3 and len(set(labels)) == len(labels)
