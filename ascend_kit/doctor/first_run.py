"""The first hour on a card in one command, and one file about it that can be attached to a report.

Doctor, self-test, a capture, two cards, then a random model of half a billion weights for a minute, its decode steps
beside what memory bandwidth allows. Every part runs in a process of its own, and the next one runs whatever happened.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.doctor.checks import name_of, plain_ops_line, probe_device, run_checks, run_child, run_stage, trouble
from ascend_kit.doctor.host import Host
from ascend_kit.files import to_json, write_atomic

if TYPE_CHECKING:
    from ascend_kit.device.device import Device

HALF_BILLION = dict(
    num_hidden_layers=22, hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    intermediate_size=3072, vocab_size=151936,
)  # fmt: skip
SMALL = {**HALF_BILLION, "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 256, "vocab_size": 512}  # fmt: skip
PROMPT_TOKENS, BATCHES = 64, (1, 8)
READ_BYTES = 256 << 20
# A step this many times its floor is bound by the host or by a wrong setting, not by memory (a card reaches 0.6 to 0.8
# of its bandwidth).
SLOW = 3.0
SLOW_REMEDY = (
    "far above the floor of memory: graph_mode: true, TASK_QUEUE_ENABLE=1, CPU governor performance, no "
    "ASCEND_LAUNCH_BLOCKING, no profiler; then compare doctor's section Host tuning"
)


def first_run(
    host: Host, device: str, output: Path, *, seconds: float, small: bool, show: Callable[[str], None] = print
) -> int:
    """Run every part, write the report to `output`; 0 when nothing failed, 1 otherwise."""
    report: dict[str, Any] = {"what": "python -m ascend_kit doctor --first-run", "steps": []}

    def add(name: str, status: str, evidence: str, remedy: str = "", **more: Any) -> None:
        report["steps"].append({"step": name, "status": status, "evidence": evidence, "remedy": remedy, **more})
        show(f"[{status:^4}] {name}: {evidence}" + (f"\n       -> {remedy}" if remedy else ""))
        write_atomic(output, to_json(without_names(report, host), indent=1))  # whatever happens next, this much is kept

    findings = run_checks(host, device=device)
    failed = [item for item in findings if item.status == "fail"]
    first = failed[0] if failed else None
    counts = f"{len(failed)} of {len(findings)} checks failed"
    rows = [asdict(finding) for finding in findings]
    if first:
        add("doctor", "fail", f"{counts}: {first.section}, {first.evidence}", first.remedy, findings=rows)
    else:
        add("doctor", "ok", counts, findings=rows)
    seen, why = probe_device(host, device)
    if seen is None:
        add("device", "fail", *why)
        return 1
    report["device"], name = seen, name_of(seen)
    add("device", "ok", f"{seen['count']} x {seen['name']}, task queue level {seen['task_queue_level']}")
    for stage, title in (("ops", "self-test"), ("graph", "capture"), ("collective", "two-card all-reduce")):
        if stage == "collective" and seen["count"] < 2 and seen["kind"] != "cpu":
            add(title, "n/a", "one card is visible")
        else:
            _stage(host, stage, title, name, add)
    _model(host, name, seconds, small, add)
    show(f"\nReport: {output}")
    return int(any(step["status"] == "fail" for step in report["steps"]))


def _stage(host: Host, stage: str, title: str, device: str, add: Callable[..., None]) -> None:
    checks = run_stage(host, stage, device)
    wrong = next((check for check in checks if check.status == "fail"), None)
    if wrong:
        status, remedy = "fail", wrong.remedy or plain_ops_line(checks)
        found = wrong.detail or f"error {wrong.error:.1e}, allowed {wrong.tolerance:.0e}"
        text = f"{wrong.op} {wrong.case}: {found}"
    else:
        status, remedy, worst = "ok", "", max((check.error or 0.0 for check in checks), default=0.0)
        text = f"{len(checks)} comparisons, largest error {worst:.1e}"
    add(title, status, text, remedy, checks=[vars(check) for check in checks])


def _model(host: Host, device: str, seconds: float, small: bool, add: Callable[..., None]) -> None:
    def take(row: dict[str, Any]) -> None:
        slow = row["times_floor"] > SLOW and row["graph_mode"] and not small
        text = (
            f"batch {row['batch']}, {row['mode']}: {row['step_ms']:.2f} ms a step, floor {row['floor_ms']:.2f} ms "
            f"at the {row['bandwidth_gb_per_s']:.0f} GB/s measured ({row['times_floor']:.1f} times)"
        )
        add("random model", "warn" if slow else "ok", text, SLOW_REMEDY if slow else "", numbers=row)

    result = run_child(host, "model", device, take, "--seconds", str(seconds), *(["--small"] if small else []))
    if not result.is_ok:
        add("random model", "fail", *trouble(result))


def without_names(value: Any, host: Host) -> Any:
    """The same plain values without host name, addresses and users, and paths cut to their last part."""
    if isinstance(value, dict):
        return {key: without_names(item, host) for key, item in value.items()}
    if isinstance(value, list):
        return [without_names(item, host) for item in value]
    if not isinstance(value, str):
        return value
    text = value.replace(host.hostname(), "<host>") if host.hostname() else value
    text = re.sub(r"\b\d{1,3}(\.\d{1,3}){3}\b", "<address>", text)
    return re.sub(r"(?<![\w.:/])~?/(?:[^\s/,;:'\"()\[\]]+/)+([^\s/,;:'\"()\[\]]*)", r"<path>/\1", text)


def write_random_model(folder: Path, shape: dict[str, int]) -> None:
    """A checkpoint of this shape with random bf16 weights and no tokenizer."""
    import torch
    from safetensors.torch import save_file

    from ascend_kit.model.config import ModelConfig
    from ascend_kit.model.tensors import expected_shapes

    config = {"model_type": "qwen3", "tie_word_embeddings": True, "max_position_embeddings": 4096, **shape}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    generator = torch.Generator().manual_seed(0)

    def weight(size: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * size[1] ** -0.5

    shapes = expected_shapes(ModelConfig.from_folder(folder))
    save_file({name: weight(size).bfloat16() for name, size in shapes.items()}, folder / "model.safetensors")


def measure_model(device: Device, shape: dict[str, int], seconds: float) -> list[dict[str, Any]]:
    """Decode steps of a random model, eager and in graphs: median ms, and the floor that reading memory sets."""
    import torch

    from ascend_kit.engine.config import EngineConfig
    from ascend_kit.engine.core import EngineCore
    from ascend_kit.measure.ceilings import read_bandwidth
    from ascend_kit.model.config import ModelConfig

    bandwidth, rows = statistics.median(read_bandwidth(device, READ_BYTES)), []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_random_model(Path(folder), shape)
        config = ModelConfig.from_folder(Path(folder))
        for graph_mode in (False, True):
            settings = EngineConfig(
                folder, precision="bf16", max_seq_length=4096, batch_size=max(BATCHES), graph_mode=graph_mode,
                kv_cache_gib=1.0,
            )  # fmt: skip
            with closing(EngineCore(settings, config, device)) as core:
                rows += [_steps(core, batch, seconds / 4, bandwidth) for batch in BATCHES]
    return rows


def _steps(core: Any, batch: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    from ascend_kit.engine.sequence import SamplingParams, Sequence

    sampling = SamplingParams(max_new_tokens=3000, ignore_eos=True)
    sequences = [Sequence([index + 1] * PROMPT_TOKENS, sampling, arrival_s=0.0) for index in range(batch)]
    for sequence in sequences:
        core.add(sequence)
    go_on: Callable[[Any, int], str | None] = lambda *_: None  # noqa: E731
    for _ in range(3):  # the prompts, and first calls
        core.step(go_on)
    times_s: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and len(times_s) < 2900:
        start = time.perf_counter()
        core.step(go_on)
        times_s.append(time.perf_counter() - start)
    stats = core.stats()
    kv_bytes = stats["kv_block_bytes"] / stats["block_size"] * sum(s.num_tokens for s in sequences)
    for sequence in list(core.sequences.values()):
        core.finish(sequence, "stop")
    floor_s, step_s = (stats["weight_bytes"] + kv_bytes) / bandwidth, statistics.median(times_s)
    graphs = stats["graphs"]
    return {
        "batch": batch, "graph_mode": graphs is not None, "mode": graphs["mode"] if graphs else "eager",
        "steps": len(times_s), "step_ms": step_s * 1e3, "tokens_per_s": batch / step_s, "floor_ms": floor_s * 1e3,
        "times_floor": step_s / floor_s, "bandwidth_gb_per_s": bandwidth / 1e9, "weight_bytes": stats["weight_bytes"],
        "task_queue_level": core.device.task_queue_level(),
    }  # fmt: skip
