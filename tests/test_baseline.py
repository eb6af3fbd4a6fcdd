"""transformers as the engine that ours is measured against, beside the real engine."""

import itertools
import threading
import time
from dataclasses import replace

import pytest
from stand_in_engine import CEILINGS, experiment_for, opened

from ascend_kit.device.device import select_device
from ascend_kit.measure import engines, sweep
from ascend_kit.measure.baseline import TransformersBackend
from ascend_kit.measure.engines import BackendElsewhere
from ascend_kit.measure.points import check_complete
from ascend_kit.measure.workload import make_requests


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """The stand-in engine has no checkpoint to read its scheme from."""
    real = engines.quantize_scheme
    monkeypatch.setattr(engines, "quantize_scheme", lambda folder: "none" if folder is None else real(folder))


def test_transformers_baseline_reports_real_times_for_every_token_of_ragged_requests(tiny_qwen3_dir):
    backend = TransformersBackend(tiny_qwen3_dir, device=select_device("cpu"), precision="fp32", max_seq_length=256)
    requests = [
        *make_requests(2, 12, 3, vocab_size=256, seed=1),
        *[r.__class__(r.index + 2, r.prompt_token_ids, r.num_output_tokens)
          for r in make_requests(1, 30, 6, vocab_size=256, seed=2)],
    ]  # fmt: skip

    records = backend.run(requests, concurrency=2)

    check_complete(requests, records)
    by_index = {r.index: r for r in records}
    assert by_index[0].arrival_s == by_index[1].arrival_s  # one batch
    assert by_index[2].arrival_s >= by_index[0].token_times_s[-1]  # the next batch waits for the whole one
    for record in records:
        times = (record.arrival_s, *record.token_times_s)
        assert all(before < after for before, after in itertools.pairwise(times))


def test_real_engine_and_baseline_fill_one_table(tmp_path, tiny_qwen3_dir):
    from ascend_kit import AscendInferEngine

    experiment = experiment_for(
        tmp_path, input_model=str(tiny_qwen3_dir), precision="fp32", device="cpu", use_model="source",
        max_seq_length=128, sweep_prompt_len=[24], kv_cache_gib=0.01, graph_mode=False,
    )  # fmt: skip
    with opened(experiment) as folder:
        with AscendInferEngine.from_experiment(experiment) as engine:
            sweep.run_sweep(engine, experiment, folder)
        rows = sweep.measure_engines(experiment, folder)
        ceilings = folder.read_json("ceilings")

    assert list(rows["backend"]) == ["ascend_kit"] * 2 + ["transformers"] * 2
    assert rows["error"].isna().all()
    assert (rows["prefix_hit_rate"] == 0).all() and (rows["num_preemptions"] == 0).all()
    assert (rows["weight_bytes"] == rows["weight_bytes"].iloc[0]).all()  # the same float32 model twice
    assert rows["mbu"].between(0, 1).all() and rows["mfu"].between(0, 1).all()
    assert (rows["ceiling_share"] < 1).all()
    assert ceilings["fp32_flops_per_s"] > 0


def test_continuous_batching_gives_the_greedy_tokens_of_generate_with_a_time_each(tiny_qwen3_dir):
    import torch
    from transformers import AutoModelForCausalLM

    from ascend_kit.measure.baseline import ContinuousBackend

    backend = ContinuousBackend(tiny_qwen3_dir, device=select_device("cpu"), precision="fp32", max_seq_length=512)
    shapes = [(12, 3), (300, 6), (40, 1), (7, 9)]  # the second needs two pages of the cache
    requests = [
        replace(make_requests(1, prompt, output, vocab_size=256, seed=9 + n)[0], index=n, send_at_s=0.05 * n)
        for n, (prompt, output) in enumerate(shapes)
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)

    before = time.perf_counter()
    served = {request.index: (at_s, result) for request, at_s, result in backend.serve(requests, 2)}
    again = backend.run(requests, 2)  # on the manager that was kept
    backend.close()

    for request in requests:
        prompt = torch.tensor([request.prompt_token_ids])
        right = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, pad_token_id=0,
            min_new_tokens=request.num_output_tokens, max_new_tokens=request.num_output_tokens,
        )  # fmt: skip
        at_s, result = served[request.index]
        assert result.generated_tokens == right[0, prompt.shape[1] :].tolist()
        times = (before, at_s, *result.timestamps, time.perf_counter())
        assert len(result.timestamps) == request.num_output_tokens
        assert all(first < later for first, later in itertools.pairwise(times))
    check_complete(requests, again)
    assert [r.arrival_s - again[0].arrival_s for r in sorted(again, key=lambda r: r.index)] == pytest.approx(
        [0, 0.05, 0.1, 0.15]
    )
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


