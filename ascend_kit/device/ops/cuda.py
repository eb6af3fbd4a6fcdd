"""The op table on an NVIDIA GPU, from torch's fused kernels; its decode attention fits into a CUDA graph."""

from __future__ import annotations

from ascend_kit.device.ops.cpu import (  # noqa: F401 - this table
    HOST_LENGTHS,
    MERGED_QKV,
    add_rms_norm,
    argmax,
    gather_rows,
    int4_weight_matmul,
    int8_static_matmul,
    int8_weight_matmul,
    linear,
    make_mask,
    pack_int4,
    pack_int8_static,
    pack_linear,
    paged_attention,
    quantize_per_token,
    quantize_static,
    rms_norm,
    rotary,
    split_columns,
    store_kv,
    swiglu,
    validate,
)
from ascend_kit.device.ops.reference import int8_matmul, pack_int8, pack_int8_weight  # noqa: F401 - torch's int8 product wants more than 16 rows on CUDA
