"""What reads files, each with the files it reads and the damage that suits them; and the judgement of an outcome."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mindspore_writer
import torch
from conftest import make_model
from evaluation_data import write_sets
from fuzz_mutations import (
    Mutation,
    bytes_of_file,
    json_of_file,
    jsonl_of_file,
    pickle_of_file,
    safetensors_of_file,
    yaml_of_file,
)
from megatron_writer import save_megatron
from quantized_writer import awq, gptq, modelslim_w4a16, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ascend_kit import convert
from ascend_kit.checkpoint.adapter import adapter_digest, with_adapter
from ascend_kit.checkpoint.convert import check_model, open_source
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.manifest import check_converted, model_identity, verify
from ascend_kit.evaluation.datasets import find_tasks
from ascend_kit.identity import Identity
from ascend_kit.measure.loads import read_load_prompts, read_trace
from ascend_kit.params import Experiment, load_experiment
from ascend_kit.params.experiment import EVAL_SETS
from ascend_kit.prompts import read_prompts
from ascend_kit.results import RunFolder, list_runs, newest_rows, run_parameters
from ascend_kit.show.report import write_report
from ascend_kit.stages import RunFolderError, RunRecord

MAX_S, MAX_BYTES = 2.0, 500_000_000  # above what was in use before


@dataclass(frozen=True)
class Target:
    """A reader: `build(folder)` makes what it reads, `read(folder)` reads it, `damage` maps files to mutations."""

    name: str
    build: Callable[[Path], object]
    read: Callable[[Path], object]
    damage: dict[str, Mutation]


@dataclass(frozen=True)
class Case:
    """One damaged file and what came of it: ok, refused, or a fault in words."""

    target: str
    seed: int
    file: str
    outcome: str
    fault: str | None = None


# --- readers ----------------------------------------------------------------------------------------------------------


def experiment_of(folder: Path, **values: Any) -> Experiment:
    return Experiment(
        experiment="fuzz", input_model=str(folder / "model"), output_root=str(folder / "outputs"), **values
    )


def read_model(folder: Path) -> None:
    """What `check` reads of a model, then every tensor, then what identifies it."""
    check_model(experiment_of(folder))
    checkpoint = open_checkpoint(folder / "model")
    for name in checkpoint.tensor_names():
        checkpoint.read(name)
    model_identity(folder / "model")


def read_safetensors(folder: Path) -> None:
    """As read_model; what the library refuses must be refused."""
    read_model(folder)
    for path in (folder / "model").glob("*.safetensors"):
        with safe_open(path, "pt") as library:
            for name in library.keys():  # noqa: SIM118 - it is no mapping
                library.get_tensor(name)


def read_megatron(folder: Path) -> None:
    checkpoint = open_source(folder / "shards", "auto", folder / "model")
    for name in checkpoint.tensor_names():
        checkpoint.read(name)
    checkpoint.check_data()


def read_converted(folder: Path) -> None:
    verify(folder / "converted", full=True)
    check_converted(experiment_of(folder, use_model="converted", output_model=str(folder / "converted")))
    model_identity(folder / "converted")
    convert(folder / "model", folder / "converted", if_exists="reuse", precision="fp32")


def read_run(folder: Path) -> None:
    """What a resumed stage and a comparison read of a run folder."""
    run = RunFolder(folder / "outputs" / "fuzz" / "default")
    RunRecord.read(run.path)
    run_parameters(run)
    run.read_json("summary")
    identities = run.identities()
    for identity in (Identity(), *identities.values()):
        list(run.rows_of("rows", identity))
        identity.agrees(Identity(weights="a"), "history")
    newest_rows(run.rows("rows"), ["concurrency", "variant"])
    run.load("rows")
    list_runs(folder / "outputs", "fuzz")


def read_report(folder: Path) -> None:
    write_report(folder / "outputs" / "fuzz" / "default")


# --- what they read ---------------------------------------------------------------------------------------------------


def build_model(folder: Path) -> None:
    make_model(folder / "model", "qwen3", hidden_size=16, intermediate_size=32, num_attention_heads=2, head_dim=8)


def build_sharded(folder: Path) -> None:
    build_model(folder)
    model = folder / "model"
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, part in halves.items() for name in part},
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def build_bin(folder: Path) -> None:
    build_model(folder)
    weights = folder / "model" / "model.safetensors"
    torch.save(load_file(weights), folder / "model" / "pytorch_model.bin")
    weights.unlink()


def build_old_bin(folder: Path) -> None:
    build_bin(folder)
    path = folder / "model" / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)


def build_megatron(folder: Path) -> None:
    build_model(folder)
    config = json.loads((folder / "model" / "config.json").read_text())
    save_megatron(folder / "shards", load_file(folder / "model" / "model.safetensors"), config, tp=2)


def build_converted(folder: Path) -> None:
    build_model(folder)
    convert(folder / "model", folder / "converted", precision="fp32")


def build_int8(folder: Path) -> None:
    """A model stored as int8, as it is converted here: compressed-tensors, its description in config.json."""
    build_model(folder)
    convert(folder / "model", folder / "int8", quantize="w8a8")
    (folder / "int8" / "ascend_manifest.json").unlink()
    shutil.rmtree(folder / "model")
    (folder / "int8").rename(folder / "model")


def build_stored(folder: Path, kind: str) -> None:
    """A model in four bits as other tools store it, in groups of 32."""
    make_model(folder / "plain", "qwen3", hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=16)
    settings: dict[str, Any] = {"quant_method": kind, "bits": 4, "group_size": 32}
    make: Callable[..., Any]
    if kind == "gptq":
        make, settings = lambda name, weight, bias: gptq(name, weight, 32, True, False, 1), {**settings, "sym": True}
    elif kind == "awq":
        make, settings = lambda name, weight, bias: awq(name, weight, 32), {**settings, "zero_point": True}
    else:
        make = lambda name, weight, bias: modelslim_w4a16(name, weight, 32)  # noqa: E731 - as the others
    write(folder / "plain", folder / "model", make, settings, description="W4A16" if kind == "msmodelslim" else None)
    shutil.rmtree(folder / "plain")


def build_adapter(folder: Path) -> None:
    build_model(folder)
    (folder / "adapter").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    low = {f"{name}.lora_A.weight": torch.randn(4, 16), f"{name}.lora_B.weight": torch.randn(16, 4)}
    save_file(low, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "rank_pattern": {}, "use_rslora": False}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def read_adapter(folder: Path) -> None:
    checkpoint = with_adapter(open_checkpoint(folder / "model"), folder / "adapter")
    for name in checkpoint.tensor_names():
        checkpoint.read(name)
    adapter_digest(folder / "adapter")


def build_mindspore(folder: Path) -> None:
    """One rank's file, and two ranks with the description of how they are split."""
    build_model(folder)
    tensors = load_file(folder / "model" / "model.safetensors")
    mindspore_writer.save_ckpt(folder / "one" / "model.ckpt", tensors)
    states = mindspore_writer.rank_states(tensors, 2, 1, 1, 2)
    mindspore_writer.save_iteration(folder / "ranks", states, tensors)


