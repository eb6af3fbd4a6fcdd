"""How findings are shown, the command, and the machine that this test runs on."""

from __future__ import annotations

import io
import json
import subprocess
import sys

from doctor_hosts import ORDER, laptop

from ascend_kit import doctor
from ascend_kit.doctor import as_table, render, run_checks
from ascend_kit.doctor.findings import Section
from ascend_kit.doctor.host import Host

# ------------------------------------------------------------------------------------- whole machines


# --------------------------------------------------------------------------------------------- presentation


def test_text_folds_sections_that_do_not_apply_and_ends_with_totals():
    text = render(run_checks(laptop()))

    assert "Driver: not applicable (no Ascend card or software on this machine)" in text
    assert text.splitlines()[-1].endswith("n/a")  # nothing failed, so nothing to begin with
    assert max(map(len, text.splitlines())) <= 110


def test_remedy_of_trouble_is_an_arrow_and_of_ok_a_tip():
    section = Section("S")
    section.warn("a", "seen", "do this")
    section.ok("b", "fine", "could do that")

    text = render(section)

    assert "-> do this" in text and "tip: could do that" in text


def test_findings_become_a_table():
    table = as_table(run_checks(laptop()))

    assert list(table.columns) == ["section", "check", "status", "evidence", "remedy"]
    assert (table.section == "Workbench").sum() >= 4


def test_command_prints_json_and_returns_one_on_failure(monkeypatch, capsys):
    monkeypatch.setattr("ascend_kit.doctor.checks.Host", lambda: laptop())

    assert doctor.main(["--json"]) == 0
    assert {row["section"] for row in json.loads(capsys.readouterr().out)} == set(ORDER)
    assert doctor.main(["--device", "npu"]) == 1
    printed = capsys.readouterr().out
    assert "[fail] npu-smi" in printed
    assert printed.endswith("Begin with: Driver, npu-smi\n")


def test_command_explains_a_file_and_the_standard_input(monkeypatch, capsys, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("step 3\nerror code is 561002\n")

    assert doctor.main(["--explain", str(log)]) == 0
    assert "attention parameter check (line 2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("EI0002"))
    assert doctor.main(["--explain", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["key"] == "notify timeout (EI0002)"


def test_command_says_which_log_cannot_be_read(capsys, tmp_path):
    assert doctor.main(["--explain", str(tmp_path / "absent.log")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_importing_the_doctor_does_not_import_torch():
    code = "import sys, ascend_kit.doctor; print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# --------------------------------------------------------------------------------------------- the real host


def test_host_stops_a_silent_command_in_time_and_keeps_what_it_printed():
    lines: list[str] = []
    code = "import time; print('first', flush=True); time.sleep(60)"

    result = Host().run([sys.executable, "-c", code], timeout_s=3.0, on_line=lines.append)

    assert result.code is None and result.problem.startswith("no end after 3 s")
    assert result.stdout == "first\n" and lines == ["first"]


def test_host_reports_a_missing_program_and_a_signal():
    host = Host()

    assert host.run(["no-such-program-here"]).code is None
    killed = host.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    assert killed.code == -11 and killed.problem == "ended by signal 11"


def test_host_answers_for_what_is_absent_without_raising(tmp_path):
    host = Host()

    assert host.read(str(tmp_path / "absent")) is None
    assert host.import_version("no-such-package-here") is None
    assert host.requirements("no-such-package-here") is None
    assert host.can_create_in(str(tmp_path / "new" / "folder"))
