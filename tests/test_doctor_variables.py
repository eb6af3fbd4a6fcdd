"""Environment variables, host tuning, and the network of several machines."""

from __future__ import annotations

import pytest
from doctor_hosts import ascend_server, laptop

from ascend_kit.doctor import Finding
from ascend_kit.doctor.host import CommandResult
from ascend_kit.doctor.machine import check_machine, check_tuning, check_workbench
from ascend_kit.doctor.network import check_network
from ascend_kit.doctor.variables import check_variables, effective_exec_timeout_s, visible_devices


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {item.check: item for item in findings}


def variables(num_cards: int = 8, **env: str) -> dict[str, Finding]:
    return by_check(check_variables(ascend_server(env=env), num_cards))


# ------------------------------------------------------------------------------------------------- variables


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("0,1,2", [0, 1, 2]),
        ("0, 1,2", [0]),
        ("0,x,2", [0]),
        (" 0,1", []),
        ("", []),
        ("3", [3]),
        ("0,,2", [0]),
        ("0,-1", [0]),
    ],
)
def test_visible_list_ends_at_the_first_bad_token(value, taken):
    assert visible_devices(value) == taken


@pytest.mark.parametrize(
    ("value", "status"),
    [("0,1,2,3", "ok"), ("0, 1", "fail"), ("0,0", "fail"), ("0,8", "fail"), ("", "fail"), ("7", "ok")],
)
def test_visible_devices_are_checked_against_the_cards(value, status):
    found = variables(ASCEND_RT_VISIBLE_DEVICES=value)["visible cards"]

    assert found.status == status and repr(value) in found.evidence


def test_both_allocator_variables_are_an_error_and_one_is_not():
    both = variables(PYTORCH_ALLOC_CONF="expandable_segments:True")["allocator"]
    one = variables(PYTORCH_NPU_ALLOC_CONF=None, PYTORCH_ALLOC_CONF="expandable_segments:True")["allocator"]

    assert both.status == "fail" and "unset PYTORCH_ALLOC_CONF" in both.remedy
    assert one.status == "ok"


def test_launch_blocking_fails_and_its_absence_is_silent():
    assert variables(ASCEND_LAUNCH_BLOCKING="1")["launch blocking"].status == "fail"
    assert "launch blocking" not in variables(ASCEND_LAUNCH_BLOCKING="0")


@pytest.mark.parametrize(("value", "status"), [("0", "warn"), ("1", "ok"), ("2", "fail")])
def test_task_queue_levels(value, status):
    assert variables(TASK_QUEUE_ENABLE=value)["task queue"].status == status


def test_level_2_is_only_a_warning_where_no_graph_is_captured():
    found = by_check(check_variables(ascend_server(env={"TASK_QUEUE_ENABLE": "2"}), 8, graph_mode=False))["task queue"]

    assert found.status == "warn" and "TASK_QUEUE_ENABLE=1" in found.remedy


@pytest.mark.parametrize(
    ("env", "seconds"),
    [
        ({}, 1836),
        ({"HCCL_EXEC_TIMEOUT": "1200"}, 1200),
        ({"HCCL_EXEC_TIMEOUT": "0"}, None),
        ({"HCCL_OP_EXPANSION_MODE": "AIV"}, 1091),
        ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_EXEC_TIMEOUT": "1200"}, 1091),
        ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_EXEC_TIMEOUT": "0"}, 1091),
        ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_EXEC_TIMEOUT": "600"}, 600),
        ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_EXEC_TIMEOUT": "0", "HCCL_DETERMINISTIC": "true"}, None),
    ],
)
def test_collective_timeout_is_clamped_in_aiv_mode_only(env, seconds):
    assert effective_exec_timeout_s(env) == seconds


def test_clamped_timeout_is_a_warning_that_names_the_real_one():
    found = variables(HCCL_OP_EXPANSION_MODE="AIV", HCCL_EXEC_TIMEOUT="1200")["collective timeout"]

    assert found.status == "warn" and "becomes 1091 s" in found.evidence


@pytest.mark.parametrize(
    ("value", "status"), [("120", "ok"), ("7200", "ok"), ("60", "fail"), ("7201", "fail"), ("1h", "fail")]
)
def test_connect_timeout_must_lie_in_its_range(value, status):
    assert variables(HCCL_CONNECT_TIMEOUT=value)["connect timeout"].status == status


def test_aiv_with_deterministic_mode_is_said_to_be_ignored():
    found = variables(HCCL_OP_EXPANSION_MODE="AIV", HCCL_DETERMINISTIC="true")["collective mode"]

    assert found.status == "warn" and "ignored" in found.remedy


