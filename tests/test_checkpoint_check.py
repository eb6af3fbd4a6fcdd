"""The one check of a checkpoint: the engine and convert refuse the same folders for the same reasons, by name."""

from __future__ import annotations

import fcntl
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_model
from evaluation_data import write_sets
from safetensors.torch import load_file, save_file

from ascend_kit import AscendInferEngine, SamplingParams, convert
from ascend_kit.__main__ import main
from ascend_kit.checkpoint.tensor_file import CheckpointError

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "qwen2")


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run(folder: Path) -> list[tuple[int, float]]:
    with AscendInferEngine(folder, precision="fp32", device="cpu", max_seq_length=64, kv_cache_gib=0.01) as engine:
        output = engine.generate([list(range(60, 80))], SamplingParams(max_new_tokens=1, logprobs=20))[0]
    return output.logprobs[0].top


def assert_refused(folder: Path, words: str) -> None:
    """By both ways in, and nothing is written."""
    with pytest.raises(ValueError, match=words):
        run(folder)
    with pytest.raises(ValueError, match=words):
        convert(folder, folder.parent / "result")
    assert not (folder.parent / "result").exists()


def int8(tensors: dict[str, torch.Tensor], name: str) -> None:
    weight = tensors[f"{name}.weight"]
    scale = weight.abs().amax(1, keepdim=True) / 127
    tensors |= {f"{name}.weight": (weight / scale).round().to(torch.int8), f"{name}.weight_scale": scale}


def compressed_tensors(folder: Path, names: list[str], group: dict | None = None, **changes: object) -> None:
    change_tensors(folder, lambda tensors: [int8(tensors, name) for name in names])
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    described = {"weights": weights, "input_activations": None, "output_activations": None, "targets": ["Linear"]}
    change_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {**described, **(group or {})}},
            **changes,
        },
    )


def msmodelslim(folder: Path, *, where: str, **more: torch.Tensor) -> None:
    names = [f"model.layers.{layer}.{part}" for layer in range(2) for part in LINEARS]
    described: dict[str, str] = {"model_quant_type": "W8A8_DYNAMIC"}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        described.update(dict.fromkeys(tensors, "FLOAT"))
        for name in names:
            int8(tensors, name)
            tensors[f"{name}.weight_offset"] = torch.zeros_like(tensors[f"{name}.weight_scale"])
            described.update(dict.fromkeys([f"{name}.weight", f"{name}.weight_scale"], "W8A8_DYNAMIC"))
        tensors |= more

    change_tensors(folder, change)
    (folder / "model.safetensors").rename(folder / "quant_model_weight_w8a8_dynamic.safetensors")
    if where == "config.json":
        change_config(folder, quantization_config=described)
    else:
        (folder / where).write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), r"layers\.1\.self_attn\.k_proj\.bias is missing"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.empty(0)}), r"mlp\.up_proj.* shape \[0\]"),
        (lambda t: t.update({"score.weight": torch.ones(1, 64)}), r"score\.weight does not belong"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)}), r"layers\.2.* not belong"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), r"model\.norm\.weight holds int32"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(320, 64).to(torch.float8_e4m3fn)}),
            r"lm_head\.weight holds float8_e4m3fn",
        ),
        (lambda t: int8(t, "model.layers.0.mlp.up_proj"), r"layers\.0\.mlp\.up_proj"),
        (lambda t: t.update({"model.norm.bias": torch.ones(64)}), r"model\.norm\.bias is not zero"),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}), r"o_proj\.bias is not zero"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(folder: Path, change, words: str):
    change_tensors(folder, change)

    assert_refused(folder, words)


def test_a_tied_model_with_a_head_of_its_own_is_refused_and_with_a_copy_accepted(tmp_path: Path):
    folder = make_model(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    right = run(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))

    with pytest.warns(UserWarning, match=r"tied embedding.*lm_head\.weight"):
        assert run(folder) == right

    change_tensors(folder, lambda t: t["lm_head.weight"].add_(0.01))
    assert_refused(folder, r"lm_head\.weight differs")


def test_harmless_extras_are_left_out_and_named(folder: Path):
    right = run(folder)
    extras = {
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.mlp.down_proj.bias": torch.zeros(64),
    }
    change_tensors(folder, lambda t: t.update(extras))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run(folder) == right
    result = convert(folder, folder.parent / "result", precision="fp32")

    for name in extras:
        assert any(name in str(warning.message) for warning in said)
        assert name in str(result)


