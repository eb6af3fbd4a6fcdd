import pytest

from ascend_kit.device.device import select_device
from ascend_kit.measure import ceilings
from ascend_kit.measure.ceilings import launch_cost, matrix_rate, measure_ceilings, read_bandwidth


@pytest.fixture
def cpu():
    return select_device("cpu")


def test_figures_are_positive_carry_units_and_keep_their_samples(cpu, monkeypatch):
    monkeypatch.setattr(ceilings, "_BUDGET_S", 0.05)

    found = measure_ceilings(cpu, dtypes=("fp32", "int8"), buffer_bytes=2**20)

    assert found["read_bytes_per_s"] > 1e8 and found["read_buffer_bytes"] == 2**20
    assert found["fp32_flops_per_s"] > 1e8 and found["int8_ops_per_s"] > 1e7
    assert 0 < found["launch_s"] < 1e-2
    assert sorted(found["fp32_samples"])[len(found["fp32_samples"]) // 2] == found["fp32_flops_per_s"]


def test_dtype_the_device_cannot_multiply_gives_none_and_not_a_guess(cpu, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not implemented for BFloat16")

    monkeypatch.setattr(ceilings, "_float_product", refuse)

    assert matrix_rate(cpu, "bf16", repeats=1) is None
    assert measure_ceilings(cpu, dtypes=("bf16",), buffer_bytes=4096)["bf16_flops_per_s"] is None


def test_unknown_dtype_is_refused_with_what_is_allowed(cpu):
    with pytest.raises(ValueError, match="allowed: bf16, fp16, fp32, int8"):
        matrix_rate(cpu, "fp8")


def test_each_figure_has_one_sample_per_repeat(cpu):
    assert len(read_bandwidth(cpu, 2**16, repeats=3)) == 3
    assert len(launch_cost(cpu, repeats=2)) == 2