@pytest.mark.parametrize(("value", "status"), [("200", "ok"), ("2048", "warn"), ("0", "fail"), ("200MB", "fail")])
def test_collective_buffer_counts_twice(value, status):
    found = variables(HCCL_BUFFSIZE=value)["collective buffer"]

    assert found.status == status
    assert status != "warn" or "4096 MB per communication domain" in found.evidence


@pytest.mark.parametrize(
    ("cards", "value", "status"), [(8, None, "warn"), (8, "64", "warn"), (8, "10", "ok"), (1, None, "ok")]
)
def test_host_threads_matter_with_several_cards(cards, value, status):
    assert variables(cards, OMP_NUM_THREADS=value)["host threads"].status == status


@pytest.mark.parametrize(
    ("env", "check"),
    [
        ({"ASCEND_GLOBAL_LOG_LEVEL": "1"}, "logging"),
        ({"ASCEND_SLOG_PRINT_TO_STDOUT": "1"}, "logging"),
        ({"PROFILING_MODE": "true"}, "logging"),
        ({"INF_NAN_MODE_ENABLE": "0"}, "overflow mode"),
        ({"RANK_TABLE_FILE": "/tmp/ranks.json"}, "rank table"),
        ({"PER_STREAM_QUEUE": "1"}, "newer switches"),
    ],
)
def test_debugging_leftovers_are_warnings(env, check):
    assert variables(**env)[check].status == "warn"


def test_operator_cache_that_cannot_be_written_fails():
    host = ascend_server(env={"ACL_OP_COMPILER_CACHE_DIR": "/cache"}, closed={"/cache"})

    assert by_check(check_variables(host, 8))["operator cache"].status == "fail"


# ------------------------------------------------------------------------------------------------------- host


def test_slow_governor_numa_balancing_and_swapping_are_warnings_with_commands():
    host = ascend_server(
        files={
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "/proc/sys/kernel/numa_balancing": "1\n",
            "/proc/sys/vm/swappiness": "60\n",
        }
    )

    found = by_check(check_tuning(host, is_ascend=True))

    assert found["cpu governor"].status == "warn"
    assert "sysctl -w kernel.numa_balancing=0" in found["kernel.numa_balancing"].remedy
    assert "sysctl -w vm.swappiness=0" in found["vm.swappiness"].remedy


def test_swapping_of_a_laptop_is_not_its_business():
    found = by_check(check_tuning(laptop(), is_ascend=False))

    assert found["vm.swappiness"].status == "n/a" and found["cpu governor"].status == "n/a"


def test_container_limits_count_as_the_machine():
    host = laptop(
        files={**laptop().files, "/sys/fs/cgroup/cpu.max": "150000 100000\n", "/sys/fs/cgroup/memory.max": str(2**30)}
    )

    found = by_check(check_machine(host, []))

    assert found["cpus"].status == "warn" and "may use 1.5" in found["cpus"].evidence
    assert found["memory"].status == "warn" and "1.0 of 1.0 GiB" in found["memory"].evidence


def test_compiler_packages_and_disk_of_a_bare_machine():
    host = laptop(files={}, packages={"torch": "2.8.0", "ascend-kit": "0.1.0"}, free_disk=2**29, closed={"."})

    found = by_check(check_workbench(host))

    assert found["c++ compiler"].status == "warn" and "graph_mode: false" in found["c++ compiler"].remedy
    assert found["packages"].evidence == "torch 2.8.0 (needs >=2.9)"
    assert found["outputs folder"].status == "fail" and found["cache folder"].status == "warn"
    assert found["ray"].status == "n/a"


def test_compiler_without_python_headers_is_a_warning():
    host = laptop(files={"/usr/bin/g++": ""})

    assert "python3-dev" in by_check(check_workbench(host))["c++ compiler"].remedy


def test_vllm_ascend_beside_torch_213_is_a_warning():
    host = ascend_server(packages={"torch": "2.13.0", "vllm_ascend": "0.23.0"})

    assert by_check(check_workbench(host))["vllm-ascend"].status == "warn"


# -------------------------------------------------------------------------------------- several machines

TOOL = "hccn_tool -i {card} {option}"
HEALTHY = {
    "-link -g": "link status: UP",
    "-net_health -g": "net health status: Success",
    "-ip -g": "ipaddr:198.51.100.1\nnetmask:255.255.0.0",
    "-gateway -g": "default gateway: 198.51.100.254, Iface: eth0",
    "-netdetect -g": "netdetect address: 198.51.100.254",
    "-tls -g": "dev_id:0, tls switch[0](0:disable, 1:enable), tls preconfigured[1](0:non-preset, 1:preset)",
    "-ping -g address 198.51.100.9": "recv seq=0,time=0.07ms\n3 packets transmitted, 3 received, 0% loss",
}
ADDRESSES = "1: lo    inet 127.0.0.1/8 scope host lo\n2: eth0    inet 192.0.2.11/24 scope global eth0\n"
NETWORK_ENV = {
    "HCCL_IF_IP": "192.0.2.11",
    "HCCL_SOCKET_IFNAME": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
    "TP_SOCKET_IFNAME": "eth0",
    "HCCL_CONNECT_TIMEOUT": "1200",
}