def test_a_failure_of_continuous_batching_is_told_and_the_next_run_is_whole(tiny_qwen3_dir, monkeypatch):
    from ascend_kit.measure.baseline import ContinuousBackend

    backend = ContinuousBackend(tiny_qwen3_dir, device=select_device("cpu"), precision="fp32", max_seq_length=256)
    requests = make_requests(3, 12, 4, vocab_size=256)
    backend.open()
    forward = backend._model.forward

    def failing(*_, **__):
        raise MemoryError("no page left")

    monkeypatch.setattr(backend._model, "forward", failing)
    with pytest.raises(RuntimeError, match="no page left"):
        check_complete(requests, backend.run(requests, 2))
    monkeypatch.setattr(backend._model, "forward", forward)

    check_complete(requests, backend.run(requests, 2))
    backend.close()


def test_continuous_batching_is_refused_where_it_does_not_run_before_anything_is_measured(tmp_path, monkeypatch):
    import transformers

    experiment = experiment_for(tmp_path, engines=[{"kind": "transformers", "batching": "continuous"}])
    with opened(experiment) as folder:
        monkeypatch.setattr(sweep, "resolve_device", lambda *_: ("npu", 0))
        with pytest.raises(ValueError, match="runs on cpu and cuda, not on npu; allowed: padded"):
            sweep.measure_engines(experiment, folder)
        monkeypatch.setattr(sweep, "resolve_device", lambda *_: ("cpu", 0))
        monkeypatch.setattr(transformers, "ContinuousBatchingConfig", object)  # as before page_size
        with pytest.raises(ValueError, match=r"needs transformers 5\.17 or later, here is"):
            sweep.measure_engines(experiment, folder)


@pytest.mark.multiproc
def test_the_baseline_of_a_notebooks_kernel_runs_in_a_process_of_its_own(tmp_path, tiny_qwen3_dir, monkeypatch):
    monkeypatch.setattr(sweep, "needs_process", lambda kind: True)
    experiment = experiment_for(
        tmp_path, input_model=str(tiny_qwen3_dir), precision="fp32", device="cpu", max_seq_length=128,
        sweep_concurrency=[2], sweep_prompt_len=[24],
    )  # fmt: skip
    (spec,) = [spec for spec in experiment.engine_specs if spec.kind == "transformers"]
    with opened(experiment) as folder:
        backend = sweep.open_backend(spec, experiment, folder)
        monkeypatch.setattr(sweep, "needs_process", lambda kind: False)
        here = sweep.open_backend(spec, experiment, folder)
    before = time.perf_counter()
    seen: list[int] = []
    records = backend.run(make_requests(3, 24, 4, vocab_size=320), 2, seen.append)
    with opened(experiment) as folder:
        (row,) = sweep.run_sweep(backend, experiment, folder, ceilings=CEILINGS).to_dict("records")
    backend.close()

    assert isinstance(backend, BackendElsewhere) and here._model is None  # nothing was loaded in this process
    assert backend.identity == here.identity and backend.variant() == here.variant()
    assert seen == [2, 3] and [len(record.token_times_s) for record in records] == [4, 4, 4]
    assert all(before < moment < time.perf_counter() for record in records for moment in record.token_times_s)
    assert row["error"] is None and row["peak_memory_bytes"] > row["weight_bytes"] > 0
    backend.close()
