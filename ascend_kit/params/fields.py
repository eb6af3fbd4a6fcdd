"""Every parameter by itself: type, default, meaning, bounds and the notebooks that use it, said here and nowhere else.

Experiment checks what must hold between several of them.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, NamedTuple, TypedDict, TypeVar, Unpack

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

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


class PathKind(NamedTuple):
    """What must lie at a path before work starts."""

    is_folder: bool
    is_read: bool


AnyPath = Annotated[str | None, AfterValidator(rules.path_text)]
FolderRead = Annotated[AnyPath, PathKind(is_folder=True, is_read=True)]
FileRead = Annotated[AnyPath, PathKind(is_folder=False, is_read=True)]
FolderWritten = Annotated[AnyPath, PathKind(is_folder=True, is_read=False)]
FileWritten = Annotated[AnyPath, PathKind(is_folder=False, is_read=False)]
DeviceName = Annotated[str, AfterValidator(rules.device_name)]
RayAddress = Annotated[str | None, AfterValidator(rules.ray_address)]
FolderName = Annotated[str, AfterValidator(rules.folder_name)]
Precision = Annotated[str, AfterValidator(partial(rules.one_of, allowed=PRECISIONS))]
Framework = Annotated[str, AfterValidator(partial(rules.one_of, allowed=FRAMEWORKS))]
Names = Annotated[list[str], AfterValidator(rules.without_repetition)]
Default = TypeVar("Default")


class Bounds(TypedDict, total=False):
    """Between what a value, or the length of a list, must lie."""

    gt: float
    ge: float
    lt: float
    le: float
    min_length: int


def param(notebooks: str, default: Default, meaning: str, **bounds: Unpack[Bounds]) -> Default:
    """A parameter that the notebooks of these numbers have in their cell, within the bounds given."""
    return Field(default, description=meaning, json_schema_extra={"notebooks": notebooks}, **bounds)


def notebooks_of(field: FieldInfo) -> str:
    """The numbers of the notebooks that use a parameter."""
    extra = field.json_schema_extra
    return str(extra["notebooks"]) if isinstance(extra, dict) else ""


class Parameters(BaseModel):
    """Checked, frozen values without room for a name that nobody knows."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=False
    )


class RunParameters(Parameters):
    """Names of a run, and what holds for all of it."""

    experiment: FolderName = param(
        "1234567", "demo", "name of the experiment: results go to <output_root>/<experiment>/"
    )
    run: FolderName = param("1234567", "default", "name of this variant: one folder below the experiment")
    output_root: Annotated[str, AfterValidator(rules.path_text), PathKind(is_folder=True, is_read=False)] = param(
        "1234567", "outputs", "folder that holds all experiments"
    )
    if_exists: Literal["resume", "refuse", "overwrite"] = param(
        "1234567", "resume", "an earlier run of the stage: resume it, refuse, or overwrite it"
    )
    params_file: AnyPath = param(
        "1234567", None, "YAML file below the values set here; None: params/demo.yaml until a model is named"
    )
    language: Literal["en", "zh"] = param("1234567", "en", "of notebooks, panel, findings and report")
    seed: int = param("345", 0, "seed of workloads and sampling", ge=0, lt=1 << 32)
    model_name: FolderName = param("12345", "demo", "name shown in tables; default the name of input_model")


class ConversionParameters(Parameters):
    """What decides which weights a conversion writes."""

    input_model: Annotated[str, AfterValidator(rules.path_text), PathKind(is_folder=True, is_read=True)] = param(
        "12345", "demo", "checkpoint folder, or `demo` for the built-in model"
    )
    output_model: FolderWritten = param("2345", None, "folder of the converted model; default below output_root")
    framework: Framework = param(
        "2", "auto", "format of input_model: auto, pytorch (Hugging Face), megatron, mindspore"
    )
    tokenizer_path: FolderRead = param("12345", None, "folder of tokenizer and config; default input_model")
    adapter_path: FolderRead = param("2345", None, "LoRA folder (PEFT) merged at conversion")
    precision: Precision = param("12345", "bf16", "bf16, fp16 or fp32")
    quantize: Literal["none", "w8a8", "w8a16", "w4a16", "auto"] = param(
        "12345", "none", "how the linears are quantised"
    )
    quantize_keep: Names = param("12", ["lm_head"], "linears kept unquantised: names, or parts between dots")
    calibration_file: FileRead = param(
        "2", None, "texts for smoothing and quantize: auto; the same kinds of file as prompts_file"
    )
    smooth: float | None = param(
        "2", None, "share of activation outliers moved into W8A8 weights; 0.5 is usual", ge=0, le=1
    )
    clip_search: bool = param("2", False, "smaller int8 scales where that lowers the output error")
    max_kl: float | None = param("2", None, "limit of quantize: auto, nats per token", gt=0)
    max_accuracy_loss: float | None = param(
        "2", None, "limit of quantize: auto, share of next tokens lost on the calibration text", gt=0, lt=1
    )

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