def test_two_sets_of_weights_in_one_folder_are_refused_and_both_named(folder: Path, tmp_path: Path):
    shutil.copy(folder / "model.safetensors", tmp_path / "one.safetensors")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run(folder)

    shutil.copy(tmp_path / "one.safetensors", folder / "model.safetensors")
    assert_refused(folder, r"model\.safetensors\.index\.json.*model\.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(load_file(tmp_path / "one.safetensors"), folder / "pytorch_model.bin")
    assert_refused(folder, r"model\.safetensors\.index\.json.*pytorch_model\.bin")


def test_what_other_programs_leave_beside_the_weights_changes_nothing(folder: Path):
    right = run(folder)
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7")  # macOS, on a disk that knows no resource forks
    (folder / "original").mkdir()  # Meta's own format, beside Hugging Face's
    torch.save({}, folder / "original" / "consolidated.00.pth")
    torch.save({}, folder / "training_args.bin")

    assert run(folder) == right


def test_a_note_of_git_in_the_place_of_weights_is_refused_as_such(folder: Path):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")

    assert_refused(folder, r"model\.safetensors: it is a Git LFS pointer")


def test_a_lora_adapter_is_refused_by_name(folder: Path):
    (folder / "adapter_config.json").write_text("{}")

    assert_refused(folder, r"LoRA adapter \(adapter_config\.json\)")


@pytest.mark.parametrize(
    ("group", "changes", "words"),
    [
        ({}, {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({}, {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme: type='float'"),
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({}, {"ignore": ["re:.*down_proj"]}, "`ignore` names model.layers.0.mlp.down_proj"),
        ({}, {"ignore": ["re:(.*down_proj"]}, r"'\(\.\*down_proj' is no regular expression"),
        ({}, {"ignore": [r"re:(.|\w)*[A-Z]"]}, "did not end within 0.2 s"),
        ({}, {"format": "marlin-24"}, "marlin-24"),
        ({"output_activations": {"num_bits": 8}}, {}, "output_activations"),
        ({"input_activations": {"num_bits": 8, "dynamic": False, "strategy": "tensor"}}, {}, "input_scale is missing"),
        (
            {"input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": False}},
            {},
            "input_activations: symmetric=False",
        ),
        ({"weights": {"num_bits": 8, "symmetric": False, "strategy": "channel"}}, {}, "weights: symmetric=False"),
        ({"weights": {"num_bits": 8, "strategy": "channel", "actorder": "group"}}, {}, "actorder"),
    ],
)
def test_compressed_tensors_settings_that_are_not_computed_are_refused_by_name(
    folder: Path, group: dict, changes: dict, words: str
):
    compressed_tensors(folder, ["model.layers.0.mlp.down_proj"], group, **changes)

    assert_refused(folder, words)


def test_an_int8_scale_that_is_no_number_is_refused_by_engine_and_convert(folder: Path):
    compressed_tensors(folder, ["model.layers.0.mlp.down_proj"])
    change_tensors(folder, lambda t: t["model.layers.0.mlp.down_proj.weight_scale"].view(-1)[3:4].fill_(float("nan")))

    assert_refused(folder, "model.layers.0.mlp.down_proj.weight_scale")


def test_an_int8_embedding_is_refused_by_name(folder: Path):
    compressed_tensors(folder, ["model.embed_tokens"], {"targets": ["Linear", "Embedding"]})

    assert_refused(folder, r"model\.embed_tokens is quantised")


@pytest.mark.parametrize(
    "where", ["quant_model_description.json", "quant_model_description_w8a8_dynamic.json", "config.json"]
)
def test_msmodelslim_descriptions_are_read_by_every_name(folder: Path, where: str):
    float_model = dict(run(folder))
    msmodelslim(folder, where=where)

    found = dict(run(folder))

    common = found.keys() & float_model.keys()
    assert len(common) > 10
    # int8 weights and activations of a small random model; another scheme or scale would be nats away
    assert max(abs(found[token] - float_model[token]) for token in common) < 0.3


def test_a_second_msmodelslim_description_is_refused(folder: Path):
    msmodelslim(folder, where="quant_model_description.json")
    (folder / "quant_model_description_w8a16.json").write_text("{}")

    assert_refused(folder, r"more than once: .*quant_model_description_w8a16\.json")


def test_a_norm_bias_of_asymmetric_suppression_is_refused_by_name(folder: Path):
    msmodelslim(folder, where="quant_model_description.json", **{"model.layers.1.input_layernorm.bias": torch.ones(64)})

    assert_refused(folder, r"layers\.1\.input_layernorm\.bias is not zero")


def test_scales_of_an_int8_cache_are_taken_by_engine_and_convert_alike(folder: Path):
    more = {
        f"model.layers.{n}.self_attn.{p}_proj.kv_cache_{w}": torch.ones(32)
        for n in (0, 1)
        for p in "kv"
        for w in ("scale", "offset")
    }
    msmodelslim(folder, where="quant_model_description.json", **more)

    with pytest.warns(UserWarning, match="KV cache"):
        run(folder)
    assert "KV cache" in str(convert(folder, folder.parent / "result"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", '),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("generation_config.json", "[]"),
        ("tokenizer_config.json", ""),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n"),
    ],
)
def test_a_broken_small_file_is_an_error_that_names_it(folder: Path, name: str, content: str):
    (folder / name).write_text(content)

    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as refusal:
        convert(folder, folder.parent / "result")
    assert ("Git LFS" in str(refusal.value)) == content.startswith("version")
    assert not (folder.parent / "result").exists()


def test_the_lock_is_held_until_the_folder_has_its_name(folder: Path, tmp_path: Path):
    """A second conversion that starts while the first one publishes is refused, at every moment."""
    lock = tmp_path / ".result.lock"
    states = []

    def look(_: Path) -> None:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                states.append("free")
            except BlockingIOError:
                states.append("held")

    convert(folder, tmp_path / "result", before_publish=look)

    assert states == ["held"] and not lock.exists()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another conversion"):
            convert(folder, tmp_path / "result", if_exists="overwrite")
    convert(folder, tmp_path / "result", if_exists="overwrite")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: change_config(folder, hidden_act="relu"), "hidden_act"),
        (lambda folder: change_tensors(folder, lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (
            lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}'),
            "generation_config.json: eos_token_id",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({"model.norm.bias": torch.ones(64)})),
            "model.norm.bias is not zero",
        ),
    ],
)
def test_the_command_check_names_a_fault_without_loading_the_model(folder: Path, tmp_path: Path, capsys, change, words):
    path = tmp_path / "run.yaml"
    keys = {"input_model": folder, "output_root": tmp_path / "out", "dataset_path": write_sets(tmp_path / "data")}
    keys["prompts_file"] = "demo"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()) + "device: cpu\n")
    assert main(["check", str(path)]) == main(["check", str(folder)]) == 0

    change(folder)

    for given in (path, folder):
        capsys.readouterr()
        assert main(["check", str(given)]) != 0
        said = capsys.readouterr()
        assert words in said.out + said.err


