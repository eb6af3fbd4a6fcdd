"""int8 weights: rounding, zero rows, outliers, scale grids, clipping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_kit.model.quantize import dequantize_weight, encode, on_grid, quantize_weight, search_clip, weight_scale


def random_weight(rows: int = 24, columns: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_round_trip_error_is_at_most_half_a_scale_step():
    weight = random_weight()

    codes, scale = quantize_weight(weight)

    error = (dequantize_weight(codes, scale) - weight).abs()
    assert codes.dtype == torch.int8
    assert bool((error <= scale[:, None] * 0.5 * 1.0001).all())  # float32 rounding of the product


def test_largest_value_of_a_row_becomes_127_and_minus_128_is_never_used():
    weight = torch.tensor([[1.0, -2.0, 0.5], [-3.0, 0.0, 3.0]])

    codes, scale = quantize_weight(weight)

    assert codes.tolist() == [[64, -127, 32], [-127, 0, 127]]  # 63.5 and 31.75: ties go to the even code
    assert torch.allclose(scale, torch.tensor([2.0 / 127, 3.0 / 127]))


def test_zero_row_and_row_of_subnormals_stay_finite():
    weight = torch.stack([torch.zeros(8), torch.full((8,), 1e-44), torch.ones(8)])

    codes, scale = quantize_weight(weight)

    assert codes[0].eq(0).all() and codes[1].eq(0).all() and codes[2].eq(127).all()
    assert torch.isfinite(scale).all() and scale.gt(0).all()


def test_outlier_only_spoils_its_own_row():
    weight = random_weight()
    damaged = weight.clone()
    damaged[3, 5] = 1000.0

    codes, scale = quantize_weight(damaged)

    clean_codes, clean_scale = quantize_weight(weight)
    others = [row for row in range(len(weight)) if row != 3]
    assert torch.equal(codes[others], clean_codes[others]) and torch.equal(scale[others], clean_scale[others])


@pytest.mark.parametrize("grid", [torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 10_000), exponent=st.integers(-12, 4))
@settings(max_examples=40, deadline=None)
def test_scale_on_a_grid_is_exact_there_and_never_smaller(grid: torch.dtype, seed: int, exponent: int):
    weight = random_weight(seed=seed) * 2.0**exponent

    exact, rounded = weight_scale(weight), weight_scale(weight, grid=grid)

    assert torch.equal(rounded.to(grid).float(), rounded)
    assert bool((rounded >= exact).all())
    assert encode(weight, rounded).abs().max() <= 127


@pytest.mark.parametrize("grid", [torch.bfloat16, torch.float16])
def test_a_scale_beside_the_grid_becomes_the_next_number_above(grid: torch.dtype):
    numbers = torch.arange(1, 0x7000 if grid == torch.float16 else 0x7F00, dtype=torch.int16).view(grid).float()
    numbers = numbers[numbers > 1e-6]
    between = (numbers[:-1].double() + 0.01 * (numbers[1:] - numbers[:-1])).float()

    assert torch.equal(on_grid(numbers, grid), numbers)
    beside = (between > numbers[:-1]) & (between < numbers[1:])
    assert torch.equal(on_grid(between, grid)[beside], numbers[1:][beside])


def test_clip_search_never_increases_the_error_it_minimises():
    weight, importance = random_weight(), torch.rand(40, generator=torch.Generator().manual_seed(1))
    weight[:, 7] *= 6  # one heavy column, unimportant below
    importance[7] = 1e-4

    plain, clipped = weight_scale(weight), search_clip(weight, importance)

    def cost(scale: torch.Tensor) -> torch.Tensor:
        return (dequantize_weight(encode(weight, scale), scale) - weight).square() @ importance

    assert bool((cost(clipped) <= cost(plain)).all())
    assert cost(clipped).sum() < 0.9 * cost(plain).sum()


def test_weight_of_wrong_rank_is_refused():
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        quantize_weight(torch.ones(3))
