"""From checkpoint files to a decoder on a device. Merging, slicing for ranks and device layouts happen here, at load,
so that the files stay in the standard Hugging Face form."""

from __future__ import annotations

import warnings
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ascend_kit.checkpoint.check import KV_SCALES, check_tensors
from ascend_kit.checkpoint.huggingface import Checkpoint, open_checkpoint
from ascend_kit.checkpoint.quantized_tensors import kv_scales
from ascend_kit.checkpoint.tensor_file import TensorSource
from ascend_kit.device.device import Device
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.decoder import Decoder, Embedding, Linear, RMSNorm, Rotary, SideBySide, StackedLinear, build_layer
from ascend_kit.model.quantize import quantize_weight
from ascend_kit.model.quantized_layers import (
    Int4WeightLinear,
    Int8Linear,
    Int8StaticLinear,
    Int8WeightLinear,
    KVScales,
    frozen,
)
from ascend_kit.model.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorSpec, expected_shapes, tensor_spec


def load_decoder(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: Device,
    ops: ModuleType,
    max_positions: int,
    parallel: TensorParallel | None = None,
    with_kv_scales: bool = False,
    int8_head: bool = False,
) -> Decoder:
    """Read this rank's part of a Hugging Face checkpoint into a decoder.

    `with_kv_scales` is for an int8 KV cache: it keeps codes by the checkpoint's scales, where there are any.
    `int8_head` keeps the matrix of embedding and tied head as int8 with a scale per row; the head is W8A8.

    ValueError names the limit when a head count, group count or width does not divide over the ranks, or when the
    op table cannot run the model's shapes.
    """
    parallel = parallel or TensorParallel()
    problems = ops.validate(
        config.num_heads // parallel.size, max(1, config.num_kv_heads // parallel.size), config.head_dim, dtype
    )
    if config.sliding_window is not None and max_positions > config.sliding_window:
        problems.append(
            f"some layers see {config.sliding_window} tokens only (sliding_window), which is not supported beyond that "
            f"length; set max_seq_length to at most {config.sliding_window}"
        )
    if int8_head and not (config.tie_embeddings and device.kind == "cpu"):
        problems.append(
            "head_dtype: int8 is for a head that is tied to the embedding, on a CPU; a head of its own is quantised by "
            "converting with quantize_keep: []"
        )
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(problems))
    checkpoint = open_checkpoint(folder)
    left_out = check_tensors(checkpoint, config, data=parallel.rank == 0)
    if parallel.rank == 0:
        checkpoint.check_data()
        for text in left_out:
            if with_kv_scales and KV_SCALES in text:
                continue
            warnings.warn(f"{folder}: {text}", stacklevel=2)
    loader = _Loader(checkpoint, config, dtype, device.torch_device, ops, parallel)
    return loader.decoder(max_positions, with_kv_scales, int8_head)


