"""A model folder with its settings and identity, the core that computes once it is loaded, and what its cards do."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ascend_kit.checkpoint.huggingface import load_tokenizer
from ascend_kit.checkpoint.manifest import check_converted, model_identity, verify
from ascend_kit.checkpoint.tensor_file import folder_version, unreplaced
from ascend_kit.device.device import Device, resolve_device, select_device
from ascend_kit.device.parallel import check_division
from ascend_kit.engine import text
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import Core, EngineCore
from ascend_kit.engine.processes import needs_process
from ascend_kit.engine.ranks import Ranks, environment_ranks
from ascend_kit.identity import Identity
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import Experiment


class OpenedModel:
    """One model and where it runs. Its parameters are those of EngineConfig."""

    def __init__(self, model_path: str | Path, **names: Any):
        self._open(EngineConfig.from_names(model_path, names))

    @classmethod
    def from_experiment(cls, experiment: Experiment, model_path: str | Path | None = None) -> Self:
        """An engine as the parameters describe it, on the converted checkpoint or the source.

        CheckpointError when the converted checkpoint was not made from `input_model`.
        """
        if model_path is None and experiment.use_model == "converted":
            check_converted(experiment)
        engine = cls.__new__(cls)
        engine._open(EngineConfig.from_experiment(experiment, model_path))
        return engine

    def _open(self, settings: EngineConfig) -> None:
        """Everything that needs no device: the model's config must be there and fit."""
        self.model_path, self.max_seq_length = settings.model_path, settings.max_seq_length
        self._version = folder_version(settings.model_path)
        self.config = ModelConfig.from_folder(settings.model_path)
        if settings.max_seq_length > self.config.max_position_embeddings:
            raise ValueError(
                f"max_seq_length={settings.max_seq_length} is above the model's max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        self._ranks = environment_ranks()
        self.settings = _on_ranks(settings, self._ranks)
        self.num_replicas = self.settings.replicas  # copies of the model, each with its own slots and KV cache
        check_division(
            settings.tensor_parallel,
            {
                "num_attention_heads": self.config.num_heads,
                "num_key_value_heads": self.config.num_kv_heads,
                "intermediate_size": self.config.intermediate_size,
                "vocab_size": self.config.vocab_size,
                "hidden_size": self.config.hidden_size,
            },
        )
        self.core: Core | None = None
        self.device: Device | None = None
        self.tokenizer: Any = None
        self._identity: Identity | None = None

    def load_model(self) -> Self:
        """Read the tokenizer and the weights; does nothing when they are loaded.

        A converted folder must still be as its manifest says (CheckpointError names the file): sizes and headers, with
        `check_all_bytes` every byte. One that a conversion replaces meanwhile is refused.
        """
        if self.core is not None:
            return self
        try:
            with unreplaced(self.model_path, self._version):
                self._load()
        except BaseException:
            self.close()
            raise
        return self

    def _load(self) -> None:
        verify(self.model_path, full=self.settings.check_all_bytes)
        self.tokenizer = load_tokenizer(self.settings.tokenizer_folder)
        ends = text.end_ids(self.model_path, self.tokenizer, self.config.vocab_size)
        self.config = replace(self.config, eos_token_ids=ends)
        self._stop = text.StopRules(lambda: self.tokenizer, self.config.eos_token_ids, self.max_seq_length)
        self.core = self._open_core()
        self.device = self.core.device
        self._identity = None  # the core may run elsewhere, on another kind of device

    def _open_core(self) -> Core:
        """One card in this process or one of its own, the ranks this process is among, or replicas on Ray."""
        settings = self.settings
        if self._ranks is not None:
            from ascend_kit.engine.ranks import RankCore

            return RankCore(settings, self.config, self._ranks)
        is_elsewhere = settings.cards > 1 or settings.ray_address is not None
        if is_elsewhere or needs_process(resolve_device(settings.device)[0]):
            from ascend_kit.engine.replicas import ReplicatedCore

            return ReplicatedCore(settings, self.config)
        device = select_device(settings.device, settings.device_id)
        return EngineCore(settings, self.config, device)

    def close(self) -> None:
        """Free weights and cache, and end the processes that hold them."""
        core, self.core = self.core, None
        if core is not None:
            core.close()

    def __enter__(self) -> Self:
        return self.load_model()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> Identity:
        """What the answers and speeds of this engine depend on; known before it is loaded.

        Where the engine runs in a process of its own, that process is started: it has the device, this one has not.
        The first call may read the weights for their hash, which is remembered.
        """
        if self.device is None and needs_process(resolve_device(self.settings.device)[0]):
            self.load_model()
        if self._identity is None:
            with unreplaced(self.model_path, self._version):
                found = model_identity(self.model_path, self.settings.tokenizer_path)
            device = self.device or select_device(self.settings.device, self.settings.device_id)
            parts = {"engine": self.settings.identity(), "versions": device.versions(), "device": device.facts()}
            self._identity = found.with_parts(**parts)
        return self._identity

    def stats(self) -> dict[str, Any]:
        """Counters and sizes since load; see EngineCore.stats."""
        return self._loaded().stats()

    def _loaded(self) -> Core:
        if self.core is None:
            raise RuntimeError("the model is not loaded: call load_model() or use the engine in a with statement")
        return self.core


def _on_ranks(settings: EngineConfig, ranks: Ranks | None) -> EngineConfig:
    """The settings with the ranks this process was started with as cards, when none were asked for."""
    if ranks is not None and settings.cards not in (1, ranks.size):
        raise ValueError(
            f"cards={settings.cards}, but this process was started as one of {ranks.size} ranks; leave cards out, "
            f"or start {settings.cards} ranks"
        )
    settings = settings if ranks is None else replace(settings, cards=ranks.size)
    cards, size = settings.cards, settings.tensor_parallel
    if cards % size:
        allowed = [n for n in range(1, cards + 1) if cards % n == 0]
        raise ValueError(f"tensor_parallel={size} does not divide cards={cards}; allowed: {allowed}")
    return settings


# --- what each card does ----------------------------------------------------------------------------------------------

COUNTERS = ("requests", "output_tokens", "restarts", "busy_s")


def cards_of(engine: Any) -> list[dict[str, Any]]:
    """One row per card with counters since load and memory in bytes; empty for an engine that keeps none.

    The cards of one replica share its requests and tokens, and are busy together. `busy_s` is the time in steps,
    as the replica's process sees it; one card in this process keeps no such account and has None, as it has no
    count of requests.
    """
    stats = engine.stats()
    if "replicas" in stats:
        return [
            {
                "card": name,
                "replica": row["replica"],
                "requests": row["finished"],
                "output_tokens": row["output_tokens"],
                "restarts": row["restarts"],
                "busy_s": row["busy_s"],
                "peak_memory_bytes": int(row["peak_memory_bytes"] / row["cards"]),
            }
            for row in stats["replicas"]
            for name in row["card_names"]
        ]
    if "output_tokens" not in stats:
        return []
    device, tokens = engine.device, stats["output_tokens"]
    head = {"card": f"{device.kind} {device.index or 0}", "replica": 0, "requests": None, "output_tokens": tokens}
    return [{**head, "restarts": 0, "busy_s": None, "peak_memory_bytes": device.peak_memory_bytes()}]


class CardMeter:
    """Starts counting, and new peaks of memory, when it is made."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        engine.device.reset_peak_memory()
        self._before, self._start = cards_of(engine), time.perf_counter()

    def rows(self) -> list[dict[str, Any]]:
        """One row per card: what was counted since the start, `wall_s` since then, and `busy_share` of it (0..1)."""
        wall_s, rows = time.perf_counter() - self._start, cards_of(self._engine)
        for old, row in zip(self._before, rows, strict=True):
            row |= {name: row[name] - old[name] for name in COUNTERS if row[name] is not None}
            busy_s = row.pop("busy_s")
            row |= {"wall_s": wall_s, "busy_share": None if busy_s is None else busy_s / wall_s}
        return rows
