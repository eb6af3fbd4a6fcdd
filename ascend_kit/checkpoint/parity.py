"""Does the result still say what the source says? Distributions, perplexity, greedy text and length, each
with a limit.

A model is two functions: logits of given token ids, and continuations of prompts. This module does not know
where they come from: files run layer by layer (`files_model`), an engine, transformers.

Distributions are compared teacher-forced on the prompts' own tokens, so that one early difference does not
spoil the rest. Greedy text is compared as written, up to the first difference; few texts that part early may do so
by chance, and then miss no limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ascend_kit.checkpoint.check import check_tensors
from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.layerwise import LayerwiseModel, PackedTexts
from ascend_kit.model.tensors import EMBEDDING

TokenIds = Sequence[int]
# (prompts) -> logits [T, V] of each prompt in turn, float32
LogitsFunction = Callable[[Sequence[TokenIds]], Iterator[Tensor]]
# (prompts, max_new_tokens, seed; None = greedy) -> new token ids of each prompt, end token included if it
# was reached
GenerateFunction = Callable[[Sequence[TokenIds], int, "int | None"], list[list[int]]]


# --- the numbers of any comparison ------------------------------------------------------------------------------------


def kl_divergence(source: Tensor, other: Tensor) -> Tensor:
    """KL(source || other) in nats over the last dimension, from log-probabilities.

    sum p (lp - lq) cancels badly when both are close; as sum q = sum p, each term may be written as
    p (exp(lq - lp) - 1 - (lq - lp)), which is never negative.
    """
    gap = other - source
    return (source.exp() * (torch.expm1(gap) - gap)).sum(-1)


def equal_tokens(left: TokenIds, right: TokenIds) -> int:
    """Tokens before the first difference; a text that stops earlier differs where the other goes on."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


# --- models against each other ----------------------------------------------------------------------------------------


class ParityError(RuntimeError):
    """The result misses a limit. `report` holds all figures; `remedy` is said at the end."""

    def __init__(self, report: ParityReport, remedy: str = "") -> None:
        figures = {row["figure"]: f"{row['value']:.4g}" for row in report.table() if row["limit"] and row["ok"]}
        held = ", ".join(f"{name} {value}" for name, value in figures.items())
        super().__init__(
            f"{report.result} does not answer like {report.source}: "
            + "; ".join(report.failures)
            + f". Measured on {report.summary['tokens']} tokens of {report.summary['prompts']} prompts"
            + (f"; within their limits: {held}" if held else "")
            + (f". {remedy}" if remedy else "")
        )
        self.report = report


@dataclass(frozen=True)
class ParityModel:
    """A model as parity sees it; without `generate` text and length are not compared."""

    name: str
    logits: LogitsFunction
    generate: GenerateFunction | None = None


@dataclass(frozen=True)
class ParityLimits:
    """What is still accepted; None switches a limit off."""

    max_kl: float | None = 0.05  # mean KL(source || result), nats per token
    min_top1_agreement: float | None = 0.9  # share of positions
    max_logit_error: float | None = 2.0  # largest, in standard deviations of the source's logits
    max_perplexity_increase: float | None = 0.05  # result / source - 1, on the same tokens
    min_greedy_share: float | None = 0.3  # equal greedy tokens before the first difference / tokens written
    min_length_ratio: float | None = 0.9  # output tokens of result / source on sampled prompts (MLPerf's 90 %)

    def by_figure(self) -> dict[str, tuple[str, float]]:
        """Figure -> (min or max, limit) of those that are not switched off."""
        parts = [(*name.partition("_")[::2], value) for name, value in asdict(self).items()]
        return {figure: (bound, value) for bound, figure, value in parts if value is not None}


