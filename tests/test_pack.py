"""Runs packed for mail: what a reader opens is in the archive, weights and working copies are not."""

import re
import zipfile
from html import unescape
from urllib.parse import unquote, urlsplit

import pytest
from test_explore import document, point
from test_explore import write_run as write_explored

from ascend_kit.__main__ import main
from ascend_kit.run.pack import pack
from ascend_kit.show.report import write_report


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("index.html", "e/r/report.html", "e/r/rows.jsonl", "e/r/figures/a.svg", "e/r/work/01_a.ipynb",
                 "e/r/.run.lock", "e/models/m/model.safetensors", "e/models/m/config.json"):  # fmt: skip
        path = tmp_path / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "outputs"


def test_archive_holds_reports_rows_and_figures_and_nothing_heavy(outputs):
    assert main(["zip"]) == 0

    with zipfile.ZipFile("outputs.zip") as archive:
        names = ["outputs/e/r/figures/a.svg", "outputs/e/r/report.html", "outputs/e/r/rows.jsonl", "outputs/index.html"]
        assert sorted(archive.namelist()) == names and archive.read("outputs/index.html") == b"index.html"


def test_one_run_without_its_rows(outputs):
    assert main(["zip", "outputs/e/r", "--to", "run.zip", "--no-rows"]) == 0

    with zipfile.ZipFile("run.zip") as archive:
        assert sorted(archive.namelist()) == ["r/figures/a.svg", "r/report.html"]


def test_nothing_to_read_and_a_target_inside_are_refused_and_leave_no_file(outputs, capsys):
    assert main(["zip", "outputs/e/models"]) == 2
    assert main(["zip", "outputs", "--to", "outputs/runs.zip"]) == 2

    told = capsys.readouterr().err
    assert "holds no report.html" in told and "lies inside" in told and not list(outputs.parent.glob("*.zip"))


def dead_links(folder):
    """Page -> what its links lead to and is not there; places on the same page among them."""
    found = {}
    for page in folder.rglob("*.html"):
        text = page.read_text()
        for link in map(unescape, re.findall(r'href="([^"]*)"', text)):
            target = urlsplit(link)
            there = page.parent / unquote(target.path) if target.path else page
            if not target.scheme and not (
                there.is_file() and (not target.fragment or f'id="{target.fragment}"' in text)
            ):
                found.setdefault(page.name, []).append(link)
    return found


@pytest.mark.parametrize("what", ["", "e", "e/a run"])
@pytest.mark.parametrize("with_rows", [True, False])
def test_every_link_in_a_packed_report_leads_somewhere(tmp_path, what, with_rows):
    root = tmp_path / "outputs"
    for name in ("e/a run", "e/other"):
        write_explored(root, name, "2026-01-01", [point(900)], [document(0, 0)])
    report = write_report(root / "e/a run")
    before = report.read_text()

    pack(root / what, tmp_path / "packed.zip", with_rows=with_rows)
    with zipfile.ZipFile(tmp_path / "packed.zip") as archive:
        archive.extractall(tmp_path / "there")

    (page,) = (tmp_path / "there").rglob("report.html")
    assert dead_links(tmp_path / "there") == dead_links(root) == {}
    assert 'href="rows.jsonl"' in before and 'href="rows.csv"' in page.read_text()
    assert ('href="rows.jsonl"' in page.read_text()) is with_rows and "rows.jsonl" in page.read_text()
    assert ('href="../../index.html"' in page.read_text()) is (what == "")
