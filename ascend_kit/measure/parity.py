"""Parity of a converted model: distributions straight from the files, text as the engine writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ascend_kit.checkpoint.calibration import tokenize_texts
from ascend_kit.checkpoint.convert import open_source
from ascend_kit.checkpoint.huggingface import Checkpoint, open_checkpoint
from ascend_kit.checkpoint.parity import (
    GenerateFunction,
    ParityLimits,
    ParityReport,
    TokenIds,
    compare,
    files_model,
    limits_for,
)
from ascend_kit.params import Experiment
from ascend_kit.prompts import read_prompts

SAMPLE_TEMPERATURE = 0.7


class ParityCheck:
    """Compares a folder with the experiment's source; made for `convert(..., before_publish=check)`.

    Texts come from `prompts_file`. The float32 source is the measure; a Megatron source, which no engine
    runs, is compared by its distributions alone. After a call `report` holds the figures, also when the
    call raised.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        limits: ParityLimits | None = None,
        num_prompts: int = 16,
        max_prompt_tokens: int = 128,
        max_new_tokens: int = 32,
    ) -> None:
        self.experiment, self.limits = experiment, limits
        self.num_prompts, self.max_prompt_tokens = num_prompts, max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.report: ParityReport | None = None

    def __call__(self, folder: Path) -> ParityReport:
        """The report; ParityError when a limit is missed."""
        experiment, result = self.experiment, open_checkpoint(folder)
        source = open_source(Path(experiment.input_model), experiment.framework, experiment.tokenizer_path)
        texts = read_prompts(experiment.prompts_file)[: self.num_prompts]
        prompts = tokenize_texts(texts, _tokenizer_folder(experiment, source), self.max_prompt_tokens)
        limits = self.limits or limits_for(
            experiment.precision, result.quantization.summary, **_replaced_limits(experiment)
        )
        models = [files_model(source, "source"), files_model(result, "result")]
        if source.framework == "huggingface":
            tokenizer = _tokenizer_folder(experiment, source)
            # The source in float32: its own precision is part of what conversion changes.
            engines = ((source, "fp32"), (result, experiment.precision))
            models = [
                replace(model, generate=engine_generate(checkpoint.folder, tokenizer, precision, experiment))
                for model, (checkpoint, precision) in zip(models, engines, strict=True)
            ]
        self.report = compare(*models, prompts, limits=limits, max_new_tokens=self.max_new_tokens)
        return self.report.check()

    def describe(self) -> dict[str, Any]:
        """What to store of the last report: table of figures, rows per prompt, missed limits."""
        if self.report is None:
            return {}
        rows = [dict(row) for row in self.report.rows]
        return {"figures": self.report.table(), "rows": rows, "failures": self.report.failures}


def engine_generate(folder: Path, tokenizer: Path, precision: str, experiment: Experiment) -> GenerateFunction:
    """A generate function that loads the engine for each call, so that only one model is in memory at a
    time.
    """

    def generate(prompts: Sequence[TokenIds], max_new_tokens: int, seed: int | None) -> list[list[int]]:
        from ascend_kit.engine.engine import AscendInferEngine
        from ascend_kit.engine.sequence import SamplingParams

        sampling = [
            SamplingParams(max_new_tokens=max_new_tokens)
            if seed is None
            else SamplingParams(max_new_tokens=max_new_tokens, temperature=SAMPLE_TEMPERATURE, seed=seed + index)
            for index in range(len(prompts))
        ]
        longest = max(map(len, prompts)) + max_new_tokens + 1
        engine = AscendInferEngine(
            folder,
            tokenizer_path=tokenizer,
            precision=precision,
            device=experiment.device,
            device_id=experiment.device_id,
            max_seq_length=min(longest, experiment.max_seq_length),
            batch_size=min(len(prompts), experiment.batch_size),
            operator_fusion=experiment.operator_fusion,
        )
        with engine:
            outputs = engine.generate([list(prompt) for prompt in prompts], sampling)
        failed = next((output for output in outputs if output.error), None)
        if failed is not None:
            raise ValueError(f"parity prompt {failed.index} was refused by the engine: {failed.error}")
        return [output.token_ids for output in outputs]

    return generate


def _tokenizer_folder(experiment: Experiment, source: Checkpoint) -> Path:
    return Path(experiment.tokenizer_path) if experiment.tokenizer_path else source.config_folder


def _replaced_limits(experiment: Experiment) -> dict[str, float]:
    """The limits that the parameters replace: parity_max_kl stands for ParityLimits.max_kl, and so on."""
    given = experiment.model_dump(include={f"parity_{limit.name}" for limit in fields(ParityLimits)})
    return {name.removeprefix("parity_"): value for name, value in given.items() if value is not None}