def read_mindspore(folder: Path) -> None:
    for name in ("one", "ranks"):
        checkpoint = open_source(folder / name, "mindspore", folder / "model")
        for tensor in checkpoint.tensor_names():
            checkpoint.read(tensor)


def build_traces(folder: Path) -> None:
    azure = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    azure += [f"2023-11-16 18:17:0{number}.9799600,{100 + number},{10 + number}" for number in range(5)]
    (folder / "azure.csv").write_text("\n".join(azure) + "\n")
    lines = [{"timestamp": 100 * n, "input_length": 600, "output_length": 5, "hash_ids": [n, 7]} for n in range(5)]
    (folder / "mooncake.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talks = [[{"from": "human", "value": f"a question {n}"}, {"from": "gpt", "value": "an answer"}] for n in range(4)]
    (folder / "sharegpt.json").write_text(json.dumps([{"id": "a", "conversations": talk} for talk in talks]))


def read_traces(folder: Path) -> None:
    read_load_prompts(folder / "sharegpt.json")
    for name in ("azure.csv", "mooncake.jsonl"):
        read_trace(folder / name)


def build_run(folder: Path) -> None:
    """A run folder as a sweep leaves it: a record, rows of two identities, a summary."""
    experiment = experiment_of(folder)
    run = RunFolder.open(experiment, "04_throughput")
    run.begin(experiment, "rows")
    for number in range(8):
        identity = Identity(weights="a" * 32, engine={"kind": "ours", "batch": number % 2}, versions={"torch": "2.13"})
        row = {"concurrency": 2**number, "variant": "x", "tokens_per_s": 10.5 * number, "note": None, "list": [1, 2]}
        run.append("rows", row, identity)
    run.write_json("summary", {"headline": {"value": 3.5}, "rows": [1, 2]})
    run.close()


def build_parameters(folder: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "params" / "qwen3-8b-w8a8.yaml", folder / "parameters.yaml")


def build_prompts(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "one"}\n{"text": "zwei"}\n{"messages": [{"role": "user", "content": "\u4f60\u597d"}]}\n'
    )
    (folder / "prompts.json").write_text('["a", {"prompt": "b"}]')
    (folder / "prompts.txt").write_text("first\nsecond\n")


def read_all_prompts(folder: Path) -> None:
    for path in folder.iterdir():
        read_prompts(path)


def build_data(folder: Path) -> None:
    import pyarrow.parquet as pq

    write_sets(folder / "data")
    for path in (folder / "data" / "mmlu").rglob("*.parquet"):
        pq.read_table(path).to_pandas().to_json(path.with_suffix(".jsonl"), orient="records", lines=True)
        path.unlink()
    for path in (folder / "data" / "ceval" / "law").glob("*.parquet"):
        pq.read_table(path).to_pandas().to_csv(path.with_suffix(".csv"), index=False)
        path.unlink()


def read_data(folder: Path) -> None:
    find_tasks(folder / "data", EVAL_SETS)


