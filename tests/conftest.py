"""Shared fixtures: tiny random checkpoints in the Hugging Face layout, and the device the engine tests run on."""

from __future__ import annotations

import json
import os
import signal
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ascend_kit import AscendInferEngine

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("npu_sim.plugin", "running_server")

TINY = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    eos_token_id=256,
    pad_token_id=257,
    bos_token_id=None,
)


def folder_with(path: Path, config: dict | None = None) -> Path:
    """A new folder with a config.json."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: ids 0 to 255 are bytes, 256 ends a text, 257 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)


def make_model(folder: Path, family: str, seed: int = 0, **changes: object) -> Path:
    """A random float32 checkpoint of `family` ("qwen3", "qwen2", "llama") with a tokenizer."""
    import torch
    import transformers

    config_type, model_type = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_type(config_type(**{**TINY, **changes})).eval()
    for name, parameter in model.named_parameters():
        # Larger than transformers' start values, so that greedy tokens depend on the whole context.
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.2)
    model.generation_config.eos_token_id = 256
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def engine(tiny_qwen3_dir: Path) -> Iterator[AscendInferEngine]:
    """What the tests of evaluations ask, on the CPU whatever `--device` says: test_evaluate_adapter.py has the rest."""
    from evaluated import CHAT

    from ascend_kit import AscendInferEngine

    with AscendInferEngine(tiny_qwen3_dir, precision="fp32", device="cpu", max_seq_length=4096) as engine:
        engine.tokenizer.chat_template = CHAT
        yield engine


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five documents of each of the four sets."""
    from evaluation_data import write_sets

    return write_sets(tmp_path_factory.mktemp("sets"), documents=5)


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a local copy of GSM8K."""
    from evaluated import write_gsm8k

    return write_gsm8k(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fresh_switches(device: str) -> Iterator[None]:
    """The NPU's switches are read from the environment anew, in the test and after it."""
    from ascend_kit.device.ops import npu

    npu.switch.cache_clear()
    yield
    npu.switch.cache_clear()


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "qwen2", "qwen2")


@pytest.fixture(scope="session", params=["w8a8", pytest.param("w8a16", marks=pytest.mark.long)])
def tiny_int8_dir(request: pytest.FixtureRequest, tiny_qwen3_dir: Path) -> Path:
    """The tiny Qwen3 converted to int8; the folder's name is the scheme."""
    from ascend_kit import convert

    folder = tiny_qwen3_dir.parent / request.param
    convert(tiny_qwen3_dir, folder, quantize=request.param)
    return folder


@pytest.fixture(scope="session", params=["qwen3", "qwen2"])
def tiny_model_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_dir")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the engine tests: cpu, npu, cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")
