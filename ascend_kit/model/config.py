"""What a decoder looks like, read from config.json.

Every key is either read here, known not to matter, or at its neutral value; any other key is refused by name, because
a key that is passed over may change what the model computes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ascend_kit.files import FileError, read_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # the precisions by name
FLOAT_NAMES = ("bfloat16", "float16", "float32", "float64")  # of torch_dtype

# Values of keys that config.json leaves out, as transformers has them.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "llama": {"max_position_embeddings": 2048},
}
_READ_WORDS = (
    "model_type architectures num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings "
    "tie_word_embeddings attention_bias mlp_bias use_sliding_window sliding_window max_window_layers layer_types "
    "eos_token_id pad_token_id torch_dtype dtype quantization_config auto_map"
)
# Where a model comes from, how it was trained, how text is drawn from it: nothing that a forward pass depends on.
_HARMLESS_WORDS = (
    "transformers_version use_cache initializer_range bos_token_id sep_token_id cls_token_id mask_token_id "
    "unk_token_id decoder_start_token_id tokenizer_class prefix id2label label2id num_labels problem_type "
    "task_specific_params finetuning_task output_attentions output_hidden_states return_dict torchscript use_bfloat16 "
    "attn_implementation gradient_checkpointing keys_to_ignore_at_inference tf_legacy_loss use_flash_attn "
    "use_flash_attention_2 seq_length model_max_length max_sequence_length pretraining_tp quantize is_decoder "
    "tie_encoder_decoder "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "router_aux_loss_coef output_router_logits "
    "cache_implementation loss_type model_name is_llama_config transformers.js_config"
)
# Parts that our decoder has: switched off they make another model.
_SWITCH_WORDS = (
    "causal use_causal causal_mask use_causal_mask causal_attention rotary use_rotary use_rope rope "
    "use_rotary_embeddings swiglu use_swiglu glu glu_mlp gated_mlp use_gated_mlp rms_norm use_rms_norm rmsnorm "
    "use_rmsnorm pre_norm prenorm scale_attn_weights"
)
_FACTOR_WORDS = "partial_rotary_factor rotary_percent rotary_pct embedding_multiplier residual_multiplier"
READ, HARMLESS = frozenset(_READ_WORDS.split()), frozenset(_HARMLESS_WORDS.split())
HARMLESS_STARTS, HARMLESS_ENDS = ("_", "unsloth_"), ("dropout", "pdrop")
# Values at which a key changes nothing, where that is not null, false, zero or empty.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "is_causal": (True,),
    "position_embedding_type": ("rope", "rotary", None),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "attention_multiplier": (None,),
    **dict.fromkeys(_FACTOR_WORDS.split(), (1, None)),
    **dict.fromkeys(_SWITCH_WORDS.split(), (True, None)),
}
# Numbers by which something is multiplied, under whatever name: they change nothing at 1, and everything at 0.
FACTOR_PATTERN = re.compile(r".*(multiplier|scal(e|ing)|factor)")
# What rope scaling has: the first words must be there.
_ROPE_WORDS = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
    "truncate",
}
ROPE_KEYS = {kind: words.split() for kind, words in _ROPE_WORDS.items()}
ROPE_REQUIRED = {"linear": 1, "llama3": 3, "yarn": 1}  # of them, the first ones


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder-only transformer."""

    family: str  # qwen2 (Qwen2 and Qwen2.5), qwen3, llama
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)  # with rope_type linear, llama3 or yarn
    max_position_embeddings: int = 32768  # scaled, where rope_scaling makes it longer
    sliding_window: int | None = None  # some layers see this many tokens; up to that length they see all
    tie_embeddings: bool = False
    attention_bias: bool = False  # bias on q, k, v
    output_bias: bool = False  # bias on o
    mlp_bias: bool = False  # bias on gate, up and down
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    torch_dtype: str | None = None
    quantization: dict[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json; ValueError names what is missing or not supported."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileError(f"no config.json in {folder}: not a Hugging Face checkpoint folder")
        config = cls.from_dict(read_json(path, "a Hugging Face model folder needs it"), where=str(path))
        # It may list more end ids than config.json; instruct models rely on them.
        generation = end_ids_in(Path(folder) / "generation_config.json")
        return replace(config, eos_token_ids=tuple(dict.fromkeys([*generation, *config.eos_token_ids])))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> ModelConfig:
        """From the mapping of a config.json."""
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILY_DEFAULTS:
            raise FileError(
                f"{where}: model_type {family!r} is not supported; allowed: {', '.join(FAMILY_DEFAULTS)}. Where a "
                "server (vLLM and the like) runs it, measure it there with engine: openai"
            )
        _refuse_unknown(raw, where)
        keys = _Keys({**FAMILY_DEFAULTS[family], **raw}, where)
        layers, heads = keys.count("num_hidden_layers", 10_000), keys.count("num_attention_heads", 100_000)
        hidden, positions = keys.count("hidden_size", 1 << 24), keys.count("max_position_embeddings", 1 << 31)
        theta, scaling, scaled = _rope(keys, positions)
        config = cls(
            family=family,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=keys.count("num_key_value_heads", heads, heads),
            head_dim=keys.count("head_dim", 1 << 16, None if family == "qwen3" or hidden % heads else hidden // heads),
            intermediate_size=keys.count("intermediate_size", 1 << 26),
            vocab_size=keys.count("vocab_size", 1 << 26),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6, below=1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=scaled,
            sliding_window=_sliding_window(keys, family, layers, scaled),
            tie_embeddings=keys.flag("tie_word_embeddings"),
            attention_bias=family == "qwen2" or keys.flag("attention_bias"),
            output_bias=family != "qwen2" and keys.flag("attention_bias"),
            mlp_bias=family == "llama" and keys.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            eos_token_ids=keys.ids("eos_token_id"),
            pad_token_id=next(iter(keys.ids("pad_token_id")), None),
            torch_dtype=keys.float_name("dtype") or keys.float_name("torch_dtype"),
            quantization=keys.mapping("quantization_config"),
        )
        if config.num_heads % config.num_kv_heads:
            raise FileError(
                f"{where}: num_attention_heads={config.num_heads} is not a multiple of "
                f"num_key_value_heads={config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise FileError(f"{where}: head_dim={config.head_dim}; rotary embeddings need an even number")
        if family != "llama" and keys.flag("mlp_bias"):
            raise FileError(f"{where}: mlp_bias=True; a {family} model has no bias in its MLP")
        return config


class _Keys:
    """The keys of one config.json, each read with its type and range; ValueError names file, key and value."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def wrong(self, name: str, value: Any, allowed: str) -> FileError:
        return FileError(f"{self.where}: {name}={value!r}; allowed is {allowed}")

    def read(self, name: str, fits: Callable[[Any], bool], allowed: str, default: Any = None) -> Any:
        """The value, or the default where it is null or left out."""
        value = self.raw.get(name)
        value = default if value is None else value
        if not fits(value):
            raise self.wrong(name, value, allowed)
        return value

    def count(self, name: str, largest: int, default: int | None = None) -> int:
        """A whole number from 1 to `largest`."""
        fits = lambda value: type(value) is int and 1 <= value <= largest  # noqa: E731
        return self.read(name, fits, f"a whole number from 1 to {largest}", default)

    def number(self, name: str, default: float | None, *, below: float = math.inf) -> float:
        """A positive finite number."""
        fits = lambda value: type(value) in (int, float) and math.isfinite(value) and 0 < value < below  # noqa: E731
        limit = "" if math.isinf(below) else f" below {below:g}"
        return float(self.read(name, fits, f"a positive number{limit}", default))

    def flag(self, name: str) -> bool:
        """true, or false where it is null or left out."""
        return self.read(name, lambda value: type(value) is bool, "true or false", False)

    def float_name(self, name: str) -> str | None:
        """A float type by torch's name; transformers reads the same key with the tokenizer and knows no other form."""
        return self.read(name, lambda value: value in (None, *FLOAT_NAMES), ", ".join(FLOAT_NAMES))

    def mapping(self, name: str) -> dict[str, Any] | None:
        return self.read(name, lambda value: value is None or isinstance(value, dict), "an object") or None

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: null, one or a list; -1 stands for none."""
        value = self.raw.get(name)
        listed = value if isinstance(value, (list, tuple)) else [value]
        found = tuple(item for item in listed if item is not None and item != -1)
        if any(type(item) is not int or item < 0 for item in found):
            raise self.wrong(name, value, "a token id or a list of them")
        return found


def end_ids_in(path: Path) -> tuple[int, ...]:
    """The end ids that a config.json or generation_config.json names, none where the file is missing; ValueError when
    they are no ids."""
    return _Keys(read_json(path), str(path)).ids("eos_token_id") if path.is_file() else ()


def _refuse_unknown(raw: Mapping[str, Any], where: str) -> None:
    odd = {key: value for key, value in raw.items() if not _is_harmless(key, value)}
    if odd:
        named = ", ".join(f"{key}={json.dumps(value, default=str)[:80]}" for key, value in odd.items())
        raise FileError(
            f"{where}: {named}: not supported, and not known to leave the result as it is; supported are dense Qwen2, "
            "Qwen2.5, Qwen3 and Llama decoders"
        )
    names = raw.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        # transformers goes by model_type, vLLM by this; trainers put words in front (FSDPLlamaForCausalLM).
        if not isinstance(name, str) or not name.lower().endswith(f"{raw['model_type']}forcausallm"):
            raise FileError(
                f"{where}: architectures={names!r}; run are language models whose name fits model_type, "
                f"{raw['model_type'].capitalize()}ForCausalLM"
            )
    code = raw.get("auto_map") or {}
    if not isinstance(code, dict) or any(str(key).startswith("AutoModel") for key in code):
        raise FileError(f"{where}: auto_map={code!r}: the model brings its own code, which is not run")


def _is_harmless(key: str, value: Any) -> bool:
    if key in NEUTRAL:
        return any((value == neutral and type(value) is not bool) or value is neutral for neutral in NEUTRAL[key])
    known = key in READ or key in HARMLESS or key.startswith(HARMLESS_STARTS) or key.endswith(HARMLESS_ENDS)
    if not known and type(value) in (int, float) and FACTOR_PATTERN.fullmatch(key):
        return value == 1
    return known or value is None or (isinstance(value, (bool, int, float, str, list, dict)) and not value)


def _sliding_window(keys: _Keys, family: str, layers: int, positions: int) -> int | None:
    """The window of the layers that have one; None when no layer has or when it is no shorter than any text."""
    kinds, window = keys.raw.get("layer_types"), keys.raw.get("sliding_window")
    is_on = keys.flag("use_sliding_window") or (family == "llama" and keys.raw.get("use_sliding_window") is None)
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise keys.wrong("layer_types", kinds, f"a list of {layers} times {' or '.join(known)}")
        slides = "sliding_attention" in kinds
        if slides and not (is_on and window):
            raise keys.wrong("layer_types", kinds, "no sliding_attention where use_sliding_window is off")
    else:
        # Where the key is left out, transformers lets the layers from 28 on slide.
        first = keys.raw.get("max_window_layers", 0 if family == "llama" else 28)
        if is_on and (type(first) is not int or first < 0):
            raise keys.wrong("max_window_layers", first, "a whole number")
        window = keys.raw.get("sliding_window", None if family == "llama" else 4096)
        slides = is_on and window is not None and first < layers
    if not slides:
        return None
    if type(window) is not int or window < 1:
        raise keys.wrong("sliding_window", window, "a whole number above zero")
    return window if window < positions else None


def _rope(keys: _Keys, positions: int) -> tuple[float, dict[str, Any] | None, int]:
    """(theta, scaling or None, longest position) of the rotary embedding, from both spellings of its keys."""
    given = [found for name in ("rope_scaling", "rope_parameters") if (found := keys.mapping(name))]
    if len(given) == 2 and any(given[0][key] != given[1].get(key, given[0][key]) for key in given[0]):
        raise keys.wrong("rope_scaling", given[0], f"the same as rope_parameters={given[1]!r}, or one of the two")
    merged = {key: value for found in given for key, value in found.items()}
    old, new = merged.pop("type", None), merged.pop("rope_type", None)
    if old and new and old != new:
        raise keys.wrong("rope_scaling.type", old, f"the same as rope_type={new!r}")
    kind = new or old or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise keys.wrong("rope_type", kind, f"{', '.join(ROPE_KEYS)} (rope scaling)")
    theta = merged.pop("rope_theta", None)
    if theta is not None and keys.raw.get("rope_theta") not in (None, theta):
        raise keys.wrong("rope_theta", keys.raw["rope_theta"], f"the same as in rope_parameters, {theta!r}")
    if merged.pop("partial_rotary_factor", None) not in (None, 1):
        raise keys.wrong("partial_rotary_factor", given, "1")
    theta = _Keys({"rope_theta": keys.raw.get("rope_theta") if theta is None else theta}, keys.where).number(
        "rope_theta", 10000.0
    )
    scaling = {key: value for key, value in merged.items() if value is not None}
    unknown = [key for key in scaling if key not in ROPE_KEYS[kind]]
    if unknown:
        raise keys.wrong(f"rope {kind}: {unknown[0]}", scaling[unknown[0]], f"{', '.join(ROPE_KEYS[kind]) or 'no key'}")
    if kind == "default":
        return theta, None, positions
    inner = _Keys(scaling, f"{keys.where}, rope scaling {kind}")
    for name in dict.fromkeys((*ROPE_KEYS[kind][: ROPE_REQUIRED[kind]], *scaling)):
        if name != "truncate":
            scaling[name] = inner.number(name, None)
    if scaling["factor"] < 1:
        raise inner.wrong("factor", scaling["factor"], "a number from 1 on")
    if kind == "llama3" and scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        raise inner.wrong("low_freq_factor", scaling["low_freq_factor"], "at most high_freq_factor")
    if kind == "yarn" and theta <= 1:
        raise inner.wrong("rope_theta", theta, "a number above 1")
    scaling["truncate"] = "truncate" not in scaling or inner.flag("truncate")
    scaling["original_max_position_embeddings"] = inner.number("original_max_position_embeddings", positions)
    reach = {"linear": positions, "yarn": scaling["original_max_position_embeddings"]}.get(kind, 0) * scaling["factor"]
    return theta, {"rope_type": kind, **scaling}, max(positions, int(reach))
