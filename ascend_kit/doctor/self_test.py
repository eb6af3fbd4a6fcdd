"""Every operator of the device's fused table against the plain reference: run first on real hardware.

The reference runs in float32 on the CPU from the same rounded inputs, so the error shown is the kernel's
own. It is the largest absolute difference divided by the largest reference value. Run by `python -m
ascend_kit doctor --self-test`, stage by stage in child processes; `run_ops` and its neighbours can also be
called directly on a `Device`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ascend_kit.device.device import Device, select_device
from ascend_kit.device.ops import reference, select_ops
from ascend_kit.doctor.comparison import (
    HEADS,
    AttentionCase,
    Comparer,
    attention_cases,
    bound,
    dtype_name,
    make_inputs,
    relative_error,
)
from ascend_kit.doctor.findings import OpCheck
from ascend_kit.doctor.first_run import HALF_BILLION, SMALL, measure_model
from ascend_kit.doctor.graph_and_ranks import run_collective, run_graph
from ascend_kit.doctor.stages import PREFIX

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16),
    "npu": (torch.bfloat16, torch.float16),
}
CODE_STEP = 1.01 / 127  # one int8 step of the largest value: ties may round either way


def run_ops(device: Device, seed: int = 0) -> Iterator[OpCheck]:
    """Every function of the table at several shapes and dtypes; results come one by one."""
    comparer = Comparer(device, select_ops(device.kind, fused=True), "ops", seed)
    for dtype in DTYPES[device.kind]:
        yield from _check_norms(comparer, dtype)
        yield from _check_rotary(comparer, dtype)
        yield from _check_copies(comparer, dtype)
        yield from _check_argmax(comparer, dtype)
        yield from _check_mlp(comparer, dtype)
        for heads in HEADS:
            yield from _check_attention(comparer, heads, dtype)
        yield from _check_quantized(comparer, dtype)
    if device.kind == "npu":
        yield from _check_alternatives(comparer, torch.bfloat16)


def _check_alternatives(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    """The NPU table's other forms, each with its time; one that does not work here is no fault, as it is not in use."""
    from ascend_kit.device.ops import npu

    decode = attention_cases(comparer.device.default_block_size)[-1]
    forms = (
        ("ASCEND_KIT_NPU_ROPE", "tnd", lambda: _check_rotary(comparer, dtype)),
        ("ASCEND_KIT_NPU_ROPE", "rotary_mul", lambda: _check_rotary(comparer, dtype)),
        ("ASCEND_KIT_NPU_KV_WRITE", "nd_update", lambda: _check_case(comparer, decode, HEADS[1], dtype)),
        ("ASCEND_KIT_NPU_DECODE_MASK", "none", lambda: _check_case(comparer, decode, HEADS[1], dtype)),
        ("ASCEND_KIT_NPU_HEAD_64", "tnd", lambda: _check_attention(comparer, HEADS[2], dtype)),
    )
    for name, value, checks in forms:
        with mock.patch.dict(os.environ, {name: value}):
            npu.switch.cache_clear()
            for check in checks():
                works = check.status == "ok"
                detail = (
                    check.detail or f"{1e3 * check.seconds:.1f} ms, the default is another; to use it: {name}={value}"
                )
                yield replace(check, op=f"{check.op} ({value})", status="ok" if works else "skip", detail=detail)
        npu.switch.cache_clear()


def run_smoke(device: Device) -> Iterator[OpCheck]:
    """Seconds, not minutes: one matrix product, one cache write, one decode attention."""
    comparer = Comparer(device, select_ops(device.kind, fused=True), "smoke")
    dtype = torch.bfloat16
    yield _linear(comparer, dtype, 64, 256, 512, with_bias=False)
    case = attention_cases(device.default_block_size)[2]
    yield from _check_case(comparer, case, HEADS[1], dtype)


