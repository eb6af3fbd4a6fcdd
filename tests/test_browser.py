"""The report and the notebooks in a real Chromium. Skipped, and counted as such, where it or playwright is missing."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas
import pytest
from browser_session import CHROMIUM, SCROLLER, chromium, jupyterlab, open_notebook, run_all
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_explore import document, point, write_run

from ascend_kit.messages import say
from ascend_kit.results import RunFolder
from ascend_kit.run.checks import find_notebooks
from ascend_kit.run.pack import pack
from ascend_kit.show import charts, sweep_charts, tables
from ascend_kit.show.report import write_report

MISSING = [
    name
    for name, there in (("Chromium", CHROMIUM), ("playwright", importlib.util.find_spec("playwright")))
    if not there
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {' and '.join(MISSING)}: apt install chromium, pip install -e '.[browser]'"
    ),
]
PDFTOTEXT = shutil.which("pdftotext")
HOSTILE = "<script>window.hurt=1</script><img src=x onerror='window.hurt=1'><svg onload='window.hurt=1'>"
# Right edges of cells beyond the page; elements inside a box that scrolls by itself do not count on a screen.
BEYOND = """(paper) => [...document.querySelectorAll('th, td')].filter(cell => cell.offsetParent !== null
  && (paper || !cell.closest('.scroll')) && cell.getBoundingClientRect().right > window.innerWidth + 1)
  .map(cell => cell.textContent)"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two runs whose names, questions and answers try to run scripts, with a report; and the notebooks beside them."""
    root = tmp_path_factory.mktemp("project")
    rows = [point(900, ttft_p50_ms=100), point(1100, 1, ttft_p50_ms=100), point(300, concurrency=1)]
    questions = [document(0, 0), document(1, 1, question=HOSTILE), document(2, 0)]
    write_run(root / "outputs", "e/plain", "2026-01-01", rows, questions)
    write_run(root / "outputs", "e/fast", "2026-02-01", [point(2000), point(2100, 1), point(700, concurrency=1)],
              [document(0, 1), document(1, 1, question=HOSTILE), document(2, 0)])  # fmt: skip
    folder = RunFolder(root / "outputs/e/fast")
    verdict = {"text": f"Use e/fast. {HOSTILE}", "best": "e/fast", "baseline": "e/plain"}
    verdict["runs"] = [{"run": "e/fast", "accuracy_percent": 72.8, "difference_points": -0.44, "low_points": -1.91,
                        "high_points": 1.04}]  # fmt: skip
    folder.write_json("04_throughput", {"findings": [say("compare.verdict", **verdict).to_row()]})
    wide = pandas.DataFrame([{f"a_long_column_name_{n}": f"value {n} {HOSTILE[:30]}" for n in range(14)}] * 3)
    told = pandas.DataFrame(
        [{"set": "mmlu, ceval, cmmlu, gsm8k", "told": "a sentence " * 9, "by": "a short text " * 3}]
    )
    picture = charts.keep(folder, "throughput", sweep_charts.throughput(pandas.DataFrame(rows)), HOSTILE)
    data, about = picture._repr_mimebundle_()
    shown = [new_output("display_data", data={"text/html": tables.readable(wide).data}),
             new_output("display_data", data={"text/html": tables.readable(told).data}),
             new_output("display_data", data=data, metadata=about),
             new_output("stream", name="stdout", text=HOSTILE)]  # fmt: skip
    cells = [new_markdown_cell(f"# Title {HOSTILE}"), new_code_cell("show", outputs=shown)]
    nbformat.write(new_notebook(cells=cells), folder.path / "04_throughput.ipynb")
    for name in ("plain", "fast"):
        write_report(root / "outputs/e" / name)
    for name in ("notebooks", "params"):
        (root / name).mkdir()
    (root / "params/demo.yaml").write_text("experiment: demo\n")
    for notebook in find_notebooks():
        (root / "notebooks" / notebook.path.name).write_bytes(notebook.path.read_bytes())
    return root


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (800, 1000), (390, 844)])
def test_the_report_fits_its_first_screen_says_verdict_and_numbers_and_nothing_is_loaded(
    browser, project, width, height
):
    page, asked = browser.new_page(viewport={"width": width, "height": height}), []
    page.on("request", lambda request: asked.append(request.url))

    page.goto(f"file://{project}/outputs/e/fast/report.html")
    for fold in page.locator("main details").all():
        fold.evaluate("fold => fold.open = true")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(BEYOND, False) == []
    assert page.locator("td:has-text('a sentence')").bounding_box()["width"] >= 110  # and not one letter a line
    sentence = page.locator(".verdict").bounding_box()
    places = [number.bounding_box() for number in page.locator(".numbers b").all()]
    assert "Use e/fast." in page.locator(".verdict").inner_text() and sentence["y"] < 200
    assert len(places) == 4 and "2,050" in page.locator(".numbers").inner_text()
    assert all(box["y"] + box["height"] <= height for box in (sentence, *places))
    assert page.evaluate("window.hurt") is None and len(asked) == 1
    page.close()


