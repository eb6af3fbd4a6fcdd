"""One decoder-only transformer for Qwen2, Qwen2.5, Qwen3 and Llama, over packed tokens and a paged KV cache."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from ascend_kit.device.ops import AttentionMeta
from ascend_kit.device.ops.reference import new_cache
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.layers import DecoderLayer, KVCache, RMSNorm, Rotary, frozen


class Embedding(nn.Module):
    """Token ids [T] -> [T, D]; a rank holds some of the columns, so that no row lookup has to be summed.

    With a scale, float32 [V], the weight holds int8 codes.
    """

    scale: Tensor | None

    def __init__(self, weight: Tensor, ops: ModuleType, parallel: TensorParallel):
        super().__init__()
        self.weight, self.ops, self.parallel, self.dtype = frozen(weight), ops, parallel, weight.dtype
        self.register_parameter("scale", None)

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = self.ops.gather_rows(self.weight, token_ids)
        if self.scale is not None:
            rows = (rows.float() * self.scale.index_select(0, token_ids).unsqueeze(1)).to(self.dtype)
        return self.parallel.all_gather(rows)


class Decoder(nn.Module):
    """The whole model on one rank. It knows token ids and KV slots, no text and no requests."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: nn.Module,
        rotary: Rotary,
        parallel: TensorParallel,
    ):
        super().__init__()
        self.config, self.parallel = config, parallel
        self.embedding, self.layers, self.norm, self.head = embedding, nn.ModuleList(layers), norm, head
        self.rotary = rotary

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        meta: AttentionMeta,
        caches: list[KVCache],
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, D] of packed tokens, after the last norm; writes their keys and values to the caches.

        With `rows` (int64 [R]) those of these tokens only, [R, D]: the last layer then leaves out what nobody reads.
        """
        x, residual = self.embedding(token_ids), None
        cos, sin = self.rotary(positions)
        for layer, cache in zip(self.layers[:-1], caches[:-1], strict=True):
            x, residual = layer(x, residual, cos, sin, meta, cache)
        x, residual = self.layers[-1](x, residual, cos, sin, meta, caches[-1], rows)
        return self.norm(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, vocabulary] in the model's dtype, gathered from all ranks."""
        return self.parallel.all_gather(self.head(hidden))

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_kv_heads // self.parallel.size

    def weight_bytes(self) -> int:
        """Bytes of all weights this rank holds; a tied matrix counts once."""
        tensors = {p.data_ptr(): p for p in self.parameters()}
        return sum(p.numel() * p.element_size() for p in tensors.values())

    def new_caches(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> list[KVCache]:
        """One pair of zeroed caches a layer, as `reference.new_cache` makes them."""
        shape = (num_blocks, block_size, self.num_kv_heads, self.config.head_dim)
        return [(new_cache(*shape, dtype, device), new_cache(*shape, dtype, device)) for _ in self.layers]
