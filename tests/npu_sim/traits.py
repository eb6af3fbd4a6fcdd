"""What an operator means to the simulation: does it wait for the device, can it be recorded, what moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Run by torch_npu itself: they allocate or describe, and launch no kernel.
NATIVE = frozenset(
    {
        "aten::empty",
        "aten::empty_strided",
        "aten::empty_like",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::set_",
        "aten::_reshape_alias",
        "aten::resize_",
        "aten::_unsafe_view",
        "aten::record_stream",
        "aten::is_pinned",
        "aten::_pin_memory",
        "npu::get_npu_format",
    }
)
# Host-side helpers of graph capture: they return memory of the right size.
ALLOCATING = frozenset(
    {"npu::_npu_fused_infer_attention_score_get_max_workspace", "npu::_npu_fused_infer_attention_score_infer_output"}
)
# The host needs the result's value or size before it can go on.
SYNCHRONISING = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
        "aten::is_nonzero",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::item",
        "aten::bincount",
    }
)
RANDOM = frozenset(
    {
        "aten::random_",
        "aten::normal_",
        "aten::uniform_",
        "aten::exponential_",
        "aten::bernoulli",
        "aten::bernoulli_",
        "aten::multinomial",
        "aten::rand",
        "aten::randn",
        "aten::randint",
        "aten::randperm",
        "aten::rand_like",
        "aten::randn_like",
        "aten::randint_like",
        "aten::native_dropout",
        "aten::geometric_",
        "aten::cauchy_",
        "aten::log_normal_",
        "aten::normal",
    }
)
# Positions of arguments that come back as results, where the shape function describes new tensors instead.
RETURNS_ARGUMENTS = {"npu::npu_apply_rotary_pos_emb": (0, 1)}
# Kernels that understand the FRACTAL_NZ storage of a weight.
READS_FRACTAL_NZ = frozenset(
    {
        "npu::npu_quant_matmul",
        "npu::npu_format_cast",
        "npu::npu_format_cast_",
        "npu::get_npu_format",
        "aten::detach",
        "aten::alias",
    }
)

_ROWS_READ = frozenset({"aten::index_select", "aten::embedding", "aten::gather", "aten::index"})
_ROWS_WRITTEN = frozenset(
    {"npu::npu_scatter_nd_update_", "aten::index_copy_", "aten::index_put_", "aten::scatter_", "aten::index_copy"}
)


def is_synchronising(name: str, args: tuple) -> bool:
    """Also true for indexing with a boolean mask, which has to count its true entries."""
    if name in ("aten::index", "aten::index_put_"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1] or ())
    if name == "aten::repeat_interleave":  # with a number of repeats the size is known
        return len(args) == 1 or isinstance(args[1], Tensor)
    return name in SYNCHRONISING


def bytes_moved(name: str, args: tuple, kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes a kernel must read and write, each tensor once; gathers and scatters touch rows only."""
    if name.startswith("npu::npu_fused_infer_attention_score"):
        return _attention(args, kwargs, outputs)
    if name == "npu::npu_scatter_pa_kv_cache":
        return 2 * (_size(args[0]) + _size(args[1])) + _size(args[4])
    if name in _ROWS_READ:
        return 2 * sum(map(_size, outputs)) + sum(_size(t) for t in inputs if not t.is_floating_point())
    if name in _ROWS_WRITTEN:
        return 2 * min(map(_size, inputs[1:]), default=0) + sum(_size(t) for t in inputs[1:] if t.numel())
    return sum(map(_size, inputs)) + sum(map(_size, outputs))


def _attention(args: tuple, kwargs: dict[str, Any], outputs: list[Tensor]) -> int:
    query, key = args[0], args[1]
    lengths = kwargs.get("actual_seq_lengths_kv") or []
    row_bytes = key.shape[-1] * key.element_size()
    if key.dim() == 3 and kwargs.get("block_table") is not None:
        return _size(query) * 2 + 2 * sum(lengths) * row_bytes + _size(kwargs["block_table"])
    return _size(query) * 2 + 2 * _size(key)


def _size(tensor: Tensor) -> int:
    """Bytes touched: a dimension of stride 0 is read once."""
    distinct = 1
    for length, stride in zip(tensor.size(), tensor.stride(), strict=True):
        distinct *= length if stride else 1
    return distinct * tensor.element_size()


def has_kernel(func: Any, key: str) -> bool:
    """Whether an operator has its own kernel for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


Check = Callable[..., None]
CHECKS: dict[str, Check] = {}


def checks(*names: str) -> Callable[[Check], Check]:
    """Register a check of everything but values: layout, dtype, shapes, host lists. Also run at capture."""

    def register(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


def tensors_in(tree: Iterable[Any]) -> list[Tensor]:
    """Distinct tensors of a flat sequence, in order."""
    found: dict[int, Tensor] = {id(x): x for x in tree if isinstance(x, Tensor)}
    return list(found.values())
