"""`python -m ascend_kit doctor`: is this machine ready, what is wrong with it, and what to do about it.

Importing this package does not import torch.
"""

from ascend_kit.device.advice import Explanation, explain
from ascend_kit.doctor.checks import run_checks
from ascend_kit.doctor.command import main, run_self_test
from ascend_kit.doctor.findings import Finding, OpCheck, as_table, render
from ascend_kit.doctor.host import Host

__all__ = [
    "Explanation",
    "Finding",
    "Host",
    "OpCheck",
    "as_table",
    "explain",
    "main",
    "render",
    "run_checks",
    "run_self_test",
]
