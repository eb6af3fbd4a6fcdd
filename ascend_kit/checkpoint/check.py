"""Whether a checkpoint holds the tensors that its config.json calls for."""

from __future__ import annotations

import difflib

from ascend_kit.checkpoint.huggingface import Checkpoint
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import expected_shapes


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """CheckpointError unless `checkpoint` holds exactly the tensors, in the shapes, that `config` calls
    for.
    """
    expected = expected_shapes(config)
    allowed_extra = {f"{linear}.weight_scale" for linear in checkpoint.quantization.schemes}
    if config.tie_embeddings:
        allowed_extra.add("lm_head.weight")  # a stored copy of the tied matrix
    # Recovering a static W8A8 layout yields a bias for every linear, also for those that had none.
    allowed_extra |= {f"{linear}.bias" for linear in checkpoint.quantization.schemes}
    for name, shape in expected.items():
        if name not in checkpoint:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name} is missing" + _closest(name, checkpoint))
        found = checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.source(name).origin}: tensor {name} has shape {list(found)}, "
                f"config.json implies {list(shape)}"
            )
    for name in checkpoint.tensor_names():
        if name not in expected and name not in allowed_extra:
            raise CheckpointError(
                f"{checkpoint.source(name).origin}: tensor {name} does not belong to a "
                f"{config.family} model of {config.num_layers} layers as config.json describes it"
            )


def _closest(name: str, checkpoint: Checkpoint) -> str:
    near = difflib.get_close_matches(name, checkpoint.tensor_names(), n=1, cutoff=0.8)
    return f" (closest: {near[0]})" if near else ""
