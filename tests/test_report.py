"""The HTML report: it opens offline, runs nothing, escapes what models say, and shows every notebook."""

import json
import re

import nbformat
import pandas
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ascend_kit.show.render import markdown, output, sanitize
from ascend_kit.show.report import write_report
from ascend_kit.show.tables import cell_text, facts, readable

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
        ("<table><tr><td>1</td></tr></table>", "<table><tr><td>1</td></tr></table>"),
        ("<td style='text-align: right; position: fixed'>1</td>", '<td style="text-align: right">1</td>'),
        ("<a href='javascript:alert(1)'>x</a>", "<a>x</a>"),
        ("<a href=' java\tscript:alert(1)'>x</a>", "<a>x</a>"),
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
    assert readable(pandas.DataFrame()).data == "<p>Nothing to show.</p>"


def test_facts_unfold_inner_mappings():
    markup = facts({"versions": {"torch": "2.13"}, "steps": 3}).data

    assert "versions.torch" in markup and "2.13" in markup
