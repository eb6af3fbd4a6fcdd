"""Does a model still answer as it should? A converted folder against its source, an engine against plain operators.

Greedy text is compared as written and judged where it first differs; log-probabilities must be finite numbers.
Distributions are compared by `checkpoint.parity`, straight from the files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.checkpoint.convert import convert, open_source
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.parity import (
    GenerateFunction,
    ParityLimits,
    ParityReport,
    TokenIds,
    check_reading,
    compare,
    equal_tokens,
    files_model,
    limits_for,
)
from ascend_kit.checkpoint.recipe import tokenize_texts
from ascend_kit.checkpoint.sensitivity import Progress
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import RequestOutput, SamplingParams
from ascend_kit.prompts import read_prompts

if TYPE_CHECKING:
    import pandas

    from ascend_kit.params import Experiment

SAMPLE_TEMPERATURE = 0.7
REFEREE_PROMPTS = 2
PARITY_PROMPTS, PARITY_PROMPT_TOKENS = 16, 128  # at most
CHECK_TOKENS = 8
CHECK_PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
    "北京是中国的",
)
# Two tokens whose log-probabilities lie closer than this (nats) may change places: rounding decides. float32
# differs in the order of sums only; bf16 has 8 and fp16 11 bits of mantissa, few for logits of a few tens (a trained
# model's 120 texts of 24 tokens: 48 parted, at most 0.25 nats apart). Int8 activations round in every layer, and one
# code that falls the other way moves those behind it: of the same texts 92 parted in bf16 and 82 in float32, at most
# 1.0 and 0.9 nats apart.
CLOSE_CALL = {"fp32": 1e-3, "fp16": 0.06, "bf16": 0.5}
INT8_CLOSE_CALL = 1.5


class WrongAnswerError(RuntimeError):
    """An engine writes other tokens than plain operators do, beyond rounding, or computes no numbers at all."""


# --- an engine against plain operators --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Greedy answers to `CHECK_PROMPTS`, with the margin (nats) by which each token won and what may be rounding."""

    token_ids: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    tolerance: float


def reference_answers(experiment: Experiment) -> Reference:
    """Answers of plain operators without graphs to a few short prompts; the model is loaded and freed."""
    cards, slots = experiment.tensor_parallel, len(CHECK_PROMPTS)
    plain = experiment.alone(cards=cards, graph_mode=False, operator_fusion=False, batch_size=slots)
    with AscendInferEngine.from_experiment(plain) as engine:
        outputs = _greedy_answers(engine)
        schemes = open_checkpoint(engine.model_path).quantization.schemes.values()
    rounding = CLOSE_CALL[experiment.precision]
    if any(scheme.startswith("w8a8") for scheme in schemes):
        rounding = max(rounding, INT8_CLOSE_CALL)
    # Nats between the best and the second token.
    margins = tuple(tuple(token.top[0][1] - token.top[1][1] for token in output.logprobs or ()) for output in outputs)
    return Reference(tuple(tuple(output.token_ids) for output in outputs), margins, rounding)


def check_against(reference: Reference, engine: AscendInferEngine) -> pandas.DataFrame:
    """Compare the engine's greedy answers with the reference; one row per prompt. The engine is loaded if it is not.

    WrongAnswerError at the first token that differs although the reference was sure of it, and for log-probabilities
    that are not finite. After a close call the texts may part, and nothing beyond that token is compared.
    """
    import pandas

    outputs = _greedy_answers(engine.load_model())
    return pandas.DataFrame([_judged(place, reference, output) for place, output in enumerate(outputs)])


def _greedy_answers(engine: AscendInferEngine) -> list[RequestOutput]:
    # ignore_eos: a small model may end at once, and then there would be nothing to compare.
    sampling = SamplingParams(max_new_tokens=CHECK_TOKENS, ignore_eos=True, logprobs=2)
    outputs = engine.generate(list(CHECK_PROMPTS), sampling)
    for prompt, output in zip(CHECK_PROMPTS, outputs, strict=True):
        if output.finish_reason == "error":
            raise WrongAnswerError(f"the check prompt {prompt!r} was refused: {output.error}")
        for place, token in enumerate(output.logprobs or ()):
            if not all(math.isfinite(value) for value in (token.logprob, *(logprob for _, logprob in token.top))):
                raise WrongAnswerError(
                    f"after {prompt!r} the log-probabilities of token {place} are not finite ({token.logprob}): the "
                    "model computes no usable logits; check the weights, or try precision: fp32"
                )
    return outputs


def _judged(number: int, reference: Reference, output: RequestOutput) -> dict[str, object]:
    prompt, expected = CHECK_PROMPTS[number], reference.token_ids[number]
    place = equal_tokens(expected, output.token_ids)
    row = {"prompt": prompt, "tokens": len(expected), "equal_tokens": place, "text": output.text}
    if place == len(expected):
        return {**row, "note": "equal"}
    margin = reference.margins[number][place]
    if margin > reference.tolerance:
        raise WrongAnswerError(
            f"after {prompt!r} token {place} is {output.token_ids[place]}, the plain operators say {expected[place]} "
            f"by {margin:.2f} nats (rounding explains {reference.tolerance}). Do not trust this setting: try "
            "graph_mode: false, then operator_fusion: false, and run `python -m ascend_kit doctor --self-test`"
        )
    return {**row, "note": f"close call at token {place}: margin {margin:.3f} nats"}


