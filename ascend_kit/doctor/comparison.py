"""What the self-test compares and how: attention steps over random caches, relative errors, bounds from roundings.

T packed tokens, N query heads, K KV heads, H head size, S tokens per KV block.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ascend_kit.device.advice import explain
from ascend_kit.device.device import Device
from ascend_kit.device.ops import FUSED, AttentionMeta, reference
from ascend_kit.doctor.findings import OpCheck

KEPT_IN_FLOAT32 = ("act_scale", "weight_scale", "dequantization", "scale", "offset", "zero")
# Operators over weights of a form that the table chooses: what makes it, and out of which arguments.
PACKS = {
    "linear": ("pack_linear", "weight"),
    "int8_matmul": ("pack_int8", "weight"),
    "int8_weight_matmul": ("pack_int8_weight", "weight"),
    "int8_static_matmul": ("pack_int8_static", "weight"),
    "int4_weight_matmul": ("pack_int4", "weight", "scale", "zero"),
}
# Name of a dtype and its rounding.
ROUNDING = {torch.float32: ("fp32", 2**-23), torch.bfloat16: ("bf16", 2**-8), torch.float16: ("fp16", 2**-11)}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value, of int8 codes over 127; infinite for a NaN or another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    if wanted.dtype == torch.int8:
        return (found.cpu().int() - wanted.int()).abs().max().item() / 127
    difference = (found.detach().cpu().float() - wanted.float()).abs().max().item()
    return float("inf") if math.isnan(difference) else difference / max(wanted.float().abs().max().item(), 1e-30)


class Comparer:
    """Runs comparisons of one op table on one device in one dtype, turning exceptions into failed results."""

    def __init__(self, device: Device, ops: ModuleType, stage: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.ops, self.stage, self.dtype = device, ops, stage, dtype
        self.dtype_name, self._rounding = ROUNDING[dtype]
        self.generator = torch.Generator().manual_seed(0)

    def bound(self, roundings: int) -> float:
        """Allowed error after so many roundings; float32 gets room for another summation order."""
        return max(roundings * self._rounding, 2e-5 if self.dtype == torch.float32 else 0.0)

    def values(self, *shape: int) -> Tensor:
        """Normal values rounded to the dtype, as float32 on the CPU."""
        return torch.randn(*shape, generator=self.generator).to(self.dtype).float()

    def compare(self, op: str, case: str, tolerance: float, *arguments: Any) -> OpCheck:
        """An operator of the table beside the reference's, which gets the same arguments in float32.

        On the device floats are of the dtype, but for scales and the like, and so is what the caller asks for (a dtype
        among the arguments). Of a fused operator the codes times their scale are compared with what was to be rounded.
        """
        plain_op = FUSED[op][0] if op in FUSED else op
        plain = dict(zip(inspect.signature(getattr(reference, plain_op)).parameters, arguments, strict=False))

        def placed(name: str, value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                kept = torch.float32 if name in KEPT_IN_FLOAT32 else self.dtype
                return value.to(self.device.torch_device, kept, copy=True)
            if isinstance(value, Tensor):
                return value.to(self.device.torch_device, copy=True)
            return self.dtype if isinstance(value, torch.dtype) else value

        def error() -> float:
            wanted = _tuple(_call(reference, plain_op, plain))
            found = _tuple(_call(self.ops, op, {name: placed(name, value) for name, value in plain.items()}))
            if op in FUSED:
                codes, scale, *others = found
                found = (codes.cpu().float() * scale.cpu().unsqueeze(-1), *others)
            return max(relative_error(*pair) for pair in zip(found, wanted, strict=True))

        return self.check(op, f"{self.dtype_name} {case}", tolerance, error)

    def check(self, op: str, case: str, tolerance: float, measure: Callable[[], float]) -> OpCheck:
        """`measure` returns the error; ok when it is within `tolerance`."""
        start = time.perf_counter()
        try:
            error = measure()
            self.device.synchronize()
        except Exception as failure:  # any refusal of a kernel is a result of this test, to be shown with the others
            known = explain(str(failure))
            text = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            detail = f"{text} [{known[0].key}: {known[0].meaning}]" if known else text
            return OpCheck(self.stage, op, case, "fail", None, tolerance, time.perf_counter() - start, detail)
        status = "ok" if error <= tolerance else "fail"
        return OpCheck(self.stage, op, case, status, error, tolerance, time.perf_counter() - start)


def _call(table: ModuleType, op: str, arguments: dict[str, Any]) -> Any:
    """The operator's result, over a weight in the form that the table wants."""
    if op in PACKS:
        name, *parts = PACKS[op]
        packed = getattr(table, name)(*(arguments[part] for part in parts))
        arguments = arguments | dict(zip(parts, _tuple(packed), strict=True))
    return getattr(table, op)(*arguments.values())


