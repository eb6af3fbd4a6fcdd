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
from chinese_text import english_in
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ascend_kit.messages import say, use_language
from ascend_kit.results import RunFolder
from ascend_kit.show import charts, sweep_charts, tables
from ascend_kit.show.render import inline_svg, markdown, output, sanitize
from ascend_kit.show.report import HERE, write_report
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


def write_run(folder, stages, **files):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"schema_version": 2, "created": "2026-01-01T00:00:00+0000", "updated": "2026-01-02", "stages": stages}
    (folder / "run.json").write_text(json.dumps(record))
    for name, value in files.items():
        rows = value if isinstance(value, list) else None
        text = "".join(json.dumps(row) + "\n" for row in rows) if rows is not None else json.dumps(value)
        (folder / f"{name}.{'jsonl' if rows is not None else 'json'}").write_text(text)
    return folder


def point(rate, concurrency=16, **also):
    return {"status": "ok", "backend": "ascend_kit", "concurrency": concurrency, "prompt_len": 64, "output_len": 32,
            "output_tokens_per_s": rate, "ttft_p50_ms": 20.0, "tpot_p50_ms": 1.5, **also}  # fmt: skip


DEVICE = {"kind": "npu", "name": "Ascend910B3", "versions": {"torch": "2.12.0", "cann": "8.5"}}
PARAMETERS = {"model_name": "Qwen3-8B", "precision": "bf16", "quantize": "w8a8", "graph_mode": True, "cards": 2}
STAGE = {"state": "ok", "parameters": PARAMETERS, "facts": {"device": DEVICE}}


def first_screen(folder):
    page = write_report(folder).read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<header")[1].split("</header>")[0]))


def test_first_screen_is_verdict_model_device_and_four_numbers(tmp_path):
    runs = [
        {
            "run": "e/fast",
            "accuracy_percent": 72.8,
            "difference_points": -0.44,
            "low_points": -1.91,
            "high_points": 1.04,
        }
    ]
    verdict = say("compare.verdict", text="Use e/fast.", best="e/fast", baseline="e/plain", runs=runs).to_row()
    rows = [point(900), point(1100), point(400, 1), point(5000, backend="transformers")]
    folder = write_run(
        tmp_path / "e/fast", {"04_throughput": STAGE}, rows=rows, **{"04_throughput": {"findings": [verdict]}}
    )

    screen = first_screen(folder)

    for text in ("Use e/fast.", "Qwen3-8B", "bf16, w8a8", "graph_mode", "torch 2.12.0", "2 x Ascend910B3", "CANN 8.5",
                 "1,000", "mean, 900 to 1,100 in 2 repeats", "20 ms", "1.5 ms", "-0.44",
                 "95 % interval -1.91 to +1.04"):  # fmt: skip
        assert text in screen, text


def test_the_best_point_is_of_one_engine_under_one_identity_and_never_anothers(tmp_path):
    rows = [point(900, identity="graphs"), point(1100, identity="graphs"), point(300, identity="plain"),
            point(9000, backend="vllm"), point(None, identity="odd")]  # fmt: skip

    screen = first_screen(write_run(tmp_path / "e/r", {"04_throughput": STAGE}, rows=rows))

    assert "mean, 900 to 1,100 in 2 repeats" in screen and "9,000" not in screen


def test_the_numbers_are_of_the_point_that_the_verdict_tells(tmp_path):
    place = {"concurrency": 16, "prompt_len": 64, "output_len": 32}
    values = {"best": "e/r", "baseline": "e/plain", "runs": [], "rate": 900.0, "speedup": 2.0, "n": 8, **place}
    use = say("compare.use", **values, difference=0.0, low=-1.0, high=1.0).to_row()
    rows = [point(900), point(1000, 4)]

    screen = first_screen(
        write_run(tmp_path / "e/r", {"06_compare": STAGE}, rows=rows, **{"06_compare": {"findings": [use]}})
    )

    assert "900 output tokens/s with 16 in flight" in screen and "one measurement, 16 in flight" in screen


def test_a_finding_that_lacks_a_value_of_this_version_keeps_its_text(tmp_path):
    old = {"key": "compare.use", "level": "note", "values": {"best": "e/r"}, "text": "Use e/r, said of old."}

    screen = first_screen(write_run(tmp_path / "e/r", {"06_compare": STAGE}, **{"06_compare": {"findings": [old]}}))

    assert "Use e/r, said of old." in (tmp_path / "e/r/report.html").read_text() and "Neither speed" in screen


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"state": "failed", "error": "CheckpointError: no folder"}, "No result: 05_evaluate failed. CheckpointError"),
        ({"state": "alarm", "alarms": [{"key": "k", "text": "answers as by guessing", "values": {}}]},
         "Do not trust this run: answers as by guessing"),
        ({"state": "ok"}, "Neither speed nor accuracy was measured"),
    ],
)  # fmt: skip
def test_failure_and_alarm_are_the_verdict_before_any_number(tmp_path, stage, words):
    screen = first_screen(write_run(tmp_path / "e/r", {"05_evaluate": stage}))

    assert words in screen


