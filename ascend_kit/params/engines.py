"""The entries of `engines`: what a sweep measures, each with its own settings. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ascend_kit.params import values as rules
from ascend_kit.params.values import ParameterError

# What makes two runs of one model different engines: rows are told apart, labelled and compared by these.
ENGINE_SWITCHES = (
    "precision", "quantize", "graph_mode", "graph_prompt_tokens", "operator_fusion", "memory_optimize",
    "kv_cache_dtype", "head_dtype", "speculate", "async_scheduling", "cards", "tensor_parallel",
)  # fmt: skip
# What an engine of ours, or transformers, may have of its own; everything else is the experiment's.
OWN_SETTINGS = (
    *ENGINE_SWITCHES, "use_model", "output_model", "batch_size", "block_size", "max_tokens_per_step", "kv_cache_gib",
    "plain_ops",
)  # fmt: skip
TRANSFORMERS_SETTINGS = ("padding", "batching")  # besides these
KINDS = ("ascend_kit", "transformers", "openai")
DEFAULT: list[dict[str, Any]] = [{"kind": "ascend_kit"}, {"kind": "transformers"}]


# Steps of an ablation, each on top of those before it; what padding costs, and what transformers' own batching gains,
# is measured on transformers.
PLAIN = {"graph_mode": False, "operator_fusion": False, "memory_optimize": False, "quantize": "none", "speculate": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "padded_to_max": {"kind": "transformers", "padding": "max"},
    "padded": {"kind": "transformers"},
    "transformers_continuous": {"kind": "transformers", "batching": "continuous"},
    "continuous_batching": PLAIN,
    "fused_operators": {"operator_fusion": True},
    "decode_graphs": {"graph_mode": True, "graph_prompt_tokens": 0},
    "graphs": {"graph_mode": True, "graph_prompt_tokens": 256},
    "prefix_reuse": {"memory_optimize": True},
    "int8": {"quantize": "w8a8"},
    "speculation": {"speculate": 4},
}


def variant_entries(variants: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of `engines` for the named steps, in their order; each of ours carries the steps before it."""
    entries, settings = [], {"kind": "ascend_kit", **PLAIN}
    for name in variants:
        if name not in VARIANTS:
            raise ParameterError(f"variants: {rules.unknown_key(name, VARIANTS)}; allowed: {', '.join(VARIANTS)}")
        step = VARIANTS[name]
        if "kind" not in step:
            step = settings = {**settings, **step}
        entries.append({"name": name, **step})
    return entries


class OpenAIEngine(BaseModel):
    """A server that speaks OpenAI's protocol. What it runs is declared here: nobody can hash what is behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    base_url: str = Field(description="for instance http://127.0.0.1:8000/v1", pattern=r"^https?://[^/\s]+")
    model: str = Field(description="the model's name as the server knows it")
    api: Literal["completions", "chat"] = "completions"
    api_key_env: str | None = None  # the variable that holds the key; the key itself is never stored
    engine_command: str | None = None  # starts the server; it is ended with its whole process group
    ready_timeout_s: float = Field(default=600.0, gt=0)
    send_prompts_as: Literal["ids", "text"] = "ids"
    leave_out: list[str] = []  # fields of a request that the server refuses
    extra_body: dict[str, Any] = {}
    retries: int = Field(default=0, ge=0, le=10)
    idle_s: float = Field(default=120.0, gt=0)
    runs_on: str | None = None  # `this machine`, or a card such as 910B3: whose limits the rows are compared with
    precision: str | None = None
    quantize: str = "none"
    cards: int = Field(default=1, ge=1)
    batch_size: int | None = Field(default=None, ge=1)

    @property
    def root(self) -> str:
        """The address without /v1, where /metrics is."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        """Authorisation, where there is a key: it is read from the environment now."""
        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        return {"Authorization": f"Bearer {key}"} if key else {}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's fields with the model and the server's own fields, without those that it refuses."""
        whole = {"model": self.model, **body, **self.extra_body}
        return {key: value for key, value in whole.items() if key not in self.leave_out}


class EngineSpec(BaseModel):
    """One entry: its name in rows and in `sweep`, its kind, its settings by name."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    settings: dict[str, Any] = {}
    padding: Literal["longest", "max"] = "longest"  # of transformers' batches
    batching: Literal["padded", "continuous"] = "padded"  # of transformers: generate, or generate_batch's manager
    openai: OpenAIEngine | None = None


def read_engines(entries: Sequence[Any]) -> list[EngineSpec]:
    """The entries of `engines` checked; ParameterError names the entry and what is allowed."""
    specs = [_read(number, entry) for number, entry in enumerate(entries)]
    names = [spec.name for spec in specs]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise ParameterError(f"engines: {again!r} stands twice; give each entry a name of its own")
    return specs


def _read(number: int, entry: Any) -> EngineSpec:
    where = f"engines[{number}]"
    entry = {"kind": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise ParameterError(f"{where}: expected a block with `kind` and settings, got {rules.shown(entry)}")
    if (odd := next((key for key in entry if not isinstance(key, str)), None)) is not None:
        raise ParameterError(f"{where}: the names of settings are texts, got {rules.shown(odd)}")
    rest = dict(entry)
    kind = rest.pop("kind", "openai" if "base_url" in rest else None)
    if kind not in KINDS:
        raise ParameterError(f"{where}: kind: allowed {', '.join(KINDS)}, got {rules.shown(kind)}" + (
            "; vLLM is measured through its server: kind openai with engine_command" if kind == "vllm" else ""
        ))  # fmt: skip
    name = str(rest.pop("name", kind))
    try:
        rules.folder_name(name)
    except ValueError as error:
        raise ParameterError(f"{where}: name: {error}, got {rules.shown(name)}") from None
    try:
        if kind == "openai":
            return EngineSpec(name=name, kind=kind, openai=OpenAIEngine(**rest))
        own = {key: rest.pop(key) for key in TRANSFORMERS_SETTINGS if key in rest} if kind == "transformers" else {}
        if own.get("batching") == "continuous" and "padding" in own:
            raise ParameterError(f"{where}: padding: continuous batching pads nothing; leave it out")
        wrong = next((key for key in rest if key not in OWN_SETTINGS), None)
        if wrong is not None:
            allowed = (*OWN_SETTINGS, *TRANSFORMERS_SETTINGS) if kind == "transformers" else OWN_SETTINGS
            raise ParameterError(f"{where}: {rules.unknown_key(wrong, allowed)}")
        return EngineSpec(name=name, kind=kind, settings=rest, **own)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in item["loc"])
        text = rules.unknown_key(key, OpenAIEngine.model_fields) if item["type"] == "extra_forbidden" else item["msg"]
        raise ParameterError(f"{where}: {key}: {text}, got {rules.shown(item['input'])}") from None
