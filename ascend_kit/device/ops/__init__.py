"""The operators a decoder needs, one module per back-end; see table.py."""

from ascend_kit.device.ops.table import OPS, PLAIN_OPS, AttentionMeta, select_ops

__all__ = ["OPS", "PLAIN_OPS", "AttentionMeta", "select_ops"]