def test_on_paper_every_column_is_there(browser, project):
    page = browser.new_page(viewport={"width": 718, "height": 1000})  # A4 less one centimetre on each side, at 96 dots
    page.goto(f"file://{project}/outputs/e/fast/report.html")

    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    printed = page.pdf(format="A4")

    assert page.evaluate(BEYOND, True) == [] and page.locator("th:has-text('name_13')").first.is_visible()
    assert printed.startswith(b"%PDF") and page.evaluate("document.documentElement.scrollWidth") <= 718
    if PDFTOTEXT:  # of poppler-utils: what the paper says, a heading's lines and hyphens joined
        paper = subprocess.run([PDFTOTEXT, "-raw", "-", "-"], input=printed, capture_output=True, check=True).stdout
        headings, told = page.locator("thead th").all_text_contents(), squeezed(paper.decode())
        assert len(headings) >= 14 and [name for name in headings if squeezed(name) not in told] == []
    page.close()


def test_the_packed_index_sorts_filters_and_leads_to_the_report_and_loads_nothing(browser, project, tmp_path):
    pack(project / "outputs", tmp_path / "outputs.zip")
    with zipfile.ZipFile(tmp_path / "outputs.zip") as packed:
        packed.extractall(tmp_path)
    (index,) = tmp_path.rglob("index.html")
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{index}")

    cut = [(page.set_viewport_size({"width": width, "height": 800}), page.evaluate(BEYOND, True))[1]
           for width in (390, 800, 1280)]  # fmt: skip
    orders = []
    for name in ("output tokens/s", "output tokens/s", "TTFT", "TTFT"):
        page.click(f"table.runs th:has-text('{name}')")
        orders.append(page.locator("table.runs tbody th").all_inner_texts())
    page.fill("input[type=search]", "fast")
    visible = [row.inner_text() for row in page.locator("table.runs tbody tr").all() if row.is_visible()]
    page.click("table.runs tbody tr:visible a")
    links = page.locator("a[href]:not([href^='#'])").evaluate_all("links => links.map(link => link.href)")
    names = {unquote(link.rsplit("/", 1)[1]) for link in links}

    assert cut == [[], [], []]
    # 1,000 before 2,050, and 20 ms before 100 ms: by their numbers, not by their letters.
    fast, slow = ["e/fast", "e/plain"], ["e/plain", "e/fast"]
    assert orders == [slow, fast, fast, slow]
    assert len(visible) == 1 and visible[0].startswith("e/fast") and page.url.endswith("e/fast/report.html")
    assert page.evaluate("window.hurt") is None and all(url.startswith("file://") for url in asked) and len(asked) == 2
    assert names >= {"04_throughput.ipynb", "rows.jsonl", "rows.csv", "scores.csv", "documents.jsonl", "throughput.png"}
    assert [link for link in links if not Path(unquote(urlsplit(link).path)).is_file()] == []
    page.close()


