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

from ascend_kit.device.device import Device, select_device
from ascend_kit.device.ops import reference, select_ops
from ascend_kit.doctor.checks import PREFIX
from ascend_kit.doctor.comparison import HEADS, AttentionCase, Comparer, attention_cases, make_inputs, relative_error
from ascend_kit.doctor.findings import OpCheck
from ascend_kit.doctor.first_run import HALF_BILLION, SMALL, measure_model
from ascend_kit.doctor.graph_and_ranks import run_collective, run_graph

CODE_STEP = 1.01 / 127  # one int8 step of the largest value: ties may round either way


def run_ops(device: Device) -> Iterator[OpCheck]:
    """Every function of the table at several shapes and dtypes; results come one by one."""
    ops = select_ops(device.kind, fused=True)
    for dtype in (torch.float32, torch.bfloat16) if device.kind == "cpu" else (torch.bfloat16, torch.float16):
        comparer = Comparer(device, ops, "ops", dtype)
        for check in (_check_norms, _check_rotary, _check_copies, _check_argmax, _check_mlp):
            yield from check(comparer)
        for heads in HEADS:
            yield from _check_attention(comparer, heads)
        yield from _check_quantized(comparer)
        yield from _check_fused_int8(comparer)
    if device.kind == "npu":
        yield from _check_alternatives(Comparer(device, ops, "ops"))


def _check_alternatives(comparer: Comparer) -> Iterator[OpCheck]:
    """The NPU table's other forms, each with its time; one that does not work here is no fault, as it is not in use."""
    from ascend_kit.device.ops import npu

    decode = attention_cases(comparer.device.default_block_size)[-1]
    forms = (
        ("ASCEND_KIT_NPU_ROPE", "tnd", lambda: _check_rotary(comparer)),
        ("ASCEND_KIT_NPU_ROPE", "rotary_mul", lambda: _check_rotary(comparer)),
        ("ASCEND_KIT_NPU_KV_WRITE", "nd_update", lambda: _check_case(comparer, decode, HEADS[1])),
        ("ASCEND_KIT_NPU_DECODE_MASK", "none", lambda: _check_case(comparer, decode, HEADS[1])),
        ("ASCEND_KIT_NPU_HEAD_64", "tnd", lambda: _check_attention(comparer, HEADS[2])),
    )
    for name, value, checks in forms:
        with mock.patch.dict(os.environ, {name: value}):
            npu.switch.cache_clear()
            for check in checks():
                time_ms, status = 1e3 * check.seconds, "ok" if check.status == "ok" else "skip"
                detail = check.detail or f"{time_ms:.1f} ms, the default is another; to use it: {name}={value}"
                yield replace(check, op=f"{check.op} ({value})", status=status, detail=detail)
        npu.switch.cache_clear()


def run_smoke(device: Device) -> Iterator[OpCheck]:
    """Seconds, not minutes: one matrix product, one cache write, one decode attention."""
    comparer = Comparer(device, select_ops(device.kind, fused=True), "smoke")
    yield _linear(comparer, 64, 256, 512, with_bias=False)
    yield from _check_case(comparer, attention_cases(device.default_block_size)[2], HEADS[1])


def _check_norms(comparer: Comparer) -> Iterator[OpCheck]:
    for shape in ((1, 3584), (37, 4096), (64, 32, 128)):
        x, residual, weight = comparer.values(*shape), comparer.values(*shape), comparer.values(shape[-1])
        yield comparer.compare("rms_norm", str(list(shape)), comparer.bound(2), x, weight, 1e-6)
        if len(shape) == 2:
            yield comparer.compare("add_rms_norm", str(list(shape)), comparer.bound(3), x, residual, weight, 1e-6)


