"""What quantising one linear alone costs, and the cheapest mix of schemes that stays within a limit.

Cost is measured where it matters: the KL divergence of next-token distributions on calibration texts, in
nats per token, of the changed model against the float32 source. All variants travel through the layers
together, so the weights are read once, whatever the number of variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_kit.checkpoint.layerwise import LayerwiseModel, PackedTexts
from ascend_kit.checkpoint.parity import kl_divergence
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import linear_names, num_weights, unit_members, unit_names, weight_bytes

POSITIONS_AT_ONCE = 256
SHARE_STEPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)  # shares of units protected, tried from none upwards

Progress = Callable[[int, int, str], None]  # done, in all, what is counted


@dataclass(frozen=True)
class Divergence:
    """A variant against the float32 source on the same texts, teacher-forced."""

    kl: float  # mean KL(source || variant), nats per token
    max_kl: float  # of the worst token
    top1_agreement: float  # share of positions where both prefer the same token
    accuracy: float  # share of positions where the variant prefers the text's own next token
    source_accuracy: float  # the same of the source

    @property
    def accuracy_loss(self) -> float:
        """Next-token accuracy lost, as a share of all positions; negative when it rose."""
        return self.source_accuracy - self.accuracy


@dataclass(frozen=True)
class Candidate:
    """One mix of schemes with what it costs and what it saves."""

    name: str
    schemes: Mapping[str, str]  # linear -> w8a8 | w8a16 | w4a16
    weight_bytes: int  # all weights a decode step reads
    predicted_step_s: float | None  # weight_bytes / memory bandwidth; None when that is unknown
    divergence: Divergence

    def row(self) -> dict[str, Any]:
        """One line of a table, plain values."""
        kinds = list(self.schemes.values())
        return {
            "candidate": self.name,
            "w8a8_linears": kinds.count("w8a8"),
            "w8a16_linears": kinds.count("w8a16"),
            "w4a16_linears": kinds.count("w4a16"),
            "weight_bytes": self.weight_bytes,
            "predicted_step_s": self.predicted_step_s,
            **asdict(self.divergence),
            "accuracy_loss": self.divergence.accuracy_loss,
        }


@dataclass(frozen=True)
class MixChoice:
    """The chosen candidate among all that were measured, with the table behind it."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    sensitivity: tuple[dict[str, Any], ...]


def compare_variants(
    model: LayerwiseModel,
    texts: Sequence[Sequence[int]],
    variants: Mapping[str, Mapping[str, str]],
    on_progress: Progress | None = None,
    counted: str = "layers",
) -> dict[str, Divergence]:
    """Divergence of each variant (name -> schemes of its linears) from the float model."""
    packed = PackedTexts(texts, model)
    start = model.embed(packed.token_ids)
    hidden: dict[str | None, Tensor] = {None: start}  # None is the source; a variant joins where it first differs
    for number in range(model.config.num_layers):
        weights = model.layer_weights(number)
        plain = model.build_layer(number, weights)
        before = hidden[None]
        for name, schemes in variants.items():
            here = {linear: kind for linear, kind in schemes.items() if linear.startswith(f"model.layers.{number}.")}
            if here or name in hidden:
                layer = model.build_layer(number, weights, model.quantized_linear(here)) if here else plain
                hidden[name] = packed.forward(layer, hidden.get(name, before))
        hidden[None] = packed.forward(plain, before)
        if on_progress:
            on_progress(number + 1, model.config.num_layers, counted)
    return _divergences(model, packed, hidden, list(variants))


def _divergences(
    model: LayerwiseModel, packed: PackedTexts, hidden: dict[str | None, Tensor], names: list[str]
) -> dict[str, Divergence]:
    rows, tokens = (torch.tensor(found, device=model.device) for found in packed.targets)
    figures: dict[str | None, list[Tensor]] = {name: [] for name in (None, *names)}
    for chosen, wanted in zip(rows.split(POSITIONS_AT_ONCE), tokens.split(POSITIONS_AT_ONCE), strict=True):
        source = model.logits(hidden[None][chosen]).log_softmax(-1)
        for name, found in figures.items():
            state = hidden.get(name, hidden[None])
            other = source if name is None else model.logits(state[chosen]).log_softmax(-1)
            best, kl = other.argmax(-1), kl_divergence(source, other)
            found.append(torch.stack([kl, best == source.argmax(-1), best == wanted]).cpu().double())
    # [kl, prefers what the source prefers, prefers the text's own token] of every position
    whole = {name: torch.cat(found, dim=1) for name, found in figures.items()}
    source_accuracy = whole.pop(None)[2].mean().item()

    def divergence(kl: Tensor, agrees: Tensor, is_right: Tensor) -> Divergence:
        agreement, accuracy = agrees.mean().item(), is_right.mean().item()
        return Divergence(kl.mean().item(), kl.max().item(), agreement, accuracy, source_accuracy)

    return {name: divergence(*found) for name, found in whole.items() if name is not None}


