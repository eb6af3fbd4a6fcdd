"""Power of cards while something is measured: the recorded tables of npu-smi, given out by a stand-in on PATH."""

import os
import subprocess
import sys
import time

import pytest
from doctor_hosts import DATA, sample

from ascend_kit.device.meters import PowerMeter, Reading, gpu_readings, npu_readings, physical_cards

NOTHING = dict.fromkeys(
    ["energy_j_per_output_token", "power_w", "card_use_percent", "card_memory_mb", "temperature_c", "power_source"]
)


def stand_in(tmp_path, monkeypatch, name, script):
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_cards_are_known_by_the_number_that_programs_use():
    assert npu_readings(sample("info_910b4_busy"))[1] == Reading(1, 88.7, 0.0, 24428, 39.0)
    assert [one.card for one in npu_readings(sample("info_a3"))[:4]] == [0, 1, 2, 3]  # two chips a card
    assert npu_readings(sample("info_910b")[:90]) == []  # cut off while it was printed
    assert gpu_readings("0, 71.5, 12, 1024, 41\n1, [N/A], 0, 3, 30\n") == [
        Reading(0, 71.5, 12, 1024, 41),
        Reading(1, None, 0, 3, 30),
    ]


def test_visible_cards_are_numbered_from_zero_again():
    assert physical_cards("npu", [1], {"ASCEND_RT_VISIBLE_DEVICES": "4,6"}) == [6]
    assert physical_cards("cuda", [0, 1], {"CUDA_VISIBLE_DEVICES": "3,2,1"}) == [3, 2]
    assert physical_cards("npu", [3], {}) == [3] and physical_cards(
        "cuda", [0], {"CUDA_VISIBLE_DEVICES": "GPU-8a"}
    ) == [0]


def test_energy_is_the_power_of_the_cards_in_use_over_the_time(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "npu-smi", f'test "$1" = info && cat {DATA / "npu_smi_info_910b4_busy.txt"}')

    start = time.perf_counter()
    with PowerMeter("npu", [1, 2], interval_s=0.02) as meter:
        time.sleep(0.4)
    wall_s = time.perf_counter() - start
    row = meter.columns(output_tokens=100)

    assert row["power_w"] == pytest.approx(88.7 + 89.4) and row["power_source"] == "npu-smi"
    assert row["energy_j_per_output_token"] == pytest.approx((88.7 + 89.4) * wall_s / 100, rel=0.1)
    assert (row["card_use_percent"], row["card_memory_mb"], row["temperature_c"]) == (0.0, 24428, 40.0)


@pytest.mark.parametrize("script", ["exit 1", "echo dcmi module initialize failed. ret is -8005", "sleep 60"])
def test_a_tool_that_tells_nothing_leaves_the_row_without_energy(tmp_path, monkeypatch, script):
    stand_in(tmp_path, monkeypatch, "npu-smi", script)

    with PowerMeter("npu", [0], interval_s=0.02) as meter:
        time.sleep(0.1)

    assert meter.columns(10) == NOTHING


def test_a_gpu_is_asked_through_its_own_tool(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "nvidia-smi", "echo '0, 300.0, 90, 40000, 60'; echo '1, 100.0, 0, 4, 30'")

    with PowerMeter("cuda", [0], interval_s=0.02) as meter:
        time.sleep(0.2)

    assert meter.columns(0) == {**NOTHING, "power_w": 300.0, "card_use_percent": 90.0, "card_memory_mb": 40000.0,
                                "temperature_c": 60.0, "power_source": "nvidia-smi"}  # fmt: skip


def test_the_kernels_counter_of_a_cpu_may_start_again_meanwhile(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the first
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("100000000")
    (zone / "energy_uj").write_text("99000000\n")
    with PowerMeter("cpu", [0], rapl=tmp_path) as meter:
        (zone / "energy_uj").write_text("2000000\n")

    row = meter.columns(30)

    assert row["energy_j_per_output_token"] == pytest.approx(0.1) and row["power_source"] == "rapl"
    with PowerMeter("cpu", [0], rapl=tmp_path / "none") as meter:
        pass
    assert meter.columns(30) == NOTHING


def test_the_tool_ends_with_the_process_that_measures(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "npu-smi", f"date >> {tmp_path}/calls")
    code = (
        "import os; from ascend_kit.device.meters import PowerMeter; import time\n"
        "with PowerMeter('npu', [0], interval_s=0.02): time.sleep(0.2); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9

    time.sleep(0.2)
    count = len((tmp_path / "calls").read_text().splitlines())
    time.sleep(0.3)
    assert len((tmp_path / "calls").read_text().splitlines()) == count > 0