def _check_norms(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    for shape in ((1, 3584), (37, 4096), (64, 32, 128)):
        x, residual = comparer.values(*shape, dtype=dtype), comparer.values(*shape, dtype=dtype)
        weight, case = comparer.values(shape[-1], dtype=dtype), str(list(shape))
        yield comparer.compare("rms_norm", case, bound(dtype, 2), dtype, x, weight, 1e-6)
        if len(shape) == 2:
            yield comparer.compare("add_rms_norm", case, bound(dtype, 3), dtype, x, residual, weight, 1e-6)


def _check_rotary(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    for num_heads, num_kv_heads, head_size in HEADS:
        for num_tokens in (1, 19):
            angles = torch.arange(num_tokens).unsqueeze(1) * 10000.0 ** (-torch.arange(head_size // 2) * 2 / head_size)
            q = comparer.values(num_tokens, num_heads, head_size, dtype=dtype)
            k = comparer.values(num_tokens, num_kv_heads, head_size, dtype=dtype)
            cos, sin = (turn(angles).repeat(1, 2).to(dtype).float() for turn in (torch.cos, torch.sin))
            case = f"T={num_tokens} heads {num_heads}/{num_kv_heads} x {head_size}"
            yield comparer.compare("rotary", case, bound(dtype, 3), dtype, q, k, cos, sin)


def _check_copies(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    """Embedding rows and rotary tables by int32 ids; q, k and v out of one product: copies, so they must be exact."""
    table, ids = comparer.values(1000, 128, dtype=dtype), torch.tensor([999, 0, 7, 7, 512], dtype=torch.int32)
    yield comparer.compare("gather_rows", "[1000, 128]", 0.0, dtype, table, ids)
    for num_tokens in (1, 19):
        x = comparer.values(num_tokens, 6144, dtype=dtype)
        yield comparer.compare("split_columns", f"{[num_tokens, 6144]}", 0.0, dtype, x, [4096, 1024, 1024])


def _check_argmax(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    """The largest logit of a row; a wrong one by how much smaller it is."""
    logits = comparer.values(5, 151936, dtype=dtype)

    def loss() -> float:
        found = comparer.ops.argmax(*comparer.place(logits, dtype=dtype)).cpu()
        return relative_error(logits.gather(1, found.unsqueeze(1)), logits.amax(1, keepdim=True))

    yield comparer.check("argmax", f"{dtype_name(dtype)} [5, 151936]", 0.0, loss)


def _check_mlp(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    for num_tokens, width in ((1, 18944), (33, 12288)):
        gate_up = comparer.values(num_tokens, 2 * width, dtype=dtype)
        yield comparer.compare("swiglu", f"{[num_tokens, 2 * width]}", bound(dtype, 3), dtype, gate_up)
    yield _linear(comparer, dtype, 1, 3584, 4608, with_bias=True)
    yield _linear(comparer, dtype, 130, 4096, 1024, with_bias=False)


def _linear(
    comparer: Comparer, dtype: torch.dtype, num_tokens: int, width: int, num_out: int, with_bias: bool
) -> OpCheck:
    x, weight = comparer.values(num_tokens, width, dtype=dtype), comparer.values(num_out, width, dtype=dtype)
    bias = comparer.values(num_out, dtype=dtype) if with_bias else None
    case = f"[{num_tokens}, {width}] x [{width}, {num_out}]" + (" + bias" if with_bias else "")
    return comparer.compare("linear", case, bound(dtype, 2), dtype, x, weight, bias)


def _check_attention(comparer: Comparer, heads: tuple[int, int, int], dtype: torch.dtype) -> Iterator[OpCheck]:
    limits = comparer.ops.validate(*heads, dtype)
    shape = f"{dtype_name(dtype)} heads {heads[0]}/{heads[1]} x {heads[2]}"
    if limits:
        yield OpCheck(comparer.stage, "paged_attention", shape, "skip", detail="; ".join(map(str, limits)))
        return
    for case in attention_cases(comparer.device.default_block_size):
        yield from _check_case(comparer, case, heads, dtype)


def _check_case(
    comparer: Comparer, case: AttentionCase, heads: tuple[int, int, int], dtype: torch.dtype
) -> Iterator[OpCheck]:
    """store_kv must be exact; attention reads the cache the reference wrote: the two are judged apart."""
    inputs = make_inputs(case, heads, comparer.device.default_block_size, dtype)
    shape = f"{dtype_name(dtype)} {heads[0]}/{heads[1]}x{heads[2]} {case.name}"
    target = comparer.device.torch_device
    untouched = inputs.to(target, dtype, None)
    reference.store_kv(inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.meta.slot_mapping)

    def stored() -> float:
        comparer.ops.store_kv(
            untouched.k, untouched.v, untouched.k_cache, untouched.v_cache, untouched.meta.slot_mapping
        )
        pairs = ((untouched.k_cache, inputs.k_cache), (untouched.v_cache, inputs.v_cache))
        return max(relative_error(found[1:], wanted[1:]) for found, wanted in pairs)  # block 0 may hold anything

    def attended() -> float:
        placed = inputs.to(target, dtype, comparer.ops.make_mask(target))
        scale = heads[2] ** -0.5
        wanted = reference.paged_attention(inputs.q, inputs.k_cache, inputs.v_cache, inputs.meta, scale)
        found = comparer.ops.paged_attention(placed.q, placed.k_cache, placed.v_cache, placed.meta, scale)
        return relative_error(found[: inputs.num_live], wanted[: inputs.num_live])

    yield comparer.check("store_kv", shape, 0.0, stored)
    yield comparer.check("paged_attention", shape, bound(dtype, 4), attended)


def _check_quantized(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    """Activations in int8, with a scale a token and with one for all tokens; weights of 8 bits, and of 4 in groups."""
    for num_tokens, width, num_out in ((1, 3584, 512), (32, 4096, 1024)):
        generator, case = comparer.generator, f"[{num_tokens}, {width}] x [{width}, {num_out}]"
        x, bias = comparer.values(num_tokens, width, dtype=dtype), comparer.values(num_out, dtype=dtype)
        x[0, 5] = 60.0  # an outlier as activations have them
        codes, act_scale = reference.quantize_per_token(x)
        weight = torch.randint(-127, 128, (num_out, width), dtype=torch.int8, generator=generator)
        scale = torch.rand(num_out, generator=generator) * 1e-3 + 1e-4
        yield comparer.compare("quantize_per_token", case, CODE_STEP, dtype, x)
        yield comparer.compare("int8_weight_matmul", case, bound(dtype, 3), dtype, x, weight, scale, bias)
        yield comparer.compare(
            "int8_matmul", case, bound(dtype, 2), dtype, codes, act_scale, weight, scale, bias, torch.float32
        )
        step, offset = torch.tensor([0.05]), torch.tensor([3.0])
        codes = reference.quantize_static(x, step, offset)
        whole = torch.randint(-1000, 1000, (num_out,), dtype=torch.int32, generator=generator)
        yield comparer.compare("quantize_static", case, CODE_STEP, dtype, x, step, offset)
        yield comparer.compare(
            "int8_static_matmul", case, bound(dtype, 2), dtype, codes, weight, scale, whole, torch.float32
        )
        small = torch.randint(-8, 8, (num_out, width), dtype=torch.int8, generator=generator)
        scale = torch.rand(num_out, width // 128, generator=generator) * 1e-2 + 1e-3
        zero = torch.randint(-8, 8, scale.shape, generator=generator).float()
        yield comparer.compare("int4_weight_matmul", case, bound(dtype, 4), dtype, x, small, scale, zero, bias)
    yield from _check_fused_int8(comparer, dtype)


def _check_fused_int8(comparer: Comparer, dtype: torch.dtype) -> Iterator[OpCheck]:
    """What a table quantises inside another operator, against the two operators of the reference."""
    ops = comparer.ops

    def error(codes: Tensor, scale: Tensor, wanted: Tensor) -> float:
        return relative_error(codes.cpu().float() * scale.cpu().unsqueeze(-1), wanted)

    # A fault of small shapes was mended in some releases: one token and few columns are among the cases.
    for num_tokens, width in ((1, 3584), (1, 64), (33, 4096)) if hasattr(ops, "add_rms_norm_quantize") else ():
        x, residual = (comparer.values(num_tokens, width, dtype=dtype) for _ in range(2))
        weight = comparer.values(width, dtype=dtype)

        def normed(x=x, residual=residual, weight=weight) -> float:
            wanted, total = reference.add_rms_norm(x, residual, weight, 1e-6)
            codes, scale, found = ops.add_rms_norm_quantize(*comparer.place(x, residual, weight, dtype=dtype), 1e-6)
            return max(error(codes, scale, wanted), relative_error(found, total))

        case = f"{dtype_name(dtype)} {[num_tokens, width]}"
        yield comparer.check("add_rms_norm_quantize", case, CODE_STEP + bound(dtype, 3), normed)
    for num_tokens, width in ((1, 18944), (1, 64), (33, 12288)) if hasattr(ops, "swiglu_quantize") else ():
        gate_up = comparer.values(num_tokens, 2 * width, dtype=dtype)

        def gated(gate_up=gate_up) -> float:
            codes, scale = ops.swiglu_quantize(*comparer.place(gate_up, dtype=dtype))
            return error(codes, scale, reference.swiglu(gate_up))

        case = f"{dtype_name(dtype)} {[num_tokens, 2 * width]}"
        yield comparer.check("swiglu_quantize", case, CODE_STEP + bound(dtype, 3), gated)


def probe(device: Device) -> dict[str, Any]:
    """Versions, device name, memory in bytes and number of devices, as seen from inside a process."""
    described = device.describe()
    return {
        **{name: described[name] for name in ("kind", "index", "name", "versions", "task_queue_level")},
        "count": 1 if device.kind == "cpu" else device.backend.device_count(),
        "free_bytes": device.free_memory_bytes(),
        "total_bytes": device.total_memory_bytes,
        "peak": device.peak.source if device.peak else None,
        "threads": torch.get_num_threads(),
    }


STAGES = {"smoke": run_smoke, "ops": run_ops, "graph": run_graph, "collective": run_collective}


def main(argv: list[str] | None = None) -> int:
    """Child process: run one stage and print one line per result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", choices=(*STAGES, "probe", "model"), required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args(argv)
    device, failed = select_device(arguments.device), False
    if arguments.stage == "probe":
        rows = iter([probe(device)])
    elif arguments.stage == "model":
        rows = measure_model(device, SMALL if arguments.small else HALF_BILLION, arguments.seconds)
    else:
        rows = map(asdict, STAGES[arguments.stage](device))
    for row in rows:
        print(PREFIX + json.dumps(row), flush=True)
        failed |= row.get("status") == "fail"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
