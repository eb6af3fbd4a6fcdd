"""The parameters of an experiment: one frozen, strict, flat model with one set of defaults.

Nothing here imports torch: a file with a wrong key must fail within a second.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import PrivateAttr, ValidationError, field_validator, model_validator

from ascend_kit.messages import did_you_mean
from ascend_kit.params import engines as engine_rules
from ascend_kit.params import sweep as sweep_rules
from ascend_kit.params import values as rules
from ascend_kit.params.fields import StageParameters
from ascend_kit.params.values import ParameterError

# The article's three switches. TensorRT is NVIDIA's product; on Ascend the word means a captured decode graph.
ARTICLE_SWITCHES = ("tensorrt", "graph_mode", "operator_fusion", "memory_optimize")
EVAL_SETS = ("mmlu", "ceval", "agieval", "wikitext")
DEMO = "demo"  # the word for the built-in model, questions and prompts
RETIRED = {"sweep_at_once": "points are always measured one after the other now; leave it out"}
# What only the demo has by itself.
NEEDED = {
    "dataset_path": "name the folder of your copies of the sets; the sample questions are for the demo model only",
    "prompts_file": "name a file of prompts like those the model will get, or write `demo` for the built-in ones",
}


class Experiment(StageParameters):
    """Every parameter of an experiment. The same flat names are the YAML keys and the notebooks' variables."""

    # Parameters that read `demo` and stand for these words wherever the experiment is shown or stored.
    _words: dict[str, str] = PrivateAttr(default_factory=dict)

    if not TYPE_CHECKING:  # a type checker should not take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Notebooks and scripts of one's own may read parameters by their old names."""
            return sweep_rules.old_value(self, name) if name in sweep_rules.ALIASES else super().__getattr__(name)

    @model_validator(mode="before")
    @classmethod
    def _resolve_spellings_and_dependent_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: rules.plain(value, kind_of(key)) for key, value in expand_aliases(data).items()}
        if retired := next((key for key in RETIRED if key in data), None):
            raise ParameterError(f"{retired}: {RETIRED[retired]}")
        data = sweep_rules.resolve(data)
        # Defaults that follow a short max_seq_length, so that lowering one number does not need three.
        longest = data.get("max_seq_length", 8192)
        if isinstance(longest, int) and longest >= 2:
            data.setdefault("eval_max_seq_length", min(4096, longest))
            data.setdefault("max_new_tokens", min(1024, longest // 2))
        model = data.get("input_model", DEMO)
        if model == DEMO:  # the demo brings its own data; any other model must say what it is to answer
            data |= {key: DEMO for key in ("dataset_path", "prompts_file") if data.get(key) is None}
        elif isinstance(model, str) and (name := re.sub(r"[^\w.+-]+", "-", Path(model).name).strip(".")):
            data.setdefault("model_name", f"model-{name}" if rules.DATE.fullmatch(name) else name[:60])
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                rules.check_text(text)
        return value

    @field_validator("eval_datasets")
    @classmethod
    def _eval_sets(cls, value: list[str]) -> list[str]:
        found = find_spec("lm_eval")  # names like ifeval are close to ours and no slips
        packaged = os.listdir(Path(found.origin).parent / "tasks") if found and found.origin else []
        value = [name.lower() if name.lower() in EVAL_SETS else name for name in value]
        for name in value:
            is_known = name in packaged or name.startswith("text:") or any(known in name for known in EVAL_SETS)
            hint = "" if is_known else did_you_mean(name, EVAL_SETS, 0.7, shown=str)
            if hint or not re.fullmatch(r"text:.+|[\w.+-]+", name):
                raise ValueError(f"allowed: {', '.join(EVAL_SETS)}, a task of lm-eval, or text:<file>{hint}")
        return rules.without_repetition(value)

    @field_validator("compare_runs")
    @classmethod
    def _runs(cls, value: list[str]) -> list[str]:
        if any(".." in Path(name).parts for name in value):
            raise ValueError("name runs of this experiment, experiment/run, or a whole path; `..` is not followed")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Experiment:
        if self.cards % self.tensor_parallel:
            raise ParameterError(
                f"tensor_parallel={self.tensor_parallel} does not divide cards={self.cards}; "
                f"allowed: {[n for n in range(1, self.cards + 1) if self.cards % n == 0]}"
            )
        if self.max_new_tokens >= self.max_seq_length:
            raise ParameterError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt within "
                f"max_seq_length={self.max_seq_length}; lower one or raise the other"
            )
        sweep_rules.check(self)
        if self.endpoint_spec is not None and self.eval_endpoint_model is not None:
            raise ParameterError(f"eval_endpoint_model: the entry {self.eval_endpoint} of engines names its model")
        if self.eval_max_seq_length > self.max_seq_length:
            raise ParameterError(
                f"eval_max_seq_length={self.eval_max_seq_length} is above max_seq_length={self.max_seq_length}"
            )
        if self.eval_samples > 1 and not self.eval_temperature:
            raise ParameterError(
                f"eval_samples={self.eval_samples} answers to a question would all be the same: set eval_temperature"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved parameters as flat YAML that `load_experiment` reads back; what they came from is left out."""
        return yaml.safe_dump(self.model_dump(exclude={"params_file"}), sort_keys=False, allow_unicode=True)

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """The parameters as plain values; the word demo reads as it was written."""
        dumped = super().model_dump(**options)
        return {**dumped, **{key: word for key, word in self._words.items() if key in dumped}}

    def needed(self, key: Literal["dataset_path", "prompts_file"]) -> str:
        """The path of a parameter that has no default for a model of one's own; ParameterError when it is not set."""
        value: str | None = getattr(self, key)
        if value is None:
            raise ParameterError(f"{key} is not set: {NEEDED[key]}")
        return value

    def standing_for(self, paths: Mapping[str, str], **changes: str) -> Experiment:
        """A copy in which the parameters named in `paths` are read from there, and shown and stored as they are now."""
        copy = self.model_copy(update={**paths, **changes})
        copy._words = {**self._words, **{key: getattr(self, key) for key in paths}}
        return copy

    def with_changes(self, **changes: Any) -> Experiment:
        """A checked copy with some parameters replaced."""
        copy = build_experiment({**self.model_dump(), **changes})
        return copy.standing_for({key: getattr(self, key) for key in self._words if key not in changes})

    def alone(self, **changes: Any) -> Experiment:
        """A checked copy with some engine parameters set and none left to sweep over. A checkpoint of another precision
        or scheme lies beside `output_model`, where that is given."""
        rest = {key: values for key, values in self.sweep.items() if key in sweep_rules.LOAD_KEYS}
        copy = self.with_changes(**{"sweep": rest, **changes})
        same = (copy.precision, copy.quantize) == (self.precision, self.quantize)
        if same or self.output_model is None or "output_model" in changes:
            return copy
        return copy.with_changes(output_model=f"{self.output_model}-{copy.converted_suffix}")

    def swept(self, key: str) -> list[Any]:
        """The values of a parameter in the sweep, or its one value."""
        return self.sweep[key] if key in self.sweep else [getattr(self, key)]

    @property
    def run_folder(self) -> Path:
        return Path(self.output_root) / self.experiment / self.run

    @property
    def replicas(self) -> int:
        return self.cards // self.tensor_parallel

    @property
    def engine_specs(self) -> list[engine_rules.EngineSpec]:
        """The engines that the sweep measures, in the order of `engines`."""
        wanted = self.sweep.get("engine")
        entries = engine_rules.variant_entries(self.variants) or self.engines
        return [spec for spec in engine_rules.read_engines(entries) if wanted is None or spec.name in wanted]

    @property
    def endpoint_spec(self) -> engine_rules.OpenAIEngine | None:
        """The entry of `engines` that `eval_endpoint` names; None where it is an address, or nothing."""
        if self.eval_endpoint is None or self.eval_endpoint.startswith(("http://", "https://")):
            return None
        specs = {spec.name: spec.openai for spec in engine_rules.read_engines(self.engines) if spec.openai}
        if self.eval_endpoint not in specs:
            raise ParameterError(
                f"eval_endpoint: allowed http://... or an entry of engines of kind openai "
                f"({', '.join(specs) or 'there is none'}), got {self.eval_endpoint!r}"
            )
        return specs[self.eval_endpoint]

    @property
    def sweep_settings(self) -> list[dict[str, Any]]:
        """Each combination of the sweep's engine parameters; one empty one where it has none.

        Card counts that a tensor-parallel size does not divide are left out.
        """
        keys = [key for key in self.sweep if key in engine_rules.OWN_SETTINGS]
        every = [dict(zip(keys, values, strict=True)) for values in itertools.product(*(self.sweep[k] for k in keys))]
        cards, size = self.cards, self.tensor_parallel
        return [one for one in every if one.get("cards", cards) % one.get("tensor_parallel", size) == 0]

    @property
    def swept_checkpoints(self) -> list[Experiment]:
        """The experiment of every other converted folder that the sweep's settings and the engines' own need."""
        own = [spec.settings for spec in self.engine_specs if spec.openai is None]
        plans = [self.alone(**changes) for changes in [*self.sweep_settings, *own]]
        others = {plan.converted_folder: plan for plan in plans if plan.use_model == "converted"}
        return [plan for folder, plan in others.items() if folder != self.converted_folder]

    @property
    def plain_operators(self) -> str | None:
        """The operators of `plain_ops`, with commas; None where there are none."""
        return ", ".join(sorted(self.plain_ops)) or None

    @property
    def limits(self) -> dict[str, float]:
        """Metric -> limit in ms that a request must meet to count for goodput: the strictest of those in `slo`."""
        found: dict[str, float] = {}
        for key, value in self.slo.items():
            metric = key.split("_")[0]
            found[metric] = min(value, found.get(metric, value))
        return found

    @property
    def converted_folder(self) -> Path:
        """Where `convert` writes and the engine reads: `output_model`, or a folder beside the runs."""
        if self.output_model:
            return Path(self.output_model)
        return Path(self.output_root) / self.experiment / "models" / f"{self.model_name}-{self.converted_suffix}"

    @property
    def converted_suffix(self) -> str:
        """How a converted folder is told from others of its model."""
        return self.precision if self.quantize == "none" else self.quantize


def build_experiment(
    values: Mapping[str, Any], *, source: str = "parameters", places: Mapping[str, str] | None = None
) -> Experiment:
    """A checked Experiment from plain values; ParameterError with every fault in one line.

    `places` says in which line of which file a parameter stands, where that is not just `source`.
    """
    try:
        return Experiment(**values)
    except ValidationError as error:
        raise ParameterError(rules.explained(error, Experiment, source, places or {})) from None


def expand_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """The article's `tensorrt` and `optimization:` block as flat switches; the block wins over its neighbours."""
    flat = dict(values)
    if "tensorrt" in flat:
        flat["graph_mode"] = flat.pop("tensorrt")
    block = flat.pop("optimization", None)
    if block is None:
        return flat
    if not isinstance(block, dict):
        raise ParameterError(f"optimization: expected a block of {sorted(ARTICLE_SWITCHES)}, got {rules.shown(block)}")
    for key, value in block.items():
        if key not in ARTICLE_SWITCHES:
            raise ParameterError("optimization: " + rules.unknown_key(str(key), ARTICLE_SWITCHES))
        flat["graph_mode" if key == "tensorrt" else key] = value
    return flat


def kind_of(key: str) -> str:
    """The type of a parameter as a notebook's cell writes it: `str`, `list[int]`, `float | None`."""
    if key not in Experiment.model_fields:
        return "unknown"
    annotation = Experiment.model_fields[key].annotation
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"typing\.Literal\[.*?\]", "str", text)
