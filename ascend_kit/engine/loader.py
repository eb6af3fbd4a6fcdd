"""From checkpoint files to a decoder on a device. Merging, slicing for ranks and device layouts happen here, at load,
so that the files stay in the standard Hugging Face form."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ascend_kit.checkpoint.check import check_tensors
from ascend_kit.checkpoint.huggingface import Checkpoint, open_checkpoint
from ascend_kit.device.device import Device
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.decoder import Decoder, Embedding
from ascend_kit.model.int8 import dequantize_weight
from ascend_kit.model.layers import Int8Linear, Int8WeightLinear, Linear, RMSNorm, Rotary, StackedLinear, build_layer
from ascend_kit.model.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    TensorSpec,
    expected_shapes,
    layer_tensors,
    outer_tensors,
    tensor_spec,
)


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
    if config.sliding_window is not None and max_positions > config.sliding_window:
        problems.append(
            f"some layers see {config.sliding_window} tokens only (sliding_window), which is not supported beyond that "
            f"length; set max_seq_length to at most {config.sliding_window}"
        )
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(problems))
    checkpoint = open_checkpoint(folder)
    left_out = check_tensors(checkpoint, config, data=parallel.rank == 0)
    if parallel.rank == 0:
        checkpoint.check_data()
        for text in left_out:
            warnings.warn(f"{folder}: {text}", stacklevel=2)
    return _Loader(checkpoint, config, dtype, device, ops, parallel).decoder(max_positions)


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
        self.names = expected_shapes(config).keys()
        # What ranks share is decided before anything is read.
        for spec in (*outer_tensors(config).values(), *layer_tensors(config).values()):
            self._share(spec)

    def decoder(self, max_positions: int) -> Decoder:
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
            )
            for number in range(config.num_layers)
        ]
        rotary = Rotary(config, max_positions, self.dtype, self.target, self.ops)
        norm = self._norm(FINAL_NORM.removesuffix(".weight"))
        return Decoder(config, embedding, layers, norm, self._head(embedding), rotary, self.parallel).eval()

    def _qkv(self, names: list[str]) -> list[nn.Module]:
        """One product; or q beside k and v stacked, for kernels that want contiguous results; or three."""
        schemes = {self.checkpoint.quantization.scheme(name) for name in names}
        if len(schemes) == 1 and (self.ops.MERGED_QKV or schemes != {"none"}):
            return [self._linear(names)]
        if schemes == {"none"}:
            weights, biases = zip(
                *((self._float(f"{name}.weight"), self._bias(name)) for name in names[1:]), strict=True
            )
            return [self._linear(names[:1]), StackedLinear(list(weights), list(biases))]
        return [self._linear([name]) for name in names]

    def _head(self, embedding: Embedding) -> nn.Module:
        if not self.config.tie_embeddings:
            return self._linear([HEAD.removesuffix(".weight")])
        if self.parallel.size == 1:
            head = Linear(embedding.weight.data, None, self.ops)
            embedding.weight = head.weight  # tied: one matrix for both, in the form that products want
            return head
        rows = self.parallel.span(self.config.vocab_size, "vocab_size")
        return Linear(self.checkpoint.read_slice(EMBEDDING, 0, *rows).to(self.target, self.dtype), None, self.ops)

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._float(f"{name}.weight"), self.config.rms_norm_eps, self.ops)

    def _linear(self, names: list[str]) -> nn.Module:
        """This rank's part of linears that form one product; those of unlike schemes are dequantised."""
        schemes = {self.checkpoint.quantization.scheme(name) for name in names}
        scheme = schemes.pop() if len(schemes) == 1 else "none"
        weights, scales = zip(*(self._weight(name, scheme) for name in names), strict=True)
        biases = [bias for name in names if (bias := self._bias(name)) is not None]
        weight, bias = torch.cat(weights), torch.cat(biases) if biases else None
        if scheme == "none":
            return Linear(weight, bias, self.ops)
        kind = Int8Linear if scheme == "w8a8" else Int8WeightLinear
        return kind(weight, torch.cat(scales), bias, self.ops)

    def _weight(self, name: str, scheme: str) -> tuple[Tensor, Tensor | None]:
        """(weight, scale) of one linear: float weight and None, or int8 codes and the scale of its output rows."""
        if self.checkpoint.quantization.scheme(name) == "none":
            return self._float(f"{name}.weight"), None
        weight = f"{name}.weight"
        codes = self._read(weight).to(self.target)
        rows = self._share(self._spec(weight)) if self._spec(weight).split == 0 else (0, codes.shape[0])
        scale = self.checkpoint.read_slice(f"{name}.weight_scale", 0, *rows).to(self.target).float()
        return (codes, scale) if scheme != "none" else (dequantize_weight(codes, scale, self.dtype), None)

    def _bias(self, name: str) -> Tensor | None:
        """A bias that belongs to a whole output is added once, on rank 0."""
        bias = f"{name}.bias"
        if bias not in self.names or (self._spec(f"{name}.weight").split == 1 and self.parallel.rank > 0):
            return None
        return self._float(bias)

    def _float(self, name: str) -> Tensor:
        return self._read(name).to(self.target, self.dtype)

    def _read(self, name: str) -> Tensor:
        """Only this rank's part is read from disk."""
        spec = self._spec(name)
        if self.parallel.size == 1 or spec.split is None:
            return self.checkpoint.read(name)
        return self.checkpoint.read_slice(name, spec.split, *self._share(spec))

    def _spec(self, name: str) -> TensorSpec:
        return tensor_spec(self.config, name)

    def _share(self, spec: TensorSpec) -> tuple[int, int]:
        """[start, stop) of this rank along the dimension that ranks share, in elements."""
        if spec.split is None:
            return 0, 0
        first, last = self.parallel.span(spec.pieces, spec.shared)
        size = spec.shape[spec.split] // spec.pieces
        return first * size, last * size
