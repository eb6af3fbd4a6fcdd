"""From checkpoint files to a decoder on a device. Merging, slicing for ranks and device layouts happen here, at load,
so that the files stay in the standard Hugging Face form."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ascend_kit.checkpoint.huggingface import Checkpoint, open_checkpoint
from ascend_kit.device.device import Device
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.decoder import Decoder, Embedding
from ascend_kit.model.layers import (
    MLP,
    Attention,
    DecoderLayer,
    Int8Linear,
    Int8WeightLinear,
    Linear,
    RMSNorm,
    Rotary,
    StackedLinear,
)

COLUMN, ROW = 0, 1  # which dimension of [out, in] is split over ranks


def load_decoder(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: Device,
    ops: ModuleType,
    max_positions: int,
    parallel: TensorParallel | None = None,
) -> Decoder:
    """Read this rank's part of a Hugging Face checkpoint into a decoder.

    ValueError names the limit when a head count, group count or width does not divide over the ranks, or when the
    op table cannot run the model's shapes.
    """
    parallel = parallel or TensorParallel()
    problems = ops.validate(
        config.num_heads // parallel.size, max(1, config.num_kv_heads // parallel.size), config.head_dim, dtype
    )
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(problems))
    return _Loader(open_checkpoint(folder), config, dtype, device, ops, parallel).decoder(max_positions)


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        device: Device,
        ops: ModuleType,
        parallel: TensorParallel,
    ):
        self.checkpoint, self.config, self.dtype = checkpoint, config, dtype
        self.target, self.ops, self.parallel = device.torch_device, ops, parallel
        heads = parallel.span(config.num_heads, "num_attention_heads")
        groups = parallel.span(config.num_kv_heads, "num_key_value_heads")
        self.q_rows = (heads[0] * config.head_dim, heads[1] * config.head_dim)
        self.kv_rows = (groups[0] * config.head_dim, groups[1] * config.head_dim)
        self.ffn_rows = parallel.span(config.intermediate_size, "intermediate_size")

    def decoder(self, max_positions: int) -> Decoder:
        config = self.config
        embedding = Embedding(
            self._float("model.embed_tokens.weight", 1, self.parallel.span(config.hidden_size, "hidden_size")),
            self.ops,
            self.parallel,
        )
        layers = [self._layer(f"model.layers.{number}") for number in range(config.num_layers)]
        rotary = Rotary(config, max_positions, self.dtype, self.target, self.ops)
        return Decoder(
            config, embedding, layers, self._norm("model.norm"), self._head(embedding), rotary, self.parallel
        ).eval()

    def _layer(self, name: str) -> DecoderLayer:
        attention = f"{name}.self_attn"
        rows = (self.q_rows, self.kv_rows, self.kv_rows)
        parts = [(f"{attention}.{part}_proj", span) for part, span in zip("qkv", rows, strict=True)]
        qkv = nn.ModuleList(self._qkv(parts))
        norms = [self._norm(f"{attention}.{part}_norm") if self.config.qk_norm else None for part in "qk"]
        out = self._rows(f"{attention}.o_proj", self.q_rows)
        gate_up = self._columns([(f"{name}.mlp.{part}_proj", self.ffn_rows) for part in ("gate", "up")])
        down = self._rows(f"{name}.mlp.down_proj", self.ffn_rows)
        return DecoderLayer(
            self._norm(f"{name}.input_layernorm"),
            Attention(self.config, qkv, out, *norms, self.ops, self.parallel),
            self._norm(f"{name}.post_attention_layernorm"),
            MLP(gate_up, down, self.ops, self.parallel),
        )

    def _qkv(self, parts: list[tuple[str, tuple[int, int]]]) -> list[nn.Module]:
        """One product; or q beside k and v stacked, for kernels that want contiguous results; or three."""
        if self.ops.MERGED_QKV and self._same_scheme(parts):
            return [self._columns(parts)]
        if not self.ops.MERGED_QKV and not any(
            self.checkpoint.quantization.scheme(name) != "none" for name, _ in parts
        ):
            pair = [(self._float(f"{name}.weight", COLUMN, span), self._bias(name, span)) for name, span in parts[1:]]
            return [self._columns(parts[:1]), StackedLinear(*map(list, zip(*pair, strict=True)))]
        return [self._columns([part]) for part in parts]

    def _head(self, embedding: Embedding) -> nn.Module:
        if not self.config.tie_embeddings and "lm_head.weight" in self.checkpoint:
            return self._columns([("lm_head", self.parallel.span(self.config.vocab_size, "vocab_size"))])
        if self.parallel.size == 1:
            head = Linear(embedding.weight.data, None, self.ops)
            embedding.weight = head.weight  # tied: one matrix for both, in the form that products want
            return head
        span = self.parallel.span(self.config.vocab_size, "vocab_size")
        return Linear(self._float("model.embed_tokens.weight", 0, span), None, self.ops)

    def _norm(self, name: str) -> RMSNorm:
        weight = self.checkpoint.read(f"{name}.weight").to(self.target, self.dtype)
        return RMSNorm(weight, self.config.rms_norm_eps, self.ops)

    def _same_scheme(self, parts: list[tuple[str, tuple[int, int]]]) -> bool:
        return len({self.checkpoint.quantization.scheme(name) for name, _ in parts}) == 1

    def _columns(self, parts: list[tuple[str, tuple[int, int]]]) -> nn.Module:
        """Linears split by output rows and joined into one product; gate and up of unlike schemes are dequantised."""
        schemes = {self.checkpoint.quantization.scheme(name) for name, _ in parts}
        scheme = schemes.pop() if len(schemes) == 1 else "none"
        loaded = [self._part(name, COLUMN, span, scheme) for name, span in parts]
        biases = [self._bias(name, span) for name, span in parts]
        bias = None if biases[0] is None else torch.cat(biases)
        return self._linear(torch.cat([weight for weight, _ in loaded]), [scale for _, scale in loaded], bias, scheme)

    def _rows(self, name: str, span: tuple[int, int]) -> nn.Module:
        """A linear split by input columns; the bias is added once, on rank 0."""
        scheme = self.checkpoint.quantization.scheme(name)
        weight, scale = self._part(name, ROW, span, scheme)
        bias = self._bias(name, None) if self.parallel.rank == 0 else None
        return self._linear(weight, [scale], bias, scheme)

    def _linear(self, weight: Tensor, scales: list[Tensor | None], bias: Tensor | None, scheme: str) -> nn.Module:
        if scheme == "none":
            return Linear(weight, bias, self.ops)
        kind = Int8Linear if scheme == "w8a8" else Int8WeightLinear
        return kind(weight, torch.cat([scale.reshape(-1) for scale in scales]), bias, self.ops)

    def _part(self, name: str, dim: int, span: tuple[int, int], scheme: str) -> tuple[Tensor, Tensor | None]:
        """(weight, scale) of one linear: float weight and None, or int8 codes and the scale of its output rows."""
        info = self.checkpoint.quantization
        stored = info.scheme(name)
        if stored == "none":
            return self._float(f"{name}.weight", dim, span), None
        codes = self._read(info.weight_name(name), dim, span)
        scale_name = info.scale_name(name)
        scale = self._read(scale_name, 0, span) if dim == COLUMN else self.checkpoint.read(scale_name)
        codes, scale = codes.to(self.target), scale.to(self.target).float()
        if scheme != "none":
            return codes, scale
        return (codes.float() * scale.reshape(-1, 1)).to(self.dtype), None

    def _bias(self, name: str, span: tuple[int, int] | None) -> Tensor | None:
        bias = f"{name}.bias"
        if bias not in self.checkpoint:
            return None
        tensor = self.checkpoint.read(bias) if span is None else self._read(bias, 0, span)
        return tensor.to(self.target, self.dtype)

    def _float(self, name: str, dim: int, span: tuple[int, int]) -> Tensor:
        return self._read(name, dim, span).to(self.target, self.dtype)

    def _read(self, name: str, dim: int, span: tuple[int, int]) -> Tensor:
        """Only this rank's part is read from disk."""
        if self.parallel.size == 1:
            return self.checkpoint.read(name)
        return self.checkpoint.read_slice(name, dim, *span)
