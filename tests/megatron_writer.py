"""Writes Megatron-core checkpoints from Hugging Face weights, for tests.

Built from the description of the format alone and shares nothing with the reader: weights are cut the way
training cuts them (a rank owns whole KV groups, its rows of gate and of up, its columns of the output
projections).
"""

from __future__ import annotations

import argparse
import enum
import sys
import types
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]


def fuse_qkv(weights: State, prefix: str, kind: str, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Query heads of a group, then its key head, then its value head; group after group."""
    query, key, value = (weights[f"{prefix}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
    per_group = query.shape[0] // head_dim // kv_heads
    blocks = []
    for group in range(kv_heads):
        blocks.append(query[group * per_group * head_dim : (group + 1) * per_group * head_dim])
        blocks.append(key[group * head_dim : (group + 1) * head_dim])
        blocks.append(value[group * head_dim : (group + 1) * head_dim])
    return torch.cat(blocks)


def rank_part(tensor: torch.Tensor, dim: int, rank: int, tp: int) -> torch.Tensor:
    size = tensor.shape[dim] // tp
    return tensor.narrow(dim, rank * size, size).clone()


def layer_state(
    weights: State, config: dict[str, Any], layer: int, local: int, rank: int, tp: int, te_norms: bool
) -> State:
    source, target = f"model.layers.{layer}.", f"decoder.layers.{local}."
    kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    norm = (
        ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        if te_norms
        else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    )
    state = {
        target + norm[0]: weights[source + "input_layernorm.weight"],
        target + "self_attention.linear_qkv.weight": rank_part(
            fuse_qkv(weights, source, "weight", kv_heads, head_dim), 0, rank, tp
        ),
        target + "self_attention.linear_proj.weight": rank_part(
            weights[source + "self_attn.o_proj.weight"], 1, rank, tp
        ),
        target + norm[1]: weights[source + "post_attention_layernorm.weight"],
        target + "mlp.linear_fc1.weight": torch.cat(
            [
                rank_part(weights[source + "mlp.gate_proj.weight"], 0, rank, tp),
                rank_part(weights[source + "mlp.up_proj.weight"], 0, rank, tp),
            ]
        ),
        target + "mlp.linear_fc2.weight": rank_part(weights[source + "mlp.down_proj.weight"], 1, rank, tp),
        target + "self_attention.linear_qkv._extra_state": torch.zeros(3),
    }
    if source + "self_attn.q_proj.bias" in weights:
        state[target + "self_attention.linear_qkv.bias"] = rank_part(
            fuse_qkv(weights, source, "bias", kv_heads, head_dim), 0, rank, tp
        )
    for letter in "qk":
        if source + f"self_attn.{letter}_norm.weight" in weights:
            state[target + f"self_attention.{letter}_layernorm.weight"] = weights[
                source + f"self_attn.{letter}_norm.weight"
            ]
    return state


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, torch.full((rows - tensor.shape[0], tensor.shape[1]), 7.0, dtype=tensor.dtype)])


def save_megatron(
    root: Path,
    weights: State,
    config: dict[str, Any],
    *,
    tp: int = 1,
    pp: int = 1,
    stages: list[list[list[int | None]]] | None = None,
    te_norms: bool = False,
    padded_vocab: int | None = None,
    args_changes: dict[str, Any] | None = None,
) -> Path:
    """Write `weights` as a Megatron checkpoint under `root`.

    `stages[p][v]` lists the model layers of chunk v of stage p; None is a slot without a layer. Default:
    even.
    """
    per_stage = config["num_hidden_layers"] // pp
    stages = stages or [[list(range(p * per_stage, (p + 1) * per_stage))] for p in range(pp)]
    vocab = padded_vocab or config["vocab_size"]
    tied = config["tie_word_embeddings"]
    embedding = pad_rows(weights["model.embed_tokens.weight"], vocab)
    head = embedding if tied else pad_rows(weights["lm_head.weight"], vocab)
    for p, chunks in enumerate(stages):
        for rank in range(tp):
            models = []
            for v, layers in enumerate(chunks):
                state: State = {}
                if p == 0 and v == 0:
                    state["embedding.word_embeddings.weight"] = rank_part(embedding, 0, rank, tp)
                for local, layer in enumerate(layers):
                    if layer is not None:
                        state |= layer_state(weights, config, layer, local, rank, tp, te_norms)
                if p == pp - 1 and v == len(chunks) - 1:
                    state["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
                    if not tied or pp > 1:
                        state["output_layer.weight"] = rank_part(head, 0, rank, tp)
                models.append(state)
            folder = root / "iter_0000001" / (f"mp_rank_{rank:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            content: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 1, "rng_state": [{"seed": 1}]}
            content |= {"model": models[0]} if len(models) == 1 else {f"model{v}": m for v, m in enumerate(models)}
            save_with_arguments(folder / "model_optim_rng.pt", content, config, tp, pp, stages, vocab, args_changes)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    return root


def save_with_arguments(
    path: Path,
    content: dict[str, Any],
    config: dict[str, Any],
    tp: int,
    pp: int,
    stages: list[list[list[int | None]]],
    vocab: int,
    changes: dict[str, Any] | None,
) -> None:
    """Save with a Namespace that also carries an enum of the training code, which no reader can import."""
    module = types.ModuleType("megatron_for_test.enums")
    model_type = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)
    module.ModelType = model_type
    slots = [layer for chunks in stages for layers in chunks for layer in layers]
    arguments = argparse.Namespace(
        num_layers=len(slots),
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        group_query_attention=True,
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        ffn_hidden_size=config["intermediate_size"],
        padded_vocab_size=vocab,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        noop_layers={slot for slot, layer in enumerate(slots) if layer is None} or None,
        model_type=model_type.encoder_or_decoder,
        params_dtype=torch.bfloat16,
        save=Path("/somewhere"),
    )
    for name, value in (changes or {}).items():
        setattr(arguments, name, value)
    sys.modules["megatron_for_test"], sys.modules[module.__name__] = (types.ModuleType("megatron_for_test"), module)
    try:
        torch.save({**content, "args": arguments}, path)
    finally:
        del sys.modules["megatron_for_test"], sys.modules[module.__name__]
