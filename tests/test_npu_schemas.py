"""Every torch_npu call of the NPU table against the operator schemas recorded from five wheels; needs no torch_npu.

tests/data/npu_schemas.json holds the registration strings of libtorch_npu.so of the wheels on PyPI.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_ops_npu import CALLS

RECORDED = json.loads((Path(__file__).parent / "data" / "npu_schemas.json").read_text())
VERSIONS = ("2.9.0.post9", "2.10.0.post7", "2.12.0", "2.13.0", "2.14.0")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name,keywords,positional", CALLS)
def test_a_call_fits_the_schema_of_older_and_newer_wheels(name, keywords, positional, version):
    schemas = [torch._C.parse_schema(f"npu::{text}") for text in RECORDED[version][name]]

    fitting = [
        schema
        for schema in schemas
        if set(keywords) <= {a.name for a in schema.arguments}
        and positional <= sum(not a.kwarg_only for a in schema.arguments)
        # What has no default must be passed.
        and all(
            index < positional or argument.name in keywords or argument.has_default_value()
            for index, argument in enumerate(schema.arguments)
        )
    ]

    assert fitting, f"{name}{keywords} fits none of {schemas} of torch_npu {version}"
