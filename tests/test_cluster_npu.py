"""Several simulated NPUs: visibility, the collectives' backends, fused operators and captured steps on every rank."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ascend-kit[cluster]")

from ascend_kit import AscendInferEngine, SamplingParams  # noqa: E402
from ascend_kit.engine import replicas  # noqa: E402
from ascend_kit.engine.worker import Worker  # noqa: E402

pytestmark = [pytest.mark.npu, pytest.mark.multiproc]

TESTS = str(Path(__file__).parent)


class Simulated(Worker):
    """A worker that starts the simulated NPU before anything imports torch_npu, and remembers what it saw."""

    def load(self, settings, config, role):
        sys.path.insert(0, TESTS)
        import npu_sim

        npu_sim.start(2)
        facts = super().load(settings, config, role)
        import os

        import torch

        facts.stats["saw"] = (os.environ.get("ASCEND_RT_VISIBLE_DEVICES"), role.device_id)
        facts.stats["backends"] = torch.distributed.get_backend_config() if torch.distributed.is_initialized() else None
        return facts


@pytest.fixture
def simulated_workers(monkeypatch):
    import npu_sim

    try:
        npu_sim.current()
    except RuntimeError:
        pytest.skip("needs the simulated NPU; on a real one the engine starts its own workers")
    monkeypatch.setattr(replicas, "Worker", Simulated)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """Heads of 128, the size the fused attention takes."""
    from conftest import make_model

    return make_model(tmp_path_factory.mktemp("wide") / "qwen3", "qwen3", head_dim=128)


@pytest.mark.parametrize("tensor_parallel", [pytest.param(1, marks=pytest.mark.long), 2])
def test_two_npus_give_the_tokens_of_one_with_fused_operators_and_graphs(
    simulated_workers, wide_model_dir, tensor_parallel
):
    draw = random.Random(1)
    prompts = [[draw.randrange(255) for _ in range(length)] for length in (3, 40, 17, 140, 5)]
    sampling = SamplingParams(max_new_tokens=6)
    settings = dict(
        precision="fp32",
        device="npu",
        max_seq_length=512,
        batch_size=4,
        block_size=128,
        kv_cache_gib=0.02,
        graph_mode=True,
        operator_fusion=True,
    )
    with AscendInferEngine(wide_model_dir, **settings) as engine:
        expected = [output.token_ids for output in engine.generate(prompts, sampling)]

    with AscendInferEngine(wide_model_dir, cards=2, tensor_parallel=tensor_parallel, **settings) as engine:
        outputs = engine.generate(prompts, sampling)
        facts = [facts for one in engine.core.replicas for facts in one.facts]
        stats = engine.stats()

    assert [output.token_ids for output in outputs] == expected
    assert stats["graphs"]["mode"] == "npu_graph" and stats["graphs"]["replays"] > 0
    if tensor_parallel == 1:
        assert sorted(facts.stats["saw"] for facts in facts) == [("0", 0), ("1", 0)]
    else:  # both ranks see both cards, each takes its own
        assert [facts.stats["saw"][1] for facts in facts] == [0, 1] and len(
            {facts.stats["saw"][0] for facts in facts}
        ) == 1
        assert all("npu:hccl" in facts.stats["backends"] and "cpu:gloo" in facts.stats["backends"] for facts in facts)
