"""What every process of a distributed engine is told: which model, how, and how many of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ReplicaPlan:
    """`replicas` copies of a model, each split over `tensor_parallel` cards. Plain values: it travels between hosts."""

    model_path: str
    tokenizer_path: str
    device: str  # as given by the user: auto, cpu, npu, ...
    seed: int
    settings: dict[str, Any]  # keyword arguments of EngineCore
    replicas: int
    tensor_parallel: int