MODEL_FILES: dict[str, Mutation] = {"model/config.json": json_of_file, "model/generation_config.json": json_of_file}
TOKENIZER_FILES: dict[str, Mutation] = {
    "model/tokenizer.json": json_of_file,
    "model/tokenizer_config.json": json_of_file,
}
STORED = {"gptq": "config.json", "awq": "config.json", "msmodelslim": "quant_model_description.json"}
RUN = "outputs/fuzz/default/"
RUN_FILES: dict[str, Mutation] = {
    RUN + "run.json": json_of_file,
    RUN + "rows.jsonl": jsonl_of_file,
    RUN + "identities.jsonl": jsonl_of_file,
    RUN + "summary.json": json_of_file,
}
TARGETS = [
    Target("safetensors", build_model, read_safetensors, {"model/model.safetensors": safetensors_of_file}),
    Target("index", build_sharded, read_safetensors, {"model/model.safetensors.index.json": json_of_file}),
    Target("config", build_model, read_model, MODEL_FILES),
    Target("int8", build_int8, read_safetensors,
           {"model/config.json": json_of_file, "model/model.safetensors": safetensors_of_file}),
    Target("tokenizer", build_model, read_model, TOKENIZER_FILES),
    Target("bin", build_bin, read_model, {"model/pytorch_model.bin": pickle_of_file}),
    Target("old bin", build_old_bin, read_model, {"model/pytorch_model.bin": bytes_of_file}),
    Target("megatron", build_megatron, read_megatron, {
        "shards/iter_0000001/mp_rank_01/model_optim_rng.pt": pickle_of_file,
        "shards/latest_checkpointed_iteration.txt": bytes_of_file,
    }),
    *(
        Target(kind, partial(build_stored, kind=kind), read_model,
               {f"model/{file}": json_of_file, "model/model.safetensors": safetensors_of_file})
        for kind, file in STORED.items()
    ),
    Target("adapter", build_adapter, read_adapter, {
        "adapter/adapter_config.json": json_of_file, "adapter/adapter_model.safetensors": safetensors_of_file,
    }),
    Target("mindspore", build_mindspore, read_mindspore, {
        "one/model.ckpt": bytes_of_file,
        "ranks/iteration_00000007/metadata.json": json_of_file,
        "ranks/latest_checkpointed_iteration.txt": bytes_of_file,
    }),
    Target("traces", build_traces, read_traces, {"azure.csv": bytes_of_file, "mooncake.jsonl": jsonl_of_file,
           "sharegpt.json": json_of_file}),
    Target("manifest", build_converted, read_converted, {"converted/ascend_manifest.json": json_of_file}),
    Target("run", build_run, read_run, RUN_FILES),
    Target("report", build_run, read_report, RUN_FILES),
    Target("parameters", build_parameters, lambda folder: load_experiment(folder / "parameters.yaml"),
           {"parameters.yaml": yaml_of_file}),
    Target("prompts", build_prompts, read_all_prompts,
           {"prompts.jsonl": jsonl_of_file, "prompts.json": json_of_file, "prompts.txt": bytes_of_file}),
    Target("data", build_data, read_data, {
        "data/mmlu/abstract_algebra/test.jsonl": jsonl_of_file,
        "data/ceval/law/val.csv": bytes_of_file,
        "data/agieval/aqua-rat/test.parquet": bytes_of_file,
        "data/wikitext/wikitext-2-raw-v1/test.parquet": bytes_of_file,
    }),
]  # fmt: skip


# --- one case ---------------------------------------------------------------------------------------------------------


def run_case(target: Target, pristine: Path, work: Path, seed: int) -> Case:
    """Damage one file of a fresh copy and read it."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work)
    rng = Random(f"{target.name} {seed}")
    file = rng.choice(list(target.damage))
    target.damage[file](rng, work / file)
    before, started = memory("VmRSS", reset=True), time.process_time()
    outcome, fault = "ok", None
    try:
        target.read(work)
    except Exception as error:
        outcome, fault = "refused", _unclear(error, work, Path(file))
    took_s, grown = time.process_time() - started, memory("VmHWM") - before
    if took_s > MAX_S:
        fault = f"{took_s:.1f} s of processor time; {fault or outcome}"
    if grown > MAX_BYTES:
        fault = f"{grown / 1e6:.0f} MB more; {fault or outcome}"
    return Case(target.name, seed, file, outcome, fault)


def _unclear(error: Exception, work: Path, file: Path) -> str | None:
    """What is wrong with a refusal: a type of somebody else, more than one line, no file named."""
    text = str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    is_ours = type(error).__module__.startswith("ascend_kit") or type(error) is ValueError
    if not (is_ours and isinstance(error, (ValueError, RunFolderError))):
        return f"{type(error).__name__}: {text[:300]}"
    if str(work) not in text:
        return f"no file is named by {type(error).__name__}: {text[:300]}"
    if len(lines) > 1 and not text.startswith("dataset_path: the local data sets"):  # which lists one fault a line
        return f"several lines: {text[:300]}"
    return f"{len(text)} characters: {text[:300]}" if len(text) > 5000 else None


def memory(which: str, *, reset: bool = False) -> int:
    """VmRSS or VmHWM of this process in bytes; `reset` sets the highest to the present."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024
