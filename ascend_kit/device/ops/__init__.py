"""The operators a decoder needs, one module per back-end; see table.py."""

from ascend_kit.device.ops.table import FUSED, OPS, PLAIN_OPS, AttentionMeta, select_ops

__all__ = ["FUSED", "OPS", "PLAIN_OPS", "AttentionMeta", "select_ops"]
