"""What one decode step costs, counted at real model sizes: no weight exists and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ascend_kit.checkpoint.huggingface import Checkpoint, QuantizationInfo
from ascend_kit.device.device import select_device
from ascend_kit.engine import loader
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import EngineCore
from ascend_kit.engine.sequence import SamplingParams, Sequence
from ascend_kit.measure.forecast import kv_bytes_per_token
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import LINEAR_PARTS, tensor_spec, uniform_schemes, weight_bytes
from npu_sim.counts import Counts
from npu_sim.simulator import Simulator

QWEN3_8B = ModelConfig("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True)
QWEN25_7B = ModelConfig("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, attention_bias=True)
MODELS = {"Qwen2.5-7B": QWEN25_7B, "Qwen3-8B": QWEN3_8B}


@dataclass
class StepCost:
    """One decode step. `bytes_ratio` is bytes moved over the least possible: weights and KV read once."""

    launches: float
    launches_per_layer: float
    kernels: int
    syncs: float
    uploads: int
    replays: int
    updates: int
    bytes_ratio: float


@dataclass
class _Unset:
    """A checkpoint tensor that nobody fills, but for int8 scales: loading reads those and refuses NaN."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str = "shapes only"

    def read(self) -> torch.Tensor:
        return (torch.ones if self.dtype == torch.float32 else torch.empty)(self.shape, dtype=self.dtype)

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        shape = list(self.shape)
        shape[dim] = stop - start
        return torch.empty(shape, dtype=self.dtype)


def count_step(
    sim: Simulator,
    config: ModelConfig,
    *,
    batch: int = 1,
    context: int = 1024,
    quantize: str = "none",
    graph_mode: bool = False,
    fused: bool = True,
    async_scheduling: bool | None = None,
    prompt_tokens: int = 0,
    graph_prompt_tokens: int = 256,
) -> StepCost:
    """Our engine's decode step at `context` tokens per sequence, in bf16, with int8 linears if `quantize`.

    With `prompt_tokens` a prompt of so many tokens comes in the same step.
    """
    options = (batch, context, quantize, graph_mode, fused, async_scheduling, prompt_tokens, graph_prompt_tokens)
    counts, ratio = _run(sim, config, *options)
    shallow, _ = _run(sim, replace(config, num_layers=1), *options)
    kernels = sum(counts.kernels.values())
    per_layer = (kernels - sum(shallow.kernels.values())) / (config.num_layers - 1)
    return StepCost(
        counts.num_launches, per_layer, kernels, counts.num_syncs, counts.uploads, counts.replays, counts.updates, ratio
    )


def _run(
    sim: Simulator,
    config: ModelConfig,
    batch: int,
    context: int,
    quantize: str,
    graph_mode: bool,
    fused: bool,
    async_scheduling: bool | None,
    prompt_tokens: int,
    graph_prompt_tokens: int,
) -> tuple[Counts, float]:
    with shapes_only(sim), mock.patch.object(loader, "open_checkpoint", lambda _: _checkpoint(config, quantize)):
        settings = EngineConfig(
            "shapes only",
            max_seq_length=context + 128,
            batch_size=batch + bool(prompt_tokens),
            graph_mode=graph_mode,
            graph_prompt_tokens=graph_prompt_tokens,
            operator_fusion=fused,
            async_scheduling=async_scheduling,
            max_tokens_per_step=batch * context,  # all prompts in the first step
        )
        core = EngineCore(settings, config, select_device("npu"))
        for index in range(batch):
            prompt = [index + 1] * (context - 2)  # two tokens follow, the second in the counted step
            sampling = SamplingParams(max_new_tokens=100, ignore_eos=True)
            core.add(Sequence(prompt, sampling, arrival_s=0.0, is_watched=False))
        go_on: Callable[[Sequence, int], str | None] = lambda *_: None  # noqa: E731
        while min(sequence.num_output_tokens for sequence in core.sequences.values()) < 1:
            core.step(go_on)
        core.step(go_on)  # captures, where captured
        if prompt_tokens:
            core.add(Sequence([999] * prompt_tokens, SamplingParams(), arrival_s=0.0))
            if core.is_async:
                core.step(go_on)  # reads what was queued ahead
        sim.reset()
        core.step(go_on)
        counts = sim.counts
        sim.reset()
        lengths = sum(sequence.num_tokens - 1 for sequence in core.sequences.values())
        core.close()
    schemes = uniform_schemes(config, quantize, ["lm_head"])
    needed = weight_bytes(config, schemes, 2).per_step + lengths * kv_bytes_per_token(config)
    return counts, counts.bytes / needed


def _checkpoint(config: ModelConfig, quantize: str) -> Checkpoint:
    sources: dict[str, Any] = {}

    def add(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        sources[name] = _Unset(shape, dtype)

    schemes: dict[str, str] = {}
    hidden, vocabulary = config.hidden_size, config.vocab_size
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        add(name, vocabulary, hidden)
    add("model.norm.weight", hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{prefix}{norm}.weight", hidden)
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            add(f"{prefix}self_attn.{norm}.weight", config.head_dim)
        for linear in LINEAR_PARTS:
            rows, cols = tensor_spec(config, f"{prefix}{linear}.weight").shape
            add(f"{prefix}{linear}.weight", rows, cols, dtype=torch.bfloat16 if quantize == "none" else torch.int8)
            if quantize != "none":
                schemes[prefix + linear] = quantize
                add(f"{prefix}{linear}.weight_scale", rows, dtype=torch.float32)
            if config.attention_bias and linear.endswith(("q_proj", "k_proj", "v_proj")):
                add(f"{prefix}{linear}.bias", rows)
    info = QuantizationInfo("none" if quantize == "none" else "compressed-tensors", schemes)
    return Checkpoint(Path("shapes-only"), sources, {}, files=[], quantization=info)


@contextmanager
def shapes_only(sim: Simulator) -> Iterator[None]:
    """Compute nothing inside; results are unset memory."""
    from ascend_kit.device.ops import npu

    sim.shapes_only = True
    try:
        yield
    finally:
        sim.shapes_only = False
        npu.make_mask.cache_clear()  # one made inside holds no values, and all later attention would share it