def cluster(cards: int = 2, outputs: dict[tuple[int, str], str] | None = None, **env):
    answers = {(card, option): text for card in range(cards) for option, text in HEALTHY.items()} | (outputs or {})
    commands = {
        f"/usr/bin/hccn_tool -i {card} {option}": CommandResult(0, text) for (card, option), text in answers.items()
    }
    commands |= {"hccn_tool": CommandResult(0), "ip -o -4 addr": CommandResult(0, ADDRESSES)}
    files = {
        "/etc/hccn.conf": "",
        "/usr/bin/hccn_tool": "",
        "/proc/sys/net/ipv4/ip_local_port_range": "32768 60999",
        "/proc/sys/net/ipv4/ip_local_reserved_ports": "60000-60015",
    }
    return ascend_server(commands=commands, files=files, env={**NETWORK_ENV, **env})


def test_two_healthy_servers_pass_every_check():
    findings = check_network(cluster(), [0, 1], ["198.51.100.9"])

    assert {item.status for item in findings} == {"ok"}
    assert by_check(findings)["ping 198.51.100.9"].evidence == "2 of 2 cards"


def test_single_machine_is_not_checked():
    (only,) = check_network(ascend_server(), [0, 1])

    assert only.status == "n/a" and "one machine" in only.evidence


def test_address_of_another_machine_and_unknown_interface_fail():
    found = by_check(check_network(cluster(HCCL_IF_IP="192.0.2.99", HCCL_SOCKET_IFNAME="ib0"), [0]))

    assert found["HCCL_IF_IP"].status == "fail" and "eth0 192.0.2.11" in found["HCCL_IF_IP"].evidence
    assert found["HCCL_SOCKET_IFNAME"].status == "fail"


def test_missing_interface_variable_is_suggested_from_the_address():
    found = by_check(check_network(cluster(GLOO_SOCKET_IFNAME=None), [0]))

    assert "export GLOO_SOCKET_IFNAME=eth0" in found["GLOO_SOCKET_IFNAME"].remedy


@pytest.mark.parametrize(
    ("option", "text", "check"),
    [
        ("-link -g", "link status: DOWN", "link"),
        ("-net_health -g", "net health status: Fault", "net health"),
        ("-ip -g", "", "card address"),
        (
            "-ping -g address 198.51.100.9",
            "3 packets transmitted, 0 received, 100.00% packet loss",
            "ping 198.51.100.9",
        ),
    ],
)
def test_card_with_a_bad_port_is_named(option, text, check):
    found = by_check(check_network(cluster(outputs={(1, option): text}), [0, 1], ["198.51.100.9"]))

    assert found[check].status == "fail" and found[check].evidence.startswith("cards 1: ")


def test_unequal_tls_fails():
    host = cluster(outputs={(1, "-tls -g"): "dev_id:1, tls switch[1](0:disable, 1:enable)"})

    assert by_check(check_network(host, [0, 1]))["tls"].evidence == "0: 0, 1: 1"


def test_port_range_that_others_may_take_is_a_warning():
    host = cluster()
    host.files["/proc/sys/net/ipv4/ip_local_reserved_ports"] = "\n"

    found = by_check(check_network(host, [0]))["base port"]

    assert found.status == "warn" and "ip_local_reserved_ports=60000-60015" in found.remedy


def test_default_connect_timeout_is_a_warning_between_machines():
    assert by_check(check_network(cluster(HCCL_CONNECT_TIMEOUT=None), [0]))["connect timeout"].status == "warn"


def test_container_without_hccn_files_says_what_to_mount():
    host = ascend_server(env=NETWORK_ENV)

    found = by_check(check_network(host, [0]))

    assert "/etc/hccn.conf" in found["/etc/hccn.conf"].remedy and found["hccn_tool"].status == "fail"


def test_a3_cards_are_pinged_over_hccs():
    host = cluster(outputs={(0, "-hccs_ping -g address 198.51.100.9"): "This pkt ping success"})

    assert by_check(check_network(host, [0], ["198.51.100.9"], is_a3=True))["ping 198.51.100.9"].status == "ok"
