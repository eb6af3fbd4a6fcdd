"""The checklist on machines in every state: healthy, incomplete, mismatched, laptop."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from doctor_hosts import ROOT, ascend_server, laptop, probe_output, sample, stage_output
from packaging.specifiers import SpecifierSet

from ascend_kit import doctor
from ascend_kit.doctor import Finding, as_table, render, run_checks, run_self_test
from ascend_kit.doctor.findings import Section, worst_status
from ascend_kit.doctor.host import CommandResult, Host
from ascend_kit.doctor.stages import OpCheck
from ascend_kit.doctor.versions import check_cann_packages, stack

ORDER = [
    "Machine",
    "Driver",
    "Device files",
    "CANN",
    "NNAL",
    "Versions",
    "Import",
    "Devices",
    "First operators",
    "Two ranks",
    "Graph",
    "Environment variables",
    "Host tuning",
    "Several machines",
    "Workbench",
]
STAGE = "python -m ascend_kit.doctor.self_test --stage "


def find(findings: list[Finding], section: str, check: str) -> Finding:
    (found,) = [item for item in findings if (item.section, item.check) == (section, check)]
    return found


def trouble(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(item.section, item.check, item.status) for item in findings if item.status in ("warn", "fail")]


# ------------------------------------------------------------------------------------- whole machines


def test_healthy_910b_server_has_nothing_to_report():
    findings = run_checks(ascend_server())

    assert trouble(findings) == []
    assert find(findings, "Driver", "npu-smi").evidence == "version 25.5.1, 8 x 910B3"
    assert find(findings, "Devices", "links").evidence == "HCCS between all 8 cards"
    assert "TorchNPU 26.1.1" in find(findings, "Versions", "torch_npu and CANN").evidence


@pytest.mark.parametrize("host", [ascend_server(), laptop()], ids=["server", "laptop"])
def test_sections_come_in_the_order_of_the_checklist(host):
    seen = list(dict.fromkeys(item.section for item in run_checks(host)))

    assert seen == ORDER


def test_plain_laptop_is_told_so_and_still_checked():
    findings = run_checks(laptop())

    assert "everything runs on the CPU" in find(findings, "Machine", "kind").evidence
    assert {item.status for item in findings if item.section in ("Driver", "CANN", "Versions")} == {"n/a"}
    assert find(findings, "First operators", "linear").status == "ok"
    assert find(findings, "Workbench", "c++ compiler").status == "ok"
    assert worst_status(findings) == "ok"


def test_laptop_asked_for_an_npu_fails_with_what_is_missing():
    findings = run_checks(laptop(), device="npu")

    failed = {item.section for item in findings if item.status == "fail"}
    assert {"Driver", "Device files", "CANN", "Versions"} <= failed


def test_missing_cann_fails_there_and_the_import_error_is_explained():
    host = ascend_server(
        env={"ASCEND_HOME_PATH": None},
        files={name: None for name in ascend_server().files if name.startswith(ROOT)},
        commands={
            "python -m ascend_kit.doctor.self_test --stage probe": CommandResult(
                1, stderr="ImportError: libhccl.so: cannot open shared object file: No such file or directory"
            )
        },
    )

    findings = run_checks(host)

    assert find(findings, "CANN", "toolkit").status == "fail"
    imported = find(findings, "Import", "torch")
    assert imported.status == "fail" and "set_env.sh" in imported.remedy
    assert find(findings, "Graph", "all").evidence == "the import failed"


def test_cann_that_was_not_sourced_names_the_file_to_source():
    findings = run_checks(ascend_server(env={"ASCEND_HOME_PATH": None}))

    sourced = find(findings, "CANN", "set_env.sh")
    assert sourced.status == "fail" and f"source {ROOT}/set_env.sh" in sourced.remedy


def test_operator_package_of_another_version_fails():
    host = ascend_server(files={f"{ROOT}/aarch64-linux/ascend_ops_install.info": "version=9.0.0\n"})

    package = find(run_checks(host), "CANN", "operator package")
    assert package.status == "fail" and package.evidence == "version 9.0.0, toolkit 9.1.0"


def test_missing_driver_fails_with_the_driver_remedy():
    host = ascend_server(
        commands={"npu-smi info": None, "npu-smi info -t topo": None},
        files={"/usr/local/Ascend/driver/version.info": None},
    )

    findings = run_checks(host)

    assert find(findings, "Driver", "npu-smi").status == "fail"
    assert "install the driver" in find(findings, "Driver", "driver version").remedy


def test_container_without_devices_names_the_mounts():
    lost = [name for name in ascend_server().files if name.startswith(("/dev/", "/usr/local/Ascend/driver"))]
    host = ascend_server(
        files={**{name: None for name in lost}, "/.dockerenv": ""},
        commands={"npu-smi info": None, "npu-smi info -t topo": None},
    )

    files = find(run_checks(host), "Device files", "present")

    assert files.status == "fail"
    assert "--device /dev/davinci_manager" in files.remedy and "driver/lib64" in files.remedy


def test_files_without_permission_name_the_group():
    findings = run_checks(ascend_server(closed={"/dev/davinci_manager"}))

    closed = find(findings, "Device files", "permission")
    assert closed.status == "fail" and "HwHiAiUser" in closed.remedy


def test_old_driver_is_a_warning_for_graphs():
    host = ascend_server(files={"/usr/local/Ascend/driver/version.info": "Version=24.1.rc3\n"})

    assert find(run_checks(host), "Driver", "driver version").status == "warn"


def test_sick_card_and_leftover_processes_are_listed():
    host = ascend_server(
        commands={"npu-smi info": CommandResult(0, sample("info_910b4_busy"))},
        files={"/proc/40112/cmdline": "python3\0old_job.py\0"},
    )

    findings = run_checks(host)

    assert "NPU 3 chip 0: Alarm" in find(findings, "Driver", "health").evidence
    others = find(findings, "Devices", "other processes").evidence
    assert "pid 40112 21560 MB python3 old_job.py" in others
    assert "pid 40340 134 MB no name (pid not visible here)" in others


def test_memory_held_without_a_process_is_suspected():
    busy = sample("info_910b").replace("3376 / 65536 ", "41000/ 65536 ")

    findings = run_checks(ascend_server(commands={"npu-smi info": CommandResult(0, busy)}))

    assert "NPU 2 chip 0: 41000 of 65536 MB" in find(findings, "Devices", "memory without a process").evidence


def test_a3_server_wants_the_kernels_of_its_own_chip():
    host = ascend_server(
        commands={
            "npu-smi info": CommandResult(0, sample("info_a3")),
            "npu-smi info -t topo": CommandResult(0, sample("topo_a3")),
        }
    )

    findings = run_checks(host)

    assert "ascend910_93" in find(findings, "CANN", "operator package").evidence
    assert find(findings, "Devices", "links").status == "ok"  # SIO and the HCCS switch are its normal links


# ---------------------------------------------------------------------------------------- version triples


@pytest.mark.parametrize(
    ("packages", "cann", "check", "status"),
    [
        ({"torch": "2.13.0"}, "9.1.0", "torch and torch_npu", "fail"),  # pip moved torch
        ({"torch": "2.12.0", "torch_npu": "2.12.0"}, "9.1.0", "torch_npu and CANN", "ok"),
        ({"torch": "2.12.0", "torch_npu": "2.12.0.post2"}, "9.1.1", "torch_npu and CANN", "ok"),
        ({"torch": "2.12.0", "torch_npu": "2.12.0.post2"}, "8.5.0", "torch_npu and CANN", "fail"),
        ({"torch": "2.9.0", "torch_npu": "2.9.0"}, "9.1.0", "torch_npu and CANN", "warn"),  # newer CANN
        ({"torch": "2.13.0", "torch_npu": "2.13.0"}, "9.1.0", "torch_npu and CANN", "warn"),  # plausible
        ({"torch": "2.13.0", "torch_npu": "2.13.0"}, "9.2.0", "torch_npu and CANN", "warn"),  # expected
        ({"torch": "2.13.0", "torch_npu": "2.13.0"}, "9.0.0", "torch_npu and CANN", "fail"),
        ({"torch": "2.8.0", "torch_npu": "2.8.0"}, "8.3.RC1", "torch_npu and CANN", "ok"),
        ({"torch": "2.4.0", "torch_npu": "2.4.0"}, "8.1.RC1", "torch_npu and CANN", "warn"),  # not in the table
    ],
)
def test_version_triple(packages, cann, check, status):
    name = f"{ROOT}/aarch64-linux/ascend_%s_install.info"
    files = {name % "toolkit": f"version={cann}\n", name % "ops": f"version={cann}\n"}

    found = find(run_checks(ascend_server(packages=packages, files=files)), "Versions", check)

    assert found.status == status
    assert found.remedy or status == "ok"


def test_too_old_cann_names_the_torch_npu_that_suits_it():
    files = {f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": "version=8.5.0\n"}

    assert "torch-npu==2.9.0" in find(run_checks(ascend_server(files=files)), "Versions", "torch_npu and CANN").remedy


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("torch", "status"), [("2.12.0", "warn"), ("2.12.0+cu130", "warn"), ("2.12.0+cpu", "ok")])
def test_a_cuda_build_of_torch_is_a_warning_on_both_architectures(machine, torch, status):
    found = find(
        run_checks(ascend_server(machine=machine, packages={"torch": torch})), "Versions", "torch and torch_npu"
    )

    assert found.status == status
    assert status == "ok" or "+cpu --index-url" in found.remedy


def test_a_missing_package_of_cann_is_named_with_the_command_that_brings_it():
    host = ascend_server(commands={"python -c": CommandResult(0, "decorator: No module named 'decorator'\n")})

    found = find(run_checks(host), "Versions", "packages of CANN")

    assert found.status == "fail" and "decorator: No module named" in found.evidence
    assert "pip install 'decorator>=4.4'" in found.remedy and "500001" in found.remedy


def test_packages_of_cann_are_really_imported():
    section = Section("S")

    check_cann_packages(section, Host())

    (found,) = section.findings
    assert found.status in ("ok", "fail") and "yaml:" not in found.evidence and "scipy:" not in found.evidence


@pytest.mark.parametrize(
    ("cann", "numpy", "fails"), [("8.5.0", "2.2.6", True), ("8.5.0", "1.26.4", False), ("9.1.0", "2.2.6", False)]
)
def test_numpy_2_does_not_go_with_cann_below_9(cann, numpy, fails):
    files = {f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": f"version={cann}\n"}

    findings = run_checks(ascend_server(files=files, packages={"numpy": numpy}))

    assert any(item.check == "numpy" and item.status == "fail" for item in findings) == fails


@pytest.mark.parametrize(("driver", "status"), [("26.1.0", "ok"), ("25.5.1", "warn")])
def test_cann_91_pairs_with_hdk_26_1(driver, status):
    files = {"/usr/local/Ascend/driver/version.info": f"Version={driver}\n"}

    found = find(run_checks(ascend_server(files=files)), "Versions", "CANN and driver")

    assert found.status == status and (status == "ok" or "26.1.0" in found.remedy)


@pytest.mark.parametrize(
    ("cann", "torch", "torch_npu"),
    [
        ("9.1.0", "2.12.0", "2.12.0.post2"),
        ("9.0.0", "2.10.0", "2.10.0"),
        ("8.5.0", "2.9.0", "2.9.0"),
        ("8.3.RC1", "2.8.0", "2.8.0"),
    ],
)
def test_the_pair_of_the_cann_found_is_printed(cann, torch, torch_npu):
    files = {f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": f"version={cann}\n"}

    found = find(run_checks(ascend_server(files=files)), "Versions", "pair for this CANN")

    assert f"torch=={torch}+cpu" in found.evidence and found.evidence.endswith(f"torch-npu=={torch_npu}")


@pytest.mark.parametrize(
    ("python", "torch_npu", "status"),
    [
        ("3.14.0", "2.12.0.post2", "fail"),
        ("3.14.0", "2.12.0.post3", "ok"),
        ("3.13.1", "2.12.0", "ok"),
        ("3.14.0", "2.14.0", "ok"),
    ],
)
def test_pythons_without_a_wheel_are_known(python, torch_npu, status):
    host = ascend_server(python_version=python, packages={"torch_npu": torch_npu})

    assert find(run_checks(host), "Versions", "python").status == status


def test_one_version_story_in_environment_project_readme_and_doctor():
    wanted, root = stack()["recommended"], Path(__file__).parents[1]
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    readme = (root / "README.md").read_text()

    assert {f"torch=={wanted['torch']}+cpu", f"torch-npu=={wanted['torch_npu']}"} <= set(pip)
    index = next(line.split()[1] for line in pip if line.startswith("--extra-index-url"))
    assert environment["variables"]["TASK_QUEUE_ENABLE"] == "1"
    extra = set(project["optional-dependencies"]["npu"])
    assert {f"torch=={wanted['torch']}", f"torch-npu=={wanted['torch_npu']}"} <= extra
    assert set(stack()["cann_packages"].values()) <= extra | set(project["dependencies"])
    assert set(stack()["cann_packages"].values()) - set(project["dependencies"]) <= set(pip)
    for text in (
        f"torch {wanted['torch']}",
        f"torch_npu {wanted['torch_npu']}",
        f"CANN {wanted['cann']}",
        f"HDK {wanted['driver']}",
    ):
        assert text in readme, text
    assert f"--index-url {index}" in readme
    assert project["requires-python"] == ">=3.11.5" and "3.11 to 3.13" in (root / "Makefile").read_text()


def test_cann_version_comes_from_torch_npu_when_no_file_tells_it():
    host = ascend_server(files={f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": None, f"{ROOT}/lib": ""})

    findings = run_checks(host)

    assert find(findings, "Versions", "torch_npu and CANN").status == "n/a"
    assert find(findings, "Import", "torch_npu and CANN").status == "ok"


def test_python_without_a_wheel_of_torch_npu_213_fails():
    host = ascend_server(python_version="3.9.18", packages={"torch": "2.13.0", "torch_npu": "2.13.0"})

    assert find(run_checks(host), "Versions", "python").status == "fail"


# ------------------------------------------------------------------------------------- device in children


def test_device_is_left_alone_when_asked():
    findings = run_checks(
        ascend_server(commands={"python -m ascend_kit.doctor.self_test --stage probe": None}), use_device=False
    )

    assert find(findings, "Import", "all").status == "n/a"
    assert trouble(findings) == []


def test_hang_in_capture_keeps_earlier_results_and_is_explained():
    done = OpCheck("graph", "capture and replay", "x", "ok", 0.003, 0.016).to_line()
    hung = CommandResult(None, done, problem="no end after 600 s, stopped")

    findings = run_checks(ascend_server(commands={STAGE + "graph": hung}))

    assert find(findings, "Graph", "capture and replay").status == "ok"
    process = find(findings, "Graph", "graph process")
    assert process.status == "fail" and "graph_mode: false" in process.remedy


def test_crash_with_a_known_code_is_explained():
    crashed = CommandResult(1, stderr="RuntimeError: capture failed, error code is 207008\n")

    process = find(run_checks(ascend_server(commands={STAGE + "graph": crashed})), "Graph", "graph process")

    assert "207008" in process.evidence and "fewer batch sizes" in process.remedy


def test_wrong_numbers_on_the_device_fail_the_machine():
    wrong = stage_output(OpCheck("smoke", "paged_attention", "bf16", "fail", 0.7, 0.016))

    found = find(run_checks(ascend_server(commands={STAGE + "smoke": wrong})), "First operators", "paged_attention")

    assert found.status == "fail" and "error 7.0e-01" in found.evidence


def test_card_that_is_half_full_is_a_warning():
    probe = probe_output("npu", 8, "Ascend910B3", 20 * 2**30, 64 * 2**30, torch="2.12.0")
    host = ascend_server(commands={"python -m ascend_kit.doctor.self_test --stage probe": probe})

    assert find(run_checks(host), "Devices", "device").status == "warn"


def test_sections_are_handed_over_as_they_are_done():
    seen: list[str] = []

    run_checks(laptop(), on_section=lambda items: seen.append(items[0].section))

    assert seen == ORDER


def test_self_test_runs_every_stage_and_reports_a_dead_one():
    host = ascend_server(
        commands={
            STAGE + "ops": stage_output(OpCheck("ops", "rms_norm", "x", "ok", 0.001, 0.008)),
            STAGE + "collective": CommandResult(1, stderr="EI0006: Getting socket times out"),
        }
    )
    shown: list[OpCheck] = []

    checks = run_self_test(host, on_check=shown.append)

    assert [check.stage for check in checks] == ["ops", "graph", "collective"]
    assert checks[-1].status == "fail" and "interface" in checks[-1].remedy
    assert shown == checks


def test_self_test_without_a_working_import_ends_at_once():
    host = ascend_server(
        commands={
            "python -m ascend_kit.doctor.self_test --stage probe": CommandResult(
                1, stderr="undefined symbol: GroupTopkParam"
            )
        }
    )

    (check,) = run_self_test(host)

    assert check.status == "fail" and "older than the torch_npu" in check.remedy


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

    text = render(section.findings)

    assert "-> do this" in text and "tip: could do that" in text


def test_unknown_status_is_refused():
    with pytest.raises(ValueError, match="must be one of ok, warn, fail, n/a"):
        Finding("a", "b", "maybe", "c")


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


@pytest.mark.parametrize("python", ["3.11.5", "3.12.0", "3.13.0"])
def test_every_pinned_package_admits_each_supported_python(python):
    """What pip's resolver asks first; read from the packages installed here, so it needs no network."""
    pins = [line.partition("==")[0] for line in (Path(__file__).parents[1] / "constraints.txt").read_text().split()]
    refused = []
    for name in pins:
        try:
            needs = metadata(name)["Requires-Python"]
        except PackageNotFoundError:
            continue
        if needs and not SpecifierSet(needs).contains(python):
            refused.append(f"{name} needs Python {needs}")

    assert refused == []
