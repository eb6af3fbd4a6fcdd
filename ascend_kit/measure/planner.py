"""How many cards to use in which way: every split of some cards into replicas x tensor parallel, the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ascend_kit.device.peaks import PEAKS
from ascend_kit.files import GIB
from ascend_kit.measure.forecast import Card, Deployment
from ascend_kit.model.config import ModelConfig

if TYPE_CHECKING:
    import pandas

    from ascend_kit.params import Experiment

CARD_COUNTS = (1, 2, 4, 8)
# The models and the machine the project is about, from the models' config.json and the peak table.
MODELS = {
    "Qwen2.5-7B": ModelConfig("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, attention_bias=True),
    "Qwen3-8B": ModelConfig("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True),
}
SERVER_CARD = "910B3"
SERVER_CARDS = (4, 8)
SERVER_LOADS = (8, 16, 32, 64, 128, 256, 512, 1024)  # requests in flight, all cards together


@dataclass(frozen=True)
class Plan:
    """A way to use cards, and what it is predicted to do; times in ms, memory in GiB per card.

    `ttft_ms` is a prompt alone, without queueing; `tpot_ms` and `decode_floor_ms` are those of the fullest replica.
    `reason` says why an infeasible plan is one.
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


def plan(
    group: Deployment,
    prompt_len: int,
    output_len: int,
    concurrency: int,
    *,
    limits_ms: Mapping[str, float] | None = None,
    card_counts: Sequence[int] = CARD_COUNTS,
) -> list[Plan]:
    """Every split of every card count into groups like `group` of 1, 2, 4 or 8 cards, the best first.

    So many requests of these lengths are in flight, within `limits_ms` of `ttft` and `tpot`. Best: feasible (fits,
    divides, meets the limits), then most output tokens per second, then fewest cards.
    """
    plans = [
        _one_plan(replace(group, tp_size=size), cards // size, (prompt_len, output_len), concurrency, limits_ms or {})
        for cards in card_counts
        for size in CARD_COUNTS
        if size <= cards and cards % size == 0
    ]
    return sorted(plans, key=lambda one: (one.reason is not None, -(one.output_tokens_per_s or 0.0), one.cards))


def forecast(group: Deployment, replicas: int, prompt_len: int, output_len: int, concurrency: int) -> dict[str, float]:
    """Floors, ceiling and predictions of `replicas` groups that share `concurrency` requests, by the names of a Plan.

    Whether that many requests fit is not asked.
    """
    shares = _shares(concurrency, replicas)
    busiest = shares[0][0]
    return {
        "decode_floor_ms": group.decode_floor_s(busiest, prompt_len + output_len / 2) * 1e3,
        "prefill_floor_ms": group.prefill_floor_s(prompt_len) * 1e3,
        "tpot_ms": group.tpot_s(prompt_len, output_len, busiest) * 1e3,
        "ttft_ms": group.prefill_s(prompt_len) * 1e3,
        "output_tokens_per_s": sum(n * group.output_tokens_per_s(prompt_len, output_len, c) for c, n in shares),
        "ceiling_tokens_per_s": sum(n * group.ceiling_tokens_per_s(prompt_len, output_len, c) for c, n in shares),
    }


def outlook(experiment: Experiment, memory_bytes: int, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Sizes and floors of the experiment's model on a device of `memory_bytes` with measured `ceilings`.

    They are those of its heaviest sweep point.

    `facts`: name with unit -> value. `plans`: one row per way to split the cards, the best first.
    """
    model = ModelConfig.from_folder(experiment.tokenizer_path or experiment.input_model)
    card = Card.from_ceilings(ceilings, memory_bytes=memory_bytes, precision=experiment.precision)
    one = Deployment(model, card, experiment.precision, experiment.quantize, tuple(experiment.quantize_keep),
                     kv_cache_dtype=experiment.kv_cache_dtype, speculate=experiment.speculate,
                     graph_mode=experiment.graph_mode, graph_prompt_tokens=experiment.graph_prompt_tokens,
                     async_scheduling=experiment.async_scheduling is not False)  # fmt: skip
    longest = experiment.max_seq_length
    heaviest = [max(experiment.sweep[name]) for name in ("prompt_len", "output_len", "concurrency")]
    plans = plan(one, *heaviest, limits_ms=experiment.limits, card_counts=sorted({1, experiment.cards}))
    least = min((item.decode_floor_ms for item in plans if item.decode_floor_ms is not None), default=None)
    facts = {
        "weights, GiB": one.weights.stored / GIB,
        "read per decode step, GiB": one.weights.per_step / GIB,
        "KV per token, KiB": one.kv_token_bytes / 2**10,
        f"KV of a request of {longest} tokens, GiB": one.kv_token_bytes * longest / GIB,
        "memory of the device, GiB": memory_bytes / GIB,
        "requests of the longest length that fit": one.max_concurrency(longest),
        "reading memory, GB/s": card.peak.bandwidth_bytes_per_s / 1e9,
        f"least time of a decode step at concurrency {heaviest[-1]}, ms": least,
    }
    return {"facts": facts, "plans": [asdict(item) for item in plans]}


def server_plans(prompt_len: int = 512, output_len: int = 256) -> pandas.DataFrame:
    """A row per model, load and way to use 4 or 8 cards of an Atlas 800T A2, in bf16: replicas and tensor parallel.

    Simulated with the planner from nominal peaks and general constants; nothing of it was measured.
    """
    import pandas

    card = Card(PEAKS[SERVER_CARD])
    return pandas.DataFrame([
        {**asdict(one), "model": name}
        for name, model in MODELS.items()
        for load in SERVER_LOADS
        for one in plan(Deployment(model, card), prompt_len, output_len, load, card_counts=SERVER_CARDS)
        if one.concurrency == load
    ])  # fmt: skip


def _one_plan(
    group: Deployment, replicas: int, lengths: tuple[int, int], concurrency: int, limits_ms: Mapping[str, float]
) -> Plan:
    problem = group.check()
    most = 0 if problem else group.max_concurrency(sum(lengths))
    running = min(concurrency, most * replicas)
    base = Plan(
        cards=group.tp_size * replicas,
        tensor_parallel=group.tp_size,
        replicas=replicas,
        weight_gib_per_card=group.weights.stored / group.tp_size / GIB,
        kv_gib_per_card=max(0.0, group.kv_bytes_free()) / group.tp_size / GIB,
        max_concurrency=most * replicas,
        concurrency=running,
    )
    if running == 0:
        return replace(base, reason=problem or f"no request of {sum(lengths)} tokens fits beside the weights")
    found = forecast(group, replicas, *lengths, running)
    broken = (
        f"predicted {name.upper()} {found[f'{name}_ms']:.1f} ms is above the limit of {limits_ms[name]:g} ms"
        for name in ("ttft", "tpot")
        if name in limits_ms and found[f"{name}_ms"] > limits_ms[name]
    )
    return replace(base, **found, reason=next(broken, None))


def _shares(concurrency: int, replicas: int) -> list[tuple[int, int]]:
    """`(requests in flight, number of replicas with so many)`, the fullest first, idle replicas left out."""
    low, extra = divmod(concurrency, replicas)
    return [(c, n) for c, n in ((low + 1, extra), (low, replicas - extra)) if c and n]