class EngineParameters(Parameters):
    """Which checkpoint runs, where and how, and what a conversion may change in its answers."""

    parity_max_kl: float | None = param("2", None, "replaces the limit of the mean KL divergence, nats", gt=0)
    parity_min_top1_agreement: float | None = param(
        "2", None, "replaces the limit of equal most probable tokens, share", ge=0, le=1
    )
    parity_max_logit_error: float | None = param("2", None, "replaces the limit of the largest logit error", gt=0)
    parity_max_perplexity_increase: float | None = param(
        "2", None, "replaces the limit of the rise in token perplexity, share", gt=0
    )
    parity_min_greedy_share: float | None = param(
        "2", None, "replaces the limit of greedy tokens before the first difference, share", ge=0, le=1
    )
    parity_min_length_ratio: float | None = param(
        "2", None, "replaces the limit of answer length, result over source", ge=0
    )
    use_model: Literal["converted", "source"] = param("345", "converted", "which checkpoint the engine runs")
    if_model_exists: Literal["reuse", "refuse", "overwrite"] = param(
        "2", "reuse", "an earlier output_model: reuse it if it was made alike, refuse, or overwrite it"
    )
    device: DeviceName = param("12345", "auto", "auto, cpu, cuda, cuda:N, npu, npu:N (ascend = npu)")
    device_id: int = param("12345", 0, "card of a device given without a number", ge=0, lt=1024)
    cards: int = param("1345", 1, "cards used in all", ge=1, le=1024)
    tensor_parallel: int = param("345", 1, "cards one copy of the model is split over", ge=1, le=64)
    ray_address: RayAddress = param("345", None, "None = this machine; auto or host:port joins a Ray cluster")
    max_seq_length: int = param("12345", 8192, "longest prompt + answer, tokens", ge=2, le=1 << 20)
    batch_size: int = param("2345", 16, "requests computed together (slots)", ge=1, le=4096)
    block_size: int | None = param("345", None, "tokens per KV block; None = 128 on npu, 32 else", ge=1, le=1024)
    max_tokens_per_step: int = param(
        "345", 2048, "token budget of one step (chunked prefill above it)", ge=1, le=1 << 20
    )
    kv_cache_gib: float | None = param("345", None, "KV pool, GiB; None = sized from free memory", gt=0, le=1 << 20)
    kv_cache_dtype: Literal["auto", "int8"] = param(
        "345", "auto", "keys and values in `precision`, or in half of bf16's memory (not on npu)"
    )
    head_dtype: Literal["auto", "int8"] = param(
        "345", "auto", "a head tied to the embedding: in `precision`, or with it in W8A8 (cpu only)"
    )
    speculate: int = param("345", 0, "tokens guessed per step by prompt lookup; 0 = off, 4 is usual", ge=0, le=15)
    async_scheduling: bool | None = param(
        "345", None, "queue a step before the last tokens are read; None = on npu and cuda"
    )
    graph_mode: bool = param("345", True, "captured or compiled decode step")
    graph_prompt_tokens: int = param(
        "345", 256, "largest step with prompts captured by graph_mode, tokens (npu); 0 = none", ge=0, le=512
    )
    operator_fusion: bool = param("2345", True, "fused operator table against the plain one")
    memory_optimize: bool = param("345", True, "KV blocks on demand with prefix reuse against a reservation")
    plain_ops: Names = param("2345", [], "operators that stay plain although operator_fusion is on")


class BatchParameters(Parameters):
    """What is asked and how it is answered."""

    prompts_file: FileRead = param(
        "23", None, "JSON list, JSON lines or text, one prompt a line; or `demo`; needed by 02 and 03"
    )
    max_new_tokens: int = param("3", 1024, "longest answer, tokens", ge=1, le=1 << 20)
    temperature: float = param("3", 0.0, "0 = greedy", ge=0.0, le=100.0)
    top_k: int | None = param("3", None, "sample from the k most probable tokens", ge=1, le=1 << 24)
    top_p: float = param("3", 1.0, "sample from the smallest set with this probability", gt=0.0, le=1.0)
    min_p: float = param("3", 0.0, "sample from tokens above this share of the best one's", ge=0.0, le=1.0)
    repetition_penalty: float = param("3", 1.0, "divides logits of tokens seen before; 1 = none", gt=0.0, le=100.0)
    presence_penalty: float = param("3", 0.0, "subtracted from logits of generated tokens", ge=-2.0, le=2.0)
    sampling: Literal["given", "model"] = param(
        "3", "given", "values above as given, or where not set those of the model (generation_config.json)"
    )
    concurrency: int = param("3", 32, "requests kept in flight", ge=1, le=1 << 20)
    output_path: FileWritten = param("3", None, "answers as JSON; default generations.json in the run folder")
    chat_template: bool = param("3", False, "wrap each prompt in the tokenizer's chat template")
    thinking: bool | None = param("35", None, "the template's enable_thinking; None = off where it has one")


