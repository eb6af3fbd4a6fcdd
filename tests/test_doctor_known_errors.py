"""Error texts as they appear in logs, and what the doctor makes of them."""

from __future__ import annotations

import re

import pytest

from ascend_kit.device.advice import advice, explain, known_errors, render_explanations

TEXTS = {
    "cann library missing": "ImportError: libhccl.so: cannot open shared object file: No such file",
    "atb library missing": "OSError: libatb.so: cannot open shared object file: No such file or directory",
    "undefined symbol": "ImportError: libop_plugin_atb.so: undefined symbol: _ZN3atb15GroupTopkParam",
    "wrong torch for torch_npu": "torch-npu 2.12.0.post2 requires torch==2.12.0.",
    "initialisation 500001": "RuntimeError: SetPrecisionMode:torch_npu/csrc/... error code is 500001",
    "device not visible": "dcmi module initialize failed. ret is -8005",
    "allocator set twice": "PYTORCH_ALLOC_CONF and PYTORCH_NPU_ALLOC_CONF cannot both be set",
    "streams exhausted": "NPU function error: capture failed, error code is 207008",
    "sq cq": "[ERROR] Alloc sq cq fail, device_id=0",
    "hang in graph update": "stuck in torch.npu.graph_task_update_end(stream)",
    "AIV inside a graph": "HCCL: task not supported in capture mode",
    "step watchdog": "decode step made no progress for 60 s, stopped",
    "launch blocking with graphs": "graph mode is not available when ASCEND_LAUNCH_BLOCKING=1",
    "attention parameter check": "npu_fused_infer_attention_score failed, error code is 561002",
    "operator parameter check": "call aclnnQuantMatmulV5 failed, detail: 161002",
    "fp8 on A2": "float8_e4m3fn is not supported on this device",
    "static kernel compilation": "static_kernel_compile is running, please wait",
    "out of memory": "RuntimeError: NPU out of memory. Tried to allocate 2.50 GiB",
    "connection timeout (EI0006)": "EI0006: Getting socket times out. Reason: the remote rank sent nothing.",
    "notify timeout (EI0002)": "EI0002: The wait execution of the Notify register times out.",
    "stream synchronise timeout": "aclrtSynchronizeDevice, error code is 507046",
    "port in use": "RuntimeError: The server socket has failed to bind: Address already in use",
    "non-contiguous tensor in a collective": "RuntimeError: HCCL does not support non-contiguous tensors",
    "distributed wrapper (ERR02200)": "[ERROR] ERR02200 DIST call hccl api failed.",
    "task queue level 2 with graphs": "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture",
    "process killed by the system": "the kernel was killed by SIGKILL",
    "slow decode": "decode is very slow, 7 tokens per second",
    "slow first request": "the first request takes very long",
    "slow under load": "TPOT explodes when 64 clients come",
    "output differs from GPU": "the output differs from the one of my GPU",
    "leftover processes": "there are leftover python processes on card 3",
}


@pytest.mark.parametrize("key", TEXTS)
def test_text_is_recognised_as(key):
    found = explain(TEXTS[key])

    assert key in [item.key for item in found]
    assert all(item.meaning and item.actions for item in found)


def test_every_entry_of_the_table_has_a_text_here():
    assert {known.key for known in known_errors()} == set(TEXTS)


def test_patterns_compile_and_match_no_empty_text():
    for known in known_errors():
        assert not any(re.search(pattern, "") for pattern in known.patterns), known.key


def test_wrapper_comes_after_the_cause_whatever_the_order_in_the_log():
    log = "ERR02200 DIST call hccl api failed.\nsome lines\nEI0006: Getting socket times out.\n"

    assert [item.key for item in explain(log)] == ["connection timeout (EI0006)", "distributed wrapper (ERR02200)"]


def test_earliest_cause_comes_first_with_its_line():
    log = "start\n\nrank 3: NPU out of memory. Tried to allocate\nrank 0: EI0002 notify timeout\n"

    first, second = explain(log)

    assert (first.key, first.line_number) == ("out of memory", 3)
    assert (second.key, second.line_number) == ("notify timeout (EI0002)", 4)
    assert first.matched == "rank 3: NPU out of memory. Tried to allocate"


@pytest.mark.parametrize("text", ["", "all went well", "error code is 12070081", "processed 561002345 tokens"])
def test_text_without_a_known_error_gives_nothing(text):
    assert explain(text) == []
    assert "No known error" in render_explanations(explain(text))


def test_words_of_a_symptom_inside_a_log_with_an_error_are_not_reported():
    log = "slow tokens path chosen for inference\nerror code is 207008"

    assert [item.key for item in explain(log)] == ["streams exhausted"]


def test_rendered_explanation_names_line_meaning_and_actions():
    text = render_explanations(explain(TEXTS["initialisation 500001"]))

    assert "decorator" in text and "doctor" in text
    assert "line 1" in text and "operator package" in text and "\n  - " in text


REFUSED_LEVEL = "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture, please export TASK_QUEUE_ENABLE=1/0."


def test_capture_refused_at_level_2_is_explained_by_the_doctor_and_by_the_graphs():
    assert explain(REFUSED_LEVEL)[0].key == "task queue level 2 with graphs"
    assert "TASK_QUEUE_ENABLE=1" in advice(REFUSED_LEVEL)


def test_nothing_recommends_level_2():
    assert not [known.key for known in known_errors() if "TASK_QUEUE_ENABLE=2" in " ".join(known.actions)]
