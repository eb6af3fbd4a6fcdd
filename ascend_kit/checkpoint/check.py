"""The one check of a checkpoint before anything is computed from it: names, shapes, dtypes and completeness."""

from __future__ import annotations

import re

import torch

from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.quantized_tensors import FLOATS
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.messages import did_you_mean
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import EMBEDDING, HEAD, expected_shapes, linear_names

COMPARE_ROWS = 4096  # at a time
QUANTIZED_PARTS = ("weight_scale", "weight_zero_point", "weight_g_idx", "input_scale", "input_offset")
# A folded bias of a linear that has none is rounding error, at most this many steps of the weight's scale.
FOLDED_BIAS_STEPS = 128
KV_SCALES = "scales of an int8 KV cache (conversions leave them out, and so does kv_cache_dtype: auto)"
# Tensors that a float KV cache and computed angles do without.
HARMLESS = {
    "scales of an int8 or fp8 KV cache": re.compile(
        r".*\.self_attn\.((attn\.)?([qkv]|kv)_(scale|zero_point)|[kv]_proj\.(kv_cache_(scale|offset)|output_scale|[kv]_scale))"
    ),
    KV_SCALES: re.compile(r".*\.self_attn\.[kv]_cache_(scale|offset)"),
    "buffers that are computed": re.compile(r".*(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\._extra_state)"),
}


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, *, data: bool = True) -> list[str]:
    """CheckpointError unless the checkpoint holds exactly the tensors that config.json calls for.

    Returns what is there beyond that and is left out because it changes nothing, in words. The values that decide about
    this are read: scales, biases that must be zero, a copy of the tied matrix. Without `data` no bias that follows from
    an int8 weight, which takes that weight to compute.
    """
    expected, schemes = expected_shapes(config), checkpoint.quantization.schemes
    odd = next((name for name in schemes if name not in set(linear_names(config))), None)
    if odd is not None:
        raise CheckpointError(
            f"{checkpoint.source(f'{odd}.weight').origin}: {odd} is quantised, which is read for the linears of "
            "the layers and for lm_head where it is not tied; leave it in float when quantising"
        )
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        meant = did_you_mean(missing[0], checkpoint.tensor_names(), 0.8)
        raise CheckpointError(f"{checkpoint.folder}: tensor {missing[0]}{more} is missing{meant}")
    for name, shape in expected.items():
        _check_form(checkpoint, name, shape)
    for linear in schemes:
        scale = f"{linear}.weight_scale"
        if not bool(checkpoint.read(scale).isfinite().all()):
            raise CheckpointError(f"{checkpoint.source(scale).origin}: {scale} holds NaN or infinity; it is damaged")
        _check_groups(checkpoint, linear)
    return _check_extras(checkpoint, config, [name for name in checkpoint.tensor_names() if name not in expected], data)


def _check_groups(checkpoint: Checkpoint, linear: str) -> None:
    name, groups = f"{linear}.weight_g_idx", checkpoint.shape(f"{linear}.weight_scale")
    if name not in checkpoint:
        return
    found = checkpoint.read(name).long()
    inside = bool(((found >= 0) & (found < groups[-1])).all())
    if not inside or found.bincount(minlength=groups[-1]).unique().numel() != 1:
        raise CheckpointError(
            f"{checkpoint.source(name).origin}: {name} does not put the inputs into {groups[-1]} groups of one size"
        )


def _check_form(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    source = checkpoint.source(name)
    if source.shape != shape:
        raise CheckpointError(
            f"{source.origin}: tensor {name} has shape {list(source.shape)}, config.json implies {list(shape)}"
        )
    is_int8 = name.endswith(".weight") and name.removesuffix(".weight") in checkpoint.quantization.schemes
    if not is_int8 and source.dtype not in FLOATS:
        raise CheckpointError(
            f"{source.origin}: tensor {name} holds {str(source.dtype).removeprefix('torch.')} numbers and nothing says "
            "what they stand for; readable are float tensors and linears that quantization_config in config.json or "
            "an msModelSlim description names"
        )


def _check_extras(checkpoint: Checkpoint, config: ModelConfig, names: list[str], data: bool) -> list[str]:
    left_out: dict[str, list[str]] = {}
    expected = expected_shapes(config)
    for name in names:
        owner, _, part = name.rpartition(".")
        if part in QUANTIZED_PARTS and owner in checkpoint.quantization.schemes:
            continue
        if name == HEAD and config.tie_embeddings:
            reason = "copies of the tied embedding"
            _check_tied_copy(checkpoint)
        elif name.endswith(".bias") and expected.get(f"{owner}.weight", ())[:1] == checkpoint.shape(name):
            reason = "biases of zero"
            if data or owner not in checkpoint.quantization.schemes:
                _check_zero_bias(checkpoint, name, owner)
        else:
            reason = next((text for text, pattern in HARMLESS.items() if pattern.fullmatch(name)), "")
        if not reason:
            raise CheckpointError(
                f"{checkpoint.source(name).origin}: tensor {name} does not belong to a "
                f"{config.family} model of {config.num_layers} layers as config.json describes it"
            )
        left_out.setdefault(reason, []).append(name)
    return [
        f"{len(found)} {reason}, not used: {found[0]}{', ...' * (len(found) > 1)}" for reason, found in left_out.items()
    ]


def _check_tied_copy(checkpoint: Checkpoint) -> None:
    head, embedding = checkpoint.source(HEAD), checkpoint.source(EMBEDDING)
    same = head.shape == embedding.shape and all(
        torch.equal(*(one.read_slice(0, row, min(row + COMPARE_ROWS, head.shape[0])) for one in (head, embedding)))
        for row in range(0, head.shape[0], COMPARE_ROWS)
    )
    if not same:
        raise CheckpointError(
            f"{head.origin}: {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings; "
            "set it to false to keep both"
        )


def _check_zero_bias(checkpoint: Checkpoint, name: str, owner: str) -> None:
    bias, largest = checkpoint.read(name).float(), torch.zeros(())
    if owner in checkpoint.quantization.schemes:
        largest = FOLDED_BIAS_STEPS * checkpoint.read(f"{owner}.weight_scale").abs().reshape(len(bias), -1).amax(1)
    if not bool((bias.abs() <= largest).all()):
        raise CheckpointError(
            f"{checkpoint.source(name).origin}: {name} is not zero (up to {bias.abs().max().item():.4g}), but this "
            "family has no such bias; a checkpoint made with asymmetric outlier suppression cannot be read"
        )
