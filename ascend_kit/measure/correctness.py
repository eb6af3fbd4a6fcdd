"""A cheap check before an expensive measurement: does the engine write what its plain twin writes?

The twin runs the same weights with the plain operators and without a captured graph. Its answers are made
first and it is closed again, so that only one model holds memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

    from ascend_kit.engine.engine import AscendInferEngine
    from ascend_kit.engine.sequence import RequestOutput
    from ascend_kit.params import Experiment

PROMPTS = ("The capital of France is", "Water boils at a temperature of", "def add(a, b):\n    return", "北京是中国的")
# Two tokens whose log-probabilities lie closer than this (nats) may change places: rounding decides. float32
# differs in the order of sums only; bf16 has 8 and fp16 11 bits of mantissa, few for logits of a few tens.
CLOSE_CALL = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.25}


class WrongAnswerError(RuntimeError):
    """The configured engine writes other tokens than its plain twin, beyond rounding."""


@dataclass(frozen=True)
class Reference:
    """Greedy answers of the plain twin, with the margin by which each token won."""

    token_ids: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    tolerance: float


def reference_answers(experiment: Experiment, *, num_tokens: int = 8) -> Reference:
    """Answers of plain operators without graphs to a few short prompts; the model is loaded and freed."""
    from ascend_kit.engine.engine import AscendInferEngine

    size = experiment.tensor_parallel
    plain = experiment.on_cards(size, size, graph_mode=False, operator_fusion=False, batch_size=len(PROMPTS))
    with AscendInferEngine.from_experiment(plain) as engine:
        outputs = _answers(engine, num_tokens)
    margins = tuple(tuple(_margin(token.top) for token in output.logprobs or ()) for output in outputs)
    token_ids = tuple(tuple(output.token_ids) for output in outputs)
    return Reference(token_ids, margins, CLOSE_CALL[experiment.precision])


def check_against(reference: Reference, engine: AscendInferEngine) -> pandas.DataFrame:
    """Compare the loaded engine's greedy answers with the reference; one row per prompt.

    WrongAnswerError at the first token that differs although the twin was sure of it. After a close call the
    texts may part, and nothing beyond that token is compared.
    """
    import pandas

    num_tokens = max(len(ids) for ids in reference.token_ids)
    rows = [
        _compare(prompt, expected, margins, output, reference.tolerance)
        for prompt, expected, margins, output in zip(
            PROMPTS, reference.token_ids, reference.margins, _answers(engine, num_tokens), strict=True
        )
    ]
    return pandas.DataFrame(rows)


def _answers(engine: AscendInferEngine, num_tokens: int) -> list[RequestOutput]:
    from ascend_kit.engine.sequence import SamplingParams

    # ignore_eos: a small model may end at once, and then there would be nothing to compare.
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, logprobs=2)
    outputs = engine.generate(list(PROMPTS), sampling)
    failed = [output for output in outputs if output.finish_reason == "error"]
    if failed:
        raise WrongAnswerError(f"the check prompt {PROMPTS[failed[0].index]!r} was refused: {failed[0].error}")
    return outputs


def _margin(top: list[tuple[int, float]]) -> float:
    """Nats between the best and the second token."""
    best, second, *_ = sorted((logprob for _, logprob in top), reverse=True)
    return best - second


def _compare(
    prompt: str, expected: tuple[int, ...], margins: tuple[float, ...], output: RequestOutput, tolerance: float
) -> dict[str, object]:
    row = {"prompt": prompt, "tokens": len(expected), "equal_tokens": len(expected), "text": output.text}
    for place, (want, got, margin) in enumerate(zip(expected, output.token_ids, margins, strict=True)):
        if want == got:
            continue
        if margin > tolerance:
            raise WrongAnswerError(
                f"after {prompt!r} token {place} is {got}, the plain operators say {want} by {margin:.2f} "
                f"nats (rounding explains {tolerance}). Do not trust this setting: try graph_mode: false, "
                "then operator_fusion: false, and run `python -m ascend_kit doctor --self-test`"
            )
        return {**row, "equal_tokens": place, "note": f"close call at token {place}: margin {margin:.3f} nats"}
    return {**row, "note": "equal"}
