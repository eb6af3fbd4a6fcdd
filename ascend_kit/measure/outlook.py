"""What to expect of a model on a machine before anything is run: sizes, floors and plans for the cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ascend_kit.measure.planner import Card, Deployment, Workload, plan, plans_table
from ascend_kit.model.config import ModelConfig

if TYPE_CHECKING:
    import pandas

    from ascend_kit.device.device import Device
    from ascend_kit.params import Experiment

GIB = 2**30


@dataclass(frozen=True)
class Outlook:
    """`facts`: name with unit -> value. `plans`: one row per way to split the cards, the best first."""

    facts: dict[str, Any]
    plans: pandas.DataFrame


def outlook(experiment: Experiment, device: Device, ceilings: dict[str, Any]) -> Outlook:
    """Sizes and floors of the experiment's model with measured `ceilings`, for its heaviest sweep point."""
    model = ModelConfig.from_folder(experiment.tokenizer_path or experiment.input_model)
    card = Card.from_ceilings(ceilings, memory_bytes=device.total_memory_bytes, precision=experiment.precision)
    scheme = "w8a8" if experiment.quantize == "auto" else experiment.quantize  # auto: at best everything in int8
    settings = {"precision": experiment.precision, "quantize": scheme, "keep": tuple(experiment.quantize_keep)}
    workload = Workload(
        max(experiment.sweep_prompt_len),
        max(experiment.sweep_output_len),
        max(experiment.sweep_concurrency),
        ttft_limit_ms=experiment.ttft_limit_ms,
        tpot_limit_ms=experiment.tpot_limit_ms,
    )
    plans = plans_table(plan(model, card, workload, card_counts=sorted({1, experiment.cards}), **settings))
    return Outlook(_facts(experiment, Deployment(model, card, **settings), workload, plans), plans)


def _facts(experiment: Experiment, one: Deployment, workload: Workload, plans: pandas.DataFrame) -> dict[str, Any]:
    longest = experiment.max_seq_length
    return {
        "weights, GiB": one.weights.stored / GIB,
        "read per decode step, GiB": one.weights.per_step / GIB,
        "KV per token, KiB": one.kv_token_bytes / 2**10,
        f"KV of a request of {longest} tokens, GiB": one.kv_token_bytes * longest / GIB,
        "memory of the device, GiB": one.card.memory_bytes / GIB,
        "requests of the longest length that fit": one.max_concurrency(longest),
        "reading memory, GB/s": one.card.bytes_per_s / 1e9,
        f"least time of a decode step at concurrency {workload.concurrency}, ms": plans["decode_floor_ms"].min(),
    }
