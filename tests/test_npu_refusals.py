"""Operators of an NPU called wrongly on purpose: each mistake must be noticed."""

from __future__ import annotations

import pytest
import torch
from op_cases import BF16, BLOCK, attention_case

from ascend_kit.device.ops import npu

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("fresh_switches")]


def attend_directly(device, **changes):
    """The table's attention call with some arguments changed; (result, expected)."""
    q, k_cache, v_cache, meta, expected = attention_case("chunk after a prefix", 8, 2, 128, device=device)
    arguments = dict(
        atten_mask=npu.make_mask(q.device),
        actual_seq_lengths=meta.cu_seqlens_q,
        actual_seq_lengths_kv=meta.context_lens,
        block_table=meta.block_table,
        num_heads=8,
        num_key_value_heads=2,
        scale=128**-0.5,
        input_layout="TND",
        sparse_mode=3,
        block_size=BLOCK,
    )
    import torch_npu

    return torch_npu.npu_fused_infer_attention_score(
        q, k_cache.flatten(2), v_cache.flatten(2), **{**arguments, **changes}
    )[0].cpu(), expected


def test_attention_called_directly_is_correct_before_it_is_broken(sim, device):
    got, expected = attend_directly(device)

    torch.testing.assert_close(got, expected, **BF16)


@pytest.mark.parametrize("mode", [0, 2])
def test_a_wrong_mask_mode_is_noticed(mode, sim, device):
    # Mode 2 aligns the mask at the upper left, which hides a chunk's prefix; mode 0 wants a full mask.
    with pytest.raises((AssertionError, RuntimeError)):
        torch.testing.assert_close(*attend_directly(device, sparse_mode=mode), **BF16)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"scale": 1.0}, "1/sqrt"),
        ({"atten_mask": None}, "2048x2048"),
        ({"actual_seq_lengths_kv": None}, "actual_seq_lengths_kv"),
        ({"actual_seq_lengths": [39]}, "561002"),
        ({"actual_seq_lengths": [20, 20]}, "561002"),
        ({"block_size": 64}, "paged key"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"input_layout": "BNSD"}, "BNSD"),
    ],
)
def test_a_broken_attention_argument_is_refused(changes, message, sim, device):
    with pytest.raises(RuntimeError, match=message):
        attend_directly(device, **changes)


def test_cumulative_kv_lengths_are_refused(sim, device):
    q, k_cache, v_cache, meta, _ = attention_case("decode", 8, 2, 128, device=device)
    meta.context_lens = torch.tensor(meta.context_lens).cumsum(0).tolist()

    with pytest.raises(RuntimeError, match="per sequence, not cumulative"):
        npu.paged_attention(q, k_cache, v_cache, meta, 128**-0.5)


def test_a_block_table_out_of_range_or_of_another_type_is_refused(sim, device):
    q, k_cache, v_cache, meta, _ = attention_case("decode", 8, 2, 128, device=device)
    good = meta.block_table

    meta.block_table = good + 12
    with pytest.raises(RuntimeError, match="the cache has 12"):
        npu.paged_attention(q, k_cache, v_cache, meta, 128**-0.5)
    meta.block_table = good.long()
    with pytest.raises(RuntimeError, match=r"block_table is torch\.int64"):
        npu.paged_attention(q, k_cache, v_cache, meta, 128**-0.5)


@pytest.mark.parametrize(
    "slots,message", [([0, 1, 4 * BLOCK], "outside"), ([0, -1, 2], "outside"), ([5, 5, 6], "twice")]
)
def test_slots_out_of_range_or_used_twice_are_refused(slots, message, sim, device):
    rows = torch.zeros(3, 2, 128).bfloat16().to(device)
    cache = torch.zeros(4, BLOCK, 2, 128).bfloat16().to(device)

    with pytest.raises(RuntimeError, match=message):
        npu.store_kv(rows, rows, cache, cache, torch.tensor(slots, dtype=torch.int32).to(device))


def test_the_default_cache_mode_and_a_strided_key_are_refused(sim, device):
    import torch_npu

    cache, slots = torch.zeros(4, BLOCK, 2, 128).to(device), torch.arange(3, dtype=torch.int32).to(device)
    merged = torch.zeros(3, 4, 128).to(device)

    with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
        torch_npu.npu_scatter_pa_kv_cache(merged[:, :2].contiguous(), merged[:, 2:].contiguous(), cache, cache, slots)
    with pytest.raises(RuntimeError, match="key must be contiguous"):
        torch_npu.npu_scatter_pa_kv_cache(merged[:, :2], merged[:, 2:], cache, cache, slots, cache_mode="Norm")


def test_a_cpu_tensor_among_npu_tensors_is_refused(sim, device):
    with pytest.raises(RuntimeError, match="same device"):
        npu.rms_norm(torch.zeros(2, 64).to(device), torch.ones(64), 1e-6)


def test_an_nz_weight_cannot_be_sliced(sim, device, monkeypatch):
    monkeypatch.setenv("ASCEND_KIT_NPU_WEIGHT_NZ", "int8")
    packed = npu.pack_int8(torch.ones(48, 64, dtype=torch.int8).to(device))

    with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
        packed[:, :16]


def test_forgetting_the_output_type_of_an_int8_product_shows(sim, device):
    import torch_npu

    codes, scale = torch.ones(2, 64, dtype=torch.int8).to(device), torch.ones(48).to(device)
    weight, rows = torch.ones(64, 48, dtype=torch.int8).to(device), torch.ones(2).to(device)

    with pytest.raises(RuntimeError, match="None means int8"):
        torch_npu.npu_quant_matmul(codes, weight, scale, pertoken_scale=rows)