# --- a converted folder against its source ----------------------------------------------------------------------------


class ParityCheck:
    """Compares a folder with the experiment's source; made for `convert(..., before_publish=check)`.

    Texts come from `prompts_file`. The float32 source is the measure; a Megatron source, which no engine
    runs, is compared by its distributions alone. On a few prompts transformers reads the source, too: what we read
    wrongly in its config.json would be equal on both sides. After a call `report` holds the figures, also when the
    call raised.
    """

    def __init__(self, experiment: Experiment, *, max_new_tokens: int = 32) -> None:
        self.experiment, self.max_new_tokens = experiment, max_new_tokens
        self.report: ParityReport | None = None

    def __call__(self, folder: Path) -> ParityReport:
        """The report; ParityError when a limit is missed."""
        experiment, result = self.experiment, open_checkpoint(folder)
        source = open_source(
            Path(experiment.input_model), experiment.framework, experiment.tokenizer_path, experiment.adapter_path
        )
        tokenizer = Path(experiment.tokenizer_path) if experiment.tokenizer_path else source.config_folder
        texts = read_prompts(experiment.needed("prompts_file"))[:PARITY_PROMPTS]
        prompts = tokenize_texts(texts, tokenizer, PARITY_PROMPT_TOKENS)
        if not source.quantization.schemes:  # source and result share our reading of config.json; transformers does not
            check_reading(source, prompts[:REFEREE_PROMPTS])
        # parity_max_kl stands for ParityLimits.max_kl, and so on.
        given = experiment.model_dump(include={f"parity_{limit.name}" for limit in fields(ParityLimits)})
        replaced = {name.removeprefix("parity_"): value for name, value in given.items() if value is not None}
        limits = limits_for(experiment.precision, result.quantization.summary, **replaced)
        ours, theirs = files_model(result, "result"), files_model(source, "source")
        if source.framework == "huggingface":
            # The source in float32: its own precision is part of what conversion changes.
            theirs = replace(theirs, generate=_engine_generate(source.folder, tokenizer, "fp32", experiment))
            ours = replace(ours, generate=_engine_generate(result.folder, tokenizer, experiment.precision, experiment))
        self.report = compare(theirs, ours, prompts, limits=limits, max_new_tokens=self.max_new_tokens)
        return self.report.check(_remedy(experiment))

    def describe(self) -> dict[str, Any]:
        """What to store of the last report: table of figures, rows per prompt, missed limits."""
        if self.report is None:
            return {}
        report = self.report
        return {"figures": report.table(), "rows": [dict(row) for row in report.rows], "failures": report.failures}


def _remedy(experiment: Experiment) -> str:
    """What loses less than the conversion that was asked for, and how to accept what it loses."""
    if experiment.quantize == "none":
        lighter = [] if experiment.precision == "fp32" else ["precision: fp32, to see whether rounding alone does it"]
    else:
        asked = {
            "smooth: 0.5": experiment.quantize == "w8a8" and experiment.smooth is None,
            "clip_search: true": not experiment.clip_search,
            "quantize: auto with max_kl": experiment.quantize != "auto",
            "quantize: w8a16": experiment.quantize != "w8a16",
        }
        lighter = [change for change, is_left in asked.items() if is_left]
    tried = f"Try {'; or '.join(lighter)}. " if lighter else ""
    return f"{tried}To accept the loss, set the limit's parity_ parameter"


def convert_and_compare(
    experiment: Experiment, bandwidth_bytes_per_s: float | None = None, *, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Convert the experiment's model and compare the result with its source before it takes its place; one row.

    Every other checkpoint that the sweep names is converted as well; their rows are in `others`. ParityError when a
    limit is missed, and nothing is published; otherwise as `convert`.
    """
    rows = []
    for plan in [experiment, *experiment.swept_checkpoints]:
        parity = ParityCheck(plan)
        result = convert(
            plan, bandwidth_bytes_per_s=bandwidth_bytes_per_s, on_progress=on_progress, before_publish=parity
        )
        if parity.report is None:  # a folder that is reused was not written now
            parity(result.folder)
        rows.append({**result.to_row(), **parity.describe()})
    return {**rows[0], "others": rows[1:]}


def _engine_generate(folder: Path, tokenizer: Path, precision: str, experiment: Experiment) -> GenerateFunction:
    """A generate function that loads the engine for each call, so that only one model is in memory at a time."""

    def generate(prompts: Sequence[TokenIds], max_new_tokens: int, seed: int | None) -> list[list[int]]:
        temperature = 0.0 if seed is None else SAMPLE_TEMPERATURE
        seeds = [None if seed is None else seed + number for number in range(len(prompts))]
        sampling = [SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=own) for own in seeds]
        longest = max(map(len, prompts)) + max_new_tokens + 1
        engine = AscendInferEngine(
            folder,
            tokenizer_path=tokenizer,
            precision=precision,
            device=experiment.device,
            device_id=experiment.device_id,
            max_seq_length=min(longest, experiment.max_seq_length),
            batch_size=min(len(prompts), experiment.batch_size),
            graph_mode=False,
            operator_fusion=experiment.operator_fusion,
        )
        with engine:
            outputs = engine.generate([list(prompt) for prompt in prompts], sampling)
        failed = next((output for output in outputs if output.error), None)
        if failed is not None:
            raise ValueError(f"parity prompt {failed.index} was refused by the engine: {failed.error}")
        return [output.token_ids for output in outputs]

    return generate
