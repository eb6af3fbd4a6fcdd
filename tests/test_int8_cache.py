"""An int8 KV cache: the kernels agree with the definition, and that stays near a cache of full numbers."""

from __future__ import annotations

import pytest
import torch

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.device.ops import AttentionMeta, reference, select_ops

KV_HEADS, BLOCK = 2, 16
LENGTHS = [40, 1, 33, 700]  # the last one takes two spans of the kernel


def step_of(size, dtype, *, is_decode):
    """Caches filled by the reference, and a step over them: one new token each, or prompt chunks behind one."""
    draw = torch.Generator().manual_seed(size)
    noise = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)  # noqa: E731
    widths = [-(-length // BLOCK) for length in LENGTHS]
    table, free = torch.zeros(len(LENGTHS), max(widths), dtype=torch.int32), 1
    for row, width in zip(table, widths, strict=True):
        row[:width] = torch.arange(free, free + width, dtype=torch.int32)
        free += width
    slots = [int(row[p // BLOCK]) * BLOCK + p % BLOCK for row, n in zip(table, LENGTHS, strict=True) for p in range(n)]
    keys, values = (noise(len(slots), KV_HEADS, size) for _ in range(2))
    new = [1] * len(LENGTHS) if is_decode else [1, 1, 20, 60]
    ends = torch.tensor(new).cumsum(0).tolist()
    meta = AttentionMeta(
        torch.tensor(slots, dtype=torch.int32), table, ends, LENGTHS, torch.tensor(LENGTHS, dtype=torch.int32), BLOCK,
        is_decode,
    )  # fmt: skip
    return noise(sum(new), 2 * KV_HEADS + 2, size), keys, values, meta, free


def attend(ops, step, cache_dtype, store=None):
    query, keys, values, meta, blocks = step
    caches = [
        reference.new_cache(blocks, BLOCK, KV_HEADS, query.shape[2], cache_dtype, torch.device("cpu")) for _ in "kv"
    ]
    (store or ops).store_kv(keys, values, *caches, meta.slot_mapping)
    return ops.paged_attention(query, *caches, meta, query.shape[2] ** -0.5), caches


@pytest.mark.parametrize("is_decode", [True, False])
@pytest.mark.parametrize("size,dtype", [(128, torch.bfloat16), (64, torch.bfloat16), (16, torch.float32)])
def test_kernels_store_and_read_what_the_definition_does(size, dtype, is_decode):
    step, ops = step_of(size, dtype, is_decode=is_decode), select_ops("cpu", fused=True)

    wanted, reference_caches = attend(reference, step, torch.int8)
    found, caches = attend(ops, step, torch.int8)

    codes = [reference._int8_parts(cache, KV_HEADS, size) for cache in (*reference_caches, *caches)]
    for (ours, our_scales), (theirs, their_scales) in zip(codes[:2], codes[2:], strict=True):
        assert (ours.int() - theirs.int()).abs().max() <= 1 and torch.equal(our_scales, their_scales)
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-4  # the definition rounds weights to bf16
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("where", ["query", "scale"])
def test_a_number_that_is_none_stays_visible_and_touches_no_other_sequence(where):
    query, keys, values, meta, blocks = step_of(128, torch.bfloat16, is_decode=True)
    ops = select_ops("cpu", fused=True)
    caches = [reference.new_cache(blocks, BLOCK, KV_HEADS, 128, torch.int8, torch.device("cpu")) for _ in "kv"]
    ops.store_kv(keys, values, *caches, meta.slot_mapping)
    if where == "query":
        query[0, 0, 5] = torch.nan
    else:
        scales = reference._int8_parts(caches[1], KV_HEADS, 128)[1]
        scales[int(meta.block_table[0, 0]), 3, 0] = torch.nan

    found = ops.paged_attention(query, *caches, meta, 128**-0.5)

    assert found[0, 0].isnan().all() and not found[1:].isnan().any()
    assert not found[0, 3:].isnan().any()  # the other KV head


def test_attention_over_int8_stays_near_that_over_full_numbers():
    step = step_of(64, torch.float32, is_decode=True)

    exact, rounded = (attend(reference, step, dtype)[0] for dtype in (torch.float32, torch.int8))

    assert 0 < (exact - rounded).norm() / exact.norm() < 0.01  # codes of random numbers are off by a third of a step


@pytest.mark.parametrize(
    "options", [{}, {"operator_fusion": False, "graph_mode": False}, {"graph_mode": False, "speculate": 4}]
)
def test_an_engine_on_an_int8_cache_answers_within_its_bound_and_in_little_more_than_a_quarter_of_float32s_memory(
    options, tiny_qwen3_dir
):
    settings = dict(precision="fp32", device="cpu", max_seq_length=512, batch_size=4, block_size=16, kv_cache_gib=0.05)
    prompts, found = [[5, 6, 7, 8] * 10, list(range(100)), [3]], {}
    pairs = [(prompt, [11, 12, 13]) for prompt in prompts]
    for kind in ("auto", "int8"):
        with AscendInferEngine(tiny_qwen3_dir, **settings, **options, kv_cache_dtype=kind) as engine:
            outputs = engine.generate(prompts, SamplingParams(max_new_tokens=8))
            scores = [score.logprob for score in engine.score(pairs)]
            found[kind] = (engine.stats()["kv_block_bytes"], scores, [o.token_ids for o in outputs])

    assert found["int8"][0] == found["auto"][0] * (16 + 4) // (16 * 4)  # heads of 16 numbers
    assert found["int8"][1] == pytest.approx(found["auto"][1], abs=0.15) and found["int8"][1] != found["auto"][1]
    same = [a == b for ours, theirs in zip(found["int8"][2], found["auto"][2], strict=True)
            for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    assert sum(same) >= len(same) // 2, "random weights are sensitive, but most tokens stay"
