"""Before measuring: what fits on a card, how fast it could be, and how many cards to use in which way.

Every prediction is a roofline (bytes and FLOPs of `costs` over the card's ceilings, times a sustained share
of them) plus launch and all-reduce costs. The constants are general ones with their sources; none is fitted
to a measurement of this project, so a prediction may be off by tens of percent. Floors use the plain
ceilings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ascend_kit.measure import costs
from ascend_kit.measure.costs import Limit, ModelShape

if TYPE_CHECKING:
    import pandas

GIB = 2**30
CARD_COUNTS = (1, 2, 4, 8)
# Launches per layer of our fused path, and outside the layers (embedding, last norm, lm_head, gathers).
LAYER_LAUNCHES = {"qwen2": 11, "qwen3": 14, "llama": 11}
INT8_EXTRA_LAUNCHES = 4  # one quantisation before qkv, o, gate_up and down
OUTER_LAUNCHES = 6


class Peak(Protocol):
    """The fields of a `HardwarePeak` that the planner reads."""

    name: str
    bf16_flops: float
    int8_ops: float
    bandwidth_bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float | None


@dataclass(frozen=True)
class Card:
    """Ceilings of one card and what of them can be sustained.

    Sustained shares: 0.7 of compute and 0.6 of bandwidth are the defaults of Huawei's own model
    (Ascend/msmodeling, tensor_cast/device.py, there marked uncalibrated). `launch_s` is the gap between two
    kernels of a replayed graph, `eager_launch_s` the host's cost of queueing one kernel from Python, and
    `allreduce_s` the start-up of one small all-reduce: assumptions of the usual order for accelerators, not
    measurements. Replace them by measured values where there are any.
    """

    name: str
    flops_per_s: float  # matrix products in the model's floating dtype
    int8_ops_per_s: float | None
    bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float | None = None
    compute_share: float = 0.7
    bandwidth_share: float = 0.6
    launch_s: float = 2e-6
    eager_launch_s: float = 15e-6
    allreduce_s: float = 20e-6
    memory_share: float = 0.9  # of the card: the rest is context, workspace, graphs and communication buffers

    @classmethod
    def from_peak(cls, peak: Peak, **changes: Any) -> Card:
        """The card of a row of the peak table."""
        return cls(
            name=peak.name,
            flops_per_s=peak.bf16_flops,
            int8_ops_per_s=peak.int8_ops,
            bytes_per_s=peak.bandwidth_bytes_per_s,
            memory_bytes=peak.memory_bytes,
            link_bytes_per_s=peak.link_bytes_per_s,
            **changes,
        )

    @classmethod
    def from_ceilings(cls, ceilings: dict[str, Any], *, memory_bytes: int, precision: str = "bf16") -> Card:
        """The card as `measure_ceilings` found it: ceilings that were reached, so shares of 1."""
        matrix = ceilings[f"{precision}_flops_per_s"]
        if matrix is None:
            raise ValueError(f"the {precision} matrix rate of {ceilings['device']} was not measured")
        return cls(
            name=f"{ceilings['device']} (measured)",
            flops_per_s=matrix,
            int8_ops_per_s=ceilings.get("int8_ops_per_s"),
            bytes_per_s=ceilings["read_bytes_per_s"],
            memory_bytes=memory_bytes,
            compute_share=1.0,
            bandwidth_share=1.0,
            launch_s=ceilings["launch_s"],
            eager_launch_s=ceilings["launch_s"],
        )

    def peak_limit(self, quantize: str = "none") -> Limit:
        """The plain ceilings, for floors."""
        return Limit(self._matrix_rate(quantize), self.bytes_per_s)

    def sustained_limit(self, quantize: str = "none") -> Limit:
        """The ceilings times their sustained shares, for predictions."""
        return Limit(self._matrix_rate(quantize) * self.compute_share, self.bytes_per_s * self.bandwidth_share)

    def _matrix_rate(self, quantize: str) -> float:
        # Weight-only int8 is widened before the product, so only w8a8 gains matrix rate.
        return self.int8_ops_per_s if quantize == "w8a8" and self.int8_ops_per_s else self.flops_per_s


@dataclass(frozen=True)
class Workload:
    """What is to be served: requests of these lengths, so many in flight (None: as many as fit), within
    limits.
    """

    prompt_len: int
    output_len: int
    concurrency: int | None = None
    ttft_limit_ms: float | None = None
    tpot_limit_ms: float | None = None
    target_tokens_per_s: float | None = None  # output tokens; enough is enough: then fewer cards win


@dataclass(frozen=True)
class Plan:
    """A way to use cards, and what it is predicted to do; times in ms, memory in GiB per card.

    `ttft_ms` is a prompt alone, without queueing; `tpot_ms` is that of the fullest replica. `reason` says why
    an infeasible plan is one.
    """

    cards: int
    tensor_parallel: int
    replicas: int
    weight_gib_per_card: float
    kv_gib_per_card: float
    max_concurrency: int
    concurrency: int
    decode_floor_ms: float | None = None
    prefill_floor_ms: float | None = None
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    output_tokens_per_s: float | None = None
    ceiling_tokens_per_s: float | None = None
    reason: str | None = None

    @property
    def is_feasible(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Deployment:
    """A model in a precision on one group of `tp_size` cards: the unit whose steps are predicted."""

    config: ModelShape
    card: Card
    precision: str = "bf16"
    quantize: str = "none"
    keep: tuple[str, ...] = ("lm_head",)
    tp_size: int = 1
    launches_per_layer: int | None = None  # None: our fused path
    graph_mode: bool = True
    max_tokens_per_step: int = 2048
    known_weights: costs.WeightBytes | None = None  # of a loaded model; None: arithmetic

    def check(self) -> str | None:
        """Why the model cannot be split over `tp_size` cards; None when it can."""
        parts = (
            ("num_heads", self.config.num_heads),
            ("num_kv_heads", self.config.num_kv_heads),
            ("intermediate_size", self.config.intermediate_size),
        )
        bad = [f"{name}={value}" for name, value in parts if value % self.tp_size]
        return f"tensor_parallel {self.tp_size} does not divide {', '.join(bad)}" if bad else None

    @property
    def scheme(self) -> str:
        """The int8 scheme to reckon with; an unknown mix counts as the cheapest it may become."""
        return "w8a8" if self.quantize in ("auto", "mixed") else self.quantize

    @property
    def weights(self) -> costs.WeightBytes:
        """Weight bytes of the whole model."""
        if self.known_weights is not None:
            return self.known_weights
        return costs.weight_bytes(self.config, self.precision, self.scheme, self.keep)

    @property
    def kv_token_bytes(self) -> int:
        """KV bytes of one token over the whole group."""
        return costs.kv_bytes_per_token(self.config, self.precision)

    def kv_bytes_free(self) -> float:
        """Bytes left for KV in the whole group; negative when the weights alone do not fit."""
        return self.card.memory_bytes * self.card.memory_share * self.tp_size - self.weights.stored

    def max_concurrency(self, total_len: int) -> int:
        """Requests of `total_len` tokens whose KV fits at the same time; 0 when none does."""
        return max(0, int(self.kv_bytes_free() // (self.kv_token_bytes * total_len)))

    def floor(self) -> Limit:
        """Ceilings of the group."""
        return _times(self.card.peak_limit(self.scheme), self.tp_size)

    def decode_s(self, batch: int, context_len: float) -> float:
        """Predicted time of one decode step."""
        work = costs.decode_floor_s(
            self.config, self._sustained(), self.weights.per_step, self.kv_token_bytes, batch, context_len
        )
        return work + self._launch_s() + self._communication_s(batch)

    def prefill_s(self, prompt_len: int, num_prompts: int = 1) -> float:
        """Predicted time of prompts packed into one pass. Attention stays in the model's dtype under int8."""
        linear = costs.token_flops(self.config) * prompt_len + 2.0 * costs.head_parameters(self.config)
        attention = costs.prefill_flops(self.config, prompt_len) - linear
        limit = self._sustained()
        wide = _times(self.card.sustained_limit("none"), self.tp_size)
        compute = num_prompts * (linear / limit.flops_per_s + attention / wide.flops_per_s)
        reading = self.weights.per_step / limit.bytes_per_s
        return max(compute, reading) + self._launch_s() + self._communication_s(num_prompts * prompt_len)

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

    def ceiling_tokens_per_s(self, prompt_len: int, output_len: int, concurrency: int) -> float | None:
        """Output tokens per second that no schedule can exceed on this group."""
        return costs.throughput_ceiling(
            self.config,
            self.floor(),
            step_weights=self.weights.per_step,
            kv_token_bytes=self.kv_token_bytes,
            concurrency=concurrency,
            prompt_len=prompt_len,
            output_len=output_len,
        )

    def _sustained(self) -> Limit:
        return _times(self.card.sustained_limit(self.scheme), self.tp_size)

    def _launch_s(self) -> float:
        per_layer = self.launches_per_layer
        if per_layer is None:
            per_layer = LAYER_LAUNCHES.get(getattr(self.config, "family", "qwen3"), 14)
            per_layer += INT8_EXTRA_LAUNCHES if self.scheme == "w8a8" else 0
        one = self.card.launch_s if self.graph_mode else self.card.eager_launch_s
        return one * (per_layer * self.config.num_layers + OUTER_LAUNCHES)

    def _communication_s(self, tokens: int) -> float:
        """Two all-reduces per layer; each rank sends and receives 2 (tp - 1) / tp of the activations."""
        if self.tp_size == 1:
            return 0.0
        size = tokens * self.config.hidden_size * costs.ELEMENT_BYTES[self.precision]
        moved = 2 * (self.tp_size - 1) / self.tp_size * size
        link = self.card.link_bytes_per_s
        return 2 * self.config.num_layers * (self.card.allreduce_s + (moved / link if link else 0.0))


