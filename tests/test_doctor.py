"""The checklist on machines in every state: healthy, incomplete, mismatched, laptop."""

from __future__ import annotations

import pytest
from doctor_hosts import (
    ORDER,
    ROOT,
    STAGE,
    ascend_server,
    find,
    laptop,
    line_of,
    probe_output,
    sample,
    stage_output,
    trouble,
)

from ascend_kit.doctor import run_checks, run_self_test
from ascend_kit.doctor.findings import OpCheck
from ascend_kit.doctor.host import CommandResult

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
    assert trouble(findings) == []


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


# ------------------------------------------------------------------------------------- device in children


def test_device_is_left_alone_when_asked():
    findings = run_checks(
        ascend_server(commands={"python -m ascend_kit.doctor.self_test --stage probe": None}), use_device=False
    )

    assert find(findings, "Import", "all").status == "n/a"
    assert trouble(findings) == []


def test_hang_in_capture_keeps_earlier_results_and_is_explained():
    done = line_of(OpCheck("graph", "capture and replay", "x", "ok", 0.003, 0.016))
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
