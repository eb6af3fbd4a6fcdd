"""What a model costs on a group of cards and how fast it can be there: bytes, FLOPs, floors, ceilings, predictions.

Pure arithmetic, nothing is measured and no tensor is made. FLOPs count a multiply-add as two; a "step" is one pass of
the model. Floors and ceilings are rooflines with the plain ceilings of the card: nothing is faster. Predictions use a
sustained share of them and add launches and all-reduces; the constants are general ones with their sources, none is
fitted to a measurement of this project, so a prediction may be off by tens of percent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ascend_kit.device.graphs import PROMPT_STRIDE, prompt_sizes
from ascend_kit.device.parallel import AIV_RANKS, check_division
from ascend_kit.device.peaks import HardwarePeak
from ascend_kit.model.config import DTYPES, ModelConfig
from ascend_kit.model.tensors import LINEAR_PARTS, WeightBytes, layer_prefix, num_weights, uniform_schemes, weight_bytes

if TYPE_CHECKING:
    from ascend_kit.measure.metrics import RequestRecord

# Launches per layer of our fused path, and outside the layers (embedding, first norm, lm_head, gathers), as counted on
# the simulated NPU.
LAYER_LAUNCHES = {"qwen2": 11, "qwen3": 13, "llama": 11}
W8A8_EXTRA_LAUNCHES = 1  # quantisation before o, and a split of q, k, v, which are one product instead of two
OUTER_LAUNCHES = 5
CHOICE_LAUNCHES = 5  # argmax, and whether the logits are finite
ASYNC_LAUNCHES = 2  # unread tokens become ids; a graph's inputs are one more
PROMPT_LAUNCHES = 2  # rows that are read leave the last layer, hidden and residual; those of a graph leave it once


class Limit(NamedTuple):
    """What a group of cards does at most: matrix products in the dtype in use, and reading memory."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, flops: float, num_bytes: float) -> float:
        """Least time for this work, compute and memory overlapped perfectly."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Card:
    """The ceilings of one card and what of them can be sustained.

    Sustained shares: 0.7 of compute and 0.6 of bandwidth are the defaults of Huawei's own model
    (Ascend/msmodeling, tensor_cast/device.py, there marked uncalibrated). `launch_s` is the gap between two
    kernels of a replayed graph, `eager_launch_s` the host's cost of queueing one kernel from Python, and
    `allreduce_s` the start-up of one small all-reduce: assumptions of the usual order for accelerators, not
    measurements. `allreduce_aiv_s` is that on an Ascend's vector cores, from what they are said to save with four cards
    and one request (10 to 15 % of a step), `graph_update_s` the host's cost of giving one layer of a replayed NPU graph
    its lengths (estimated at 80 to 150 us). Replace them by measured values where there are any.
    """

    peak: HardwarePeak
    compute_share: float = 0.7
    bandwidth_share: float = 0.6
    launch_s: float = 2e-6
    eager_launch_s: float = 15e-6
    allreduce_s: float = 20e-6
    allreduce_aiv_s: float = 10e-6
    graph_update_s: float = 115e-6
    memory_share: float = 0.9  # of the card: the rest is context, workspace, graphs and communication buffers

    @classmethod
    def from_ceilings(cls, ceilings: dict[str, Any], *, memory_bytes: int, precision: str = "bf16") -> Card:
        """The card as `measure_ceilings` found it: ceilings that were reached, so shares of 1."""
        matrix = ceilings.get(f"{precision}_flops_per_s")
        if matrix is None:
            raise ValueError(f"the {precision} matrix rate of {ceilings['device']} was not measured")
        peak = HardwarePeak(
            name=f"{ceilings['device']} (measured)",
            bf16_flops=matrix,  # of the precision in use
            int8_ops=ceilings.get("int8_ops_per_s") or matrix,
            bandwidth_bytes_per_s=ceilings["read_bytes_per_s"],
            memory_bytes=memory_bytes,
            source="measured",
        )
        launch = ceilings["launch_s"]
        return cls(peak, compute_share=1.0, bandwidth_share=1.0, launch_s=launch, eager_launch_s=launch)

    def limit(self, scheme: str = "none") -> Limit:
        """The plain ceilings. Weight-only int8 is widened before the product, so only w8a8 gains matrix rate."""
        rate = self.peak.int8_ops if scheme == "w8a8" else self.peak.bf16_flops
        return Limit(rate, self.peak.bandwidth_bytes_per_s)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def prefill_flops(config: ModelConfig, prompt_len: int, cached_len: int = 0) -> float:
    """FLOPs of a prompt of which `cached_len` tokens are in the cache, with logits for its last token."""
    pairs = prompt_len * (prompt_len + 1) / 2 - cached_len * (cached_len + 1) / 2
    return _layers_flops(config) * (prompt_len - cached_len) + _attention_flops(config, pairs) + _head_flops(config)


def decode_flops(config: ModelConfig, batch: int, context_len: float) -> float:
    """FLOPs of one decode step for `batch` requests that each see `context_len` tokens on average."""
    return batch * (_layers_flops(config) + _head_flops(config) + _attention_flops(config, context_len))


def request_flops(config: ModelConfig, records: Iterable[RequestRecord]) -> float:
    """FLOPs that finished requests needed; cached prompt tokens cost none."""
    total = 0.0
    for record in records:
        steps = max(record.num_output_tokens - 1, 0)
        context = record.num_prompt_tokens + (steps + 1) / 2
        total += prefill_flops(config, record.num_prompt_tokens, record.num_cached_tokens)
        total += steps * decode_flops(config, 1, context)
    return total


def _layers_flops(config: ModelConfig) -> int:
    """Of the layers' matrices for one token."""
    return 2 * config.num_layers * sum(num_weights(config, layer_prefix(0) + part) for part in LINEAR_PARTS)


