"""What a decoder looks like, read from config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # the precisions by name
FAMILIES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}
SHAPE_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")


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
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    max_position_embeddings: int = 32768
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
            raise ValueError(f"no config.json in {folder}: not a Hugging Face checkpoint folder")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        return cls.from_dict(raw, where=str(path), eos=_generation_eos(Path(folder)))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config", eos: Any = None) -> ModelConfig:
        """From the mapping of a config.json. `eos` overrides its end-of-sequence ids."""
        family = FAMILIES.get(raw.get("model_type", ""))
        if family is None:
            raise ValueError(
                f"{where}: model_type {raw.get('model_type')!r} is not supported; allowed: {', '.join(FAMILIES)}"
            )
        missing = [key for key in SHAPE_KEYS if not isinstance(raw.get(key), int)]
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} missing or not a whole number")
        if raw.get("use_sliding_window"):
            raise ValueError(f"{where}: use_sliding_window is on; sliding-window attention is not supported")
        rope = raw.get("rope_parameters") or {}
        heads = raw["num_attention_heads"]
        config = cls(
            family=family,
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            intermediate_size=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(raw.get("rope_scaling") or rope, where),
            max_position_embeddings=raw.get("max_position_embeddings", 32768),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2" or bool(raw.get("attention_bias", False)),
            output_bias=family != "qwen2" and bool(raw.get("attention_bias", False)),
            mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            eos_token_ids=_ids(eos if eos is not None else raw.get("eos_token_id")),
            pad_token_id=raw.get("pad_token_id"),
            torch_dtype=raw.get("dtype") or raw.get("torch_dtype"),
            quantization=raw.get("quantization_config"),
        )
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"{where}: num_attention_heads={config.num_heads} is not a multiple of "
                f"num_key_value_heads={config.num_kv_heads}"
            )
        return config


def _rope_scaling(scaling: dict[str, Any], where: str) -> dict[str, Any] | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{where}: rope scaling {kind!r} is not supported; allowed: default, llama3")
    return dict(scaling)


def _generation_eos(folder: Path) -> Any:
    """generation_config.json may list more end ids than config.json; instruct models rely on them."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