def _check_rotary(comparer: Comparer) -> Iterator[OpCheck]:
    for num_heads, num_kv_heads, head_size in HEADS:
        for num_tokens in (1, 19):
            angles = torch.arange(num_tokens).unsqueeze(1) * 10000.0 ** (-torch.arange(head_size // 2) * 2 / head_size)
            q, k = (comparer.values(num_tokens, heads, head_size) for heads in (num_heads, num_kv_heads))
            cos, sin = (turn(angles).repeat(1, 2).to(comparer.dtype).float() for turn in (torch.cos, torch.sin))
            case = f"T={num_tokens} heads {num_heads}/{num_kv_heads} x {head_size}"
            yield comparer.compare("rotary", case, comparer.bound(3), q, k, cos, sin)


def _check_copies(comparer: Comparer) -> Iterator[OpCheck]:
    """Embedding rows and rotary tables by int32 ids; q, k and v out of one product: copies, so they must be exact."""
    ids = torch.tensor([999, 0, 7, 7, 512], dtype=torch.int32)
    yield comparer.compare("gather_rows", "[1000, 128]", 0.0, comparer.values(1000, 128), ids)
    for num_tokens in (1, 19):
        x = comparer.values(num_tokens, 6144)
        yield comparer.compare("split_columns", f"{[num_tokens, 6144]}", 0.0, x, [4096, 1024, 1024])


def _check_argmax(comparer: Comparer) -> Iterator[OpCheck]:
    """The largest logit of a row; a wrong one by how much smaller it is."""
    logits = comparer.values(5, 151936)

    def loss() -> float:
        found = comparer.ops.argmax(logits.to(comparer.device.torch_device, comparer.dtype)).cpu()
        return relative_error(logits.gather(1, found.unsqueeze(1)), logits.amax(1, keepdim=True))

    yield comparer.check("argmax", f"{comparer.dtype_name} [5, 151936]", 0.0, loss)


def _check_mlp(comparer: Comparer) -> Iterator[OpCheck]:
    for num_tokens, width in ((1, 18944), (33, 12288)):
        gate_up = comparer.values(num_tokens, 2 * width)
        yield comparer.compare("swiglu", f"{[num_tokens, 2 * width]}", comparer.bound(3), gate_up)
    yield _linear(comparer, 1, 3584, 4608, with_bias=True)
    yield _linear(comparer, 130, 4096, 1024, with_bias=False)


def _linear(comparer: Comparer, num_tokens: int, width: int, num_out: int, with_bias: bool) -> OpCheck:
    x, weight = comparer.values(num_tokens, width), comparer.values(num_out, width)
    bias = comparer.values(num_out) if with_bias else None
    case = f"[{num_tokens}, {width}] x [{width}, {num_out}]" + (" + bias" if with_bias else "")
    return comparer.compare("linear", case, comparer.bound(2), x, weight, bias)


def _check_attention(comparer: Comparer, heads: tuple[int, int, int]) -> Iterator[OpCheck]:
    limits = comparer.ops.validate(*heads, comparer.dtype)
    shape = f"{comparer.dtype_name} heads {heads[0]}/{heads[1]} x {heads[2]}"
    if limits:
        yield OpCheck(comparer.stage, "paged_attention", shape, "skip", detail="; ".join(map(str, limits)))
        return
    for case in attention_cases(comparer.device.default_block_size):
        yield from _check_case(comparer, case, heads)


def _check_case(comparer: Comparer, case: AttentionCase, heads: tuple[int, int, int]) -> Iterator[OpCheck]:
    """store_kv must be exact; attention reads the cache the reference wrote: the two are judged apart."""
    inputs = make_inputs(case, heads, comparer.device.default_block_size, comparer.dtype)
    shape = f"{comparer.dtype_name} {heads[0]}/{heads[1]}x{heads[2]} {case.name}"
    target = comparer.device.torch_device
    untouched = inputs.to(target, comparer.dtype, None)
    reference.store_kv(inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.meta.slot_mapping)

    def stored() -> float:
        own = untouched
        comparer.ops.store_kv(own.k, own.v, own.k_cache, own.v_cache, own.meta.slot_mapping)
        pairs = ((own.k_cache, inputs.k_cache), (own.v_cache, inputs.v_cache))
        return max(relative_error(found[1:], wanted[1:]) for found, wanted in pairs)  # block 0 may hold anything

    def attended() -> float:
        placed = inputs.to(target, comparer.dtype, comparer.ops.make_mask(target))
        scale = heads[2] ** -0.5
        wanted = reference.paged_attention(inputs.q, inputs.k_cache, inputs.v_cache, inputs.meta, scale)
        found = comparer.ops.paged_attention(placed.q, placed.k_cache, placed.v_cache, placed.meta, scale)
        return relative_error(found[: inputs.num_live], wanted[: inputs.num_live])

    yield comparer.check("store_kv", shape, 0.0, stored)
    yield comparer.check("paged_attention", shape, comparer.bound(4), attended)


def _check_quantized(comparer: Comparer) -> Iterator[OpCheck]:
    """Activations in int8, with a scale a token and with one for all tokens; weights of 8 bits, and of 4 in groups."""
    for num_tokens, width, num_out in ((1, 3584, 512), (32, 4096, 1024)):
        generator, case = comparer.generator, f"[{num_tokens}, {width}] x [{width}, {num_out}]"
        x, bias = comparer.values(num_tokens, width), comparer.values(num_out)
        x[0, 5] = 60.0  # an outlier as activations have them
        codes, act_scale = reference.quantize_per_token(x)
        weight = torch.randint(-127, 128, (num_out, width), dtype=torch.int8, generator=generator)
        scale = torch.rand(num_out, generator=generator) * 1e-3 + 1e-4
        product = (weight, scale, bias)
        yield comparer.compare("quantize_per_token", case, CODE_STEP, x)
        yield comparer.compare("int8_weight_matmul", case, comparer.bound(3), x, *product)
        yield comparer.compare("int8_matmul", case, comparer.bound(2), codes, act_scale, *product, torch.float32)
        step, offset = torch.tensor([0.05]), torch.tensor([3.0])
        codes = reference.quantize_static(x, step, offset)
        whole = torch.randint(-1000, 1000, (num_out,), dtype=torch.int32, generator=generator)
        product = (weight, scale, whole)
        yield comparer.compare("quantize_static", case, CODE_STEP, x, step, offset)
        yield comparer.compare("int8_static_matmul", case, comparer.bound(2), codes, *product, torch.float32)
        small = torch.randint(-8, 8, (num_out, width), dtype=torch.int8, generator=generator)
        scale = torch.rand(num_out, width // 128, generator=generator) * 1e-2 + 1e-3
        zero = torch.randint(-8, 8, scale.shape, generator=generator).float()
        yield comparer.compare("int4_weight_matmul", case, comparer.bound(4), x, small, scale, zero, bias)


def _check_fused_int8(comparer: Comparer) -> Iterator[OpCheck]:
    """What a table quantises inside another operator."""
    allowed = CODE_STEP + comparer.bound(3)
    # A fault of small shapes was mended in some releases: one token and few columns are among the cases.
    for num_tokens, width in ((1, 3584), (1, 64), (33, 4096)) if hasattr(comparer.ops, "add_rms_norm_quantize") else ():
        x, residual = comparer.values(num_tokens, width), comparer.values(num_tokens, width)
        arguments = (x, residual, comparer.values(width), 1e-6)
        yield comparer.compare("add_rms_norm_quantize", f"{[num_tokens, width]}", allowed, *arguments)
    for num_tokens, width in ((1, 18944), (1, 64), (33, 12288)) if hasattr(comparer.ops, "swiglu_quantize") else ():
        gate_up = comparer.values(num_tokens, 2 * width)
        yield comparer.compare("swiglu_quantize", f"{[num_tokens, 2 * width]}", allowed, gate_up)


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
