"""Tensors made out of parts of others: rows below each other, columns side by side, every other row, equal copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource, check_slice
from ascend_kit.model.config import ModelConfig


class _ByRows:
    """A tensor of which any rows can be had alone; slices of other dimensions are cut out of the whole."""

    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        return self._rows(0, self.shape[0])

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        check_slice("made of parts", self.shape, dim, start, stop)
        return self._rows(start, stop) if dim == 0 else self.read().narrow(dim, start, stop - start).contiguous()

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError


class RowPieces(_ByRows):
    """Rows [start, stop) of several tensors, one below the other."""

    def __init__(self, pieces: Sequence[tuple[TensorSource, int, int]]) -> None:
        self.pieces = [piece for piece in pieces if piece[2] > piece[1]]
        first = pieces[0][0]
        self.dtype, self.origin = first.dtype, first.origin
        self.shape = (sum(stop - start for _, start, stop in pieces), *first.shape[1:])

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        parts, position = [], 0
        for source, first, last in self.pieces:
            low, high = max(start, position), min(stop, position + last - first)
            if low < high:
                parts.append(source.read_slice(0, first + low - position, first + high - position))
            position += last - first
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class ColumnPieces(_ByRows):
    """Tensors [out, in_r] side by side: [out, sum of in_r]."""

    def __init__(self, parts: Sequence[TensorSource]) -> None:
        self.parts, self.dtype, self.origin = parts, parts[0].dtype, parts[0].origin
        self.shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return torch.cat([part.read_slice(0, start, stop) for part in self.parts], dim=1)


class SameOnAllRanks:
    """A tensor that every tensor-parallel rank holds; a difference is an error, found when it is read."""

    def __init__(self, name: str, parts: Sequence[TensorSource]) -> None:
        self.name, self.parts = name, parts
        self.dtype, self.shape, self.origin = parts[0].dtype, parts[0].shape, parts[0].origin

    def read(self) -> torch.Tensor:
        first = self.parts[0].read()
        for part in self.parts[1:]:
            if not torch.equal(first, part.read()):
                raise CheckpointError(
                    f"{part.origin}: {self.name} differs from the copy in {self.origin}; the shards are from "
                    "different checkpoints or are damaged"
                )
        return first

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        check_slice(self.name, self.shape, dim, start, stop)
        return self.read().narrow(dim, start, stop - start).contiguous()


class EveryOtherRow(_ByRows):
    """Rows 0, 2, 4, ... of a tensor, or 1, 3, 5, ...: one of two matrices whose rows alternate."""

    def __init__(self, inner: TensorSource, first: int) -> None:
        self.inner, self.first, self.dtype, self.origin = inner, first, inner.dtype, inner.origin
        self.shape = (inner.shape[0] // 2, *inner.shape[1:])

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_slice(0, 2 * start, 2 * stop)[self.first :: 2].contiguous()


def split_qkv(model: ModelConfig, name: str, parts: Sequence[TensorSource]) -> dict[str, RowPieces]:
    """q, k and v out of a merged tensor of whole KV groups: rows of the group's queries, its key, its value; group
    after group, over all `parts` (tensor ranks)."""
    head, per_group = model.head_dim, model.num_heads // model.num_kv_heads
    group_rows, groups = (per_group + 2) * head, model.num_kv_heads // len(parts)
    for part in parts:
        if part.shape[0] != groups * group_rows or groups * len(parts) != model.num_kv_heads:
            raise CheckpointError(
                f"{part.origin}: {name} has {part.shape[0]} rows; config.json implies {model.num_kv_heads} groups of "
                f"{group_rows} over {len(parts)} tensor ranks"
            )
    spans = {"q": (0, per_group), "k": (per_group, per_group + 1), "v": (per_group + 1, per_group + 2)}
    return {
        letter: RowPieces(
            [
                (part, group * group_rows + first * head, group * group_rows + last * head)
                for part in parts
                for group in range(groups)
            ]
        )
        for letter, (first, last) in spans.items()
    }