@dataclass
class _Loader:
    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype
    target: torch.device
    ops: ModuleType
    parallel: TensorParallel

    @cached_property
    def names(self) -> Set[str]:
        """Every tensor of the model."""
        return expected_shapes(self.config).keys()

    def decoder(self, max_positions: int, with_kv_scales: bool, int8_head: bool) -> Decoder:
        config = self.config
        embedding = Embedding(self._float(EMBEDDING), self.ops, self.parallel)
        layers = [
            build_layer(
                config,
                number,
                qkv=self._qkv,
                linear=self._linear,
                norm=self._norm,
                ops=self.ops,
                parallel=self.parallel,
                kv_scales=self._kv_scales(number) if with_kv_scales else None,
            )
            for number in range(config.num_layers)
        ]
        rotary = Rotary(config, max_positions, self.dtype, self.target, self.ops)
        norm = self._norm(FINAL_NORM.removesuffix(".weight"))
        return Decoder(config, embedding, layers, norm, self._head(embedding, int8_head), rotary, self.parallel).eval()

    def _kv_scales(self, number: int) -> KVScales | None:
        """This rank's heads of a layer's scales; None where the checkpoint has none."""
        config, (first, last) = self.config, self.parallel.span(self.config.num_kv_heads, "num_key_value_heads")
        found = kv_scales(self.checkpoint, config, number)
        if found is None:
            return None
        scales, offsets = (numbers[:, first:last].to(self.target) for numbers in found)
        return KVScales(scales, offsets, config.num_heads // config.num_kv_heads)

    def _qkv(self, names: list[str]) -> list[nn.Module]:
        """One product; or q beside k and v stacked, for kernels that want contiguous results; or three."""
        schemes = {self.checkpoint.quantization.scheme(name) for name in names}
        if len(schemes) == 1 and (self.ops.MERGED_QKV or schemes != {"none"}):
            return [self._linear(names)]
        if schemes == {"none"}:
            weights = [self._float(f"{name}.weight") for name in names[1:]]
            return [self._linear(names[:1]), StackedLinear(weights, [self._bias(name) for name in names[1:]])]
        return [self._linear([name]) for name in names]

    def _head(self, embedding: Embedding, in_int8: bool) -> nn.Module:
        if not self.config.tie_embeddings:
            return self._linear([HEAD.removesuffix(".weight")])
        weight = embedding.weight.data
        if self.parallel.size > 1:
            rows = self.parallel.span(self.config.vocab_size, "vocab_size")
            weight = self.checkpoint.read_slice(EMBEDDING, 0, *rows).to(self.target, self.dtype)
        if not in_int8:
            head = Linear(weight, None, self.ops)
            if self.parallel.size == 1:
                embedding.weight = head.weight  # tied: one matrix for both, in the form that products want
            return head
        codes, scale = quantize_weight(weight)
        int8_head = Int8Linear(codes, scale, None, self.ops)
        if self.parallel.size == 1:
            is_view = int8_head.weight.dim() == 2  # of the codes, turned perhaps
            embedding.weight, embedding.scale = frozen(codes) if is_view else int8_head.weight, int8_head.weight_scale
        return int8_head

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._float(f"{name}.weight"), self.config.rms_norm_eps, self.ops)

    def _linear(self, names: list[str]) -> nn.Module:
        """This rank's part of linears that form one product; those of unlike schemes are dequantised."""
        schemes = {self.checkpoint.quantization.scheme(name) for name in names}
        scheme = schemes.pop() if len(schemes) == 1 else "none"
        if scheme == "w4a16":
            return self._int4(names)
        if scheme == "w8a8_static" and len(names) > 1 and not self._share_inputs(names, "input_scale", "input_offset"):
            return SideBySide([self._linear([name]) for name in names])
        biases = [bias for name in names if (bias := self._bias(name)) is not None]
        bias = torch.cat(biases) if biases else None
        if scheme == "none":
            return Linear(torch.cat([self._dequantized(name) for name in names]), bias, self.ops)
        codes = torch.cat([self._read(f"{name}.weight").to(self.target) for name in names])
        scale = torch.cat([self._of_rows(name, "weight_scale") for name in names])
        if scheme == "w8a8_static":
            of_inputs = [self.checkpoint.read(f"{names[0]}.input_{part}") for part in ("scale", "offset")]
            input_scale, offset = (number.to(self.target) for number in of_inputs)
            return Int8StaticLinear(codes, scale, bias, input_scale, offset, self.ops)
        return (Int8Linear if scheme == "w8a8" else Int8WeightLinear)(codes, scale, bias, self.ops)

    def _share_inputs(self, names: list[str], *parts: str) -> bool:
        """Whether linears take their common input in one form: the same scale, or the same order."""
        for part in parts:
            found = [self.checkpoint.read(f"{name}.{part}") for name in names if f"{name}.{part}" in self.checkpoint]
            if len(found) not in (0, len(names)) or any(not torch.equal(found[0], other) for other in found[1:]):
                return False
        return True

    def _int4(self, names: list[str]) -> nn.Module:
        """4-bit linears in one product where they share groups and order; in float where ranks would cut a group."""
        widths = {self.checkpoint.shape(f"{name}.weight_scale")[1] for name in names}
        have_zeros = {self._has_zeros(name) for name in names}
        if len(widths) > 1 or len(have_zeros) > 1 or not self._share_inputs(names, "weight_g_idx"):
            return SideBySide([self._int4([name]) for name in names])
        biases = [bias for name in names if (bias := self._bias(name)) is not None]
        bias, order, span = torch.cat(biases) if biases else None, self._order(names[0]), slice(None)
        spec = self._spec(f"{names[0]}.weight")
        if spec.split == 1 and self.parallel.size > 1:
            size = spec.shape[1] // widths.pop()
            first, last = self._share(spec)
            if size < spec.shape[1]:
                if first % size or last % size or order is not None:
                    return Linear(torch.cat([self._dequantized(name) for name in names]), bias, self.ops)
                span = slice(first // size, last // size)
        codes = torch.cat([self._read(f"{name}.weight").to(self.target) for name in names])
        scale = torch.cat([self._of_rows(name, "weight_scale")[:, span] for name in names])
        zeros = [self._of_rows(name, "weight_zero_point")[:, span] for name in names if have_zeros == {True}]
        return Int4WeightLinear(codes, scale, torch.cat(zeros) if zeros else None, bias, self.ops, order)

    def _has_zeros(self, name: str) -> bool:
        zero = f"{name}.weight_zero_point"
        return zero in self.checkpoint and bool(self.checkpoint.read(zero).any())

    def _order(self, name: str) -> Tensor | None:
        """int64 [in]: the inputs group by group, None where they stand so already."""
        if f"{name}.weight_g_idx" not in self.checkpoint:
            return None
        group_of = self.checkpoint.read(f"{name}.weight_g_idx")
        order = group_of.argsort(stable=True)
        is_sorted = torch.equal(order, torch.arange(len(order)))
        return None if is_sorted else order.to(self.target)

    def _of_rows(self, name: str, part: str) -> Tensor:
        """float32: this rank's rows of something that a quantised linear has for each output."""
        spec = self._spec(f"{name}.weight")
        rows = self._share(spec) if spec.split == 0 else (0, spec.shape[0])
        return self.checkpoint.read_slice(f"{name}.{part}", 0, *rows).to(self.target).float()

    def _dequantized(self, name: str) -> Tensor:
        """This rank's part of a weight in the model's dtype, however it is stored."""
        name = f"{name}.weight"
        return self._part(self.checkpoint.dequantized(name), self._spec(name)).to(self.target, self.dtype)

    def _bias(self, name: str) -> Tensor | None:
        """A bias that belongs to a whole output is added once, on rank 0."""
        bias = f"{name}.bias"
        if bias not in self.names or (self._spec(f"{name}.weight").split == 1 and self.parallel.rank > 0):
            return None
        return self._float(bias)

    def _float(self, name: str) -> Tensor:
        return self._read(name).to(self.target, self.dtype)

    def _read(self, name: str) -> Tensor:
        return self._part(self.checkpoint.source(name), self._spec(name))

    def _part(self, source: TensorSource, spec: TensorSpec) -> Tensor:
        """Only this rank's part is read from disk."""
        if self.parallel.size == 1 or spec.split is None:
            return source.read()
        return source.read_slice(spec.split, *self._share(spec))

    def _spec(self, name: str) -> TensorSpec:
        return tensor_spec(self.config, name)

    def _share(self, spec: TensorSpec) -> tuple[int, int]:
        """[start, stop) of this rank along the dimension that ranks share, in elements."""
        assert spec.split is not None
        first, last = self.parallel.span(spec.pieces, spec.shared)
        size = spec.shape[spec.split] // spec.pieces
        return first * size, last * size
