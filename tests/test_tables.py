"""Cells, tables, facts and answers as a report and a notebook show them."""

import re

import pandas
import pytest
from report_runs import point

from ascend_kit.messages import use_language
from ascend_kit.show import tables
from ascend_kit.show.tables import cell_text, facts, readable, shorten

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (0.0, "0"),
        (123.456, "123.5"),
        (0.000123456, "0.0001235"),
        (45678.9, "45,679"),
        (1234567, "1,234,567"),
        (2048, "2048"),
        (True, "yes"),
        (float("inf"), "inf"),
        ("<b>", "<b>"),
    ],
)
def test_cells_show_few_digits_and_nothing_for_unknown(value, text):
    assert cell_text(value) == text


def test_readable_table_escapes_and_does_not_cut_text():
    table = pandas.DataFrame({"text": ["a" * 120, HOSTILE], "value": [1.0, None]})

    markup = readable(table).data

    assert "a" * 120 in markup and "<script" not in markup and "NaN" not in markup
    assert readable(pandas.DataFrame()) is None


def columns_of(markup):
    return [len(re.findall("<th scope=.col", table)) for table in markup.split("<table>")[1:]]


def test_table_shows_eight_columns_and_the_rest_in_a_fold_with_the_key_again():
    table = pandas.DataFrame(2 * [{f"column_{i}": i for i in range(17)}])

    markup = readable(table).data

    assert columns_of(markup) == [8, 8, 3]
    shown, folded = markup.split("<details>")
    assert "column_<wbr>7" in shown and "column_<wbr>8" not in shown and "9 more columns" in folded
    assert folded.count("column_<wbr>0<") == 2


def test_of_a_single_line_the_columns_in_the_fold_stand_upright_with_their_names():
    markup = readable(pandas.DataFrame([{f"c{n}": n for n in range(20)} | {"outcome": "undecided"}])).data

    shown, folded = markup.split("<details>")
    assert shown.count("<tr>") == 2 and folded.count("<tr>") == 14 and "13 more columns" in folded
    assert re.search(r'scope="row"[^>]*>c8</th><td[^>]*>8</td>', folded)


def test_repeats_of_a_point_stand_below_each_other_and_settings_that_were_swept_are_named():
    rows = [
        point(n, load, repeat=n // 4, graph_mode=mode)
        for n, (load, mode) in enumerate(2 * [(16, False), (16, True), (4, True), (4, False)])
    ]

    shown = tables.sweep(pandas.DataFrame(rows)).data.split("<details>")[0].split("<tr>")[2:]
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in shown]

    named = [("ascend_kit, graph_mode", 4, 2), ("ascend_kit, graph_mode", 4, 6), ("ascend_kit, graph_mode", 16, 1)]
    assert [(line[0], int(line[1]), int(line[4])) for line in lines[:3]] == named
    assert lines[-1][0] == "ascend_kit, no graph_mode"


def test_columns_without_a_value_are_left_out():
    assert "empty" not in readable(pandas.DataFrame([{"a": 1, "empty": None}])).data


def test_130_tasks_become_sets_ten_best_ten_worst_and_a_fold():
    rows = [{"kind": "task", "set": "mmlu", "task": f"task_{i:03}", "metric": metric, "value": i / 130, "stderr": 0.01,
             "unit": "fraction", "n": 100} for i in range(130) for metric in ("acc", "acc_norm")]  # fmt: skip
    rows += [{**rows[0], "kind": "group", "task": "mmlu", "value": 0.5}]

    shown, folded = tables.scores(pandas.DataFrame(rows)).data.split("<details>")

    assert re.findall(r">(task_\d+|mmlu)</td><td[^>]*>acc<", shown) == (
        ["mmlu", *[f"task_{i:03}" for i in range(129, 119, -1)], *[f"task_{i:03}" for i in range(9, -1, -1)]]
    )
    assert "240 more rows" in folded and folded.count("<tr>") == 241


def answer(prompt, text="fine"):
    return pandas.DataFrame([{"index": 0, "prompt": prompt, "text": text}])


def test_a_long_chinese_prompt_is_shortened_by_characters():
    prompt = "请用一句话说明什么是大语言模型以及它为什么会产生幻觉。" * 10

    assert prompt[:88] + " …" in tables.answers(answer(prompt)).data
    assert shorten("one two " * 40, 90).endswith("two …") and len(shorten("one two " * 40, 90)) <= 90


def test_dollar_signs_are_no_formula_and_control_and_bidi_characters_are_visible():
    markup = tables.answers(answer("From $100 to $200?", "a\x00b\u202ec")).data

    assert not re.search(r"\$[^<]*\$", markup)
    assert "a⟨U+0000⟩b⟨U+202E⟩c" in markup
    assert tables.visible("\ud800 一\n👩\u200d💻") == "⟨U+D800⟩ 一\n👩\u200d💻"


def test_checks_that_are_fine_stand_in_a_fold_and_what_is_wrong_above_it():
    rows = [
        {"section": "CANN", "check": f"check {i}", "status": "ok", "evidence": "e", "remedy": ""} for i in range(26)
    ]

    fine = tables.checks(pandas.DataFrame(rows)).data
    rows[3] |= {"status": "warn", "remedy": "mend it"}
    wrong = tables.checks(pandas.DataFrame(rows)).data

    assert fine.startswith("<details><summary>26 checks, nothing to mend</summary>")
    assert "check 3" in wrong.split("<details>")[0] and "check 4" not in wrong.split("<details>")[0]
    assert "25 other checks" in wrong


def test_parity_figures_say_what_they_mean():
    markup = tables.parity(
        pandas.DataFrame([{"figure": "greedy_share", "value": 0.906}, {"figure": "new", "value": 1}])
    ).data

    assert "rounding" in markup


def test_facts_unfold_inner_mappings():
    markup = facts({"versions": {"torch": "2.13"}, "steps": 3, "left out": None}).data

    assert "versions.<wbr>torch" in markup and "2.13" in markup and "left out" not in markup


def test_short_lists_are_shown_and_of_long_ones_how_much_they_hold():
    markup = facts({"sizes": [1, 2, 4], "kept": [f"model.layers.{n}.self_attn.q_proj" for n in range(35)]}).data

    assert ">1, 2, 4<" in markup and ">35 entries<" in markup


def test_in_chinese_names_of_columns_and_our_own_words_are_chinese_and_data_stays():
    use_language("zh")
    try:
        markup = tables.paired(
            pandas.DataFrame([{"candidate": "undecided", "set": "mmlu", "outcome": "undecided"}])
        ).data
    finally:
        use_language("en")

    assert '<th scope="col" title="candidate" style="text-align: left">候选</th>' in markup
    assert markup.count("undecided") == 1 and "未定" in markup  # a run may be called so
