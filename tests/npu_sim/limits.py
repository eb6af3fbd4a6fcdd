"""How the simulated kernels refuse what the operators' documents exclude."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

LIBRARY = Library("npu", "IMPL", "CPU")
HALF = (torch.float16, torch.bfloat16)
FLOAT = (*HALF, torch.float32)


class LimitError(RuntimeError):
    """A documented limit of an operator was exceeded."""


def require(condition: bool, operator: str, what: str) -> None:
    """Raise LimitError unless `condition` holds."""
    if not condition:
        raise LimitError(f"{operator}: {what}")


def check_contiguous(operator: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.is_contiguous(),
            operator,
            f"{name} must be contiguous, is {tuple(tensor.shape) if tensor is not None else ()} with strides "
            f"{tensor.stride() if tensor is not None else ()}",
        )


def check_dtype(operator: str, allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.dtype in allowed,
            operator,
            f"{name} is {tensor.dtype if tensor is not None else None}, allowed {allowed}",
        )
