"""Profiles: the traces of three profilers become one table of operators, and a sentence says what bounds a step."""

import gzip
import json

import pandas
import pytest

from ascend_kit import AscendInferEngine, RunFolder, SamplingParams
from ascend_kit.device.profiler import ProfileError, kind_of, read_kernel_details, read_trace, summarize
from ascend_kit.measure.profile import bound_of, profile_engine
from ascend_kit.measure.rows import load_profile
from ascend_kit.params import Experiment
from ascend_kit.show import charts, findings, tables
from ascend_kit.show.tables import memory
from ascend_kit.stages import RunRecord

# The columns that torch_npu writes (CsvHeaders of its wheel), times with the tab that CANN puts behind them.
KERNEL_DETAILS = """Step Id,Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Num
,0,aclnnMm_MatMulV2,MatMulV2,AI_CORE,1000.0\t,40.0,0,24
,0,aclnnMm_MatMulV2,MatMulV2,AI_CORE,1050.0\t,60.0,10,24
,0,hcom_allReduce__123_0_1,N/A,COMMUNICATION,1060.0\t,100.0,0,0
,0,aclnnFusedInferAttentionScoreV3,FusedInferAttentionScore,MIX_AIC,1200.0\t,20.0,40,24
"""
CEILINGS = {"fp32_flops_per_s": 1e11, "read_bytes_per_s": 1e10, "launch_s": 1e-6}


def event(name, start, length, category="cpu_op", thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": thread}


def write_trace(path, events):
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return path


def test_an_operator_within_another_counts_once(tmp_path):
    events = [event("aten::linear", 0, 10_000), event("aten::addmm", 3_000, 4_000), event("aten::abs", 20_000, 500),
              event("ProfilerStep", 0, 9e6, "python_function"), event("other thread", 0, 5, thread=2)]  # fmt: skip

    profile = summarize(read_trace(write_trace(tmp_path / "t.json.gz", events), on_host=True), "t", is_nested=True)

    times = {one.name: (one.calls, one.total_ms) for one in profile.operators}
    assert times == {"aten::linear": (1, 6.0), "aten::addmm": (1, 4.0), "aten::abs": (1, 0.5)}
    assert profile.busy_ms == 10.5 and profile.launches == 3


def test_kernels_of_a_gpu_that_run_together_are_busy_once(tmp_path):
    events = [event("aten::mm", 0, 9_000), event("sm90_gemm", 100, 1_000, "kernel"),
              event("ncclAllReduce", 600, 1_000, "kernel", 7),
              event("Memcpy HtoD", 3_000, 200, "gpu_memcpy")]  # fmt: skip

    profile = summarize(read_trace(write_trace(tmp_path / "t.json.gz", events), on_host=False), "t")

    assert profile.busy_ms == pytest.approx(1.7) and profile.time_of("communication") == 1.0
    assert [one.name for one in profile.operators][2] == "Memcpy HtoD"


def test_the_kernel_table_of_an_npu_is_read_by_its_columns(tmp_path):
    folder = tmp_path / "decode" / "rank0_1_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    (folder / "kernel_details.csv").write_text(KERNEL_DETAILS)

    profile = summarize(read_kernel_details(tmp_path / "decode"), "decode")

    assert profile.operators[:2] == [
        ("MatMulV2", "product", 2, 0.1),
        ("hcom_allReduce__123_0_1", "communication", 1, 0.1),
    ]
    assert profile.busy_ms == pytest.approx(0.04 + 0.11 + 0.02)
    with pytest.raises(ProfileError, match=r"kernel_details\.csv.*set_env\.sh"):
        read_kernel_details(tmp_path / "prefill")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("aclnnQuantMatmulV4", "product"), ("ak_packed_linear", "product"), ("void cutlass::Kernel<...>", "product"),
     ("FusedInferAttentionScore", "attention"), ("flash_fwd_splitkv_kernel", "attention"), ("ak_attend", "attention"),
     ("hcom_allGather_", "communication"), ("ScatterPaKvCache", "copy"), ("aten::to", "copy"),
     ("aten::topk", "other"), ("RmsNorm", "other")],
)  # fmt: skip
def test_operators_are_sorted_by_what_they_do(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("host", "communication", "memory_ms", "arithmetic_ms", "bound"),
    [(0.6, 0.0, 3.0, 1.0, "host"), (0.2, 0.5, 3.0, 1.0, "communication"), (0.1, 0.1, 6.0, 1.0, "memory"),
     (0.1, 0.1, 1.0, 6.0, "arithmetic"), (0.1, 0.1, 1.0, 1.0, "operators"), (0.1, 0.1, None, None, "operators")],
)  # fmt: skip
def test_a_step_is_bound_by_what_takes_most_of_it(host, communication, memory_ms, arithmetic_ms, bound):
    shares = {"host_share": host, "communication_share": communication, "operator_share": 1 - host - communication}

    assert bound_of(8.0, memory_ms, arithmetic_ms, **shares) == bound