# By what was done to the weights. fp32 -> bf16 keeps 8 bits of mantissa; int8 rounds to 1/254 of a row's range. Steps
# of 4 bits are 127 / 7 = 18 times as long: divergence and perplexity grow with the square of that, the share of other
# top tokens and the logit error in proportion. From what W8A16 costs the demo model (0.0001 nats, 0.03 %, 0.5 %, 0.08),
# three times over.
LIMITS = {
    "fp32": ParityLimits(1e-6, 0.999, 0.001, 1e-4, 0.95, 0.9),
    "fp16": ParityLimits(1e-3, 0.99, 0.1, 0.005, 0.6, 0.9),
    "bf16": ParityLimits(0.005, 0.97, 0.5, 0.01, 0.5, 0.9),
    "w8a16": ParityLimits(0.02, 0.95, 1.0, 0.02, 0.3, 0.9),
    "w4a16": ParityLimits(0.1, 0.73, 4.3, 0.3, 0.05, 0.8),
    "w8a8": ParityLimits(0.05, 0.9, 1.5, 0.05, 0.2, 0.9),
}

# The same weights in float32, computed by two programs: rounding alone.
READING_LIMITS = ParityLimits(1e-6, 0.99, 0.01, 1e-4, None, None)


@dataclass(frozen=True)
class ParityReport:
    """Figures per prompt (`rows`) and in all (`summary`), the limits, and the limits that were missed."""

    source: str
    result: str
    rows: tuple[dict[str, Any], ...]
    summary: dict[str, float | int | None]
    limits: ParityLimits

    @property
    def failures(self) -> list[str]:
        """One sentence per missed limit."""
        words = {"max": "at most", "min": "at least"}
        return [
            f"{figure} is {self.summary[figure]:.4g}, allowed is {words[bound]} {limit:.4g}"
            for figure, (bound, limit) in self.limits.by_figure().items()
            if not self._meets(figure, bound, limit)
        ]

    def _meets(self, figure: str, bound: str, limit: float) -> bool:
        measured = self.summary.get(figure)
        if measured is None or (figure == "greedy_share" and _parts_by_chance(self.rows, limit)):
            return True
        return measured <= limit if bound == "max" else measured >= limit

    @property
    def passed(self) -> bool:
        return not self.failures

    def check(self, remedy: str = "") -> ParityReport:
        """Itself if every limit is met, else ParityError that ends with `remedy`."""
        if not self.passed:
            raise ParityError(self, remedy)
        return self

    def table(self) -> list[dict[str, Any]]:
        """One row per figure: value, limit and whether it holds."""
        missed = {text.split(" ", 1)[0] for text in self.failures}
        limits, rows = self.limits.by_figure(), []
        for figure, value in self.summary.items():
            bound, limit = limits.get(figure, ("", None))
            shown = "" if limit is None else f"{'<=' if bound == 'max' else '>='} {limit:g}"
            if limit is not None and bound == "min" and value is not None and value < limit and figure not in missed:
                shown += ", too few texts to tell"
            rows.append({"figure": figure, "value": value, "limit": shown or None, "ok": figure not in missed})
        return rows


def limits_for(precision: str, scheme: str, **changes: float | None) -> ParityLimits:
    """Default limits of a precision and quantisation scheme, with some replaced."""
    return replace(LIMITS[{"none": precision, "mixed": "w8a8", "w8a8_static": "w8a8"}.get(scheme, scheme)], **changes)


