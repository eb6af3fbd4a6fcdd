"""Endpoints that are real servers: started, searched, failing for a while, and our own."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest
from capacity_server import CapacityServer
from scripted_server import DONE, HEAD, ScriptedServer, event, failure, text_chunk, usage

from ascend_kit.measure.endpoint import Client
from ascend_kit.measure.over_time import observed, read_metrics
from ascend_kit.measure.points import check_complete
from ascend_kit.measure.server_process import ServerProcess
from ascend_kit.measure.workload import make_requests
from ascend_kit.params.engines import OpenAIEngine


def test_metrics_of_three_servers_have_one_set_of_names():
    vllm = 'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:num_preemptions_total{engine="0"} 3\n'
    sglang = "sglang:token_usage 0.5\nsglang:num_queue_reqs 4\n"
    mindie = "num_requests_waiting 2\nnum_preemptions_total 1\n"
    first, last = ({"hits": h, "queries": q, "drafts": d, "accepted": a, "preemptions": p}
                   for h, q, d, a, p in ((5, 10, 2, 1, 1), (8, 14, 6, 7, 4)))  # fmt: skip

    assert read_metrics(vllm) == {"kv_use": 0.25, "preemptions": 3}
    assert read_metrics(sglang) == {"kv_use": 0.5, "waiting": 4}
    assert read_metrics(mindie) == {"waiting": 2, "preemptions": 1}
    assert observed([first, last]) == {"prefix_hit_rate": 0.75, "tokens_per_step": 2.5, "num_preemptions": 3}
    assert read_metrics("<html>\n") == {}
    two = 'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.75\n'
    two += "vllm:gpu_cache_usage_perc 0.5\n" + "".join(f'vllm:num_requests_running{{engine="{n}"}} 3\n' for n in "01")
    assert read_metrics(two + "vllm:num_requests_waiting NaN\n") == {"kv_use": 0.5, "running": 6}
    assert observed([{"waiting": 1}, {"waiting": 8}, {"waiting": 0}]) == {"waiting_max": 8, "waiting_mean": 3}


def test_a_started_server_ends_with_its_children_and_a_dead_one_is_explained(tmp_path):
    flag, child = tmp_path / "up", tmp_path / "child"
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    script = tmp_path / "server.py"
    script.write_text(
        "import subprocess, sys, time, pathlib\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        f"time.sleep(0.2); pathlib.Path({str(flag)!r}).touch(); time.sleep(60)\n"
    )
    process = ServerProcess(f"{sys.executable} {script}", tmp_path / "log")

    process.start(flag.exists, 20)
    process.stop()

    stat = Path(f"/proc/{child.read_text()}/stat")
    end = time.monotonic() + 5
    # A zombie is dead: who reaps it is the machine's affair.
    while stat.exists() and stat.read_text().split(") ")[1][0] != "Z" and time.monotonic() < end:
        time.sleep(0.02)
    assert not stat.exists() or stat.read_text().split(") ")[1][0] == "Z"
    dead = ServerProcess(f"{sys.executable} -c \"raise SystemExit('no card left')\"", tmp_path / "other.log")
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1.*no card left"):
        dead.start(lambda: False, 20)
    with pytest.raises(RuntimeError, match="something answers before"):
        process.start(flag.exists, 20)


def test_our_own_server_gives_every_token_its_time(served, monkeypatch):
    monkeypatch.setattr("ascend_kit.measure.endpoint.METRICS_EVERY_S", 0.01)
    requests = make_requests(12, 16, 10, vocab_size=250)
    client = Client(OpenAIEngine(base_url=served.base + "/v1", model="tiny"))

    records = client.run(requests, 4)

    check_complete(requests, records)
    assert {record.tokens_counted_by for record in records} == {"usage"}
    assert all(record.num_prompt_tokens == 16 for record in records)
    assert all(sum(chunk[1] == "text" for chunk in r.chunks) == 10 for r in records)
    assert client.facts["num_retries"] == 0 and client.facts["num_preemptions"] == 0
    assert 0 < client.facts["kv_use_max"] < 1 and 1 <= client.facts["running_max"] <= 4


def test_two_engines_one_a_server_that_fails_for_a_while_end_complete_with_nothing_measured_twice(
    tmp_path, served, tiny_qwen3_dir
):
    from ascend_kit.measure.conventions import export
    from ascend_kit.measure.sweep import measure_engines
    from ascend_kit.params import build_experiment
    from ascend_kit.results import RunFolder

    texts = [event(text_chunk(letter, usage=usage(8, n))) for n, letter in enumerate("ab", 1)]
    good = [(0, HEAD), (0.01, texts[0]), (0.02, texts[1]), (0.03, DONE)]
    flaky = ScriptedServer(failure(), good)
    entries = [
        {"name": "ours", "base_url": served.base + "/v1", "model": "tiny"},
        {"name": "flaky", "base_url": flaky.url, "model": "m"},
    ]
    experiment = build_experiment({
        "experiment": "two", "output_root": str(tmp_path), "input_model": str(tiny_qwen3_dir), "precision": "fp32",
        "max_seq_length": 128, "sweep": {"concurrency": [1, 2], "prompt_len": [8], "output_len": [2]},
        "engines": entries, "sweep_requests_per_point": 2, "slo": {"ttft_ms": 1e4},
    })  # fmt: skip

    def measured():
        with RunFolder.open(experiment, "04_throughput") as folder:
            return measure_engines(experiment, folder), folder

    first, _ = measured()
    asked = len(flaky.bodies)
    second, folder = measured()
    flaky.close()

    assert list(first["backend"]) == ["ours"] * 2 + ["flaky"] * 2
    assert list(first["status"]).count("failed") == 1 and "HTTP 500" in first["error"].dropna().iloc[0]
    assert list(second["status"]) == ["ok"] * 4
    again = set(second["point_id"]) - set(first["point_id"])
    assert len(again) == 1 and len(flaky.bodies) - asked <= 4  # the failed point alone, and its warm-up
    assert (second["client_lag_p99_ms"] >= 0).all() and (second["good_request_share"] == 1).all()
    assert folder.identities()[second["identity"].iloc[0]].declared[0] == "weights"
    assert len(export(folder, tmp_path / "export")) == 5


def test_a_search_finds_the_known_capacity_of_a_server(tmp_path, tiny_qwen3_dir):
    """Four places: with 8 in flight an answer takes two services, with 9 a quarter takes three; two and a half may be.

    Where a busy machine made an answer later by a quarter of a service, services are made longer: then what is late
    is small beside them again.
    """
    from ascend_kit.measure.sweep import measure_engines
    from ascend_kit.params import build_experiment
    from ascend_kit.results import RunFolder

    def experiment_for(service_s):
        return build_experiment({
            "experiment": f"capacity{service_s}", "output_root": str(tmp_path), "input_model": str(tiny_qwen3_dir),
            "max_seq_length": 64, "sweep": {"concurrency": [4], "prompt_len": [8], "output_len": [2]},
            "engines": [{"name": "server", "base_url": server.url, "model": "m"}], "search": "concurrency",
            "slo": {"e2e_p90_ms": 2500 * service_s}, "search_precision": 0.01, "sweep_requests_per_point": 24,
        })  # fmt: skip

    def searched():
        with RunFolder.open(experiment, "04_throughput") as folder:
            rows = measure_engines(experiment, folder, on_progress=lambda *now: told.append(now))
            return rows, folder.read_json("search")

    for service_s in (0.1, 0.4):
        server, told = CapacityServer(places=4, service_s=service_s), []
        experiment = experiment_for(service_s)
        rows, (found,) = searched()
        late_ms = rows["e2e_p90_ms"] - 1000 * service_s * -(-rows["concurrency"] // 4)
        if late_ms.abs().max() < 250 * service_s:
            break
        server.close()
    shares = [done / total for done, total, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1 and all(share < 1 for share in shares[:-1])
    asked = server.num_requests
    _, again = searched()
    server.close()

    assert (found["met"], found["missed"]) == (8, 9)
    assert found["binding"][0].startswith("e2e_p90_ms") and found["num_runs"] <= 6
    bounds = found["at_met"]["e2e_p90_ms"]
    assert 1800 * service_s < bounds["low"] <= bounds["value"] < 2500 * service_s and bounds["count"] == 24
    assert set(rows["concurrency"]) == {4, 8, 16, 11, 9} and (rows["status"] == "ok").all()
    assert again == [found] and server.num_requests == asked  # probes are rows: nothing is asked again


@pytest.mark.long
def test_vllm_is_measured_through_its_server_which_the_sweep_starts_and_stops(tmp_path):
    """The CPU build of benchmarks/peers/setup.sh, or of the interpreter that VLLM_PYTHON names."""
    from conftest import make_model

    from ascend_kit.measure.sweep import measure_engines
    from ascend_kit.params import build_experiment
    from ascend_kit.results import RunFolder

    python = Path(os.environ.get("VLLM_PYTHON", Path.home() / ".cache/ascend-kit/peers/vllm/bin/python"))
    if not python.exists():
        pytest.skip(f"{python} is not there: benchmarks/peers/setup.sh vllm installs it")
    model = make_model(tmp_path / "model", "qwen3", head_dim=64)  # its CPU attention has no 16
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = (
        f"env VLLM_CPU_KVCACHE_SPACE=1 {python} -m vllm.entrypoints.openai.api_server --model {model} "
        f"--served-model-name m --dtype bfloat16 --enforce-eager --port {port} --max-model-len 256 "
        "--gpu-memory-utilization 0.2"
    )
    entry = {"name": "vllm", "base_url": f"http://127.0.0.1:{port}/v1", "model": "m", "engine_command": command}
    experiment = build_experiment({
        "experiment": "vllm", "output_root": str(tmp_path), "input_model": str(model), "max_seq_length": 256,
        "sweep": {"concurrency": [1, 4], "prompt_len": [64], "output_len": [32]}, "engines": [entry],
    })  # fmt: skip

    with RunFolder.open(experiment, "04_throughput") as folder:
        rows = measure_engines(experiment, folder)

    assert rows["error"].isna().all() and set(rows["tokens_counted_by"]) == {"usage"}
    assert (rows["output_length_ratio"] == 1).all() and (rows["prefix_hit_rate"] == 0).all()
    assert (rows["num_preemptions"] == 0).all() and rows["server_version"].notna().all()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 2)