def test_a_profile_is_written_once_with_its_traces_and_read_back(tiny_qwen3_dir, tmp_path):
    experiment = Experiment(
        input_model=str(tiny_qwen3_dir), use_model="source", output_root=str(tmp_path), precision="fp32", device="cpu",
        max_seq_length=128, profile=True, sweep={"concurrency": [1, 3], "prompt_len": [20], "output_len": [4]},
    )  # fmt: skip
    with AscendInferEngine.from_experiment(experiment) as engine, RunFolder.open(experiment, "04_throughput") as folder:
        folder.write_json("ceilings", {"device": engine.device.name, **CEILINGS})
        profile_engine(engine, experiment, folder)
        profile_engine(engine, experiment, folder)
        assert "KV cache" in memory(engine).data and "kept for" not in memory(engine).data
        assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks_total"]

    steps, operators = load_profile(folder)
    prefill, decode = steps.to_dict("records")
    assert len(list(folder.rows("profile_steps"))) == 2
    assert (prefill["batch"], prefill["context_len"], prefill["steps"]) == (1, 20, 1)
    assert (decode["batch"], decode["steps"]) == (3, 8) and decode["context_len"] > 24
    for row in (prefill, decode):
        own = operators[operators["profile_id"] == row["profile_id"]]
        assert row["host_share"] + row["communication_share"] + row["operator_share"] == pytest.approx(1)
        assert own["share"].sum() == pytest.approx(1 - row["host_share"], abs=1e-6)
        assert own["kind"].eq("product").any() and own["kind"].eq("attention").any()
        assert json.loads(gzip.decompress((folder.path / row["trace"]).read_bytes()))["traceEvents"]
    products = operators[(operators["profile_id"] == decode["profile_id"]) & (operators["kind"] == "product")]
    assert products["calls_per_step"].sum() >= 2 * 4 + 1  # two layers of four products and the head, recorded or not
    assert len(findings.profile_findings(folder)) == 2 and decode["bound"] in findings.profile_findings(folder)[1].key
    assert set(tables.operators(folder)["phase"]) == {"prefill", "decode"} and charts.profile(folder) is not None


@pytest.mark.npu
def test_an_npu_without_its_profiler_says_what_is_missing_and_the_sweep_goes_on(sim, tiny_qwen3_dir, tmp_path):
    experiment = Experiment(
        input_model=str(tiny_qwen3_dir), use_model="source", output_root=str(tmp_path), precision="fp32", device="npu",
        max_seq_length=128, profile=True, graph_mode=False, sweep={"concurrency": [1], "prompt_len": [8]},
    )  # fmt: skip
    with AscendInferEngine.from_experiment(experiment) as engine, RunFolder.open(experiment, "04_throughput") as folder:
        folder.write_json("ceilings", {"device": engine.device.name, **CEILINGS})
        profile_engine(engine, experiment, folder)
        assert "kept for activations" in memory(engine).data
        assert not engine.core.sequences and len(engine.generate("ab", SamplingParams(max_new_tokens=2))) == 1

    stage = RunRecord.read(folder.path).stages["04_throughput"]
    assert stage.state == "failed" and "kernel_details.csv" in stage.error


def test_without_a_profile_there_is_nothing_to_show(tmp_path):
    folder = RunFolder(tmp_path)

    assert findings.profile_findings(folder) == [] and charts.profile(folder) is None
    assert isinstance(tables.operators(folder), pandas.DataFrame) and tables.operators(folder).empty
