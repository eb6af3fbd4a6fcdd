"""Every parameter of an engine in one frozen value, checked, with the defaults and limits of `Experiment`.

It is handed unchanged to the engine, to its core and to the processes of other cards. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from ascend_kit.messages import did_you_mean
from ascend_kit.params import Experiment
from ascend_kit.params.fields import PRECISIONS
from ascend_kit.params.values import DEVICE_PATTERN

# Where the weights lie and whether they are read twice changes neither answers nor speed.
LARGEST_GUESSED_STEP = 256  # rows; more would need further graphs, and guessing pays in small batches
NOT_IN_IDENTITY = ("model_path", "tokenizer_path", "check_all_bytes", "device", "device_id", "ray_address")


def _default(name: str) -> Any:
    return Experiment.model_fields[name].default


@dataclass(frozen=True)
class EngineConfig:
    """What an engine runs and how. ValueError names a value that is not allowed.

    Lengths are in tokens. `batch_size` requests are computed together; more may be waiting. `cards` devices hold
    `replicas` copies of the model, each split over `tensor_parallel` devices; several cards are processes on this
    machine, or on those of the Ray cluster at `ray_address` ("auto" or host:port). `graph_mode` captures or compiles
    the decode step, and on an NPU steps with prompts of at most `graph_prompt_tokens`; `operator_fusion` picks the
    device's fused operators, `memory_optimize` takes KV blocks on demand and shares equal prefixes. `check_all_bytes`
    compares a converted folder with its manifest byte by byte.
    """

    model_path: str
    tokenizer_path: str | None = _default("tokenizer_path")  # None: the model's folder
    precision: str = _default("precision")
    device: str = _default("device")
    device_id: int = _default("device_id")
    max_seq_length: int = _default("max_seq_length")
    batch_size: int = _default("batch_size")
    graph_mode: bool = _default("graph_mode")
    operator_fusion: bool = _default("operator_fusion")
    plain_ops: tuple[str, ...] = ()  # operators that stay plain although operator_fusion is on
    memory_optimize: bool = _default("memory_optimize")
    block_size: int | None = _default("block_size")
    max_tokens_per_step: int = _default("max_tokens_per_step")
    kv_cache_gib: float | None = _default("kv_cache_gib")
    kv_cache_dtype: str = _default("kv_cache_dtype")
    head_dtype: str = _default("head_dtype")
    speculate: int = _default("speculate")
    async_scheduling: bool | None = _default("async_scheduling")
    graph_prompt_tokens: int = _default("graph_prompt_tokens")
    seed: int = _default("seed")
    cards: int = _default("cards")
    tensor_parallel: int = _default("tensor_parallel")
    ray_address: str | None = _default("ray_address")
    check_all_bytes: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item.name, getattr(self, item.name)))

    @classmethod
    def from_names(cls, model_path: str | Path, names: dict[str, Any]) -> EngineConfig:
        """From keyword arguments; TypeError for a name that no engine has, with the one that was meant."""
        known = [item.name for item in fields(cls)]
        for name in names:
            if name not in known:
                raise TypeError(f"an engine has no parameter {name!r}{did_you_mean(name, known)}")
        return cls(model_path, **names)  # type: ignore[arg-type]  # made a str by the checks

    @classmethod
    def from_experiment(cls, experiment: Experiment, model_path: str | Path | None = None) -> EngineConfig:
        """As the parameters describe it, on `model_path` or else on the checkpoint that `use_model` names."""
        if model_path is None:
            converted = experiment.use_model == "converted"
            model_path = experiment.converted_folder if converted else experiment.input_model
        shared = [item.name for item in fields(cls) if item.name in Experiment.model_fields]
        return cls.from_names(model_path, {name: getattr(experiment, name) for name in shared})

    @property
    def tokenizer_folder(self) -> str:
        return self.tokenizer_path or self.model_path

    @property
    def decode_rows(self) -> int:
        """Rows of the largest decode step: one a request, and with `speculate` guesses, as far as graphs go."""
        return max(self.batch_size, min(self.batch_size * (1 + self.speculate), LARGEST_GUESSED_STEP))

    @property
    def graph_prompt_rows(self) -> int:
        """Tokens of the largest captured step with prompts: as asked for, and no more than a step may have."""
        largest_step = max(self.max_tokens_per_step, self.batch_size)
        return min(self.graph_prompt_tokens, largest_step, self.batch_size * self.max_seq_length)

    @property
    def replicas(self) -> int:
        """Copies of the model, each with its own slots and KV cache."""
        return self.cards // self.tensor_parallel

    def why_synchronous(self, device_kind: str) -> str | None:
        """Why no step is queued before the tokens of the one before it are read; None where that is done."""
        if self.speculate:
            return "speculate needs the token first"
        if self.tensor_parallel > 1:
            return "tensor_parallel: the other ranks need the token first"
        if self.async_scheduling is None and device_kind == "cpu":
            return "a CPU computes every step itself"
        return "async_scheduling is false" if self.async_scheduling is False else None

    def identity(self) -> dict[str, Any]:
        """The part of an identity that stands for an engine and its configuration."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in NOT_IN_IDENTITY}
        return {"kind": "ascend_kit", **values}


def _checked(name: str, value: Any) -> Any:
    """The value as a plain Python one; ValueError when Experiment would refuse it."""
    item = getattr(value, "item", None)
    value = item() if callable(item) and getattr(value, "shape", None) == () else value  # numpy and torch scalars
    if name in ("model_path", "tokenizer_path"):
        if not (isinstance(value, (str, Path)) and str(value)) and not (value is None and name == "tokenizer_path"):
            raise ValueError(f"{name}={value!r}: allowed: the path of a folder")
        return None if value is None else str(Path(value).expanduser())
    if name == "plain_ops":
        if isinstance(value, str) or not all(isinstance(part, str) for part in value):
            raise ValueError(f"plain_ops={value!r}; allowed: a list of operators")
        return tuple(sorted(set(value)))
    if name == "precision":
        if not isinstance(value, str) or value.lower() not in PRECISIONS:
            raise ValueError(f"precision={value!r}; allowed: {', '.join(PRECISIONS)}")
        return PRECISIONS[value.lower()]
    if name == "device":
        text = value.strip().lower() if isinstance(value, str) else ""
        text = text.replace("ascend", "npu", 1).replace("gpu", "cuda", 1)
        if not DEVICE_PATTERN.fullmatch(text):
            raise ValueError(f"device={value!r}; allowed: auto, cpu, cuda, cuda:N, npu, npu:N, ascend")
        return text
    try:
        return _adapter(name).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name}={value!r}: {error.errors()[0]['msg']}") from None


def _adapter(name: str) -> TypeAdapter[Any]:
    field = Experiment.model_fields.get(name)
    kind: Any = bool if field is None else Annotated[(field.annotation, *field.metadata, None)]  # type: ignore[misc]
    return TypeAdapter(kind, config={"strict": True})
