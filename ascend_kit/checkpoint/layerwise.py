"""Runs a checkpoint's decoder in float32 one layer at a time, so that a model of any size can be studied.

Only one layer's weights are in memory. What is carried from layer to layer are hidden states [T, D] of
packed texts, one set per variant of the model. The layers are the engine's own; operators are the plain
reference, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.tensor_jobs import Quantizer, ScaleChange
from ascend_kit.device.ops import AttentionMeta, reference
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.decoder import DecoderLayer, Linear, RMSNorm, Rotary, SideBySide, build_layer
from ascend_kit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, layer_prefix, layer_tensors

BLOCK_SIZE = 32
HEAD_ROWS = 8192  # vocabulary rows of the output head in memory at once
LinearMaker = Callable[[str, Tensor, Tensor | None], nn.Module]  # name, weight [out, in], bias


class Emulated(nn.Module):
    """A quantised linear in float32 arithmetic: a rounded weight, and inputs rounded by `round_inputs`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, round_inputs: Callable[[Tensor], Tensor] | None):
        super().__init__()
        self.weight, self.bias, self.round_inputs = weight, bias, round_inputs

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.round_inputs(x) if self.round_inputs else x, self.weight, self.bias)


def round_per_token(x: Tensor) -> Tensor:
    """x as int8 with a scale per row holds it."""
    codes, scale = reference.quantize_per_token(x)
    return codes.float() * scale.unsqueeze(-1)


def plain_linear(_name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The linear as it is."""
    return Linear(weight, bias, reference)


class LayerwiseModel:
    """A checkpoint whose layers are built, used and dropped one after another.

    `changes` are applied to weights as they are read (smoothing that is folded into them).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        changes: Mapping[str, ScaleChange] | None = None,
        quantizer: Quantizer | None = None,
    ):
        self.checkpoint, self.config, self.device = checkpoint, config, torch.device(device)
        self.changes, self.quantizer = changes or {}, quantizer or Quantizer()
        self._head: Tensor | None = None

    def quantized_linear(self, schemes: Mapping[str, str]) -> LinearMaker:
        """A maker that rounds the linears named in `schemes` and leaves the others."""

        def make(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
            if name not in schemes:
                return plain_linear(name, weight, bias)
            rounded = self.quantizer.rounded(name, weight.cpu(), schemes[name]).to(weight.device)
            return Emulated(rounded, bias, round_per_token if schemes[name] == "w8a8" else None)

        return make

    def weight(self, name: str) -> Tensor:
        """A tensor in float32 on the device, dequantised and changed where that applies."""
        tensor = self.checkpoint.dequantized(name).read().float()
        if name in self.changes:
            tensor = self.changes[name](tensor, 0, tensor.shape[0])
        return tensor.to(self.device)

    def layer_weights(self, number: int) -> dict[str, Tensor]:
        """float32 tensors of one layer, by their full names."""
        names = [layer_prefix(number) + name for name in layer_tensors(self.config)]
        return {name: self.weight(name) for name in names}

    def build_layer(self, number: int, weights: Mapping[str, Tensor], make: LinearMaker = plain_linear) -> DecoderLayer:
        """The engine's decoder layer, each linear made by `make`."""

        def each(names: Sequence[str]) -> list[nn.Module]:
            return [make(name, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in names]

        def joined(names: Sequence[str]) -> nn.Module:
            parts = each(names)
            return parts[0] if len(parts) == 1 else SideBySide(parts)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights[f"{name}.weight"], self.config.rms_norm_eps, reference)

        return build_layer(
            self.config, number, qkv=each, linear=joined, norm=norm, ops=reference, parallel=TensorParallel()
        )

    def stored_layer(self, number: int) -> DecoderLayer:
        """A layer that computes what the files say: quantised linears in the arithmetic of their scheme."""
        info, weights = self.checkpoint.quantization, self.layer_weights(number)

        def make(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
            scheme = info.scheme(name)
            if scheme != "w8a8_static":
                return Emulated(weight, bias, round_per_token if scheme == "w8a8" else None)
            scale, offset = (
                self.checkpoint.read(f"{name}.input_{part}").to(self.device) for part in ("scale", "offset")
            )
            return Emulated(
                weight, bias, lambda x: (reference.quantize_static(x, scale, offset).float() - offset) * scale
            )

        return self.build_layer(number, weights, make)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """float32 [T, D]; only the rows that occur are read."""
        source = self.checkpoint.source(EMBEDDING)
        distinct = sorted(set(token_ids))
        rows = torch.cat([source.read_slice(0, token, token + 1) for token in distinct]).float()
        position = {token: row for row, token in enumerate(distinct)}
        return rows[[position[token] for token in token_ids]].to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] after the last layer -> float32 [T, V]."""
        if self._head is None:
            # A float head is kept as stored: it is the largest matrix, of which blocks are widened where they are used.
            name = EMBEDDING if self.config.tie_embeddings else HEAD
            self._head = self.checkpoint.dequantized(name).read().to(self.device)
        normed = reference.rms_norm(hidden, self.weight(FINAL_NORM), self.config.rms_norm_eps)
        return torch.cat([normed @ rows.float().t() for rows in self._head.split(HEAD_ROWS)], dim=-1)


class PackedTexts:
    """Token ids of several texts, with what attention needs to keep them apart."""

    def __init__(self, texts: Sequence[Sequence[int]], model: LayerwiseModel):
        config, device = model.config, model.device
        self.lengths = [len(text) for text in texts]
        self.token_ids = [token for text in texts for token in text]
        blocks = [(length + BLOCK_SIZE - 1) // BLOCK_SIZE for length in self.lengths]
        table = torch.zeros(len(texts), max(blocks), dtype=torch.int32)
        slots, first = [], 1  # block 0 is scratch everywhere in the engine
        for row, (length, count) in enumerate(zip(self.lengths, blocks, strict=True)):
            table[row, :count] = torch.arange(first, first + count)
            slots.append(torch.arange(length) + first * BLOCK_SIZE)
            first += count
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        self.meta = AttentionMeta(
            torch.cat(slots).int().to(device),
            table.to(device),
            ends,
            self.lengths,
            torch.tensor(self.lengths, dtype=torch.int32, device=device),
            BLOCK_SIZE,
            False,
        )
        shape = (first, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.cache = (torch.zeros(shape, device=device), torch.zeros(shape, device=device))
        rotary = Rotary(config, max(self.lengths), torch.float32, device, reference)
        self.cos, self.sin = rotary(torch.cat([torch.arange(length) for length in self.lengths]).to(device))

    def forward(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        """One layer on the residual stream [T, D]; the KV cache is scratch space."""
        out, residual = layer(hidden, None, self.cos, self.sin, self.meta, self.cache)
        return out + residual

    @property
    def targets(self) -> tuple[list[int], list[int]]:
        """(rows that have a next token, that token) over all texts."""
        rows, tokens, start = [], [], 0
        for length in self.lengths:
            rows += range(start, start + length - 1)
            tokens += self.token_ids[start + 1 : start + length]
            start += length
        return rows, tokens