def compare(
    source: ParityModel,
    result: ParityModel,
    prompts: Sequence[TokenIds],
    *,
    limits: ParityLimits | None = None,
    max_new_tokens: int = 32,
    sample_seed: int = 0,
    num_samples: int = 4,
) -> ParityReport:
    """Measure `result` against `source` on token ids of prompts (at least two tokens each)."""
    short = [index for index, prompt in enumerate(prompts) if len(prompt) < 2]
    if short or not prompts:
        raise ValueError(f"parity needs prompts of at least two tokens; too short: {short or 'there are none'}")
    rows = [
        _compare_logits(prompt, left, right)
        for prompt, left, right in zip(prompts, source.logits(prompts), result.logits(prompts), strict=True)
    ]
    writers = [model.generate for model in (source, result) if model.generate is not None]
    generated = len(writers) == 2
    if generated:
        texts = [generate(prompts, max_new_tokens, None) for generate in writers]
        # Sampled lengths scatter: several samples a prompt, or the ratio would turn red by chance.
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        sampled = [generate(repeated, max_new_tokens, sample_seed) for generate in writers]
        for index, (row, left, right) in enumerate(zip(rows, *texts, strict=True)):
            row |= {"greedy_tokens": max(len(left), len(right)), "greedy_equal_tokens": equal_tokens(left, right)}
            row |= {"greedy_source": list(left), "greedy_result": list(right)}
            first = index * num_samples
            for side, outputs in zip(("source", "result"), sampled, strict=True):
                row[f"{side}_sampled_tokens"] = sum(map(len, outputs[first : first + num_samples]))
    return ParityReport(source.name, result.name, tuple(rows), _summary(rows, generated), limits or ParityLimits())


def _compare_logits(prompt: TokenIds, source: Tensor, other: Tensor) -> dict[str, Any]:
    """Figures over a prompt's positions from logits [T, V] of both sides.

    ValueError for logits that are not finite: nothing can be said about them.
    """
    if source.shape != other.shape or source.shape[0] != len(prompt):
        raise ValueError(
            f"logits of {len(prompt)} tokens have shapes {tuple(source.shape)} and {tuple(other.shape)}; "
            "source and result must share a vocabulary"
        )
    left, right = source[:-1].float(), other[:-1].float()
    for name, logits in (("first", left), ("second", right)):
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"the {name} model's logits hold NaN or infinite values; they cannot be compared")
    wanted = torch.tensor(list(prompt[1:]), device=left.device)[:, None]
    lp, lq = left.log_softmax(-1), right.log_softmax(-1)
    kl = kl_divergence(lp, lq)
    return {
        "tokens": len(wanted),
        "kl": kl.mean().item(),
        "worst_kl": kl.max().item(),
        "top1_agreement": (lp.argmax(-1) == lq.argmax(-1)).float().mean().item(),
        "logit_error": ((left - right).abs().max() / left.std()).item(),
        "source_nll": -lp.gather(1, wanted).sum().item(),
        "result_nll": -lq.gather(1, wanted).sum().item(),
    }


def _parts_by_chance(rows: Sequence[dict[str, Any]], share: float, significance: float = 0.05) -> bool:
    """Whether texts of a result exactly at the limit `share` would part as early in at least 5 % of the cases.

    Let each token differ with the same probability p, so that a text of L tokens keeps (1 - p)(1 - (1 - p)^L) / (p L)
    of them on average. The limit fixes p; the tokens compared and the differences seen are then binomial.
    """
    from scipy.optimize import brentq
    from scipy.stats import binom

    written, equal = (sum(row[name] for row in rows) for name in ("greedy_tokens", "greedy_equal_tokens"))
    parted = sum(row["greedy_equal_tokens"] < row["greedy_tokens"] for row in rows)
    length = written / len(rows)
    if not 0 < share < 1 or not written:
        return False
    keeps = lambda p: (1 - p) * -math.expm1(length * math.log1p(-p)) / (p * length)  # noqa: E731
    differs = brentq(lambda p: keeps(p) - share, 1e-9, 1 - 1e-9)
    return bool(binom.sf(parted - 1, equal + parted, differs) >= significance)