def measure_sensitivity(
    model: LayerwiseModel, texts: Sequence[Sequence[int]], *, scheme: str = "w8a8", on_progress: Progress | None = None
) -> list[dict[str, Any]]:
    """One row per linear, `layer`, `linear`, `kl` and the rest, for quantising that linear and nothing else."""
    linears = [name for name in linear_names(model.config) if name != "lm_head"]
    alone = {name: {name: scheme} for name in linears}
    found = compare_variants(model, texts, alone, on_progress, "layers, each linear alone")
    return [
        {
            "linear": name,
            "layer": int(name.split(".")[2]),
            "part": name.rpartition(".")[2],
            "scheme": scheme,
            "num_weights": num_weights(model.config, name),
            **asdict(found[name]),
        }
        for name in linears
    ]


def choose_mix(
    model: LayerwiseModel,
    texts: Sequence[Sequence[int]],
    *,
    kept: set[str],
    with_4_bits: bool = False,
    float_bytes: int = 2,
    max_kl: float | None = None,
    max_accuracy_loss: float | None = None,
    bandwidth_bytes_per_s: float | None = None,
    on_progress: Progress | None = None,
) -> MixChoice:
    """The mix that reads the fewest bytes per decode step within the limits; w8a8 wins over w8a16 at equal
    bytes.

    Units (q, k, v together; gate and up together) are ordered by divergence per byte saved; candidates
    protect growing shares of the most sensitive ones, in float or in w8a16, and every candidate is measured
    as a whole, for costs of single linears do not simply add up.
    """
    sensitivity = measure_sensitivity(model, texts, on_progress=on_progress)
    pain = {row["linear"]: row["kl"] for row in sensitivity}
    variants = _mixes(model.config, kept, pain)
    if with_4_bits:  # the same ranking: what 8 bits disturb most, 4 bits do
        variants |= _mixes(model.config, kept, pain, "w4a16")
    found = compare_variants(model, texts, variants, on_progress, "layers, candidate mixes")
    candidates = []
    for name, schemes in variants.items():
        size = weight_bytes(model.config, schemes, float_bytes).per_step
        step = size / bandwidth_bytes_per_s if bandwidth_bytes_per_s else None
        candidates.append(Candidate(name, schemes, size, step, found[name]))
    largest_kl, largest_loss = (math.inf if limit is None else limit for limit in (max_kl, max_accuracy_loss))
    within = [c for c in candidates if c.divergence.kl <= largest_kl and c.divergence.accuracy_loss <= largest_loss]
    chosen = min(within, key=lambda c: (c.weight_bytes, list(c.schemes.values()).count("w8a16")))
    return MixChoice(chosen, tuple(candidates), tuple(sensitivity))


def _mixes(
    config: ModelConfig, kept: set[str], kl_of_linear: Mapping[str, float], cheap: str = "w8a8"
) -> dict[str, dict[str, str]]:
    """Candidate name -> schemes. `float` is always among them, so a limit can always be met."""
    members = {unit: names for unit in unit_names(config) if not kept & set(names := unit_members(unit))}

    def pain(unit: str) -> float:
        return sum(kl_of_linear[m] for m in members[unit]) / sum(num_weights(config, m) for m in members[unit])

    ordered = sorted(members, key=pain, reverse=True)

    def of_units(units: list[str], scheme: str) -> dict[str, str]:
        return {m: scheme for unit in units for m in members[unit]}

    mixes: dict[str, dict[str, str]] = {"float": {}}
    for share in SHARE_STEPS:
        count = round(share * len(ordered))
        rest = of_units(ordered[count:], cheap)
        if not count:
            mixes.setdefault(cheap, rest)
            continue
        mixes[f"{cheap}, {count} of {len(ordered)} units w8a16"] = rest | of_units(ordered[:count], "w8a16")
        mixes[f"{cheap}, {count} of {len(ordered)} units float"] = rest
    return mixes | {"w8a16": of_units(ordered, "w8a16")}
