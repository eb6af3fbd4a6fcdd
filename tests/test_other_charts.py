"""Figures beside those of a sweep: scores, sensitivity, plans, layouts."""

import math

import pandas
import pytest
from chart_data import PARTS, chosen_schemes, plan_table, score_table, sensitivity_table

from ascend_kit.measure.planner import server_plans
from ascend_kit.show import charts, sweep_charts
from ascend_kit.show.drawing import config_labels


def test_accuracy_bars_carry_values_in_percent_and_missing_errors_are_left_out():
    table = score_table()
    table.loc[0, "stderr"] = math.nan
    figure = charts.accuracy(table)

    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches[:3]] == pytest.approx([62, 55, 41])
    assert len([c for c in axes.collections if len(c.get_segments())]) == 2  # one error line per known error


def test_linears_kept_in_float_are_hollow_and_weight_only_ones_square():
    (axes,) = charts.sensitivity(sensitivity_table(), chosen_schemes()).axes

    marks = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert sum(line.get_fillstyle() == "none" for line in marks) == 1  # down_proj
    assert sum(line.get_marker() == "s" for line in marks) == 1  # v_proj
    assert len(marks) == len(PARTS)


def test_infeasible_plan_has_no_bar_and_a_broken_limit_is_hatched():
    figure = sweep_charts.planner(plan_table())

    (axes,) = figure.axes
    bars = [patch for patch in axes.patches if patch.get_height() > 0]
    assert len(bars) == 9  # ten splits, tensor parallel 8 does not divide
    assert sum(patch.get_hatch() is not None for patch in bars) == 4
    (legend,) = figure.legends
    assert [
        text.get_text() for text, box in zip(legend.texts, legend.get_patches(), strict=True) if box.get_hatch()
    ] == ["breaks a limit"]


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