def plan(
    config: ModelShape,
    card: Card,
    workload: Workload,
    *,
    precision: str = "bf16",
    quantize: str = "none",
    keep: Sequence[str] = ("lm_head",),
    card_counts: Sequence[int] = CARD_COUNTS,
) -> list[Plan]:
    """Every split of every card count into replicas x tensor parallel, the best first.

    Best: feasible (fits, divides, meets the limits), then most output tokens per second, then fewest cards.
    With a target the plans that reach it come first, fewest cards before speed.
    """
    plans = [
        _one_plan(Deployment(config, card, precision, quantize, tuple(keep), tp), cards // tp, workload)
        for cards in card_counts
        for tp in CARD_COUNTS
        if tp <= cards and cards % tp == 0
    ]
    return sorted(plans, key=lambda item: _rank(item, workload.target_tokens_per_s))


def _rank(item: Plan, target: float | None) -> tuple[float, ...]:
    rate = item.output_tokens_per_s or 0.0
    if target is not None and item.is_feasible and rate >= target:
        return (0, item.cards, -rate)
    return (1 if item.is_feasible else 2, -rate, item.cards)


def plans_table(plans: Sequence[Plan]) -> pandas.DataFrame:
    """The plans as a table, one row each, in the given order."""
    import pandas

    return pandas.DataFrame([dataclasses.asdict(item) for item in plans])


def _one_plan(group: Deployment, replicas: int, workload: Workload) -> Plan:
    total_len = workload.prompt_len + workload.output_len
    problem = group.check()
    most = 0 if problem else group.max_concurrency(total_len)
    busiest = _busiest(group, replicas, most, workload)
    running = busiest * replicas if workload.concurrency is None else min(workload.concurrency, busiest * replicas)
    base = Plan(
        cards=group.tp_size * replicas,
        tensor_parallel=group.tp_size,
        replicas=replicas,
        weight_gib_per_card=group.weights.stored / group.tp_size / GIB,
        kv_gib_per_card=max(0.0, group.kv_bytes_free()) / group.tp_size / GIB,
        max_concurrency=most * replicas,
        concurrency=running,
    )
    if problem:
        return dataclasses.replace(base, reason=problem)
    if running == 0:
        return dataclasses.replace(base, reason=f"no request of {total_len} tokens fits beside the weights")
    return _predict(base, group, busiest, workload)


def _busiest(group: Deployment, replicas: int, most: int, workload: Workload) -> int:
    """Requests in flight on the fullest replica. Without a stated number: the most that fit and meet TPOT."""
    if workload.concurrency is not None:
        return min(most, -(-workload.concurrency // replicas))
    if workload.tpot_limit_ms is None or most == 0:
        return most
    low, high = 1, most  # TPOT grows with the number in flight
    while low < high:
        middle = (low + high + 1) // 2
        tpot = group.tpot_s(workload.prompt_len, workload.output_len, middle)
        low, high = (middle, high) if tpot * 1e3 <= workload.tpot_limit_ms else (low, middle - 1)
    return low


def _predict(base: Plan, group: Deployment, busiest: int, workload: Workload) -> Plan:
    prompt_len, output_len = workload.prompt_len, workload.output_len
    context = prompt_len + output_len / 2
    floor, weights = group.floor(), group.weights.per_step
    tpot_ms = group.tpot_s(prompt_len, output_len, busiest) * 1e3
    ttft_ms = group.prefill_s(prompt_len) * 1e3
    shares = _shares(base.concurrency, base.replicas)
    return dataclasses.replace(
        base,
        decode_floor_ms=costs.decode_floor_s(group.config, floor, weights, group.kv_token_bytes, busiest, context)
        * 1e3,
        prefill_floor_ms=costs.prefill_floor_s(group.config, floor, weights, prompt_len) * 1e3,
        tpot_ms=tpot_ms,
        ttft_ms=ttft_ms,
        output_tokens_per_s=sum(n * group.output_tokens_per_s(prompt_len, output_len, c) for c, n in shares),
        ceiling_tokens_per_s=sum(n * group.ceiling_tokens_per_s(prompt_len, output_len, c) for c, n in shares),
        reason=_broken_limit(ttft_ms, tpot_ms, workload),
    )


def _shares(concurrency: int, replicas: int) -> list[tuple[int, int]]:
    """`(requests in flight, number of replicas with so many)`, idle replicas left out."""
    low, extra = divmod(concurrency, replicas)
    return [(c, n) for c, n in ((low + 1, extra), (low, replicas - extra)) if c and n]


def _broken_limit(ttft_ms: float, tpot_ms: float, workload: Workload) -> str | None:
    for name, value, limit in (("TTFT", ttft_ms, workload.ttft_limit_ms), ("TPOT", tpot_ms, workload.tpot_limit_ms)):
        if limit is not None and value > limit:
            return f"predicted {name} {value:.1f} ms is above the limit of {limit:g} ms"
    return None


def _times(limit: Limit, tp_size: int) -> Limit:
    return Limit(limit.flops_per_s * tp_size, limit.bytes_per_s * tp_size)
