"""The HTML report: it opens offline, runs nothing, escapes what models say, and shows every notebook."""

import base64
import hashlib
import itertools
import json
import re
from html import unescape

import nbformat
import pandas
import pytest
from chart_data import sweep_rows
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from report_runs import STAGE, point, write_run

from ascend_kit.results import RunFolder
from ascend_kit.show import charts, sweep_charts, tables
from ascend_kit.show.render import inline_svg, markdown, output, sanitize
from ascend_kit.show.report import HERE, write_report

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


def test_report_loads_nothing_and_runs_one_script_of_its_own(run_folder):
    page = write_report(run_folder).read_text(encoding="utf-8")

    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policy in unescape(page)
    assert page.count("<script") == 1 and "onerror" not in re.sub(r"&lt;.*?&gt;", "", page)
    assert re.findall(r' src="(?!data:)([^"]*)"', page) == []
    assert set(re.findall(r'href="(?!#)([^"]*)"', page)) <= {"../../index.html", "01_good.ipynb", "02_bad.ipynb"}


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
        "Figure 1. figure.",
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


def test_empty_cells_leave_nothing_behind_and_findings_stand_once(tmp_path):
    cells = [
        new_markdown_cell("# Title"),
        new_markdown_cell("Where a score was published, it stands here."),
        new_code_cell("tables.readable(result.published)"),
        new_code_cell("findings.conclude(folder)", outputs=[stream("- said once")]),
    ]
    folder = write_run(tmp_path / "e/r", {"05_evaluate": STAGE}, **{"05_evaluate": {"findings": ["said once"]}})
    nbformat.write(new_notebook(cells=cells), folder / "05_evaluate.ipynb")

    page = write_report(folder).read_text()

    assert page.count("said once") == 1 and "published" not in page and "Nothing to show" not in page


def test_a_saved_chart_is_drawn_inside_the_page_and_its_points_tell_their_values(tmp_path):
    folder = write_run(tmp_path / "e/r", {"04_throughput": STAGE})
    rows = pandas.DataFrame([point(900), point(400, 1), point(300, backend=HOSTILE), point(100, 1, backend=HOSTILE)])
    image = charts.keep(RunFolder(folder), "throughput", sweep_charts.throughput(rows), "Output tokens per second")
    _, metadata = image._repr_mimebundle_()
    shown = new_output(
        "display_data", data={"image/png": PNG}, metadata={"image/png": metadata.get("image/png", metadata)}
    )
    nbformat.write(
        new_notebook(cells=[new_code_cell("charts.keep(folder)", outputs=[shown])]), folder / "04_throughput.ipynb"
    )

    page = write_report(folder).read_text()

    assert "<svg role=" in page and "<title>ascend_kit: 900 output tokens/s at 16</title>" in page
    assert "data:image/png" not in page and 'href="figures/throughput.png"' in page
    assert "Figure 1. Output tokens per second. Qwen3-8B" in page
    assert page.count("<script") == 1 and "<img src=x" not in page


@pytest.mark.parametrize(
    "part",
    ["<script>alert(1)</script>", "<g onclick='alert(1)'/>", "<image href='http://x/y.png'/>", "<foreignObject/>",
     "<g style='fill: url(http://x)'/>", "<use href='javascript:alert(1)'/>", "<rect fill='url(http://x)'/>"],
)  # fmt: skip
def test_a_hostile_svg_keeps_nothing_that_acts_or_loads(part):
    drawn = inline_svg(f"<svg xmlns='http://www.w3.org/2000/svg'>{part}<path d='M 0 0'/></svg>", "f1", "alt")

    assert "alert" not in drawn and "http://x" not in drawn and "foreign" not in drawn and "<path d=" in drawn


def test_a_column_of_numbers_stands_right_with_its_head_and_one_with_a_word_among_them_left():
    markup = tables.readable(pandas.DataFrame({"n": [7, None], "value": ["none", 3]}, dtype=object)).data

    assert (
        '<th scope="col" style="text-align: right">n</th><th scope="col" style="text-align: left">value</th>' in markup
    )
    assert (
        '<td style="text-align: right">7</td>' in markup
        and '<td style="text-align: left; white-space: nowrap">3<' in markup
    )


def saved_picture(folder, name, figure):
    path = folder.path / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode(PNG))
    return path


def test_a_report_of_24_points_130_tasks_and_a_thousand_requests_stays_below_three_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "save_figure", saved_picture)  # the report holds the SVG; drawing a PNG takes long
    folder = RunFolder(write_run(tmp_path / "e/r", {"04_throughput": STAGE, "05_evaluate": STAGE}))
    lengths = list(itertools.product((128, 1024, 4096, 16384), (128, 1024)))
    rows = sweep_rows(lengths, repeats=3, concurrency=(1, 16, 64))
    few = rows[rows["prompt_len"] == 128]  # lines, not a heat map
    scores = pandas.DataFrame([{"kind": "task", "set": "mmlu", "task": f"mmlu_some_longer_name_{n}", "metric": metric,
                                "value": n / 130, "stderr": 0.01, "unit": "fraction", "n": 100, "status": "ok"}
                               for n in range(130) for metric in ("acc", "acc_norm")])  # fmt: skip
    times = [0.01 * token for token in range(1, 33)]
    requests = pandas.DataFrame([{"index": n, "arrival_s": n / 50, "scheduled_s": n / 50 + 0.01,
                                  "token_times_s": [n / 50 + 0.1 + t for t in times]}
                                 for n in range(1000)])  # fmt: skip
    figures = {"throughput": sweep_charts.throughput(rows), "latency": sweep_charts.latency(few),
               "tradeoff": sweep_charts.tradeoff(rows), "requests": sweep_charts.request_timeline(requests),
               "tasks": charts.accuracy(scores)}  # fmt: skip
    shown = [display(text_html=table.data) for table in (tables.sweep(rows), tables.scores(scores))]
    for name, figure in figures.items():
        data, about = charts.keep(folder, name, figure, f"The chart of {name}")._repr_mimebundle_()
        shown.append(new_output("display_data", data=data, metadata=about))
    nbformat.write(new_notebook(cells=[new_code_cell("show", outputs=shown)]), folder.path / "04_throughput.ipynb")

    page = write_report(folder.path).read_text()

    assert (
        page.count("<figure>") == len(figures) + 1 and page.count("mmlu_some_longer_name_") == 260 + 20 + 20 + 12
    )  # and alternative text
    assert 100_000 < len(page.encode()) < 3_000_000
    assert '<div class="drawing">' in page and '<div class="drawing tall">' in page  # the tasks, on paper not squeezed


def test_red_is_red_and_readable_on_a_light_and_on_a_dark_page():
    light, dark = HERE.joinpath("report.css").read_text().split("@media (prefers-color-scheme: dark)")[:2]

    for style in (light, dark):
        paper = luminance(re.search("--paper: (#[0-9a-f]+)", style)[1])
        for name in ("--red", "--bad"):
            colour = re.search(f"{name}: (#[0-9a-f]+)", style)[1]
            red, green, blue = channels(colour)
            contrast = sorted([(luminance(colour) + 0.05), paper + 0.05])
            assert red > green + 60 and red > blue + 60 and contrast[1] / contrast[0] >= 4.5, (name, colour)


def channels(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    return [int(digits[at : at + 2], 16) for at in (0, 2, 4)]


def luminance(colour):
    """WCAG 2's relative luminance."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in channels(colour))]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
