"""The CPU kernels over packed weights and paged tiles: against plain torch, and against themselves in other batches."""

from __future__ import annotations

import threading

import pytest
import torch

from ascend_kit.device.ops import AttentionMeta, cpu_native, native, reference

pytestmark = pytest.mark.skipif(not native.packs(), reason=f"CPU kernels are {native.status()}")

BLOCK = 32
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def close(got, expected, dtype):
    tolerance = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.float(), expected.float(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 48, 49, 130])
def test_packed_products_of_any_row_count(rows, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 200), (192, 200), (192,)))
    packed = cpu_native.pack_linear(weight)
    assert packed.shape == (3, 200 * dtype.itemsize // 4, 64, 4 // dtype.itemsize)

    close(cpu_native.linear(x, packed, bias), x.float() @ weight.float().t() + bias.float(), dtype)
    close(cpu_native.linear(x, packed), x.float() @ weight.float().t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 47, 48, 96, 250])
def test_packed_int8_products(rows, dtype):
    codes, weight = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rows, 260), (128, 260)))
    act_scale, scale, bias = torch.rand(rows) / 100, torch.rand(128) / 100, torch.randn(128).to(dtype)
    x = torch.randn(rows, 260).to(dtype)

    exact = (codes.long() @ weight.long().t()).float() * act_scale[:, None] * scale + bias.float()
    got = cpu_native.int8_matmul(codes, act_scale, cpu_native.pack_int8(weight), scale, bias, dtype)
    torch.testing.assert_close(got.float(), exact, **(dict(rtol=4e-3, atol=1e-3) if dtype != torch.float32 else {}))

    expected = x.float() @ weight.float().t() * scale + bias.float()
    close(cpu_native.int8_weight_matmul(x, cpu_native.pack_int8_weight(weight), scale, bias), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 50])
