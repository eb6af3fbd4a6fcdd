"""What to expect of a model on a machine before anything is run: sizes, floors and plans for the cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ascend_kit.device.peaks import PEAKS
from ascend_kit.measure.planner import Card, Deployment, Workload, plan, plans_table
from ascend_kit.model.config import ModelConfig

if TYPE_CHECKING:
    import pandas

    from ascend_kit.device.device import Device
    from ascend_kit.params import Experiment

GIB = 2**30
# The models and the machine the project is about, from the models' config.json and the peak table.
MODELS = {
    "Qwen2.5-7B": ModelConfig("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, attention_bias=True),
    "Qwen3-8B": ModelConfig("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True),
}
SERVER_CARD = "910B3"
SERVER_CARDS = (4, 8)
SERVER_LOADS = (8, 16, 32, 64, 128, 256, 512, 1024)  # requests in flight, all cards together


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


def server_plans(prompt_len: int = 512, output_len: int = 256) -> pandas.DataFrame:
    """A row per model, load and way to use 4 or 8 cards of an Atlas 800T A2, in bf16: replicas and tensor parallel.

    Simulated with the planner from nominal peaks and general constants; nothing of it was measured.
    """
    import pandas

    card = Card.from_peak(PEAKS[SERVER_CARD])
    tables = []
    for name, model in MODELS.items():
        for load in SERVER_LOADS:
            plans = plan(model, card, Workload(prompt_len, output_len, load), card_counts=SERVER_CARDS)
            tables.append(plans_table([one for one in plans if one.concurrency == load]).assign(model=name))
    return pandas.concat(tables, ignore_index=True)


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