def test_the_report_of_a_run_in_chinese_is_chinese_from_its_first_line(tmp_path):
    runs = {
        "best": "e/r",
        "baseline": "e/plain",
        "runs": [],
        "rate": 3500.0,
        "speedup": 4.0,
        "n": 228,
        "concurrency": 16,
    }
    verdict = say("compare.use", **runs, difference=-0.44, low=-1.91, high=1.04).to_row()
    stage = {**STAGE, "parameters": {**PARAMETERS, "language": "zh"}}
    folder = write_run(
        tmp_path / "e/r", {"06_compare": stage}, rows=[point(900)], **{"06_compare": {"findings": [verdict]}}
    )

    try:
        page = write_report(folder).read_text(encoding="utf-8")
    finally:
        use_language("en")

    assert '<html lang="zh">' in page and "推荐 e/r：并发 16 时每秒输出 3,500 个 token，是 e/plain 的 4.00 倍" in page
    assert "输出 token/秒" in page and "output tokens/s" not in page.split("<header")[1].split("</header>")[0]
    assert verdict["text"].startswith("Use e/r: 3,500 output tokens/s with 16 in flight, 4.00 times e/plain")


def test_cautions_stand_on_the_first_screen_and_what_failed_is_said_once(tmp_path):
    findings = [say("sweep.preemptions", "caution", count=2).to_row(), say("sweep.nothing").to_row()]
    stages = {"04_throughput": STAGE, "05_evaluate": {"state": "failed", "error": "DataError: no file"}}
    folder = write_run(tmp_path / "e/r", stages, **{"04_throughput": {"findings": findings}})

    screen = first_screen(folder)

    assert (
        "2 preemptions" in screen and screen.count("DataError: no file") == 1 and "Nothing was measured" not in screen
    )


def test_index_lists_all_runs_newest_first_with_their_verdicts(tmp_path):
    for name, day in (("old", "2026-01-01"), ("new", "2026-01-03")):
        folder = write_run(tmp_path / "e" / name, {"04_throughput": STAGE}, rows=[point(900)])
        record = json.loads((folder / "run.json").read_text()) | {"updated": day}
        (folder / "run.json").write_text(json.dumps(record))
        write_report(folder)
    (tmp_path / "e/broken").mkdir()
    (tmp_path / "e/broken/run.json").write_text("{ torn")

    page = (tmp_path / "index.html").read_text()

    assert page.index("e/new/report.html") < page.index("e/old/report.html") and "900" in page and "torn" not in page


def test_the_index_is_in_one_language_whatever_its_reports_are_in_and_each_number_is_in_its_column(tmp_path):
    score = say("scores.percent", task="mmlu", metric="acc", count=72, unit="fraction", value=63.9).to_row()
    write_report(write_run(tmp_path / "e/en", {"05_evaluate": STAGE}, **{"05_evaluate": {"findings": [score]}}))
    compared = {"run": "e/zh", "accuracy_percent": 72.8, "difference_points": -0.44, "low_points": -2, "high_points": 1}
    verdict = say("compare.verdict", text="Use e/zh.", best="e/zh", baseline="e/en", runs=[compared]).to_row()
    stage = {**STAGE, "parameters": {**PARAMETERS, "language": "zh"}}
    told = {"rows": [point(9)], "06_compare": {"findings": [verdict]}}
    folder = write_run(tmp_path / "e/zh", {"06_compare": stage}, **told)

    try:
        write_report(folder)
    finally:
        use_language("en")

    page = (tmp_path / "index.html").read_text()
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("(?s)<tr>(.*?)</tr>", page)[1:]]
    assert english_in(page, "zh", "bf16", "graph", "mode", "Qwen3", "Use") == [] and "未比较" not in page
    assert sorted(line[2:6] for line in lines) == [["", "", "", "63.9 %"], ["9", "20 ms", "1.5 ms", "72.8 %"]]


def test_of_equal_cautions_about_a_busy_machine_the_last_stands_on_the_first_screen_the_other_below(tmp_path):
    busy = {"count": 2, "most": 1.5, "cores": 2}
    first, last = (say("sweep.disturbed", "caution", points=name, **busy) for name in ("ours 1/2/3", "e/r 1/2/3"))
    stages = {"04_throughput": STAGE, "06_compare": STAGE}
    told = {"04_throughput": {"findings": [first.to_row()]}, "06_compare": {"findings": [last.to_row()]}}
    folder = write_run(tmp_path / "e/r", stages, **told)

    screen = first_screen(folder)

    assert "e/r 1/2/3" in screen and "ours 1/2/3" not in screen
    assert (folder / "report.html").read_text().count("ours 1/2/3") == 1


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