@pytest.mark.parametrize("outputs,group", [(128, 32), (128, 128), (128, 256), (100, 64)])
def test_4_bit_products_in_panels_and_row_by_row(outputs, group, rows, dtype):
    codes = torch.randint(-8, 8, (outputs, 256), dtype=torch.int8)
    scale, bias = torch.rand(outputs, 256 // group) / 10, torch.randn(outputs).to(dtype)
    x = torch.randn(rows, 256).to(dtype)
    for zero in (None, torch.randint(-8, 8, scale.shape).float()):
        wide = codes.float().view(outputs, -1, group) - (0 if zero is None else zero[..., None])
        expected = x.float() @ (wide * scale[..., None]).view(outputs, 256).t()

        packed = cpu_native.pack_int4(codes, scale, zero)
        assert packed[0].shape == (2, 128, 64)
        close(cpu_native.int4_weight_matmul(x, *packed, bias), expected + bias.float(), dtype)
        close(cpu_native.int4_weight_matmul(x, *packed, None), expected, dtype)
        # What processors without the instructions take: a row at a time.
        unpacked = reference.pack_int4(codes, scale, zero)
        if rows <= cpu_native.MAX_UNPACKED_ROWS:
            close(cpu_native.int4_weight_matmul(x, *unpacked, bias), expected + bias.float(), dtype)


def test_a_4_bit_product_of_unlike_sizes_is_refused():
    packed = cpu_native.pack_int4(torch.zeros(100, 256, dtype=torch.int8), torch.ones(100, 2), None)

    with pytest.raises(ValueError, match="rows of 128 numbers times 100 outputs of 256"):
        cpu_native.int4_weight_matmul(torch.zeros(1, 128), *packed, None)
    with pytest.raises(ValueError, match="do not fit"):
        cpu_native.int4_weight_matmul(torch.zeros(1, 256), *packed, torch.zeros(99))


def test_every_int8_code_is_exact_in_the_weight_only_product():
    codes = torch.arange(-128, 128).repeat(64, 1).to(torch.int8)  # every code in every column
    x = torch.eye(256).bfloat16()

    got = cpu_native.int8_weight_matmul(x, cpu_native.pack_int8_weight(codes), torch.ones(64), None)

    assert torch.equal(got.float(), codes.float().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_table_gives_its_rows(dtype):
    table = torch.randn(256, 40).to(dtype)
    ids = torch.tensor([0, 63, 64, 255, 17, 64], dtype=torch.int32)

    assert torch.equal(cpu_native.gather_rows(cpu_native.pack_linear(table), ids), table[ids.long()])


@pytest.mark.parametrize("shape", [(37, 200), (64, 201)])
def test_what_does_not_fit_panels_stays_as_it_is(shape):
    weight, x = torch.randn(shape).bfloat16(), torch.randn(70, shape[1]).bfloat16()
    packed = cpu_native.pack_linear(weight)

    assert packed.shape == weight.shape
    close(cpu_native.linear(x, packed), x.float() @ weight.float().t(), torch.bfloat16)


def paged(lengths, new, kv_heads, size):
    """Cache and meta of sequences with `lengths` tokens, the last `new` of them in this step; blocks shuffled."""
    counts = [-(-length // BLOCK) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).int()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        table[row, : len(blocks)] = blocks
    caches = [torch.randn(sum(counts) + 1, BLOCK, kv_heads, size).bfloat16() for _ in range(2)]
    ends = torch.tensor(new).cumsum(0).tolist()
    meta = AttentionMeta(
        slot_mapping=torch.zeros(ends[-1], dtype=torch.int32),
        block_table=table,
        cu_seqlens_q=ends,
        context_lens=list(lengths),
        context_lens_t=torch.tensor(lengths, dtype=torch.int32),
        block_size=BLOCK,
        is_decode=all(count == 1 for count in new),
    )
    return *caches, meta


STEPS = {
    "decode over several spans": ([1, 511, 512, 513, 1300], [1] * 5),
    "prompts": ([1, 31, 130, 257], [1, 31, 130, 257]),
    "chunks": ([700, 129, 96], [100, 128, 1]),
    "mixed": ([40, 600, 200, 333], [1, 1, 200, 7]),
}


@pytest.mark.parametrize("heads,kv_heads,size", [(16, 8, 128), (14, 2, 64), (7, 1, 128), (4, 4, 64), (6, 2, 32)])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_attention_follows_the_reference(step, heads, kv_heads, size):
    lengths, new = step
    keys, values, meta = paged(lengths, new, kv_heads, size)
    q = torch.randn(sum(new), heads, size).bfloat16()

    got = cpu_native.paged_attention(q, keys, values, meta, size**-0.5)

    close(got, reference.paged_attention(q, keys, values, meta, size**-0.5), torch.bfloat16)


def test_scores_far_apart_neither_overflow_nor_vanish():
    keys, values, meta = paged([150, 150], [1, 150], 2, 64)
    q = torch.randn(151, 4, 64).bfloat16() * 100

    got = cpu_native.paged_attention(q, keys, values, meta, 1.0)

    assert got.isfinite().all()
    close(got, reference.paged_attention(q, keys, values, meta, 1.0), torch.bfloat16)


def test_a_row_is_the_same_alone_and_in_a_batch():
    x, weight = torch.randn(33, 512).bfloat16(), cpu_native.pack_linear(torch.randn(128, 512).bfloat16())
    together = cpu_native.linear(x, weight)
    assert all(torch.equal(cpu_native.linear(x[i : i + 1], weight)[0], together[i]) for i in range(33))

    keys, values, meta = paged([700, 30, 1100], [1, 1, 1], 2, 64)
    q = torch.randn(3, 8, 64).bfloat16()
    together = cpu_native.paged_attention(q, keys, values, meta, 0.125)
    for i in range(3):
        alone = AttentionMeta(meta.slot_mapping[:1], meta.block_table[i : i + 1], [1], [meta.context_lens[i]],
                              meta.context_lens_t[i : i + 1], BLOCK, is_decode=True)  # fmt: skip
        assert torch.equal(cpu_native.paged_attention(q[i : i + 1], keys, values, alone, 0.125)[0], together[i])


def test_the_number_of_threads_changes_nothing():
    x, weight = torch.randn(9, 512).bfloat16(), cpu_native.pack_linear(torch.randn(640, 512).bfloat16())
    keys, values, meta = paged([900, 300], [1, 300], 4, 64)
    q = torch.randn(301, 8, 64).bfloat16()
    results = []
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        results.append((cpu_native.linear(x, weight), cpu_native.paged_attention(q, keys, values, meta, 0.125)))

    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_callers_in_several_threads_do_not_disturb_one_another():
    weight = cpu_native.pack_linear(torch.randn(640, 512).bfloat16())
    inputs = [torch.randn(20, 512).bfloat16() for _ in range(4)]
    expected = [cpu_native.linear(x, weight) for x in inputs]
    wrong = []

    def work(x, result):
        for _ in range(50):
            if not torch.equal(cpu_native.linear(x, weight), result):
                wrong.append(1)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)

    assert not wrong and not any(worker.is_alive() for worker in workers)


def test_recordings_share_memory_and_still_repeat_their_own_step():
    weights = [cpu_native.pack_linear(torch.randn(256, 256).bfloat16()) for _ in range(3)]

    def step(x):
        for weight in weights:
            x = cpu_native.linear(x, weight)
        return x

    arena, recorded = cpu_native.Arena(), []
    for rows in (1, 7, 20):
        x = torch.zeros(rows, 256).bfloat16()
        with cpu_native.Recording(arena) as recording:
            recorded.append((x, recording, step(x)))
    assert recorded[0][2].data_ptr() != recorded[2][2].data_ptr() and len(arena.chunks) == 1

    for x, recording, out in recorded * 2:
        x.copy_(torch.randn(x.shape))
        recording.replay()
        assert torch.equal(out, step(x))


@pytest.mark.parametrize("width", [256, 250])
def test_quantised_activations_are_the_references(width):
    x = torch.randn(20, width).bfloat16() * torch.logspace(-3, 3, 20).unsqueeze(1).bfloat16()
    x[3] = 0

    codes, scale = cpu_native.quantize_per_token(x)

    expected_codes, expected_scale = reference.quantize_per_token(x)
    torch.testing.assert_close(scale, expected_scale)
    assert torch.equal(codes, expected_codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [256, 250])
def test_a_row_that_is_not_finite_does_not_become_finite_codes(width, dtype, bad):
    x = torch.ones(3, width, dtype=dtype)
    x[1, 7] = bad

    _, scale = cpu_native.quantize_per_token(x)

    assert not scale[1].isfinite() and scale[[0, 2]].isfinite().all()
