"""Device selection refuses what is not there, and states what it found."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
import types

import pytest
import torch

from ascend_kit.device import device as devices
from ascend_kit.device.device import DeviceError, parse_device, select_device
from ascend_kit.device.peaks import PEAKS, find_peak
from ascend_kit.files import GIB


@pytest.mark.parametrize(
    "name,device_id,expected",
    [
        ("cpu", 0, ("cpu", 0)),
        ("npu", 0, ("npu", 0)),
        ("npu:3", 0, ("npu", 3)),
        ("npu", 2, ("npu", 2)),
        ("Ascend", 1, ("npu", 1)),
        ("cuda:1", 1, ("cuda", 1)),
        (" auto ", 0, ("auto", 0)),
    ],
)
def test_names_are_understood(name, device_id, expected):
    assert parse_device(name, device_id) == expected


@pytest.mark.parametrize(
    "name,device_id,message",
    [
        ("tpu", 0, "auto, cpu, cuda"),
        ("npu:x", 0, "unknown device"),
        ("npu:1", 2, "two different cards"),
        ("cpu", -1, "counts from 0"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(name, device_id, message):
    with pytest.raises(DeviceError, match=message):
        parse_device(name, device_id)


def test_the_cpu_reports_itself():
    device = select_device("cpu")

    assert (device.kind, device.torch_device, device.peak) == ("cpu", torch.device("cpu"), None)
    assert device.name
    assert 0 < device.memory_in_use_bytes() < device.total_memory_bytes
    assert 0 < device.free_memory_bytes() <= device.total_memory_bytes
    assert device.versions()["torch"] == torch.__version__
    assert device.describe()["name"] == device.name


def test_versions_are_those_of_packages_and_facts_those_of_the_machine():
    device = select_device("cpu")

    assert {"torch", "transformers", "tokenizers", "lm_eval", "ascend_kit"} == set(device.versions())
    assert device.facts() == {"name": device.name}
    assert {"python", "torch"} <= set(device.describe()["versions"])


def test_peak_memory_on_a_cpu_sees_what_came_and_went():
    device = select_device("cpu")
    device.reset_peak_memory()
    before = device.peak_memory_bytes()

    # Pages straight from the kernel: the heap may still hold freed pages of earlier tests and hand those out.
    with mmap.mmap(-1, 64 << 20) as held:
        held.write(b"x" * (64 << 20))

    assert device.peak_memory_bytes() - before > 48 << 20


def test_seeding_repeats_random_numbers():
    device = select_device("cpu")

    device.seed(3)
    first = torch.rand(4)
    device.seed(3)

    assert torch.equal(first, torch.rand(4))


def test_an_npu_that_is_not_installed_is_an_error_and_not_a_cpu(monkeypatch):
    monkeypatch.setattr(devices, "has_torch_npu", lambda: False)

    with pytest.raises(DeviceError, match="torch_npu is not installed"):
        select_device("npu")


@pytest.mark.parametrize(
    "text,advice",
    [
        ("libhccl.so: cannot open shared object file", "ascend-toolkit/set_env.sh"),
        ("libatb.so: cannot open shared object file", "nnal/atb/set_env.sh"),
        ("undefined symbol: _ZN3atb", "table that the doctor prints"),
        ("something new", "published triple"),
    ],
)
def test_a_torch_npu_that_cannot_be_imported_is_explained(text, advice, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch_npu":
                raise ImportError(text)

    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.setattr(devices, "has_torch_npu", lambda: True)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])

    for name in ("npu", "auto"):
        with pytest.raises(DeviceError, match=advice):
            select_device(name)


def test_auto_refuses_a_machine_whose_cards_it_cannot_use(monkeypatch):
    monkeypatch.setattr(devices, "has_torch_npu", lambda: False)
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: ["/dev/davinci0"] if "davinci" in pattern else [])

    with pytest.raises(DeviceError, match="device: cpu to use the CPU on purpose"):
        select_device("auto")


def test_auto_warns_where_torch_cannot_use_an_nvidia_card(monkeypatch):
    monkeypatch.setattr(devices, "has_torch_npu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])

    with pytest.warns(UserWarning, match="NVIDIA"):
        assert select_device("auto").kind == "cpu"


def test_cuda_without_a_card_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(DeviceError, match="nvidia-smi"):
        select_device("cuda")


def test_an_index_beyond_the_visible_cards_names_the_variable(monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4")

    with pytest.raises(DeviceError, match=r"1 visible.*ASCEND_RT_VISIBLE_DEVICES='4'"):
        devices._check_index("npu", 1, 1)
    with pytest.raises(DeviceError, match="no card is visible"):
        devices._check_index("npu", 0, 0)


def test_tensors_elsewhere_are_found_before_anything_is_timed():
    device = select_device("cpu")
    device.assert_on_device(torch.nn.Linear(2, 2))
    elsewhere = torch.nn.Linear(2, 2, device="meta")

    with pytest.raises(DeviceError, match=r"weight .* is on meta, not on cpu"):
        device.assert_on_device(elsewhere)


@pytest.mark.parametrize(
    "name,memory,peak",
    [
        ("Ascend910B1", 64 * GIB, "910B1"),
        ("Ascend910B2", 64 * GIB, "910B2"),
        ("Ascend910B2C", 64 * GIB, "910B2C"),
        ("Ascend910B3", 64 * GIB, "910B3"),
        ("Ascend910B4", 32 * GIB, "910B4"),
        ("Ascend910B4", 64 * GIB, "910B4-1"),
        ("Ascend910B4_1", 64 * GIB, "910B4-1"),
        ("Ascend910B", 32 * GIB, "910B4"),
        ("Ascend910_9362", 64 * GIB, "A3-die"),
        ("910B3", None, "910B3"),
        ("NVIDIA H200", None, "H200"),
        ("NVIDIA H100 80GB HBM3", None, "H100-SXM"),
        ("NVIDIA A100-SXM4-80GB", None, "A100-80GB"),
    ],
)
def test_run_time_names_lead_to_their_peaks(name, memory, peak):
    assert find_peak(name, memory).name == peak


@pytest.mark.parametrize("name,memory", [("Ascend910B", 64 * GIB), ("Ascend310P3", 24 * GIB), ("AMD EPYC", None)])
def test_unknown_hardware_has_no_peak(name, memory):
    assert find_peak(name, memory) is None


def test_every_peak_states_a_source_and_plausible_figures():
    for peak in PEAKS.values():
        assert peak.source
        assert 1e14 < peak.bf16_flops < peak.int8_ops < 3e15
        assert 5e11 < peak.bandwidth_bytes_per_s < 1e13


def test_has_torch_npu_sees_an_imported_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))

    assert devices.has_torch_npu()


@pytest.mark.npu
def test_an_npu_reports_name_memory_and_versions(device):
    selected = select_device(device)

    assert (selected.kind, selected.default_block_size) == ("npu", 128)
    assert selected.name.startswith("Ascend")
    assert selected.peak == find_peak(selected.name, selected.total_memory_bytes)
    assert {"torch", "torch_npu", "ascend_kit"} <= set(selected.versions())
    assert set(selected.facts()) == {"name", "driver", "cann"}


@pytest.mark.npu
def test_npu_memory_follows_tensors(device):
    selected = select_device(device)
    gc.collect()  # what earlier tests left to be collected must not go while memory is measured
    selected.reset_peak_memory()
    before = selected.memory_in_use_bytes()

    held = torch.ones(8 << 20, dtype=torch.uint8, device=selected.torch_device)

    assert selected.memory_in_use_bytes() - before >= 8 << 20
    del held
    assert selected.memory_in_use_bytes() - before < 8 << 20
    assert selected.peak_memory_bytes() - before >= 8 << 20
    assert selected.free_memory_bytes() <= selected.total_memory_bytes


@pytest.mark.npu
def test_an_npu_index_too_large_is_refused(device):
    with pytest.raises(DeviceError, match="does not exist"):
        select_device("npu:99")


@pytest.mark.npu
def test_a_cpu_tensor_is_not_taken_for_one_on_the_npu(device):
    with pytest.raises(DeviceError, match="is on cpu, not on npu:0"):
        select_device(device).assert_on_device([torch.zeros(1)])


def test_products_of_ever_new_row_counts_leave_memory_level():
    script = """
import re
import torch
from pathlib import Path
import ascend_kit.device.device

torch.set_num_threads(1)

def resident_mb():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

weight, rows = torch.randn(480, 160).bfloat16(), torch.randn(1000, 160).bfloat16()
for count in range(1, 100):
    torch.nn.functional.linear(rows[:count], weight)
before = resident_mb()
for count in range(100, 500):
    torch.nn.functional.linear(rows[:count], weight)
print(resident_mb() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert float(done.stdout) < 45  # 13 to 23 MB were seen; 95 where the caches are not bounded
