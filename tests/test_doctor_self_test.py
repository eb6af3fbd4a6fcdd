"""The self-test passes on the CPU, and fails on operators that are wrong in the ways kernels go wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from doctor_hosts import STAGE, ascend_server, stage_output

from ascend_kit.device.device import select_device
from ascend_kit.device.ops import OPS, reference
from ascend_kit.doctor import run_self_test, self_test
from ascend_kit.doctor.checks import PREFIX, run_stage
from ascend_kit.doctor.comparison import AttentionCase, Comparer, attention_cases, make_inputs, relative_error
from ascend_kit.doctor.findings import OpCheck
from ascend_kit.doctor.graph_and_ranks import run_graph

HEADS = (4, 2, 16)
CPU = select_device("cpu")


def table(**changed) -> SimpleNamespace:
    """The reference operators with some replaced."""
    return SimpleNamespace(**{name: getattr(reference, name) for name in OPS} | changed)


def errors_of(ops, dtype=torch.float32) -> dict[str, list[str]]:
    """Status of each attention case under a table, by operator."""
    comparer, found = Comparer(CPU, ops, "ops", dtype), {"store_kv": [], "paged_attention": []}
    for case in attention_cases(CPU.default_block_size):
        for check in self_test._check_case(comparer, case, HEADS):
            found[check.op].append(check.status)
    return found


# ---------------------------------------------------------------------------------------- the inputs


@pytest.mark.parametrize("case", attention_cases(32), ids=lambda case: case.name)
def test_inputs_of_a_case_obey_the_contract_of_the_meta(case):
    inputs = make_inputs(case, HEADS, 32, torch.float32)
    meta = inputs.meta

    assert meta.cu_seqlens_q[-1] == inputs.q.shape[0] == meta.slot_mapping.shape[0]
    assert len(meta.context_lens) == meta.block_table.shape[0] == len(case.requests) + case.num_dead
    assert meta.context_lens_t.tolist() == meta.context_lens
    assert meta.slot_mapping.unique().numel() == meta.slot_mapping.numel()
    used = [
        block
        for row, length in zip(meta.block_table.tolist(), meta.context_lens, strict=True)
        for block in row[: -(-length // 32)]
        if block
    ]
    assert len(used) == len(set(used)) and max(used) < inputs.k_cache.shape[0]


def test_dead_rows_point_into_block_zero():
    case = AttentionCase("", ((1, 40),), num_dead=2)

    meta = make_inputs(case, HEADS, 32, torch.float32).meta

    assert meta.context_lens == [40, 1, 1]
    assert meta.slot_mapping[1:].tolist() == [0, 1] and not meta.block_table[1:].any()


def test_decode_cases_stop_before_at_and_after_a_block_limit():
    lengths = {length for case in attention_cases(128) if case.is_decode for _, length in case.requests}

    assert {127, 128, 129, 256} <= lengths


# ------------------------------------------------------------------------------------ it finds mistakes


def test_reference_passes_against_itself():
    found = errors_of(table())

    assert set(found["store_kv"]) == set(found["paged_attention"]) == {"ok"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mistake", ["scale forgotten", "mask missing", "cumulative lengths", "one key too few", "block table"]
)
def test_attention_mistakes_of_a_kernel_fail(mistake, dtype):
    def attend(q, k_cache, v_cache, meta, scale):
        if mistake == "scale forgotten":
            scale = 1.0
        elif mistake == "mask missing":  # every new token sees the keys after it
            rows = [end - start for start, end in zip([0, *meta.cu_seqlens_q], meta.cu_seqlens_q, strict=False)]
            lens = [n for n, count in zip(meta.context_lens, rows, strict=True) for _ in range(count)]
            table = meta.block_table.repeat_interleave(torch.tensor(rows), 0)
            meta = replace(meta, context_lens=lens, block_table=table, cu_seqlens_q=list(range(1, len(lens) + 1)))
        elif mistake == "cumulative lengths":
            sums = torch.tensor(meta.context_lens).cumsum(0).clamp(max=meta.block_table.shape[1] * meta.block_size)
            meta = replace(meta, context_lens=sums.tolist())
        elif mistake == "one key too few":
            meta = replace(meta, context_lens=[max(1, length - 1) for length in meta.context_lens])
        else:
            meta = replace(meta, block_table=meta.block_table.flip(0))
        return reference.paged_attention(q, k_cache, v_cache, meta, scale)

    assert "fail" in errors_of(table(paged_attention=attend), dtype)["paged_attention"]


def test_cache_writes_to_a_wrong_slot_fail():
    def store(k, v, k_cache, v_cache, slots):
        reference.store_kv(k, v, k_cache, v_cache, (slots + 1) % (k_cache.shape[0] * k_cache.shape[1]))

    assert "fail" in errors_of(table(store_kv=store))["store_kv"]


def _one_scale_for_all(x):
    return (x / x.abs().max()).mul(127).to(torch.int8), x.abs().amax(-1) / 127


@pytest.mark.parametrize(
    ("check", "name", "wrong"),
    [
        ("_check_norms", "rms_norm", lambda x, weight, eps: x * weight),
        ("_check_norms", "add_rms_norm", lambda x, r, w, eps: (reference.rms_norm(x + r, w, eps), x)),
        ("_check_rotary", "rotary", lambda q, k, cos, sin: (q, reference.rotary(q, k, cos, sin)[1])),
        ("_check_mlp", "swiglu", lambda x: reference.swiglu(torch.cat(x.chunk(2, -1)[::-1], -1))),
        ("_check_mlp", "linear", lambda x, weight, bias=None: torch.nn.functional.linear(x, weight)),
        ("_check_copies", "gather_rows", lambda table, ids: table[ids.clamp(max=998)]),
        ("_check_quantized", "int8_weight_matmul", lambda x, w, s, b: reference.linear(x, w.to(x.dtype), b)),
        ("_check_quantized", "quantize_per_token", _one_scale_for_all),
        ("_check_fused_int8", "swiglu_quantize", lambda x: reference.quantize_per_token(x.chunk(2, -1)[0])),
        (
            "_check_fused_int8",
            "add_rms_norm_quantize",
            lambda x, r, w, eps: (*reference.quantize_per_token(reference.rms_norm(x, w, eps)), x + r),
        ),
        ("_check_quantized", "int8_matmul", lambda q, a, w, s, b, out: reference.int8_matmul(q, a, w, s, None, out)),
    ],
    ids=[
        "norm without rms",
        "residual lost",
        "query not rotated",
        "gate and up swapped",
        "bias lost",
        "last row lost",
        "weight scale lost",
        "one scale for all",
        "up lost",
        "residual lost before quantisation",
        "int8 bias lost",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mistakes_of_other_operators_fail(check, name, wrong, dtype):
    comparer = Comparer(CPU, table(**{name: wrong}), "ops", dtype)

    statuses = {item.status for item in getattr(self_test, check)(comparer) if item.op == name}

    assert "fail" in statuses


def test_nan_and_wrong_shape_are_infinite_errors():
    wanted = torch.ones(2, 3)

    assert relative_error(torch.tensor([[1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]]), wanted) == float("inf")
    assert relative_error(torch.ones(3, 2), wanted) == float("inf")
    assert relative_error(torch.full((2, 3), 1.5), wanted) == pytest.approx(0.5)


def test_refusal_of_a_kernel_is_a_result_with_its_explanation():
    def refuse(*args):
        raise RuntimeError("npu_fused_infer_attention_score failed, error code is 561002")

    comparer = Comparer(CPU, table(paged_attention=refuse), "ops", torch.float32)
    _, check = self_test._check_case(comparer, attention_cases(32)[0], HEADS)

    assert (check.status, check.error) == ("fail", None)
    assert "561002" in check.detail and "attention parameter check" in check.detail


def test_shape_outside_the_limits_of_a_table_is_skipped_with_the_reason():
    comparer = Comparer(CPU, table(validate=lambda *shape: ["head size 64 with GQA"]), "ops")

    (check,) = self_test._check_attention(comparer, (14, 2, 64))

    assert check.status == "skip" and "head size 64" in check.detail


def test_bound_of_bf16_is_far_wider_than_that_of_float32():
    narrow, wide = (Comparer(CPU, table(), "ops", dtype).bound(4) for dtype in (torch.float32, torch.bfloat16))

    assert narrow < 1e-4 < wide < 0.05


# -------------------------------------------------------------------------------------------- on this machine


@pytest.mark.slow
def test_every_operator_of_the_device_passes(device):
    checks = list(self_test.run_ops(select_device(device)))

    assert [check for check in checks if check.status == "fail"] == []
    helpers = {name for name in OPS if name.startswith("pack_")} | {"make_mask", "validate"}
    is_npu = select_device(device).kind == "npu"
    fused = {"add_rms_norm_quantize", "swiglu_quantize"} if is_npu else set()
    assert {check.op for check in checks if "(" not in check.op} == set(OPS) - helpers | fused
    alternatives = {check.op for check in checks if "(" in check.op and check.status == "ok"}
    rotary = {"rotary (tnd)", "rotary (rotary_mul)"}
    others = {"store_kv (nd_update)", "paged_attention (nd_update)", "store_kv (tnd)", "paged_attention (tnd)",
              "store_kv (none)", "paged_attention (none)"}  # fmt: skip
    assert alternatives == (rotary | others if is_npu else set())


def test_captured_decode_follows_its_update(device):
    if device == "cpu":
        pytest.skip("compiling on a CPU takes long; the whole self-test below includes it")

    checks = list(run_graph(select_device(device)))

    assert [check.status for check in checks] == ["ok"] * (3 if device == "npu" else 2)
    assert not any(check.remedy for check in checks)


def test_child_prints_one_line_per_result(capsys):
    assert self_test.main(["--stage", "smoke", "--device", "cpu"]) == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 3


def test_result_survives_the_way_through_a_line_of_text():
    check = OpCheck("ops", "rms_norm", "bf16 [1, 8]", "fail", 0.25, 0.01, 1.5, "why")
    assert run_stage(ascend_server(commands={STAGE + "ops": stage_output(check)}), "ops", "npu:0") == [check]
    assert "[fail] rms_norm" in check.describe() and "2.50e-01" in check.describe()


@pytest.mark.long
@pytest.mark.multiproc
def test_whole_self_test_passes_on_the_cpu_in_child_processes():
    checks = run_self_test(device="cpu")

    assert {check.status for check in checks} == {"ok"}
    assert {"paged_attention", "update and replay", "all_reduce"} <= {check.op for check in checks}