def flip(path: Path, part: bytes) -> None:
    """Change one bit inside the only place where `part` stands."""
    data = bytearray(path.read_bytes())
    assert data.count(part) == 1
    data[data.find(part) + len(part) // 2] ^= 16
    path.write_bytes(data)


def test_the_command_check_finds_a_flipped_bit_where_a_checksum_tells(folder: Path, tmp_path: Path, capsys):
    """Sizes, headers and shapes stay right: torch's zip has a checksum, a converted folder has hashes."""
    converted, torch_file = tmp_path / "converted", folder / "pytorch_model.bin"
    convert(folder, converted)
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    torch.save({**load_file(folder / "model.safetensors"), "model.norm.weight": norm.mul_(1.25)}, torch_file)
    (folder / "model.safetensors").unlink()
    assert main(["check", str(folder)]) == main(["check", str(converted)]) == 0
    head = load_file(converted / "model.safetensors")["lm_head.weight"]
    flip(torch_file, norm.view(torch.uint8).numpy().tobytes())
    flip(converted / "model.safetensors", head[3].view(torch.uint8).numpy().tobytes())

    for given, words in ((folder, "pytorch_model.bin is damaged"), (converted, "does not have the hash")):
        capsys.readouterr()
        assert main(["check", str(given)]) != 0
        assert words in capsys.readouterr().err


def test_the_command_check_compares_every_row_of_a_tied_head(tmp_path: Path, capsys):
    tied = make_model(tmp_path / "tied", "qwen3", tie_word_embeddings=True)
    change_tensors(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert main(["check", str(tied)]) == 0
    change_tensors(tied, lambda t: t["lm_head.weight"][-1, 5].add_(1))

    assert main(["check", str(tied)]) != 0
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err
