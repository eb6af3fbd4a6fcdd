"""The parameters that say what an experiment is called, and what a conversion makes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ascend_kit.params import values as rules
from ascend_kit.params.values import ParameterError

PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
}
FRAMEWORKS = {
    "auto": "auto",
    "pytorch": "huggingface",
    "huggingface": "huggingface",
    "hf": "huggingface",
    "megatron": "megatron",
    "mindspeed": "megatron",
    "mindspore": "mindspore",
    "mindformers": "mindspore",
}


class Parameters(BaseModel):
    """Checked, frozen values without room for a name that nobody knows."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=False
    )


class RunParameters(Parameters):
    """Names of a run, and what holds for all of it."""

    # identity
    experiment: str = Field("demo", description="name of the experiment: results go to <output_root>/<experiment>/")
    run: str = Field("default", description="name of this variant: one folder below the experiment")
    output_root: str = Field("outputs", description="folder that holds all experiments")
    if_exists: Literal["resume", "refuse", "overwrite"] = Field(
        "resume", description="an earlier run of the stage: resume it, refuse, or overwrite it"
    )
    params_file: str | None = Field(
        None, description="YAML file below the values set here; None: params/demo.yaml until a model is named"
    )
    language: Literal["en", "zh"] = Field("en", description="of notebooks, panel, findings and report")
    seed: int = Field(0, ge=0, lt=1 << 32, description="seed of workloads and sampling")
    model_name: str = Field("demo", description="name shown in tables; default the name of input_model")


class ConversionParameters(Parameters):
    """What decides which weights a conversion writes."""

    input_model: str = Field("demo", description="checkpoint folder, or `demo` for the built-in model")
    output_model: str | None = Field(None, description="folder of the converted model; default below output_root")
    framework: str = Field(
        "auto", description="format of input_model: auto, pytorch (Hugging Face), megatron, mindspore"
    )
    tokenizer_path: str | None = Field(None, description="folder of tokenizer and config; default input_model")
    adapter_path: str | None = Field(None, description="LoRA folder (PEFT) merged at conversion")
    precision: str = Field("bf16", description="bf16, fp16 or fp32")
    quantize: Literal["none", "w8a8", "w8a16", "w4a16", "auto"] = Field(
        "none", description="how the linears are quantised"
    )
    quantize_keep: list[str] = Field(["lm_head"], description="linears kept unquantised: names, or parts between dots")
    calibration_file: str | None = Field(
        None, description="texts for smoothing and quantize: auto; the same kinds of file as prompts_file"
    )
    smooth: float | None = Field(
        None, ge=0, le=1, description="share of activation outliers moved into W8A8 weights; 0.5 is usual"
    )
    clip_search: bool = Field(False, description="smaller int8 scales where that lowers the output error")
    max_kl: float | None = Field(None, gt=0, description="limit of quantize: auto, nats per token")
    max_accuracy_loss: float | None = Field(
        None, gt=0, lt=1, description="limit of quantize: auto, share of next tokens lost on the calibration text"
    )

    @field_validator("precision")
    @classmethod
    def _precision(cls, value: str) -> str:
        return rules.one_of(value, PRECISIONS)

    @field_validator("framework")
    @classmethod
    def _framework(cls, value: str) -> str:
        return rules.one_of(value, FRAMEWORKS)

    @model_validator(mode="after")
    def _quantization_has_what_it_needs(self) -> ConversionParameters:
        if self.quantize == "none" and (self.smooth is not None or self.clip_search):
            raise ParameterError("smooth and clip_search change int8 weights: set quantize, or leave them out")
        limited = self.max_kl is not None or self.max_accuracy_loss is not None
        if limited and self.quantize != "auto":
            raise ParameterError(
                f"max_kl and max_accuracy_loss choose a mix: they need quantize: auto, not {self.quantize}"
            )
        if self.quantize == "auto" and not limited:
            raise ParameterError("quantize: auto needs a limit to stay within: set max_kl or max_accuracy_loss")
        if (self.quantize == "auto" or self.smooth is not None) and self.calibration_file is None:
            raise ParameterError(
                "quantize: auto and smooth need calibration_file: a file of texts like those the model will see"
            )
        return self
