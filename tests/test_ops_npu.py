"""The NPU op table against the reference, on a simulated or real NPU; and what broken conventions do."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from op_cases import BF16, BLOCK, attention_case, on, steps

from ascend_kit.device.ops import OPS, npu, reference, select_ops

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("fresh_switches")]


@pytest.mark.parametrize("step", steps())
@pytest.mark.parametrize("heads,groups,size", [(8, 2, 128), (4, 4, 128), (14, 2, 64), (4, 2, 16)])
def test_attention_equals_the_reference(step, heads, groups, size, device):
    q, k_cache, v_cache, meta, expected = attention_case(step, heads, groups, size, device=device)

    got = npu.paged_attention(q, k_cache, v_cache, meta, size**-0.5)

    torch.testing.assert_close(got.cpu(), expected, **BF16)


@pytest.mark.parametrize("step", steps())
def test_heads_of_64_go_through_one_packed_call_when_asked(step, monkeypatch, device):
    monkeypatch.setenv("ASCEND_KIT_NPU_HEAD_64", "tnd")
    q, k_cache, v_cache, meta, expected = attention_case(step, 14, 2, 64, device=device)

    got = npu.paged_attention(q, k_cache, v_cache, meta, 64**-0.5)

    torch.testing.assert_close(got.cpu(), expected, **BF16)


@pytest.mark.parametrize("size", [128, 16])
def test_decode_without_a_mask_is_a_switch_and_a_prompt_keeps_its_mask(size, monkeypatch, device):
    calls = []
    real = npu._npu().npu_fused_infer_attention_score
    recorder = SimpleNamespace(npu_fused_infer_attention_score=lambda *a, **k: calls.append(k) or real(*a, **k))
    monkeypatch.setattr(npu, "_npu", lambda: recorder)
    monkeypatch.setenv("ASCEND_KIT_NPU_DECODE_MASK", "none")
    for step, is_masked in (("decode", False), ("mixed", True)):
        q, k_cache, v_cache, meta, expected = attention_case(step, 8, 2, size, device=device)

        got = npu.paged_attention(q, k_cache, v_cache, meta, size**-0.5)

        torch.testing.assert_close(got.cpu(), expected, **BF16)
        assert {call["sparse_mode"] for call in calls} == {3 if is_masked else 0}
        assert all((call["atten_mask"] is not None) == is_masked for call in calls)
        calls.clear()


def test_rotary_leaves_the_in_place_kernel_above_76_heads_and_for_64_before_cann_9(monkeypatch, device):
    def heads(num_heads, size):
        return torch.empty(1, num_heads, size), torch.empty(1, 4, size)

    assert npu._fits_rope(*heads(72, 128)) and not npu._fits_rope(*heads(73, 128))
    monkeypatch.setattr(npu, "cann_version", lambda: "8.5.0")
    assert npu._fits_rope(*heads(28, 128)) and not npu._fits_rope(*heads(14, 64))


@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_attention_in_float32_is_exact(step, device):
    q, k_cache, v_cache, meta, expected = attention_case(step, 4, 2, 128, torch.float32, device)

    got = npu.paged_attention(q, k_cache, v_cache, meta, 128**-0.5)

    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["bsnd", "tnd", "rotary_mul"])
@pytest.mark.parametrize("size", [128, 64, 16])
def test_rotary_equals_the_reference_in_every_form(form, size, monkeypatch, device):
    monkeypatch.setenv("ASCEND_KIT_NPU_ROPE", form)
    q, k = torch.randn(5, 4, size).bfloat16(), torch.randn(5, 2, size).bfloat16()
    cos, sin = (torch.randn(5, size // 2).repeat(1, 2).clamp(-1, 1).bfloat16() for _ in range(2))
    expected = reference.rotary(q, k, cos, sin)

    got = npu.rotary(*on(device, q.clone(), k.clone(), cos, sin))

    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value.cpu(), wanted, **BF16)


@pytest.mark.parametrize("form", ["scatter_pa", "nd_update"])
def test_store_kv_writes_exactly_the_given_slots(form, monkeypatch, device):
    monkeypatch.setenv("ASCEND_KIT_NPU_KV_WRITE", form)
    k, v = torch.randn(3, 2, 128).bfloat16(), torch.randn(3, 2, 128).bfloat16()
    caches = [torch.zeros(4, BLOCK, 2, 128).bfloat16() for _ in range(2)]
    slots = torch.tensor([0, 3 * BLOCK + 7, BLOCK + 127], dtype=torch.int32)
    device_caches = on(device, *caches)

    npu.store_kv(*on(device, k, v), *device_caches, slots.to(device))
    reference.store_kv(k, v, *caches, slots)

    assert all(torch.equal(got.cpu(), wanted) for got, wanted in zip(device_caches, caches, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_and_activation_equal_the_reference(dtype, device):
    x, residual, weight = torch.randn(6, 64).to(dtype), torch.randn(6, 64).to(dtype), torch.rand(64).to(dtype)
    tolerance = BF16 if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)

    got = [
        npu.rms_norm(*on(device, x, weight), 1e-6),
        *npu.add_rms_norm(*on(device, x, residual, weight), 1e-6),
        npu.swiglu(x.to(device)),
    ]

    expected = [
        reference.rms_norm(x, weight, 1e-6),
        *reference.add_rms_norm(x, residual, weight, 1e-6),
        reference.swiglu(x),
    ]
    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value.cpu(), wanted, **tolerance)


@pytest.mark.parametrize("layout", ["int8", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_product_equals_the_reference(layout, dtype, with_bias, monkeypatch, device):
    monkeypatch.setenv("ASCEND_KIT_NPU_WEIGHT_NZ", layout)
    x, weight = torch.randn(5, 64).to(dtype), torch.randint(-127, 128, (48, 64), dtype=torch.int8)
    scale, bias = torch.rand(48) / 100, torch.randn(48).to(dtype) if with_bias else None
    x[2] = 0  # a zero row has scale 0

    codes, act_scale = npu.quantize_per_token(x.to(device))
    got = npu.int8_matmul(
        codes,
        act_scale,
        npu.pack_int8(weight.to(device)),
        scale.to(device),
        None if bias is None else bias.to(device),
        dtype,
    )

    expected = reference.int8_matmul(*reference.quantize_per_token(x), weight, scale, bias, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu(), expected, **BF16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_only_product_equals_the_reference(dtype, device):
    x, weight = torch.randn(5, 64).to(dtype), torch.randint(-127, 128, (48, 64), dtype=torch.int8)
    scale, bias = torch.rand(48) / 100, torch.randn(48).to(dtype)

    got = npu.int8_weight_matmul(*on(device, x, weight, scale, bias))

    torch.testing.assert_close(got.cpu(), reference.int8_weight_matmul(x, weight, scale, bias), **BF16)


@pytest.mark.parametrize("group", [32, 64, 128, 48])  # 128 is a whole row; the kernel does not take 48
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_4_bit_product_equals_the_reference(dtype, asymmetric, group, device):
    width = 128 if group != 48 else 96
    x, codes = torch.randn(5, width).to(dtype), torch.randint(-8, 8, (48, width), dtype=torch.int8)
    scale, bias = (torch.rand(48, width // group) / 10).to(dtype).float(), torch.randn(48).to(dtype)
    zero = torch.randint(-8, 8, scale.shape).float() if asymmetric else None

    packed = npu.pack_int4(*on(device, codes, scale), None if zero is None else zero.to(device))
    got = npu.int4_weight_matmul(x.to(device), *packed, bias.to(device))

    expected = reference.int4_weight_matmul(x.float(), *reference.pack_int4(codes, scale, zero), bias.float())
    assert packed[0].dtype == (torch.uint8 if group == 48 else torch.int32)
    torch.testing.assert_close(got.cpu().float(), expected, rtol=2e-2, atol=4e-2)  # bf16 has 8 bits of mantissa


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_static_rounding_and_product_equal_the_reference(dtype, device):
    x, weight = torch.randn(5, 64).to(dtype), torch.randint(-127, 128, (48, 64), dtype=torch.int8)
    scale, offset = torch.tensor([1 / 32]), torch.tensor([-5.0])
    dequantization, bias = torch.rand(48) / 1000, torch.randint(-500, 500, (48,), dtype=torch.int32)

    codes = npu.quantize_static(*on(device, x, scale, offset))
    got = npu.int8_static_matmul(
        codes, npu.pack_int8_static(weight.to(device)), *on(device, dequantization, bias), dtype
    )

    assert torch.equal(codes.cpu(), reference.quantize_static(x, scale, offset))
    expected = reference.int8_static_matmul(codes.cpu(), weight, dequantization, bias, dtype)
    torch.testing.assert_close(got.cpu(), expected, **BF16)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_and_swiglu_that_quantise_equal_two_operators_of_the_reference(dtype, rows, device):
    x, residual, gate_up = (torch.randn(rows, width).to(dtype) for width in (64, 64, 96))
    weight = torch.randn(64).to(dtype)

    *normed, total = npu.add_rms_norm_quantize(*on(device, x, residual, weight), 1e-6)
    gated = npu.swiglu_quantize(gate_up.to(device))

    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    for (codes, scale), wanted in ((normed, expected), (gated, reference.swiglu(gate_up))):
        assert codes.dtype == torch.int8 and scale.shape == (rows,)
        step = wanted.float().abs().amax(-1, keepdim=True) / 127
        # Half a step for the code, and up to half a step for each of the reference's two roundings to bf16.
        assert ((codes.cpu() * scale.cpu().unsqueeze(-1) - wanted.float()).abs() <= 1.51 * step).all()
    torch.testing.assert_close(total.cpu(), expected_total, **BF16)


@pytest.mark.parametrize("rows,launches", [(1, 0), (5, 1)])
def test_a_product_is_split_into_contiguous_parts_by_at_most_one_kernel(rows, launches, sim, device):
    x = torch.randn(rows, 80).bfloat16()
    on_device = x.to(device)
    sim.reset()

    parts = npu.split_columns(on_device, [48, 16, 16])

    assert sim.counts.num_launches == launches
    assert all(part.is_contiguous() for part in parts)
    assert all(torch.equal(part.cpu(), wanted) for part, wanted in zip(parts, x.split([48, 16, 16], 1), strict=True))


@pytest.mark.parametrize("plain", ["add_rms_norm", "quantize_per_token", "add_rms_norm_quantize"])
def test_a_fused_operator_goes_with_the_parts_that_are_plain(plain, device):
    table = select_ops("npu", True, [plain])

    assert not hasattr(table, "add_rms_norm_quantize")
    assert hasattr(table, "swiglu_quantize") == (plain != "quantize_per_token")
    assert (table.add_rms_norm is npu.add_rms_norm) == (plain != "add_rms_norm")


def test_table_has_the_names_and_parameters_of_the_reference(device):
    for name in OPS:
        assert list(inspect.signature(getattr(npu, name)).parameters) == list(
            inspect.signature(getattr(reference, name)).parameters
        ), name


def test_limits_are_named_before_anything_runs(device):
    assert npu.validate(28, 4, 128, torch.bfloat16) == []
    assert npu.validate(14, 2, 64, torch.bfloat16) == []
    assert "multiple of 3" in npu.validate(4, 3, 128, torch.bfloat16)[0]
    assert "64" in npu.validate(130, 2, 128, torch.bfloat16)[0]
    assert "multiples of 16" in npu.validate(4, 2, 72, torch.bfloat16)[0]
    assert npu.validate(4, 2, 72, torch.float32) == []
    with pytest.raises(ValueError, match="65535"):
        npu.pack_int8(torch.empty(70000, 8, dtype=torch.int8))


def test_an_unknown_switch_value_names_the_allowed_ones(monkeypatch, device):
    monkeypatch.setenv("ASCEND_KIT_NPU_ROPE", "sideways")

    with pytest.raises(ValueError, match="bsnd, tnd, rotary_mul"):
        npu.switch("ASCEND_KIT_NPU_ROPE")


def torch_npu_calls():
    """(name, keywords, number of positional arguments) of every torch_npu function the table calls."""
    tree = ast.parse(Path(npu.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    options = [k.arg for call in calls if getattr(call.func, "id", "") == "dict" for k in call.keywords]
    for call in calls:
        owner = getattr(call.func, "value", None)
        if isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "_npu":
            names = [k.arg for k in call.keywords if k.arg]
            spread = options if len(names) < len(call.keywords) else []  # **options
            yield call.func.attr, sorted({*names, *spread}), len(call.args)


CALLS = sorted({(name, tuple(keywords), count) for name, keywords, count in torch_npu_calls()})


@pytest.mark.parametrize("name,keywords,positional", CALLS)
def test_every_torch_npu_function_has_the_arguments_we_pass(name, keywords, positional, device):
    import torch_npu

    assert callable(getattr(torch_npu, name))
    packet = getattr(torch.ops.npu, name)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    fits = [
        s
        for s in schemas
        if set(keywords) <= {a.name for a in s.arguments} and positional <= sum(not a.kwarg_only for a in s.arguments)
    ]
    assert fits, f"{name}{keywords} fits none of {schemas}"


def test_the_mask_is_shared_and_causal(device):
    mask = npu.make_mask(torch.device(device))

    assert mask is npu.make_mask(torch.device(device))
    assert tuple(mask.shape) == (2048, 2048)
    assert int(mask[:3, :3].sum()) == 3
    assert math.isclose(float(mask.float().mean()), 2047 / 4096)