def _tuple(result: Any) -> tuple:
    return result if isinstance(result, tuple) else (result,)


# Query heads, KV heads, head size of Qwen2.5-7B, Qwen3-8B and Qwen2.5-0.5B (GQA with heads of 64).
HEADS = ((28, 4, 128), (32, 8, 128), (14, 2, 64))


@dataclass(frozen=True)
class AttentionCase:
    """Requests of one step as (new tokens, KV length with them), and rows of padding behind them."""

    name: str
    requests: tuple[tuple[int, int], ...]
    num_dead: int = 0

    @property
    def is_decode(self) -> bool:
        return all(new == 1 for new, _ in self.requests)


def attention_cases(block: int) -> tuple[AttentionCase, ...]:
    """Prefill, chunks behind a prefix, decode across block limits, padding rows, a wide batch."""
    ragged = (1, 2, block - 1, block, block + 1, 2 * block, 3 * block + 7)
    return (
        AttentionCase("prefill", ((5, 5), (block + 2, block + 2), (2 * block + 1, 2 * block + 1))),
        AttentionCase("chunked prefill with prefix", ((72, block + 72), (1, block + 1), (block, 3 * block), (17, 40))),
        AttentionCase("decode, lengths across block limits", tuple((1, length) for length in ragged)),
        AttentionCase("decode with dead rows", tuple((1, length) for length in ragged[2:5]), num_dead=2),
        AttentionCase("decode, 64 requests", tuple((1, 1 + 37 * row % (4 * block)) for row in range(64))),
    )


@dataclass
class AttentionInputs:
    """Tensors of a case: q [T, N, H], this step's k and v [T, K, H], caches [blocks, S, K, H], the meta."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMeta
    num_live: int

    def to(self, device: torch.device, dtype: torch.dtype, mask: Tensor | None) -> AttentionInputs:
        """Copies on a device, even from there: an operator must not write into what it is compared with."""
        floats = ("q", "k", "v", "k_cache", "v_cache")
        integers = ("slot_mapping", "block_table", "context_lens_t")
        meta = {name: getattr(self.meta, name).to(device, copy=True) for name in integers}
        tensors = {name: getattr(self, name).to(device, dtype, copy=True) for name in floats}
        return replace(self, meta=replace(self.meta, mask=mask, **meta), **tensors)


def make_inputs(case: AttentionCase, heads: tuple[int, int, int], block: int, dtype: torch.dtype) -> AttentionInputs:
    """Random caches, blocks handed out in random order, values rounded to `dtype` (kept as float32)."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads, head_size = heads
    counts = [-(-length // block) for _, length in case.requests]
    ids = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    table = torch.zeros(len(counts) + case.num_dead, max(counts), dtype=torch.int32)
    slots: list[int] = []
    for row, ((new, length), count) in enumerate(zip(case.requests, counts, strict=True)):
        own, ids = ids[:count], ids[count:]
        table[row, :count] = torch.tensor(own, dtype=torch.int32)
        slots += [own[position // block] * block + position % block for position in range(length - new, length)]
    slots += range(case.num_dead)  # block 0 is nobody's; each dead row has a slot of its own there
    news, lengths = map(list, zip(*case.requests, *[(1, 1)] * case.num_dead, strict=True))
    meta = AttentionMeta(
        slot_mapping=torch.tensor(slots, dtype=torch.int32),
        block_table=table,
        cu_seqlens_q=torch.tensor(news).cumsum(0).tolist(),
        context_lens=lengths,
        context_lens_t=torch.tensor(lengths, dtype=torch.int32),
        block_size=block,
        is_decode=case.is_decode,
    )

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).float()

    num_tokens, num_blocks = sum(news), sum(counts) + 1
    return AttentionInputs(
        values(num_tokens, num_heads, head_size),
        values(num_tokens, num_kv_heads, head_size),
        values(num_tokens, num_kv_heads, head_size),
        values(num_blocks, block, num_kv_heads, head_size),
        values(num_blocks, block, num_kv_heads, head_size),
        meta,
        num_tokens - case.num_dead,
    )
