"""The HTML report: it opens offline, runs nothing, escapes what models say, and shows every notebook."""

import json
import re

import nbformat
import pandas
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ascend_kit.show import tables
from ascend_kit.show.render import markdown, output, sanitize
from ascend_kit.show.report import write_report
from ascend_kit.show.tables import cell_text, facts, readable, shorten

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def stream(text):
    return new_output("stream", name="stdout", text=text)


def display(**data):
    return new_output("display_data", data={key.replace("_", "/", 1): value for key, value in data.items()})


@pytest.fixture
def run_folder(tmp_path):
    """A run of two notebooks: one good with every kind of output, one that failed."""
    folder = tmp_path / "qwen" / "first"
    folder.mkdir(parents=True)
    good = new_notebook(
        cells=[
            new_markdown_cell(
                "# A question\n\nProse with <b>markup</b>.\n\n## Part\n\n| a | b |\n|---|---|\n| 1 | 2 |"
            ),
            new_code_cell("x = 1", outputs=[stream(HOSTILE), display(image_png=PNG, text_plain="figure")]),
            new_code_cell("table", outputs=[display(text_html=f"<table><tr><td>{HOSTILE}</td></tr></table>")]),
            new_code_cell("long", outputs=[stream("line\n" * 100)]),
        ]
    )
    bad = new_notebook(
        cells=[
            new_markdown_cell("# Another"),
            new_code_cell(
                "1 / 0",
                outputs=[
                    new_output(
                        "error", ename="ZeroDivisionError", evalue=HOSTILE, traceback=["\x1b[31mTraceback\x1b[0m"]
                    )
                ],
            ),
        ]
    )
    nbformat.write(good, folder / "01_good.ipynb")
    nbformat.write(bad, folder / "02_bad.ipynb")
    device = {"kind": "npu", "name": "Ascend910B3", "total_memory_bytes": 64 * 2**30, "versions": {"cann": "8.5"}}
    good_stage = {"state": "ok", "duration_s": 1.26, "facts": {"device": device}, "parameters": {"model_name": HOSTILE}}
    stages = {
        "01_good": good_stage,
        "02_bad": {"state": "failed", "duration_s": 2.0, "error": HOSTILE},
        "03_missing": {"state": "skipped", "error": "needs 02_bad"},
    }
    record = {"schema_version": 2, "created": "2026-01-01T00:00:00+0000", "seed": 7, "stages": stages}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "01_good.json").write_text(json.dumps({"findings": [f"fast {HOSTILE}"]}))
    return folder


def test_report_loads_nothing_and_runs_nothing(run_folder):
    page = write_report(run_folder).read_text(encoding="utf-8")

    assert "default-src 'none'" in page
    assert "<script" not in page and "onerror" not in re.sub(r"&lt;.*?&gt;", "", page)
    outside = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', page)
    assert outside == []


def test_hostile_text_stays_readable_as_text(run_folder):
    page = write_report(run_folder).read_text(encoding="utf-8")

    # Stream, finding, error in the table and in the section, traceback head, parameters: all show it escaped.
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5


def test_report_shows_state_time_error_figures_and_facts(run_folder):
    page = write_report(run_folder).read_text(encoding="utf-8")

    for text in (
        "qwen / first",
        "A question",
        "Another",
        "03_missing",
        "needs 02_bad",
        "1.3",
        "Ascend910B3",
        "64.0",
        "cann version",
        f"data:image/png;base64,{PNG}",
        "100 lines of output",
        "Traceback",
    ):
        assert text in page, text
    assert "\x1b" not in page
    assert page.index('<details class="code">') > 0 and "<details open" not in page


def test_report_of_a_folder_without_run_json_still_renders_the_notebooks(run_folder):
    (run_folder / "run.json").unlink()

    page = write_report(run_folder).read_text(encoding="utf-8")

    assert "A question" in page and "Another" in page


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("<table><tr><td>1</td></tr></table>", "<table><tbody><tr><td>1</td></tr></tbody></table>"),
        ("<b style='text-align: right; position: fixed'>1</b>", '<b style="text-align:right">1</b>'),
        ("<a href='javascript:alert(1)'>x</a>", '<a rel="noopener noreferrer">x</a>'),
        ("<a href=' java\tscript:alert(1)'>x</a>", '<a rel="noopener noreferrer">x</a>'),
        ("<p onclick=alert(1)>x</p>", "<p>x</p>"),
        ("<script>alert(1)</script>after", "after"),
        ("<svg><script>alert(1)</script></svg>after", "after"),
        ("<style>p { background: url(http://x) }</style>after", "after"),
        ("<img src='http://elsewhere/x.png'>", "<img>"),
        ("<div><b>open", "<div><b>open</b></div>"),
        ("</div></div>x", "x"),
        ("<form action=x><input value=1></form>", ""),
        ("&lt;b&gt;", "&lt;b&gt;"),
    ],
)
def test_sanitizer_keeps_tables_and_drops_what_could_act(markup, expected):
    assert sanitize(markup) == expected


def test_markdown_escapes_raw_html_and_harmful_links():
    page = markdown(
        "<script>alert(1)</script>\n\n[x](javascript:alert(1)) ![y](http://elsewhere/y.png)", lambda n, t: t
    )

    assert "<script" not in page and "javascript:" not in page and "<img" not in page


def test_interactive_output_leaves_a_note():
    item = new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Box()"})

    assert "JupyterLab" in output(item)


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
    table = pandas.DataFrame([{f"column_{i}": i for i in range(17)}])

    markup = readable(table).data

    assert columns_of(markup) == [8, 8, 3]
    shown, folded = markup.split("<details>")
    assert "column_<wbr>7" in shown and "column_<wbr>8" not in shown and "9 more columns" in folded
    assert folded.count("column_<wbr>0<") == 2


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
    markup = facts({"versions": {"torch": "2.13"}, "steps": 3}).data

    assert "versions.torch" in markup and "2.13" in markup
