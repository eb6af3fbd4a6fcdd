"""Every parameter by itself: names, bounds, meanings; Experiment checks what must hold between several of them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ascend_kit.params import values as rules
from ascend_kit.params.engines import DEFAULT as DEFAULT_ENGINES
from ascend_kit.params.sweep import DEFAULT as DEFAULT_SWEEP
from ascend_kit.params.values import ParameterError

PRECISIONS = {
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("fp32", "float32"), "fp32"),
}
FRAMEWORKS = {
    "auto": "auto",
    **dict.fromkeys(("pytorch", "huggingface", "hf"), "huggingface"),
    **dict.fromkeys(("megatron", "mindspeed"), "megatron"),
    **dict.fromkeys(("mindspore", "mindformers"), "mindspore"),
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


class StageParameters(ConversionParameters, RunParameters):
    """Every parameter, each checked alone."""

    parity_max_kl: float | None = Field(None, gt=0, description="replaces the limit of the mean KL divergence, nats")
    parity_min_top1_agreement: float | None = Field(
        None, ge=0, le=1, description="replaces the limit of equal most probable tokens, share"
    )
    parity_max_logit_error: float | None = Field(
        None, gt=0, description="replaces the limit of the largest logit error"
    )
    parity_max_perplexity_increase: float | None = Field(
        None, gt=0, description="replaces the limit of the rise in token perplexity, share"
    )
    parity_min_greedy_share: float | None = Field(
        None, ge=0, le=1, description="replaces the limit of greedy tokens before the first difference, share"
    )
    parity_min_length_ratio: float | None = Field(
        None, ge=0, description="replaces the limit of answer length, result over source"
    )
    use_model: Literal["converted", "source"] = Field("converted", description="which checkpoint the engine runs")
    if_model_exists: Literal["reuse", "refuse", "overwrite"] = Field(
        "reuse", description="an earlier output_model: reuse it if it was made alike, refuse, or overwrite it"
    )
    # device
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, npu, npu:N (ascend = npu)")
    device_id: int = Field(0, ge=0, lt=1024, description="card of a device given without a number")
    cards: int = Field(1, ge=1, le=1024, description="cards used in all")
    tensor_parallel: int = Field(1, ge=1, le=64, description="cards one copy of the model is split over")
    ray_address: str | None = Field(None, description="None = this machine; auto or host:port joins a Ray cluster")
    # engine
    max_seq_length: int = Field(8192, ge=2, le=1 << 20, description="longest prompt + answer, tokens")
    batch_size: int = Field(16, ge=1, le=4096, description="requests computed together (slots)")
    block_size: int | None = Field(None, ge=1, le=1024, description="tokens per KV block; None = 128 on npu, 32 else")
    max_tokens_per_step: int = Field(
        2048, ge=1, le=1 << 20, description="token budget of one step (chunked prefill above it)"
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, le=1 << 20, description="KV pool, GiB; None = sized from free memory"
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto", description="keys and values in `precision`, or in half of bf16's memory (not on npu)"
    )
    head_dtype: Literal["auto", "int8"] = Field(
        "auto", description="a head tied to the embedding: in `precision`, or with it in W8A8 (cpu only)"
    )
    speculate: int = Field(0, ge=0, le=15, description="tokens guessed per step by prompt lookup; 0 = off, 4 is usual")
    async_scheduling: bool | None = Field(
        None, description="queue a step before the last tokens are read; None = on npu and cuda"
    )
    graph_mode: bool = Field(True, description="captured or compiled decode step")
    graph_prompt_tokens: int = Field(
        256, ge=0, le=512, description="largest step with prompts captured by graph_mode, tokens (npu); 0 = none"
    )
    operator_fusion: bool = Field(True, description="fused operator table against the plain one")
    memory_optimize: bool = Field(True, description="KV blocks on demand with prefix reuse against a reservation")
    plain_ops: list[str] = Field([], description="operators that stay plain although operator_fusion is on")
    # batch inference
    prompts_file: str | None = Field(
        None, description="JSON list, JSON lines or text, one prompt a line; or `demo`; needed by 02 and 03"
    )
    max_new_tokens: int = Field(1024, ge=1, le=1 << 20, description="longest answer, tokens")
    temperature: float = Field(0.0, ge=0.0, le=100.0, description="0 = greedy")
    top_k: int | None = Field(None, ge=1, le=1 << 24, description="sample from the k most probable tokens")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="sample from the smallest set with this probability")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="sample from tokens above this share of the best one's")
    repetition_penalty: float = Field(
        1.0, gt=0.0, le=100.0, description="divides logits of tokens seen before; 1 = none"
    )
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="subtracted from logits of generated tokens")
    sampling: Literal["given", "model"] = Field(
        "given", description="values above as given, or where not set those of the model (generation_config.json)"
    )
    concurrency: int = Field(32, ge=1, le=1 << 20, description="requests kept in flight")
    output_path: str | None = Field(None, description="answers as JSON; default generations.json in the run folder")
    chat_template: bool = Field(False, description="wrap each prompt in the tokenizer's chat template")
    thinking: bool | None = Field(None, description="the template's enable_thinking; None = off where it has one")
    # throughput sweep
    engines: list = Field(
        DEFAULT_ENGINES, min_length=1, description="what to measure, each with own settings; or openai"
    )
    sweep: dict[str, list] = Field(DEFAULT_SWEEP, description="in every combination")
    variants: list[str] = Field([], description="steps of an ablation, plain to everything, in place of engines")
    sweep_repeats: int = Field(1, ge=1, le=10_000, description="measurements of each point at least")
    sweep_precision: float | None = Field(
        None, gt=0, lt=1, description="repeat until the 95 % interval of output tokens/s is within this share of it"
    )
    sweep_max_repeats: int = Field(5, ge=1, le=10_000, description="bound of sweep_precision's repeats")
    sweep_requests_per_point: int | None = Field(
        None, ge=1, le=1 << 20, description="default 2 x concurrency, at least 4; 64 where requests come by the clock"
    )
    load: Literal["closed", "all_at_once", "constant", "poisson", "gamma", "ramp", "trace"] = Field(
        "closed", description="when requests arrive"
    )
    rate: float = Field(1.0, gt=0, le=1e6, description="requests per second on average: constant, poisson, gamma, ramp")
    burstiness: float = Field(0.25, gt=0, description="shape of load gamma: 1 is poisson, smaller comes in bursts")
    rate_end: float | None = Field(None, gt=0, description="rate that load ramp ends with; None = 4 x rate")
    trace_file: str | None = Field(
        None, description="times and lengths of load trace (Mooncake, Azure); `rate` is a speed-up"
    )
    load_prompts: str | None = Field(
        None, description="prompts of the load: JSON lines, or a ShareGPT file; else random"
    )
    length_spread: Literal["fixed", "heavy_tailed"] = Field("fixed", description="lengths as given, or log-normal")
    shared_prefix: float = Field(0.0, ge=0, lt=1, description="share of each prompt that all requests have in common")
    turns: int = Field(1, ge=1, le=64, description="turns of a conversation; each carries the turns before it")
    think_s: float = Field(0.0, ge=0, description="seconds between an answer and the next turn")
    slo: dict[str, float] = Field(
        {}, description="limits: ttft_ms, tpot_ms, e2e_ms of every request, or ttft_p99_ms and the like"
    )
    search: Literal["none", "rate", "concurrency"] = Field(
        "none", description="find the highest rate or concurrency that meets slo"
    )
    search_precision: float = Field(0.1, gt=0, lt=1, description="width of the search's bracket, share")
    profile: bool = Field(False, description="one prefill and some decode steps under the profiler, traces kept")
    log_to: Literal["none", "mlflow"] = Field("none", description="where the sweep is logged besides the run folder")
    # evaluation
    eval_datasets: list[str] = Field(
        ["mmlu", "ceval", "agieval", "wikitext"], min_length=1, description="these, any task of lm-eval, text:<file>"
    )
    allow_download: bool = Field(False, description="data sets that are not in dataset_path come from the hub")
    allow_code_execution: bool = Field(False, description="tasks may run the code that the model writes")
    dataset_path: str | None = Field(
        None, description="folder with local copies of the sets, or `demo` with the demo model; needed by 05"
    )
    eval_batch_size: int = Field(64, ge=1, le=1 << 16, description="documents handed to each copy of the model at once")
    eval_max_seq_length: int = Field(4096, ge=2, le=1 << 20, description="context limit while evaluating, tokens")
    eval_fewshot: int | None = Field(None, ge=0, le=1000, description="shots; default mmlu 5, ceval 5, agieval 0")
    eval_limit: int | None = Field(None, ge=1, le=1 << 31, description="documents per set, drawn by seed; None = all")
    eval_samples: int = Field(
        1, ge=1, le=1024, description="answers to each question of generative tasks; several need eval_temperature"
    )
    eval_temperature: float | None = Field(None, ge=0, le=100, description="of generative tasks; None = as each says")
    eval_top_p: float | None = Field(None, gt=0, le=1, description="of generative tasks; None = as each says")
    eval_top_k: int | None = Field(None, ge=1, le=1 << 20, description="of generative tasks; None = as each says")
    eval_max_new_tokens: int | None = Field(
        None, ge=1, le=1 << 20, description="tokens of an answer of generative tasks; None = as each says"
    )
    eval_thinking_budget: int = Field(
        2048, ge=1, le=1 << 20, description="tokens a thinking model may think before each answer"
    )
    eval_stop_against: str | None = Field(
        None, description="a finished run: stop as soon as the comparison with it is decided"
    )
    eval_endpoint: str | None = Field(
        None, description="evaluate a server, not the engine: its URL (.../v1), or an entry of engines"
    )
    eval_endpoint_model: str | None = Field(None, description="name of the model there; None = the only one")
    eval_chat_template: bool = Field(False, description="apply the chat template to evaluation prompts")
    # comparison
    compare_runs: list[str] = Field([], description="runs to compare; default: every run of the experiment")
    accuracy_margin_points: float = Field(
        1.0, gt=0, le=100, description="accuracy a faster run may lose and still be recommended, points"
    )