def _head_flops(config: ModelConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def _attention_flops(config: ModelConfig, num_pairs: float) -> float:
    """Of scores and weighted sum for `num_pairs` (query token, visible key token) pairs."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * num_pairs


# --- a model on cards -------------------------------------------------------------------------------------------------


def kv_bytes_per_token(config: ModelConfig, precision: str = "bf16", kv_cache_dtype: str = "auto") -> int:
    """Bytes of keys and values of one token, over all layers and KV heads; int8 has a float32 scale for each head."""
    head = config.head_dim + 4 if kv_cache_dtype == "int8" else config.head_dim * DTYPES[precision].itemsize
    return 2 * config.num_layers * config.num_kv_heads * head


@dataclass(frozen=True)
class Deployment:
    """A model in a precision on one group of `tp_size` cards: the unit whose steps are predicted.

    `quantize`: none, w8a8, w8a16; auto and mixed count as w8a8, the cheapest that they may become. `card_share` is the
    part of the cards that the group has while all its neighbours work: below 1 where replicas share a processor.
    """

    config: ModelConfig
    card: Card
    precision: str = "bf16"
    quantize: str = "none"
    keep: tuple[str, ...] = ("lm_head",)
    tp_size: int = 1
    card_share: float = 1.0
    launches_per_layer: int | None = None  # None: our fused path
    graph_mode: bool = True
    max_tokens_per_step: int = 2048
    kv_cache_dtype: str = "auto"
    stored_bytes: int | None = None  # weights of a loaded model, whole; None: arithmetic
    async_scheduling: bool = True  # where tensor parallel and speculate allow it
    graph_prompt_tokens: int = 256  # of the largest captured step with prompts, on an Ascend
    speculate: int = 0  # tokens guessed per step, each of which takes a row of its own; predictions trust in none

    def check(self) -> str | None:
        """Why the engine refuses the model on `tp_size` of these cards; None when it runs there."""
        if self.kv_cache_dtype == "int8" and self.card.peak.is_ascend:
            return "kv_cache_dtype: int8 is not available on an NPU"
        names = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size", "hidden_size")
        try:
            check_division(self.tp_size, {name: getattr(self.config, name) for name in names})
        except ValueError as error:
            return str(error)
        return None

    @property
    def scheme(self) -> str:
        """The int8 scheme to reckon with."""
        return "w8a8" if self.quantize in ("auto", "mixed") else self.quantize

    @cached_property
    def weights(self) -> WeightBytes:
        """Weight bytes of the whole model, as stored and as one decode step reads them."""
        size = DTYPES[self.precision].itemsize
        if self.stored_bytes is None:
            return weight_bytes(self.config, uniform_schemes(self.config, self.scheme, self.keep), size)
        plain = weight_bytes(self.config, {}, size)
        return WeightBytes(self.stored_bytes, self.stored_bytes - (plain.stored - plain.per_step))

    @property
    def kv_token_bytes(self) -> int:
        """KV bytes of one token over the whole group."""
        return kv_bytes_per_token(self.config, self.precision, self.kv_cache_dtype)

    def kv_bytes_free(self) -> float:
        """Bytes left for KV in the whole group; negative when the weights alone do not fit."""
        return self.card.peak.memory_bytes * self.card.memory_share * self.tp_size - self.weights.stored

    def max_concurrency(self, total_len: int) -> int:
        """Requests of `total_len` tokens whose KV fits at the same time; 0 when none does."""
        return max(0, int(self.kv_bytes_free() // (self.kv_token_bytes * total_len)))

    def limit(self, share: float = 1.0) -> Limit:
        """Ceilings of the group, of which it has `share`."""
        rate, read = self.card.limit(self.scheme)
        return Limit(rate * self.tp_size * share, read * self.tp_size * share)

    def decode_bytes(self, batch: int, context_len: float) -> float:
        """Bytes that a decode step must read: the weights once, and the KV of every request."""
        return self.weights.per_step + self.kv_token_bytes * batch * context_len

    def decode_floor_s(self, batch: int, context_len: float) -> float:
        """Least time of one decode step."""
        work = decode_flops(self.config, batch, context_len), self.decode_bytes(batch, context_len)
        return self.limit(self.card_share).floor_s(*work)

    def prefill_floor_s(self, prompt_len: int) -> float:
        """Least time from a prompt to its first token on idle cards."""
        return self.limit().floor_s(prefill_flops(self.config, prompt_len), self.weights.per_step)

    def ceiling_tokens_per_s(self, prompt_len: int, output_len: int, concurrency: int) -> float:
        """Output tokens per second that no schedule can exceed with `concurrency` requests in flight.

        A step yields at most one token per request in flight, and one for each guess, and reads the weights once, so
        they are read at least 1/concurrency times per token without guesses. A prompt's FLOPs and its share of reading
        overlap with other work at best, so the bound is the larger of total FLOPs and total bytes over their ceilings.
        """
        steps, context = output_len - 1, prompt_len + output_len / 2  # the prompt pass yields the first token
        flops = prefill_flops(self.config, prompt_len) + steps * decode_flops(self.config, 1, context)
        most = concurrency * (1 + self.speculate)
        num_bytes = self.weights.per_step * output_len / most + self.kv_token_bytes * steps * context
        return output_len / self.limit(self.card_share).floor_s(flops, num_bytes)

    # --- predictions

    def decode_s(self, batch: int, context_len: float) -> float:
        """Predicted time of one decode step. An NPU's graph waits in every layer for the lengths the host gives it."""
        rows = batch * (1 + self.speculate)
        work = decode_flops(self.config, rows, context_len), self.decode_bytes(rows, context_len)
        launched = self.launches()
        device_s = self._sustained(self.scheme).floor_s(*work) + self._launch_s(launched) + self._communication_s(rows)
        return max(device_s, self._host_s(launched, self.graph_mode))

    def prefill_s(self, prompt_len: int, num_prompts: int = 1) -> float:
        """Predicted time of prompts packed into one pass. Attention stays in the model's dtype under int8.

        An Ascend computes while the host launches, or while it gives a captured pass, which is padded, its lengths.
        """
        tokens = num_prompts * prompt_len
        launched, padded = self.launches(tokens), self.padded_tokens(tokens) / tokens
        linear = _layers_flops(self.config) * prompt_len + _head_flops(self.config)
        attention = prefill_flops(self.config, prompt_len) - linear
        linear *= padded
        limit, wide = self._sustained(self.scheme), self._sustained("none")
        compute = num_prompts * (linear / limit.flops_per_s + attention / wide.flops_per_s)
        reading = self.weights.per_step / limit.bytes_per_s
        device_s = max(compute, reading) + self._launch_s(launched) + self._communication_s(tokens)
        return max(device_s, self._host_s(launched, self.captures(tokens)))

    def loaded_prefill_s(self, prompt_len: int, concurrency: int) -> float:
        """Predicted time per prompt under load: short prompts share a pass of the token budget of a step."""
        packed = max(1, min(concurrency, self.max_tokens_per_step // prompt_len))
        return self.prefill_s(prompt_len, packed) / packed

    def output_tokens_per_s(self, prompt_len: int, output_len: int, concurrency: int) -> float:
        """Predicted steady state: each request's prompt pass, and decode steps shared by all in flight."""
        prefill = concurrency * self.loaded_prefill_s(prompt_len, concurrency)
        decode = (output_len - 1) * self.decode_s(concurrency, prompt_len + output_len / 2)
        return concurrency * output_len / (prefill + decode)

    def tpot_s(self, prompt_len: int, output_len: int, concurrency: int) -> float:
        """Predicted time per output token: a decode step, and the prompt passes of others in between."""
        step = self.decode_s(concurrency, prompt_len + output_len / 2)
        others = (concurrency - 1) * self.loaded_prefill_s(prompt_len, concurrency)
        return step + others / max(output_len - 1, 1)

    def _sustained(self, scheme: str) -> Limit:
        rate, read = self.card.limit(scheme)
        part = self.tp_size * self.card_share
        return Limit(rate * self.card.compute_share * part, read * self.card.bandwidth_share * part)

    def captures(self, prompt_tokens: int) -> bool:
        """Whether a step with so many tokens of prompts runs in a captured graph."""
        is_captured = self.graph_mode and self.card.peak.is_ascend and self.config.head_dim == 128
        return is_captured and prompt_tokens <= self.graph_prompt_tokens

    def padded_tokens(self, prompt_tokens: int) -> int:
        """Tokens that are computed for so many of prompts."""
        sizes = prompt_sizes(self.graph_prompt_tokens, PROMPT_STRIDE) if self.captures(prompt_tokens) else []
        return next((size for size in sizes if size >= prompt_tokens), prompt_tokens)

    def launches(self, prompt_tokens: int = 0) -> tuple[int, int]:
        """Kernels of a decode step, or of one with so many tokens of prompts; and what of them the host launches."""
        per_layer = self.launches_per_layer
        if per_layer is None:
            per_layer = LAYER_LAUNCHES[self.config.family] + W8A8_EXTRA_LAUNCHES * (self.scheme == "w8a8")
        kernels = per_layer * self.config.num_layers + OUTER_LAUNCHES + CHOICE_LAUNCHES
        if prompt_tokens:
            in_graph = self.captures(prompt_tokens)
            kernels += PROMPT_LAUNCHES - in_graph
            return kernels, CHOICE_LAUNCHES + 2 if in_graph else kernels  # a graph ends before the rows and lm_head
        is_async = self.async_scheduling and self.tp_size == 1 and not self.speculate
        extra = ASYNC_LAUNCHES + self.graph_mode if is_async else 0
        return kernels + extra, CHOICE_LAUNCHES + extra if self.graph_mode else kernels + extra

    def _launch_s(self, launched: tuple[int, int]) -> float:
        return launched[0] * (self.card.launch_s if self.graph_mode else self.card.eager_launch_s)

    def _host_s(self, launched: tuple[int, int], in_graph: bool) -> float:
        """What the host of an Ascend with graphs is busy for in a step; a layer of a graph waits for its lengths."""
        if not (self.graph_mode and self.card.peak.is_ascend):
            return 0.0
        updates_s = self.config.num_layers * self.card.graph_update_s if in_graph else 0.0
        return updates_s + launched[1] * self.card.eager_launch_s

    def _communication_s(self, tokens: int) -> float:
        """Two all-reduces per layer; each rank sends and receives 2 (tp - 1) / tp of the activations."""
        if self.tp_size == 1:
            return 0.0
        size = tokens * self.config.hidden_size * DTYPES[self.precision].itemsize
        moved = 2 * (self.tp_size - 1) / self.tp_size * size
        link, has_aiv = self.card.peak.link_bytes_per_s, self.card.peak.is_ascend and self.tp_size <= AIV_RANKS
        start_s = self.card.allreduce_aiv_s if has_aiv else self.card.allreduce_s
        return 2 * self.config.num_layers * (start_s + (moved / link if link else 0.0))