def _summary(rows: list[dict[str, Any]], generated: bool) -> dict[str, float | int | None]:
    tokens = sum(row["tokens"] for row in rows)

    def mean(name: str) -> float:
        return sum(row[name] * row["tokens"] for row in rows) / tokens

    source_nll, result_nll = (sum(row[f"{side}_nll"] for row in rows) / tokens for side in ("source", "result"))
    summary: dict[str, float | int | None] = {
        "prompts": len(rows),
        "tokens": tokens,
        "kl": mean("kl"),
        "worst_kl": max(row["worst_kl"] for row in rows),
        "top1_agreement": mean("top1_agreement"),
        "logit_error": max(row["logit_error"] for row in rows),
        "source_perplexity": math.exp(source_nll),
        "result_perplexity": math.exp(result_nll),
        "perplexity_increase": math.exp(result_nll - source_nll) - 1,
    }
    if generated:
        equal, written = (sum(row[name] for row in rows) for name in ("greedy_equal_tokens", "greedy_tokens"))
        source, result = (sum(row[f"{side}_sampled_tokens"] for row in rows) for side in ("source", "result"))
        summary |= {
            "greedy_equal_tokens": equal,
            "greedy_tokens": written,
            "greedy_share": equal / written if written else None,
            "length_ratio": result / source if source else None,
        }
    return summary


def files_model(checkpoint: Checkpoint, name: str = "files", device: torch.device | str = "cpu") -> ParityModel:
    """A checkpoint in float32, straight from its files and one layer in memory at a time.

    Int8 linears compute what their scheme means: rounded weights, for w8a8 also activations rounded per
    token.
    """
    config = checkpoint.model
    check_tensors(checkpoint, config)
    model = LayerwiseModel(checkpoint, config, device=device)

    def logits(prompts: Sequence[TokenIds]) -> Iterator[Tensor]:
        packed = PackedTexts(prompts, model)
        hidden = model.embed(packed.token_ids)
        for number in range(config.num_layers):
            hidden = packed.forward(model.stored_layer(number), hidden)
        for part in hidden.split(packed.lengths):
            yield model.logits(part)

    return ParityModel(name, logits)


def transformers_model(checkpoint: Checkpoint, name: str = "transformers") -> ParityModel:
    """transformers in float32 on a checkpoint's tensors, which shares nothing else with us: it reads config.json and
    computes the layers by itself. One layer's weights are in memory at a time, beside embedding and head.
    """
    config = checkpoint.model
    weights = LayerwiseModel(checkpoint, config)

    def logits(prompts: Sequence[TokenIds]) -> Iterator[Tensor]:
        model = _empty_transformers(checkpoint.config)
        for prefix, module in model.named_modules():
            if re.fullmatch(r"model\.layers\.\d+", prefix):
                module.register_forward_pre_hook(lambda module, _, prefix=prefix: fill(module, prefix))
                module.register_forward_hook(drop)
            elif prefix in ("model.embed_tokens", "model.norm", "lm_head"):
                fill(module, prefix)
        width = max(map(len, prompts))  # what is added on the right is seen by no token of the prompt
        padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        with torch.no_grad():
            found = model(padded, use_cache=False).logits
        for row, prompt in zip(found, prompts, strict=True):
            yield row[: len(prompt)].float()

    def fill(module: nn.Module, prefix: str) -> None:
        prefix = EMBEDDING.removesuffix(".weight") if prefix == "lm_head" and config.tie_embeddings else prefix
        module.load_state_dict({key: weights.weight(f"{prefix}.{key}") for key in module.state_dict()}, assign=True)

    def drop(module: nn.Module, *_: object) -> None:
        module.to("meta")

    return ParityModel(name, logits)


def _empty_transformers(raw: dict[str, Any]) -> Any:
    """The model that transformers builds from a config.json, without weights."""
    import transformers

    keys = {key: value for key, value in raw.items() if key not in ("quantization_config", "model_type", "auto_map")}
    config = transformers.AutoConfig.for_model(raw["model_type"], **keys)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not stored
    return model.eval()


def check_reading(checkpoint: Checkpoint, prompts: Sequence[TokenIds]) -> ParityReport:
    """Our reading of a float checkpoint against transformers' on a few prompts; ParityError when they differ."""
    ours = files_model(checkpoint, "this package's reading of the source")
    theirs = transformers_model(checkpoint, "transformers on the same files")
    return compare(theirs, ours, prompts, limits=READING_LIMITS).check()
