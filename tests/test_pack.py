"""Runs packed for mail: what a reader opens is in the archive, weights and working copies are not."""

import zipfile

import pytest

from ascend_kit.__main__ import main


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