def squeezed(text):
    return re.sub(r"[^\w%/]|_", "", text)


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    with jupyterlab(project, tmp_path_factory.mktemp("settings")) as address:
        yield address


def choose(page, label, value):
    field = page.locator(f".widget-dropdown:has(label:text-is('{label}')) select")
    field.select_option(label=value)


@pytest.mark.slow
def test_exploring_leads_from_the_list_of_runs_to_a_wrong_document(browser, lab):
    page = browser.new_page(viewport={"width": 1400, "height": 2600})
    open_notebook(page, lab, "notebooks/07_explore.ipynb")
    run_all(page, 90)

    page.wait_for_selector(".vega-embed", timeout=20_000)
    choose(page, "up", "median TPOT, ms")
    choose(page, "run", "e/fast")
    page.wait_for_selector("td:text-is('A yes (-0.50) B no (-1.25)')")
    page.locator(".widget-text:has(label:text-is('search')) input").fill("question 0")
    page.keyboard.press("Enter")
    page.locator(".widget-checkbox input").nth(1).click()  # e/plain leaves

    page.wait_for_function(
        "[...document.querySelectorAll('.widget-dropdown')].find(one => one.innerText.startsWith('run'))"
        "?.querySelector('select').options.length === 1",
        timeout=20_000,
    )
    page.wait_for_selector("td:has-text('question 0')")
    assert page.locator("td:has-text('question 2')").count() == 0 and page.evaluate("window.hurt") is None
    page.close()


@pytest.mark.slow
def test_the_forms_buttons_check_apply_load_and_save(browser, lab, project):
    document = json.loads((project / "notebooks/01_environment.ipynb").read_text())
    wanted = ("parameters", "setup", "panel")
    cells = {cell["id"]: cell for cell in document["cells"] if cell["id"] in wanted}
    cells["panel"]["source"].insert(0, "experiment = ascend_kit.experiment_from_notebook(globals())\n")
    tail = {**cells["panel"], "id": "after", "source": "print(ascend_kit.experiment_from_notebook(globals()).cards)"}
    (project / "notebooks/panel.ipynb").write_text(json.dumps({**document, "cells": [*cells.values(), tail]}))
    (project / "params/mine.yaml").write_text("experiment: mine\ncards: 4\n")
    page = browser.new_page(viewport={"width": 1400, "height": 1600})
    open_notebook(page, lab, "notebooks/panel.ipynb")
    run_all(page, 90)

    choose_file = page.locator("select:has(option:text-is('params/mine.yaml'))")
    choose_file.select_option(label="params/mine.yaml")
    page.click("button:text-is('Check')")
    page.wait_for_selector("text=fine: results go to outputs/demo/default")
    page.locator(".jp-OutputArea-output input[type=text]").first.fill("no/such/model")
    page.keyboard.press("Tab")
    page.click("button:text-is('Check')")
    page.wait_for_selector("text=/not ready: .*no\\/such\\/model/")
    page.click("button:has-text('Load')")
    page.wait_for_selector("text=the fields show params/mine.yaml")
    page.click("button:has-text('Apply')")
    page.wait_for_selector("text=this notebook uses")
    page.locator("input[type=text]:visible").last.fill("params/saved.yaml")
    page.keyboard.press("Tab")
    page.click("button:has-text('Save')")
    page.wait_for_selector("text=params/saved.yaml written")
    page.evaluate(f"document.querySelector('{SCROLLER}').scrollTo(0, 1e6)")
    page.locator(".jp-CodeCell").last.click()
    page.keyboard.press("Shift+Enter")

    page.wait_for_selector(".jp-OutputArea-output pre:text-is('4')", timeout=20_000)
    time.sleep(0.2)
    assert (project / "params/saved.yaml").read_text() == "experiment: mine\ncards: 4\n"
    page.close()