class SweepParameters(Parameters):
    """What is measured, under which load, and how often."""

    engines: list = param("245", DEFAULT_ENGINES, "what to measure, each with own settings; or openai", min_length=1)
    sweep: dict[str, list] = param("124", DEFAULT_SWEEP, "in every combination")
    variants: Names = param("24", [], "steps of an ablation, plain to everything, in place of engines")
    sweep_repeats: int = param("4", 1, "measurements of each point at least", ge=1, le=10_000)
    sweep_precision: float | None = param(
        "4", None, "repeat until the 95 % interval of output tokens/s is within this share of it", gt=0, lt=1
    )
    sweep_max_repeats: int = param("4", 5, "bound of sweep_precision's repeats", ge=1, le=10_000)
    sweep_requests_per_point: int | None = param(
        "4", None, "default 2 x concurrency, at least 4; 64 where requests come by the clock", ge=1, le=1 << 20
    )
    load: Literal["closed", "all_at_once", "constant", "poisson", "gamma", "ramp", "trace"] = param(
        "4", "closed", "when requests arrive"
    )
    rate: float = param("4", 1.0, "requests per second on average: constant, poisson, gamma, ramp", gt=0, le=1e6)
    burstiness: float = param("4", 0.25, "shape of load gamma: 1 is poisson, smaller comes in bursts", gt=0)
    rate_end: float | None = param("4", None, "rate that load ramp ends with; None = 4 x rate", gt=0)
    trace_file: FileRead = param("4", None, "times and lengths of load trace (Mooncake, Azure); `rate` is a speed-up")
    load_prompts: FileRead = param("4", None, "prompts of the load: JSON lines, or a ShareGPT file; else random")
    length_spread: Literal["fixed", "heavy_tailed"] = param("4", "fixed", "lengths as given, or log-normal")
    shared_prefix: float = param("4", 0.0, "share of each prompt that all requests have in common", ge=0, lt=1)
    turns: int = param("4", 1, "turns of a conversation; each carries the turns before it", ge=1, le=64)
    think_s: float = param("4", 0.0, "seconds between an answer and the next turn", ge=0)
    slo: dict[str, float] = param(
        "14", {}, "limits: ttft_ms, tpot_ms, e2e_ms of every request, or ttft_p99_ms and the like"
    )
    search: Literal["none", "rate", "concurrency"] = param(
        "4", "none", "find the highest rate or concurrency that meets slo"
    )
    search_precision: float = param("4", 0.1, "width of the search's bracket, share", gt=0, lt=1)
    profile: bool = param("4", False, "one prefill and some decode steps under the profiler, traces kept")
    log_to: Literal["none", "mlflow"] = param("4", "none", "where the sweep is logged besides the run folder")


class EvaluationParameters(Parameters):
    """Which questions are put, and how."""

    eval_datasets: list[str] = param(
        "5", ["mmlu", "ceval", "agieval", "wikitext"], "these, any task of lm-eval, text:<file>", min_length=1
    )
    allow_download: bool = param("5", False, "data sets that are not in dataset_path come from the hub")
    allow_code_execution: bool = param("5", False, "tasks may run the code that the model writes")
    dataset_path: FolderRead = param(
        "5", None, "folder with local copies of the sets, or `demo` with the demo model; needed by 05"
    )
    eval_batch_size: int = param("5", 64, "documents handed to each copy of the model at once", ge=1, le=1 << 16)
    eval_max_seq_length: int = param("5", 4096, "context limit while evaluating, tokens", ge=2, le=1 << 20)
    eval_fewshot: int | None = param("5", None, "shots; default mmlu 5, ceval 5, agieval 0", ge=0, le=1000)
    eval_limit: int | None = param("5", None, "documents per set, drawn by seed; None = all", ge=1, le=1 << 31)
    eval_samples: int = param(
        "5", 1, "answers to each question of generative tasks; several need eval_temperature", ge=1, le=1024
    )
    eval_temperature: float | None = param("5", None, "of generative tasks; None = as each says", ge=0, le=100)
    eval_top_p: float | None = param("5", None, "of generative tasks; None = as each says", gt=0, le=1)
    eval_top_k: int | None = param("5", None, "of generative tasks; None = as each says", ge=1, le=1 << 20)
    eval_max_new_tokens: int | None = param(
        "5", None, "tokens of an answer of generative tasks; None = as each says", ge=1, le=1 << 20
    )
    eval_thinking_budget: int = param(
        "5", 2048, "tokens a thinking model may think before each answer", ge=1, le=1 << 20
    )
    eval_stop_against: str | None = param(
        "5", None, "a finished run: stop as soon as the comparison with it is decided"
    )
    eval_endpoint: str | None = param(
        "5", None, "evaluate a server, not the engine: its URL (.../v1), or an entry of engines"
    )
    eval_endpoint_model: str | None = param("5", None, "name of the model there; None = the only one")
    eval_chat_template: bool = param("5", False, "apply the chat template to evaluation prompts")


class StageParameters(
    EvaluationParameters, SweepParameters, BatchParameters, EngineParameters, ConversionParameters, RunParameters
):
    """Every parameter, each checked alone."""

    compare_runs: Names = param("67", [], "runs to compare; default: every run of the experiment")
    accuracy_margin_points: float = param(
        "56", 1.0, "accuracy a faster run may lose and still be recommended, points", gt=0, le=100
    )
