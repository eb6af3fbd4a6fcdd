"""What a decode step may cost on an NPU, held at the widths of the real models (four layers, shapes only)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ascend_kit.device.peaks import PEAKS
from ascend_kit.measure.forecast import Card, Deployment

pytestmark = pytest.mark.npu

LAYERS = 4
# q, k+v, rope, cache write, attention, o, two norms, gate+up, swiglu, down; Qwen3 norms q and k besides.
LAUNCHES_PER_LAYER = {"Qwen2.5-7B": 11, "Qwen3-8B": 13}
# W8A8: q+k+v, rope, cache write, attention, quantisation, o, two norms and swiglu that quantise, gate+up, down.
W8A8_PER_LAYER = {"Qwen2.5-7B": 11, "Qwen3-8B": 13}
# W8A16: its q+k+v is one product where 16-bit weights have two.
W8A16_PER_LAYER = {"Qwen2.5-7B": 10, "Qwen3-8B": 12}
MAX_BYTES_RATIO = 1.10


def cost_of(sim, name, **options):
    from npu_sim.counting import MODELS, count_step

    return count_step(sim, replace(MODELS[name], num_layers=LAYERS), **options)


def planned(name, prompt_tokens=0, **options):
    """(kernels, launches of the host) that the planner reckons with."""
    from npu_sim.counting import MODELS

    config = replace(MODELS[name], num_layers=LAYERS)
    return Deployment(config, Card(PEAKS["910B2"]), **options).launches(prompt_tokens)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", LAUNCHES_PER_LAYER)
def test_an_eager_step_keeps_to_its_launches_bytes_and_one_synchronisation(name, batch, sim, device):
    cost = cost_of(sim, name, batch=batch)

    assert cost.launches_per_layer == LAUNCHES_PER_LAYER[name]
    assert (cost.kernels, cost.launches) == planned(name, graph_mode=False)
    assert (cost.syncs, cost.uploads) == (1, 1)
    assert cost.bytes_ratio <= MAX_BYTES_RATIO


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", LAUNCHES_PER_LAYER)
def test_a_captured_step_is_one_replay_with_one_update_per_layer(name, batch, sim, device):
    cost = cost_of(sim, name, batch=batch, graph_mode=True)

    # The choice of the token, whether its logits are finite, and unread tokens as ids are outside the graph.
    assert (cost.kernels, cost.launches) == planned(name) and cost.launches == 1 + 4 + 3
    assert (cost.replays, cost.updates, cost.syncs, cost.uploads) == (1, LAYERS, 1, 1)
    assert cost.launches_per_layer <= LAUNCHES_PER_LAYER[name]
    assert cost.bytes_ratio <= MAX_BYTES_RATIO


@pytest.mark.parametrize("name", LAUNCHES_PER_LAYER)
def test_a_prompt_beside_decodes_is_one_replay_instead_of_all_its_launches(name, sim, device):
    eager, captured = (
        cost_of(sim, name, batch=2, prompt_tokens=100, graph_mode=graph_mode) for graph_mode in (False, True)
    )

    assert (eager.kernels, eager.launches) == planned(name, 100, graph_mode=False)
    # Rows of the sampled tokens, lm_head, and what chooses a token; the rows' numbers are uploaded, too.
    assert (captured.kernels, captured.launches) == planned(name, 100) and captured.launches == 2 + 5
    assert (captured.replays, captured.updates, captured.syncs, captured.uploads) == (1, LAYERS, 1, 2)
    assert captured.launches_per_layer <= LAUNCHES_PER_LAYER[name]


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", LAUNCHES_PER_LAYER)
@pytest.mark.parametrize("scheme,budget", [("w8a8", W8A8_PER_LAYER), ("w8a16", W8A16_PER_LAYER)])
def test_an_int8_step_quantises_inside_other_kernels_and_casts_nothing(scheme, budget, name, batch, sim, device):
    cost = cost_of(sim, name, quantize=scheme, batch=batch, graph_mode=batch > 1)

    # Several rows of q, k and v lie apart in one product: a kernel splits them.
    assert cost.launches_per_layer <= budget[name] + (batch > 1)
    assert cost.syncs == 1
    assert cost.bytes_ratio <= MAX_BYTES_RATIO


def test_the_fused_table_is_what_saves_the_launches(sim, device):
    plain = cost_of(sim, "Qwen3-8B", fused=False)

    assert plain.launches_per_layer > 3 * LAUNCHES_PER_LAYER["Qwen3-8B"]
    assert plain.syncs == 1
