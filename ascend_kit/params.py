"""Experiment parameters: one frozen, strict, flat model, read from YAML or from a notebook's parameter cells.

Nothing here imports torch: a file with a wrong key must fail within a second.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
}
DEVICE_PATTERN = re.compile(r"^(auto|cpu|(cuda|npu)(:\d+)?)$")
# The article's three switches. TensorRT is NVIDIA's product; on Ascend the word means a captured decode graph.
ARTICLE_SWITCHES = {
    "tensorrt": "graph_mode",
    "graph_mode": "graph_mode",
    "operator_fusion": "operator_fusion",
    "memory_optimize": "memory_optimize",
}
EVAL_SETS = ("mmlu", "ceval", "agieval", "wikitext")
# What makes two runs of one model different engines: rows are told apart, labelled and compared by these.
ENGINE_SWITCHES = (
    "precision",
    "quantize",
    "graph_mode",
    "operator_fusion",
    "memory_optimize",
    "cards",
    "tensor_parallel",
)


class ParameterError(ValueError):
    """A parameter is unknown, of the wrong type or impossible; the text names it and what is allowed."""


class Experiment(BaseModel):
    """Every parameter of an experiment. The same flat names are the YAML keys and the notebooks' variables."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    # identity
    experiment: str = Field("demo", description="name of the experiment: results go to <output_root>/<experiment>/")
    run: str = Field("default", description="name of this variant: one folder below the experiment")
    output_root: str = Field("outputs", description="folder that holds all experiments")
    seed: int = Field(0, ge=0, description="seed of workloads and sampling")
    params_file: str | None = Field(None, description="YAML file whose values stand in for the defaults")
    # model and conversion
    model_name: str = Field("demo", description="name shown in tables and used for the converted folder")
    input_model: str = Field("demo", description="checkpoint folder, or `demo` for the built-in model")
    output_model: str | None = Field(None, description="folder of the converted model; default below output_root")
    framework: str = Field("auto", description="format of input_model: auto, pytorch (Hugging Face), megatron")
    tokenizer_path: str | None = Field(None, description="folder of tokenizer and config; default input_model")
    precision: str = Field("bf16", description="bf16, fp16 or fp32")
    quantize: Literal["none", "w8a8", "w8a16", "auto"] = Field("none", description="int8 scheme of the linears")
    quantize_keep: list[str] = Field(["lm_head"], description="names (or parts of names) of linears kept unquantised")
    calibration_file: str | None = Field(
        None, description="texts for smoothing and quantize: auto; JSON lines with `prompt`, or one text a line"
    )
    smooth: float | None = Field(
        None, ge=0, le=1, description="share of activation outliers moved into W8A8 weights; 0.5 is usual"
    )
    clip_search: bool = Field(False, description="smaller int8 scales where that lowers the output error")
    max_kl: float | None = Field(None, gt=0, description="limit of quantize: auto, nats per token")
    max_accuracy_loss: float | None = Field(
        None, gt=0, lt=1, description="limit of quantize: auto, share of next tokens lost on the calibration text"
    )
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
        "reuse", description="when output_model exists: reuse it if it was made alike, refuse, or overwrite"
    )
    # device
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, npu, npu:N (ascend = npu)")
    device_id: int = Field(0, ge=0, description="card of a device given without a number")
    cards: int = Field(1, ge=1, le=1024, description="cards used in all")
    tensor_parallel: int = Field(1, ge=1, le=64, description="cards one copy of the model is split over")
    ray_address: str | None = Field(None, description="None = this machine; auto or host:port joins a Ray cluster")
    # engine
    max_seq_length: int = Field(8192, ge=2, le=1 << 20, description="longest prompt + answer, tokens")
    batch_size: int = Field(16, ge=1, le=4096, description="requests computed together (slots)")
    block_size: int | None = Field(None, ge=1, le=1024, description="tokens per KV block; None = 128 on npu, 32 else")
    max_tokens_per_step: int = Field(2048, ge=1, description="token budget of one step (chunked prefill above it)")
    kv_cache_gib: float | None = Field(None, gt=0, description="KV pool, GiB; None = sized from free memory")
    graph_mode: bool = Field(True, description="captured or compiled decode step")
    operator_fusion: bool = Field(True, description="fused operator table against the plain one")
    memory_optimize: bool = Field(True, description="KV blocks on demand with prefix reuse against a reservation")
    plain_ops: list[str] = Field([], description="operators that stay plain although operator_fusion is on")
    # batch inference
    prompts_file: str = Field("demo", description="JSON lines with a `prompt` field, or a text file, one a line")
    max_new_tokens: int = Field(1024, ge=1, description="longest answer, tokens")
    temperature: float = Field(0.0, ge=0.0, description="0 = greedy")
    top_k: int | None = Field(None, ge=1, description="sample from the k most probable tokens")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="sample from the smallest set with this probability")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="sample from tokens above this share of the best one's")
    repetition_penalty: float = Field(1.0, gt=0.0, description="divides logits of tokens seen before; 1 = none")
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="subtracted from logits of generated tokens")
    sampling: Literal["given", "model"] = Field(
        "given", description="values above as given, or `model`: those not set come from generation_config.json"
    )
    concurrency: int = Field(32, ge=1, description="requests kept in flight")
    output_path: str | None = Field(None, description="answers as JSON; default generations.json in the run folder")
    chat_template: bool = Field(False, description="wrap each prompt in the tokenizer's chat template")
    thinking: bool | None = Field(None, description="the template's enable_thinking; None = as the model has it")
    # throughput sweep
    sweep_concurrency: list[int] = Field([1, 4, 16], min_length=1, description="requests kept in flight")
    sweep_prompt_len: list[int] = Field([64], min_length=1, description="prompt lengths, tokens")
    sweep_output_len: list[int] = Field([32], min_length=1, description="output lengths, tokens")
    sweep_repeats: int = Field(1, ge=1, description="measurements of each point")
    sweep_requests_per_point: int | None = Field(None, ge=1, description="default 2 x concurrency, at least 4")
    sweep_cards: list[int] | None = Field(
        None, min_length=1, description="cards of a point, each number measured; None = cards; fewer share the cards"
    )
    sweep_tensor_parallel: list[int] | None = Field(
        None, min_length=1, description="cards per copy of the model in the sweep; None = tensor_parallel"
    )
    sweep_at_once: bool | None = Field(
        None, description="measure points at the same time where cards are free; None = yes, but not on a CPU"
    )
    sweep_baseline: bool = Field(True, description="also measure transformers' generate")
    ttft_limit_ms: float | None = Field(None, gt=0, description="goodput counts requests below this TTFT")
    tpot_limit_ms: float | None = Field(None, gt=0, description="goodput counts requests below this TPOT")
    # evaluation
    eval_datasets: list[str] = Field(
        ["mmlu", "ceval", "agieval", "wikitext"],
        min_length=1,
        description="sets to evaluate: mmlu, ceval, agieval, wikitext",
    )
    dataset_path: str = Field("demo", description="folder with local copies of the sets, or `demo`")
    eval_batch_size: int = Field(8, ge=1, description="requests scored together")
    eval_max_seq_length: int = Field(4096, ge=2, description="context limit while evaluating, tokens")
    eval_fewshot: int | None = Field(None, ge=0, description="shots; default mmlu 5, ceval 5, agieval 0")
    eval_limit: int | None = Field(None, ge=1, description="documents per task; None = all")
    eval_chat_template: bool = Field(False, description="apply the chat template to evaluation prompts")
    # comparison
    compare_runs: list[str] = Field([], description="runs to compare; default: every run of the experiment")
    accuracy_margin_points: float = Field(
        1.0, gt=0, le=100, description="accuracy a faster run may lose and still be recommended, points"
    )
    # an existing run folder
    if_exists: Literal["resume", "refuse", "overwrite"] = Field(
        "resume", description="when the stage was run before: do what is missing, refuse, or start again"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_article_spelling(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: _plain(key, value) for key, value in data.items()}
        data = _expand_optimization(data)
        unknown = [key for key in data if key not in cls.model_fields]
        if unknown:
            raise ParameterError(_unknown_key(unknown[0], list(cls.model_fields)))
        if isinstance(data.get("eval_datasets"), str):
            data["eval_datasets"] = [name.strip() for name in data["eval_datasets"].split(",") if name.strip()]
        # Defaults that follow a short max_seq_length, so that lowering one number does not need three.
        longest = data.get("max_seq_length", 8192)
        if isinstance(longest, int) and longest >= 2:
            data.setdefault("eval_max_seq_length", min(4096, longest))
            data.setdefault("max_new_tokens", min(1024, longest // 2))
        return data

    @field_validator("experiment", "run", "model_name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.+-]+", value) or value.strip(".") == "":
            raise ValueError("use letters, digits, '.', '_', '-' and '+' only: it names a folder")
        return value

    @field_validator("precision")
    @classmethod
    def _precision(cls, value: str) -> str:
        return _one_of(value, PRECISIONS)

    @field_validator("framework")
    @classmethod
    def _framework(cls, value: str) -> str:
        return _one_of(value, FRAMEWORKS)

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        value = "npu" + value[6:] if value.startswith("ascend") else value
        if not DEVICE_PATTERN.match(value):
            raise ValueError("allowed: auto, cpu, cuda, cuda:N, npu, npu:N, ascend")
        return value

    @field_validator("eval_datasets")
    @classmethod
    def _eval_sets(cls, value: list[str]) -> list[str]:
        return [_one_of(name, {name: name for name in EVAL_SETS}) for name in value]

    @field_validator(
        "sweep_concurrency", "sweep_prompt_len", "sweep_output_len", "sweep_cards", "sweep_tensor_parallel"
    )
    @classmethod
    def _positive(cls, value: list[int] | None) -> list[int] | None:
        if any(item < 1 for item in value or ()):
            raise ValueError("every entry must be at least 1")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Experiment:
        if self.cards % self.tensor_parallel:
            raise ParameterError(
                f"tensor_parallel={self.tensor_parallel} does not divide cards={self.cards}; "
                f"allowed: {[n for n in range(1, self.cards + 1) if self.cards % n == 0]}"
            )
        self._check_layouts()
        if self.max_new_tokens >= self.max_seq_length:
            raise ParameterError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt within "
                f"max_seq_length={self.max_seq_length}; lower one or raise the other"
            )
        if self.quantize == "auto" and self.max_kl is None and self.max_accuracy_loss is None:
            raise ParameterError("quantize: auto needs a limit to stay within: set max_kl or max_accuracy_loss")
        if (self.quantize == "auto" or self.smooth is not None) and self.calibration_file is None:
            raise ParameterError(
                "quantize: auto and smooth need calibration_file: a file of texts like those the model will see"
            )
        longest = max(self.sweep_prompt_len) + max(self.sweep_output_len)
        if longest > self.max_seq_length:
            raise ParameterError(
                f"sweep_prompt_len + sweep_output_len reaches {longest} tokens, above "
                f"max_seq_length={self.max_seq_length}"
            )
        if self.eval_max_seq_length > self.max_seq_length:
            raise ParameterError(
                f"eval_max_seq_length={self.eval_max_seq_length} is above max_seq_length={self.max_seq_length}"
            )
        return self

    def _check_layouts(self) -> None:
        """Every number of sweep_cards and sweep_tensor_parallel must be used, and no point may need more cards."""
        cards, sizes = self.sweep_cards or [self.cards], self.sweep_tensor_parallel or [self.tensor_parallel]
        above = [count for count in cards if count > self.cards]
        if above:
            raise ParameterError(f"sweep_cards={cards}: {above[0]} is above cards={self.cards}")
        alone = [count for count in cards if all(count % size for size in sizes)]
        if alone:
            raise ParameterError(f"sweep_cards: {alone[0]} cannot be divided by tensor parallel sizes {sizes}")
        unused = [size for size in sizes if all(count % size for count in cards)]
        if unused:
            raise ParameterError(f"sweep_tensor_parallel: {unused[0]} divides none of the card counts {cards}")

    def to_yaml(self) -> str:
        """The resolved parameters as flat YAML that `load_experiment` reads back to an equal Experiment."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    def with_changes(self, **changes: Any) -> Experiment:
        """A checked copy with some parameters replaced."""
        return build_experiment({**self.model_dump(), **changes})

    def on_cards(self, cards: int, tensor_parallel: int = 1, **changes: Any) -> Experiment:
        """A checked copy about one layout of cards, with nothing else to sweep over."""
        alone = {"sweep_cards": None, "sweep_tensor_parallel": None}
        return self.with_changes(cards=cards, tensor_parallel=tensor_parallel, **alone, **changes)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_root) / self.experiment / self.run

    @property
    def replicas(self) -> int:
        return self.cards // self.tensor_parallel

    @property
    def sweep_layouts(self) -> list[tuple[int, int]]:
        """(cards, tensor_parallel) of the sweep's engines: every pair in which the one divides the other."""
        cards, sizes = self.sweep_cards or [self.cards], self.sweep_tensor_parallel or [self.tensor_parallel]
        return list(dict.fromkeys((count, size) for count in cards for size in sizes if count % size == 0))

    @property
    def converted_folder(self) -> Path:
        """Where `convert` writes and the engine reads: `output_model`, or a folder beside the runs."""
        if self.output_model:
            return Path(self.output_model)
        suffix = self.precision if self.quantize == "none" else self.quantize
        return Path(self.output_root) / self.experiment / "models" / f"{self.model_name}-{suffix}"


def build_experiment(values: dict[str, Any], *, source: str = "parameters") -> Experiment:
    """A checked Experiment from plain values; ParameterError with one readable line per fault."""
    try:
        return Experiment(**values)
    except ValidationError as error:
        raise ParameterError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None
    except ParameterError as error:
        raise ParameterError(f"{source}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; a duplicate key, a list or broken YAML is a ParameterError."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ParameterError(
            f"no parameter file at {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        # Text copied from a web page indents with no-break spaces, which YAML takes for part of a name.
        text = path.read_text(encoding="utf-8").replace("\u00a0", " ")
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ParameterError(f"{path} must hold `name: value` lines, found a {type(values).__name__}")
    return values


def load_experiment(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """Read one parameter file, apply overrides, check everything; no file or device is touched beyond that."""
    values = read_yaml(path)
    try:
        # Overrides come last and in the flat spelling, so the article's nested block must not outlive one of them.
        merged = {**_expand_optimization(values), **_expand_optimization(overrides or {})}
    except ParameterError as error:
        raise ParameterError(f"{path}: {error}") from None
    merged.setdefault("experiment", Path(path).stem)
    return build_experiment(merged, source=str(path))


def experiment_from_notebook(namespace: dict[str, Any]) -> Experiment:
    """An Experiment from a notebook's globals(), called before anything but the parameter cells has run.

    papermill only warns about a name that no notebook knows; here every plain variable must be a parameter, so a
    misspelt one stops the notebook in its first cell. Also leaves the folder `notebooks`, so that relative paths
    mean the same in JupyterLab as on the command line.
    """
    values = {name: value for name, value in namespace.items() if _is_parameter(name, value)}
    before = namespace.get("experiment")
    if isinstance(before, Experiment):  # the cell runs again: the name is taken, and later cells have added theirs
        values = {name: value for name, value in values.items() if name in Experiment.model_fields}
        values["experiment"] = before.experiment
    _leave_notebooks_folder()
    return build_experiment(values, source="notebook parameters")


def _leave_notebooks_folder() -> None:
    """JupyterLab starts a kernel in the notebook's folder, `make` and the command line in the one above."""
    here = Path.cwd()
    if here.name == "notebooks" and (here.parent / "params").is_dir():
        os.chdir(here.parent)


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`key=value` strings of the command line, each value read as YAML."""
    result: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ParameterError(f"--set takes key=value, got {text!r}")
        try:
            result[key.strip()] = yaml.load(value, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise ParameterError(f"--set {key}: {' '.join(str(error).split())}") from None
    return result


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads `1e5` as a number, which YAML 1.1 takes for a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _expand_optimization(values: dict[str, Any]) -> dict[str, Any]:
    """The article's `optimization:` block as flat switches; it wins over a notebook's default of the same name."""
    values = dict(values)
    if "tensorrt" in values:
        values["graph_mode"] = values.pop("tensorrt")
    block = values.pop("optimization", None)
    if block is None:
        return values
    if not isinstance(block, dict):
        raise ParameterError(f"optimization: expected a block of {sorted(ARTICLE_SWITCHES)}, got {block!r}")
    for key, value in block.items():
        if key not in ARTICLE_SWITCHES:
            raise ParameterError("optimization: " + _unknown_key(str(key), list(ARTICLE_SWITCHES)))
        values[ARTICLE_SWITCHES[key]] = value
    return values


def _is_parameter(name: str, value: Any) -> bool:
    # IPython's own names (In, Out, exit, quit, get_ipython) are not plain values or are listed here.
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))
    return (
        plain
        and not name.startswith("_")
        and name not in ("In", "Out", "PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH")
    )


def _plain(key: str, value: Any) -> Any:
    """numpy scalars, Path and tuples as the plain types they stand for; a whole float stays a float."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(key, item) for item in value]
    if isinstance(value, list):
        return [_plain(key, item) for item in value]
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", None) == () else value


def _one_of(value: str, allowed: dict[str, str]) -> str:
    if value.lower() not in allowed:
        near = difflib.get_close_matches(value.lower(), list(allowed), n=1)
        raise ValueError(f"allowed: {', '.join(allowed)}" + (f"; did you mean {near[0]}?" if near else ""))
    return allowed[value.lower()]


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown parameter {key!r}{hint} (all names: python -m ascend_kit check --list)"


def _explain(item: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    text = item["msg"].removeprefix("Value error, ")
    return f"{name}: {text}, got {item['input']!r}" if name else text
