"""Makes a checkpoint of a named shape with random bf16 weights: the speed of a model without its knowledge.

Run: python benchmarks/make_model.py qwen3-0.6b [folder]. The folder (default: under ~/.cache/ascend-
kit/bench-models-2) then holds a Hugging Face checkpoint that every engine here can read, in shards of one
layer, and a tokenizer whose every id has a text. The same shape and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_ROOT = Path(os.environ.get("ASCEND_KIT_CACHE", Path.home() / ".cache" / "ascend-kit")) / "bench-models-2"
# The usual initial spread; with a larger one the bf16 results of two engines drift apart sooner.
STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of one decoder; head size is 128 in all but the tiny one."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_embeddings: bool
    max_positions: int = 40960

    @property
    def read_bytes_per_token(self) -> int:
        """Bytes of bf16 weights that one decode step must read: everything but an untied embedding table."""
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = self.hidden_size * (heads + self.num_heads * self.head_dim)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.family == "qwen3" else heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + norms
        return 2 * (self.num_layers * layer + self.hidden_size + self.vocab_size * self.hidden_size)

    @property
    def flops_per_prompt_token(self) -> int:
        """FLOPs of the linear layers for one prompt token; attention and the head (last row) come on top."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return 2 * self.num_layers * self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, bf16."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


SHAPES = {
    "tiny": Shape("qwen3", 2, 128, 4, 2, 32, 384, 2048, True, 16384),
    "narrow": Shape("qwen3", 4, 160, 4, 2, 32, 448, 2048, False, 16384),  # the demo's widths, which are not packed
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True),
    "qwen3-1.7b": Shape("qwen3", 28, 2048, 16, 8, 128, 6144, 151936, True),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 32768),
    "qwen3-8b": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False),
}


def make_model(shape_name: str, folder: Path | None = None, seed: int = 0) -> Path:
    """The folder of the checkpoint, made when it is not there yet. ValueError for an unknown shape."""
    if shape_name not in SHAPES:
        raise ValueError(f"shape {shape_name!r} is unknown; known: {', '.join(SHAPES)}")
    shape, folder = SHAPES[shape_name], folder or DEFAULT_ROOT / shape_name
    if (folder / "config.json").is_file():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, shape, seed)
    _write_tokenizer(folder, shape.vocab_size)
    _write_json(folder / "generation_config.json", {"eos_token_id": 257, "pad_token_id": 258})
    _write_json(folder / "config.json", _config(shape))
    return folder


def _config(shape: Shape) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM" if shape.family == "qwen3" else "Qwen2ForCausalLM"],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": shape.tie_embeddings,
        "attention_bias": shape.family == "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": STD,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.num_layers,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "torch_dtype": "bfloat16",
    }


def _write_weights(folder: Path, shape: Shape, seed: int) -> None:
    """Shards of one layer each, so that a large shape needs no memory for all of it at once."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    index, total = {}, 0
    shards = list(_shards(shape))
    for number, sizes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _random(size, generator) for key, size in sizes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(size) == 1:  # norms and biases
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors, one dictionary a file."""
    hidden, ffn, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, kv = shape.num_heads * head, shape.num_kv_heads * head
    yield {"model.embed_tokens.weight": (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for number in range(shape.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        if shape.family == "qwen3":
            layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        else:
            layer |= {f"self_attn.{part}_proj.bias": (q if part == "q" else kv,) for part in "qkv"}
        yield {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    if not shape.tie_embeddings:
        yield {"lm_head.weight": (shape.vocab_size, hidden)}


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """256 bytes, three special tokens, " A" to " D" (one token each, as in real vocabularies), a made-up word for each
    further id: random output can be decoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [("Ġ", letter) for letter in "ABCD"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<bos>", "<eos>", "<pad>", *map("".join, letters)]
    words += [f"w{number}" for number in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=letters))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = make_model(arguments.shape, arguments.folder, arguments.seed)
    shape = SHAPES[arguments.shape]
    print(
        f"{folder}: {shape.read_bytes_per_token / 1e9:.3f} GB read per decode step, "
        f"{shape.flops_per_prompt_token / 1e9:.3f} GFLOP per prompt token"
    )


if __name__ == "__main__":
    main()
