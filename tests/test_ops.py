"""The op table: the reference against a few lines of independent torch, the CPU table against the reference."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest
import torch
from op_cases import make_meta

from ascend_kit.device.ops import OPS, cpu, cpu_native, native, reference, select_ops

HEADS, GROUPS, SIZE, BLOCK = 4, 2, 16, 8


def caches(blocks=12, dtype=torch.float32):
    return tuple(torch.randn(blocks, BLOCK, GROUPS, SIZE).to(dtype) for _ in range(2))


meta = partial(make_meta, block=BLOCK)
TABLES = [
    pytest.param(reference, id="reference"),
    pytest.param(cpu, id="cpu"),
    pytest.param(select_ops("cuda", fused=True), id="cuda"),
    pytest.param(
        cpu_native,
        id="cpu_native",
        marks=pytest.mark.skipif(native.library() is None, reason=f"CPU kernels are {native.status()}"),
    ),
]
STEPS = {
    "decode": meta([[3], [1, 2], [4, 5, 6]], [5, 16, 17], [1, 1, 1]),
    "prefill": meta([[3], [1, 2]], [7, 16], [7, 16]),
    "chunk after a prefix": meta([[7, 8, 9]], [20], [6]),
    "mixed": meta([[3], [4], [1, 2], [5, 6]], [3, 8, 12, 10], [1, 1, 12, 4]),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_the_same_names_and_parameters(table):
    assert isinstance(table.MERGED_QKV, bool)
    for name in OPS:
        assert list(inspect.signature(getattr(table, name)).parameters) == list(
            inspect.signature(getattr(reference, name)).parameters
        ), name


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("table", TABLES)
def test_attention_equals_sdpa_over_the_gathered_cache(table, step):
    k_cache, v_cache = caches()
    q = torch.randn(step.cu_seqlens_q[-1], HEADS, SIZE)

    got = table.paged_attention(q, k_cache, v_cache, step, 0.25)

    start = 0
    for row, (end, length) in enumerate(zip(step.cu_seqlens_q, step.context_lens, strict=True)):
        blocks = step.block_table[row, : math.ceil(length / BLOCK)].long()
        keys, values = (c[blocks].reshape(-1, GROUPS, SIZE)[:length].transpose(0, 1) for c in (k_cache, v_cache))
        hidden = torch.zeros(end - start, length).masked_fill(
            torch.arange(length) > torch.arange(length - (end - start), length).unsqueeze(1), -math.inf
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[start:end].transpose(0, 1),
            keys.repeat_interleave(2, 0),
            values.repeat_interleave(2, 0),
            attn_mask=hidden,
            scale=0.25,
        ).transpose(0, 1)
        torch.testing.assert_close(got[start:end], expected, atol=1e-5, rtol=1e-5)
        start = end


@pytest.mark.parametrize("table", TABLES)
def test_store_kv_writes_each_token_to_its_slot_and_nothing_else(table):
    k_cache, v_cache = caches()
    before = k_cache.clone()
    step = STEPS["mixed"]
    k, v = (torch.randn(len(step.slot_mapping), GROUPS, SIZE) for _ in range(2))

    table.store_kv(k, v, k_cache, v_cache, step.slot_mapping)

    flat, slots = k_cache.view(-1, GROUPS, SIZE), step.slot_mapping.long()
    assert torch.equal(flat[slots], k) and torch.equal(v_cache.view(-1, GROUPS, SIZE)[slots], v)
    others = torch.ones(len(flat), dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(flat[others], before.view(-1, GROUPS, SIZE)[others])


@pytest.mark.parametrize("table", TABLES)
def test_norms_follow_their_formula(table):
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.rand(32)

    y, total = table.add_rms_norm(x, residual, weight, 1e-6)

    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)
    torch.testing.assert_close(table.rms_norm(total, weight, 1e-6), y)


@pytest.mark.parametrize("table", TABLES)
def test_rotary_turns_each_pair_by_its_angle(table):
    q, k = torch.randn(6, HEADS, SIZE), torch.randn(6, GROUPS, SIZE)
    angle = torch.outer(torch.arange(6.0), 0.5 ** torch.arange(SIZE // 2))
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()

    turned, _ = table.rotary(q.clone(), k.clone(), cos, sin)

    pairs = (
        torch.complex(q[..., : SIZE // 2], q[..., SIZE // 2 :]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1))


@pytest.mark.parametrize("table", TABLES)
def test_swiglu_gates_with_the_first_half(table):
    gate, up = torch.randn(3, 8), torch.randn(3, 8)

    got = table.swiglu(torch.cat((gate, up), -1))

    torch.testing.assert_close(got, gate * gate.sigmoid() * up)


@pytest.mark.parametrize("table", TABLES)
def test_int8_codes_are_within_half_a_step_and_zero_rows_stay_zero(table):
    x = torch.randn(6, 64) * torch.tensor([1, 100, 1e-3, 0, 5, 1]).unsqueeze(1)

    codes, scale = table.quantize_per_token(x)

    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert ((codes * scale.unsqueeze(1) - x).abs() <= scale.unsqueeze(1) / 2 + 1e-7).all()
    assert (codes[3] == 0).all() and scale[3] == 0
    assert (codes.abs().amax(-1)[[0, 1, 2, 4, 5]] == 127).all()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_matmul_is_exact_in_its_integers(table, rows):
    generator = torch.Generator().manual_seed(0)
    codes, weight = (
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for shape in ((rows, 64), (48, 64))
    )
    act_scale, weight_scale, bias = torch.rand(rows) + 0.1, torch.rand(48) + 0.1, torch.randn(48)

    got = table.int8_matmul(codes, act_scale, table.pack_int8(weight), weight_scale, bias, torch.float32)

    expected = (codes.long() @ weight.long().t()).float() * act_scale[:, None] * weight_scale + bias
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "rows,dtype", [(1, torch.float32), (7, torch.float32), (7, torch.bfloat16), (40, torch.bfloat16)]
)
def test_linears_of_any_row_count_follow_their_formula(table, rows, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 100), (37, 100), (37,)))
    codes, scale = torch.randint(-127, 128, (37, 100), dtype=torch.int8), torch.rand(37) / 100

    plain = table.linear(x, table.pack_linear(weight), bias)
    mixed = table.int8_weight_matmul(x, codes, scale, bias)

    # bf16 keeps 8 bits of mantissa; sums are float32 in every table
    tolerance = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.float(), x.float() @ weight.float().t() + bias.float(), **tolerance)
    torch.testing.assert_close(
        mixed.float(), x.float() @ (codes.float() * scale[:, None]).t() + bias.float(), **tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(native.library() is None, reason=f"CPU kernels are {native.status()}")
def test_the_kernels_round_as_the_reference_does(dtype):
    x, residual, weight = (torch.randn(5, 64).to(dtype) for _ in range(3))
    q, k, angle = (torch.randn(5, HEADS, SIZE).to(dtype), torch.randn(5, GROUPS, SIZE).to(dtype), torch.rand(5, SIZE))
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    close = dict(rtol=8e-3, atol=1e-6) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)  # one bf16 step

    for name, arguments in {
        "rms_norm": (x, weight[0], 1e-6),
        "add_rms_norm": (x, residual, weight[0], 1e-6),
        "swiglu": (x,),
        "rotary": (q, k, cos, sin),
    }.items():
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.testing.assert_close(getattr(cpu_native, name)(*copies), getattr(reference, name)(*arguments), **close)


def test_an_unknown_device_has_no_table():
    assert select_ops("cpu", False) is reference
    assert select_ops("cpu", True) is (cpu if native.library() is None else cpu_native)
    with pytest.raises(ValueError, match="tpu"):
        select_ops("tpu", True)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_names_the_first_of_equal_numbers(table, dtype):
    logits = torch.randn(5, 1000).to(dtype)
    logits[1, [400, 900]] = 50
    logits[2] = -torch.inf
    logits[2, 999] = -1e30

    found = table.argmax(logits)

    assert found.tolist() == [row.tolist().index(max(row.tolist())) for row in logits]
    assert table.argmax(logits[1:3]).tolist() == [400, 999]


def test_a_plain_operator_takes_its_layout_with_it_and_leaves_the_others_fused():
    fused, mixed = select_ops("cpu", True), select_ops("cpu", True, ["linear", "rotary"])

    assert mixed.linear is reference.linear and mixed.pack_linear is reference.pack_linear
    assert mixed.gather_rows is reference.gather_rows and mixed.rotary is reference.rotary
    assert mixed.rms_norm is fused.rms_norm and mixed.paged_attention is fused.paged_attention
    assert not getattr(select_ops("cpu", True, ["paged_attention"]), "RECORDS", False), "it reads the whole table"


def test_an_unknown_plain_operator_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ValueError, match=r"no operator 'rotery'; did you mean 'rotary'\?.*rms_norm"):
        select_ops("npu", True, ["rotery"])


@pytest.mark.skipif(native.library() is None, reason=f"CPU kernels are {native.status()}")
@pytest.mark.parametrize("rows", [128, 100])  # packed, where the processor packs, and not
@pytest.mark.parametrize("width", [32, 128])
def test_native_kernels_refuse_a_weight_of_another_width(rows: int, width: int):
    x, weight = torch.ones(1, width), torch.ones(rows, 64)
    codes, scale = weight.to(torch.int8), torch.ones(rows)

    with pytest.raises(ValueError, match=f"rows of {width} numbers"):
        cpu_native.linear(x, cpu_native.pack_linear(weight))
    with pytest.raises(ValueError, match=f"rows of {width} numbers"):
        cpu_native.int8_weight_matmul(x, cpu_native.pack_int8(codes), scale, None)
    with pytest.raises(ValueError, match=f"rows of {width} numbers"):
        cpu_native.int8_matmul(x.to(torch.int8), torch.ones(1), cpu_native.pack_int8(codes), scale, None, torch.float32)
    with pytest.raises(ValueError, match="7 biases or scales"):
        cpu_native.linear(torch.ones(1, 64), cpu_native.pack_linear(weight), torch.ones(7))
