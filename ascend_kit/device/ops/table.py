"""The op table: the few operators a decoder needs, under our own names, with one implementation per back-end.

An implementation is a module with the functions of `OPS`. `select_ops` picks one when an engine starts; nobody asks
again. `reference` is plain torch, runs on any device and defines what is correct. Layout and dtype changes a kernel
wants happen inside its module.

Besides the functions a module states two facts: MERGED_QKV, whether q, k and v are better one product than three, and
HOST_LENGTHS, whether its attention takes the lengths as host lists, which a captured graph then has to be told anew.
A table may have functions of `FUSED` as well, which do in one kernel what two of `OPS` define; layers use them where
they are there. `gather_rows` reads what `pack_linear` returns, so that a tied head and embedding are one tensor.
On a CPU with a C++ compiler the fused table is `cpu_native`, else `cpu`, which also serves a GPU (its decode attention
fits into a CUDA graph); RECORDS says of its tables whether a decode
step can be recorded: plain attention would read the whole block table, whatever the lengths.

Shape letters: T packed tokens, N query heads, K KV heads, H head size, D hidden, F feed-forward, B sequences,
S tokens per KV block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor

from ascend_kit.messages import did_you_mean

OPS = (
    "rms_norm", "add_rms_norm", "rotary", "swiglu", "store_kv", "paged_attention", "linear", "pack_linear",
    "quantize_per_token", "int8_matmul", "int8_weight_matmul", "gather_rows", "argmax", "pack_int8",
    "pack_int8_weight", "make_mask", "validate", "split_columns", "quantize_static", "int8_static_matmul",
    "pack_int8_static", "int4_weight_matmul", "pack_int4",
)  # fmt: skip
FUSED = {
    "add_rms_norm_quantize": ("add_rms_norm", "quantize_per_token"),
    "swiglu_quantize": ("swiglu", "quantize_per_token"),
}
# What goes to the plain definition together with an operator, because the two share a layout or a fact.
_TOGETHER = {
    "linear": ("pack_linear", "gather_rows"),
    "gather_rows": ("linear", "pack_linear"),
    "int8_matmul": ("pack_int8",),
    "int8_weight_matmul": ("pack_int8_weight",),
    "int8_static_matmul": ("pack_int8_static",),
    "int4_weight_matmul": ("pack_int4",),
    "paged_attention": ("make_mask", "validate", "HOST_LENGTHS"),
}
PLAIN_OPS = tuple(name for name in (*OPS, *FUSED) if not name.startswith(("pack_", "make_", "validate")))


@dataclass
class AttentionMeta:
    """Where the tokens of one step live in the KV cache. Padding rows point into block 0, which no request owns."""

    slot_mapping: Tensor  # [T] int32: block id * S + offset
    block_table: Tensor  # [B, max_blocks] int32, unused entries 0
    cu_seqlens_q: list[int]  # cumulative query ends without the leading 0; the last one equals T
    context_lens: list[int]  # KV length of each sequence, this step's tokens included
    context_lens_t: Tensor  # [B] int32, the same on the device: what a captured graph reads
    block_size: int
    is_decode: bool  # every sequence has exactly one query token
    mask: Tensor | None = None  # the back-end's shared mask, from make_mask
    # Sequence and position of each token, [T] int32 each: in a captured step with prompts, where plain attention cannot
    # read the lists.
    packed: tuple[Tensor, Tensor] | None = None


def select_ops(device_kind: str, fused: bool, plain_ops: Sequence[str] = ()) -> ModuleType:
    """The op table of a device kind ("cpu", "cuda", "npu"): its fused kernels, or the plain reference.

    `plain_ops` names operators that keep their plain definition although the others are fused. ValueError names what
    is unknown, and what is allowed.
    """
    for name in plain_ops:
        if name not in PLAIN_OPS:
            meant = did_you_mean(name, PLAIN_OPS)
            raise ValueError(f"plain_ops: no operator {name!r}{meant}; allowed: {', '.join(PLAIN_OPS)}")
    if not fused:
        return import_module("ascend_kit.device.ops.reference")
    if device_kind not in ("cpu", "cuda", "npu"):
        raise ValueError(f"no operator table for device kind {device_kind!r}; allowed: cpu, cuda, npu")
    if device_kind == "cpu" and import_module("ascend_kit.device.ops.native").library() is not None:
        device_kind = "cpu_native"
    elif device_kind == "cuda":  # torch's kernels as on a CPU, but its int8 product wants more than 16 rows there
        device_kind, plain_ops = "cpu", (*plain_ops, "int8_matmul")
    table = import_module(f"ascend_kit.device.ops.{device_kind}")
    return _with_plain(table, plain_ops) if plain_ops else table


def _with_plain(table: ModuleType, plain_ops: Sequence[str]) -> ModuleType:
    """A copy of a table with some operators replaced by the reference's, and fused ones by the two they consist of."""
    reference = import_module("ascend_kit.device.ops.reference")
    mixed = ModuleType(f"{table.__name__} without {', '.join(sorted(plain_ops))}", table.__doc__)
    split = {name for name, parts in FUSED.items() if {name, *parts} & set(plain_ops)}
    facts = ("MERGED_QKV", "HOST_LENGTHS", "RECORDS", "prompt_attention")
    kept = [name for name in (*OPS, *FUSED, *facts) if hasattr(table, name) and name not in split]
    vars(mixed).update({name: getattr(table, name) for name in kept})
    for name in {other for op in plain_ops if op not in FUSED for other in (op, *_TOGETHER.get(op, ()))}:
        setattr(mixed, name, getattr(reference, name))
    if "paged_attention" in plain_ops:
        vars(mixed).pop("prompt_attention", None)
        vars(mixed).update({"RECORDS": False} if hasattr(table, "RECORDS") else {})
    return mixed
