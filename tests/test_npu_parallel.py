"""Tensor parallelism over two simulated NPUs: collectives over `cpu:gloo,npu:hccl`, eager and captured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from int8_halves import halve

from ascend_kit import AscendInferEngine, SamplingParams

pytestmark = [pytest.mark.npu, pytest.mark.multiproc]

PROMPTS = [[7] * 5, [3, 1, 4, 1, 5, 9, 2, 6], [250, 249]]
NEW = 6
MODES = {"eager": {"graph_mode": False}, "captured": {"graph_mode": True}}
INT8_MODES = {
    "eager": {"graph_mode": False},
    "kernels": {"graph_mode": False, "precision": "bf16"},
    "captured": {"graph_mode": True, "precision": "bf16"},
}


def test_two_ranks_give_the_tokens_of_one_cpu_eager_and_captured(tiny_qwen3_dir, sim, tmp_path, device):
    torch.multiprocessing.start_processes(
        run_rank, args=(str(tiny_qwen3_dir), str(tmp_path), MODES), nprocs=2, start_method="spawn"
    )

    settings = dict(precision="fp32", device="cpu", max_seq_length=256, batch_size=4, kv_cache_gib=0.02)
    with AscendInferEngine(tiny_qwen3_dir, **settings) as engine:
        expected = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    for mode in MODES:
        result = json.loads((tmp_path / f"{mode}.json").read_text())
        assert result["tokens"] == [output.token_ids for output in expected], mode
        # Two sums a layer, the embedding and the logits: every step communicates six times. A step with prompts
        # runs once before it is recorded and once behind that, both times without the logits.
        collectives = result["collectives"] - (2 * 5 if mode == "captured" else 0)
        assert collectives % 6 == 0 and collectives >= 6 * NEW
        assert (result["prompt_replays"] > 0) == (mode == "captured")


def test_two_ranks_give_the_tokens_of_one_from_int8_weights(tiny_int8_dir, sim, tmp_path, device):
    torch.multiprocessing.start_processes(
        run_rank, args=(str(tiny_int8_dir), str(tmp_path), INT8_MODES), nprocs=2, start_method="spawn"
    )

    settings = dict(
        precision="fp32", device="cpu", max_seq_length=256, batch_size=4, kv_cache_gib=0.02, graph_mode=False
    )
    with AscendInferEngine(tiny_int8_dir, **settings) as engine:
        halve(engine.core, tiny_int8_dir)
        expected = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    eager, kernels, captured = (json.loads((tmp_path / f"{mode}.json").read_text()) for mode in INT8_MODES)
    assert eager["tokens"] == [output.token_ids for output in expected]
    # The int8 kernels write 16 bits, where no tokens of another way of adding up are to be had.
    assert captured["tokens"] == kernels["tokens"]
    assert all(result["collectives"] % 6 == 0 for result in (eager, kernels)), "int8 adds no collective"


def run_rank(rank: int, folder: str, out: str, modes: dict[str, dict]) -> None:
    """One rank in a process of its own; rank 0 leaves its results in files."""
    import npu_sim

    sim = npu_sim.start(devices=2)

    from ascend_kit.device.device import select_device
    from ascend_kit.device.parallel import join_group, leave_group

    device = select_device("npu", rank)
    join_group("npu", rank, 2, torch.distributed.FileStore(str(Path(out, "store")), 2))
    for mode, settings in modes.items():
        sim.reset()
        core = load_core(folder, device, rank, **settings)
        if rank:
            core.runner.serve_steps()
            continue
        tokens = generate(core)
        core.close()
        collectives = sum(n for name, n in sim.counts.kernels.items() if name.startswith("c10d::"))
        prompt_replays = (core.stats()["graphs"] or {}).get("prompt_replays", 0)
        found = {"tokens": tokens, "collectives": collectives, "prompt_replays": prompt_replays}
        Path(out, f"{mode}.json").write_text(json.dumps(found))
    leave_group()


def load_core(folder, device, rank, graph_mode, precision="fp32"):
    from ascend_kit.device.parallel import TensorParallel
    from ascend_kit.engine.config import EngineConfig
    from ascend_kit.engine.core import EngineCore
    from ascend_kit.model.config import ModelConfig

    settings = EngineConfig(
        folder,
        precision=precision,
        max_seq_length=256,
        batch_size=4,
        graph_mode=graph_mode,
        max_tokens_per_step=64,
        kv_cache_gib=0.02,
    )
    return EngineCore(settings, ModelConfig.from_folder(folder), device, parallel=TensorParallel(rank, 2))


def generate(core):
    from ascend_kit.engine.sequence import Sequence

    sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    sequences = [Sequence(prompt, sampling, arrival_s=0.0) for prompt in PROMPTS]
    for sequence in sequences:
        core.add(sequence)
    while core.has_unfinished:
        core.step(lambda sequence, _: "length" if sequence.num_output_tokens == NEW else None)
    return [list(sequence.output_ids) for sequence in sequences]
