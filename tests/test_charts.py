"""Figures drawn from small tables; what is asserted is what a reader would miss: units, scales, data,
colours.
"""

import math
import re

import pandas
import pytest
from chart_data import (
    EIGHT_LENGTHS,
    EXAMPLES,
    TWO_VARIANTS,
    choice_documents,
    fastest,
    held_rows,
    held_samples,
    plan_table,
    score_table,
    sweep_rows,
    tradeoff_table,
)

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
from ascend_kit.show.findings import sweep_findings


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
        lambda table: charts.sensitivity(table, {}),
        lambda table: charts.mixes(table, "w8a8", None),
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


def test_plotting_leaves_no_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    for draw in EXAMPLES.values():
        draw()

    assert dict(matplotlib.rcParams) == before
    pyplot = __import__("sys").modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_one_bar_is_no_figure_and_simulated_layouts_are_drawn_for_several_cards_only():
    one_plan = plan_table().query("cards == 1 and tensor_parallel == 1")

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


def timed_rows():
    """A sweep of rates, of which a search measured two close together, each with another throughput."""
    one = {**sweep_rows().iloc[0].to_dict(), "concurrency": 4096, "load": "poisson"}
    return pandas.DataFrame([{**one, "rate": rate, "output_tokens_per_s": 10 * rate} for rate in (1, 4, 16, 17.5, 64)])


def test_loads_that_come_by_the_clock_are_drawn_over_their_rate():
    (axes,) = sweep_charts.throughput(timed_rows()).axes

    line = next(line for line in axes.lines if len(line.get_xdata()) == 5)
    assert list(line.get_xdata()) == [1, 4, 16, 17.5, 64] and list(line.get_ydata()) == [10, 40, 160, 175, 640]
    assert axes.get_xlabel() == "rate, requests per second"
    assert "64" in [text.get_text() for text in axes.get_xticklabels()]
    trade = sweep_charts.tradeoff(timed_rows())
    assert "requests per second" in trade.get_suptitle()
    trace = sweep_charts.throughput(timed_rows().assign(load="trace"))
    assert trace.axes[0].get_xlabel() == "speed of the trace, times"


def test_a_closed_loop_and_a_load_by_the_clock_have_panels_and_names_of_their_own():
    closed = timed_rows().assign(load="closed", rate=float("nan"), concurrency=[1, 2, 4, 8, 16])
    both = pandas.concat([closed, timed_rows()], ignore_index=True)

    first, second = sweep_charts.throughput(both).axes[:2]

    assert (first.get_xlabel(), second.get_xlabel()) == ("concurrency, requests in flight", "rate, requests per second")
    assert {label.split(", ")[-1] for label in config_labels(both)} == {"closed", "poisson"}


def test_no_number_stands_on_the_mark_of_another_engine():
    rows = []
    for name, places in (("a", ((10, 100), (11, 120), (14, 300))), ("b", ((11.6, 112), (11.4, 260), (10.6, 95)))):
        for concurrency, (tpot, rate) in zip((1, 4, 16), places, strict=True):
            rows.append({**sweep_rows().iloc[0].to_dict(), "backend": name, "concurrency": concurrency,
                         "tpot_p50_ms": tpot, "output_tokens_per_s": rate})  # fmt: skip
    figure = sweep_charts.tradeoff(pandas.DataFrame(rows))
    (axes,) = figure.axes
    figure.canvas.draw()

    boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in ("1", "4", "16")]
    marks = [axes.transData.transform(point) for line in axes.lines for point in line.get_xydata()]
    assert len(boxes) == 6  # all have found a place
    assert not [box for box in boxes if any(box.contains(*mark) for mark in marks)]
    assert not [(a, b) for number, a in enumerate(boxes) for b in boxes[:number] if a.overlaps(b)]


def test_nothing_falls_out_of_a_logarithm_and_a_legend_is_no_wider_than_its_figure():
    rows = sweep_rows()
    rows = pandas.concat([rows.assign(backend=f"an_engine_with_a_name_{n}") for n in range(11)], ignore_index=True)
    rows.loc[rows["concurrency"] == rows["concurrency"].max(), "itl_p50_ms"] = 0.0
    rows.loc[rows.index[0], "itl_p50_ms"] = 1000.0
    figure = sweep_charts.latency(rows)
    figure.canvas.draw()

    itl = figure.axes[2]
    assert itl.get_yscale() == "log" and itl.get_ylim()[0] > 1e-6
    assert not math.isfinite(itl.transData.transform((1, 0.0))[1])  # not at the bottom, as if it were small
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    looks = config_looks(rows["backend"])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 11


def test_the_best_point_of_a_sweep_of_rates_is_one_rate_and_gains_are_of_equal_rates():
    rows = timed_rows().assign(backend="ascend_kit")
    slow = timed_rows().assign(backend="transformers", output_tokens_per_s=[5, 20, 80, 35, 64])
    both = pandas.concat([rows, rows.assign(repeat=1), slow], ignore_index=True)

    best, *_, gain = sweep_findings(both)

    assert best.key == "sweep.best_timed" and best.values["rate"] == 64 and best.values["count"] == 2
    assert "640 output tokens/s" in str(best) and "poisson, rate 64" in str(best)
    assert gain.key == "sweep.gain"
    assert (gain.values["low"], gain.values["high"], gain.values["count"]) == (2, 10, 5)


def test_repeats_that_differ_in_the_shared_prefix_are_two_lines():
    rows = pandas.concat([sweep_rows().assign(shared_prefix=share) for share in (0.0, 0.5)], ignore_index=True)

    assert set(config_labels(rows)) == {
        f"{name}, shared_prefix {share:g}" for name in set(sweep_rows()["backend"]) for share in (0.0, 0.5)
    }
