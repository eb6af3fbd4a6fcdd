"""Environment variables that decide speed or correctness on Ascend, each with what its value means here.

Sources: Ascend/pytorch docs/zh/api/environment_variable, the hiascend environment reference pages 07_0028,
07_0077, 07_0078, 07_0080 and 07_0096 (CANN 9.0 / 9.1), and the vllm-ascend frequently asked questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ascend_kit.doctor.findings import Section
from ascend_kit.doctor.host import Host

CONNECT_TIMEOUT_RANGE_S = (120, 7200)
CONNECT_TIMEOUT_DEFAULT_S = 120
EXEC_TIMEOUT_DEFAULT_S = 1836  # Atlas A2
AIV_EXEC_TIMEOUT_MAX_S = 1091  # range and default end here when collectives run on vector cores
BUFFSIZE_DEFAULT_MB = 200  # twice this is held for every communication domain

_DETERMINISTIC = {
    "HCCL_DETERMINISTIC": "true",
    "LCCL_DETERMINISTIC": "1",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    "ATB_LLM_LCOC_ENABLE": "0",
}
_LEAVE_ALONE = ("MULTI_STREAM_MEMORY_REUSE", "PER_STREAM_QUEUE", "TORCH_NPU_LAZY_FUSION")


def visible_devices(value: str) -> list[int]:
    """Ids CANN takes from ASCEND_RT_VISIBLE_DEVICES: all up to the first token that is not a bare number."""
    ids: list[int] = []
    for token in value.split(","):
        if not re.fullmatch(r"\d+", token):
            break
        ids.append(int(token))
    return ids


def uses_aiv(env: Mapping[str, str]) -> bool:
    """Whether collectives are asked to run on vector cores, deterministic mode not overriding it."""
    return (
        env.get("HCCL_OP_EXPANSION_MODE", "").upper() == "AIV" and env.get("HCCL_DETERMINISTIC", "").lower() != "true"
    )


def effective_exec_timeout_s(env: Mapping[str, str]) -> int | None:
    """HCCL_EXEC_TIMEOUT as applied, in seconds; None means "never ends", which AIV mode does not know."""
    text = env.get("HCCL_EXEC_TIMEOUT", str(EXEC_TIMEOUT_DEFAULT_S))
    asked = int(text) if text.isdigit() else EXEC_TIMEOUT_DEFAULT_S
    if uses_aiv(env):
        return AIV_EXEC_TIMEOUT_MAX_S if asked == 0 else min(asked, AIV_EXEC_TIMEOUT_MAX_S)
    return asked or None


def check_variables(host: Host, num_cards: int, graph_mode: bool = True) -> Section:
    """Findings on every variable that is set to something noteworthy, or whose absence costs speed."""
    section = Section("Environment variables")
    env = host.env
    _allocator(section, env)
    _visible(section, env, num_cards)
    _launching(section, env, graph_mode)
    _collectives(section, env, num_cards)
    _timeouts(section, env)
    _threads(section, env, num_cards)
    _logging_and_caches(section, host)
    _numerics(section, env)
    return section


def _allocator(section: Section, env: Mapping[str, str]) -> None:
    npu, common = env.get("PYTORCH_NPU_ALLOC_CONF"), env.get("PYTORCH_ALLOC_CONF")
    if npu and common:
        remedy = "both set is an error in torch_npu: unset PYTORCH_ALLOC_CONF"
        section.fail("allocator", f"PYTORCH_NPU_ALLOC_CONF={npu} and PYTORCH_ALLOC_CONF={common}", remedy)
    elif "expandable_segments:True" in (npu or common or ""):
        section.ok("allocator", "expandable_segments:True")
    else:
        tip = "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True fragments less"
        section.ok("allocator", f"PYTORCH_NPU_ALLOC_CONF={npu}" if npu else "PYTORCH_NPU_ALLOC_CONF not set", tip)


def _visible(section: Section, env: Mapping[str, str], num_cards: int) -> None:
    check, value = "visible cards", env.get("ASCEND_RT_VISIBLE_DEVICES")
    if value is None:
        other = env.get("ASCEND_VISIBLE_DEVICES")
        evidence = "ASCEND_RT_VISIBLE_DEVICES not set: every card"
        evidence = evidence if other is None else f"{evidence} (CANN does not read ASCEND_VISIBLE_DEVICES={other})"
        section.ok(check, evidence)
        return
    taken, asked = visible_devices(value), len([token for token in value.split(",") if token.strip()])
    shown = f"ASCEND_RT_VISIBLE_DEVICES={value!r}"
    if len(taken) < asked or not taken:
        remedy = "write a comma list of bare numbers without blanks; the list ends silently at the first bad token"
        section.fail(check, f"{shown}: only {taken or 'no card'} taken", remedy)
    elif len(set(taken)) < len(taken):
        section.fail(check, f"{shown}: a card is named twice", "name every card once")
    elif num_cards and max(taken) >= num_cards:
        section.fail(check, f"{shown}, but cards are numbered 0 to {num_cards - 1}", "name cards that exist")
    else:
        section.ok(check, f"{shown}: {len(taken)} cards, numbered again from 0 inside the process")


def _launching(section: Section, env: Mapping[str, str], graph_mode: bool) -> None:
    if env.get("ASCEND_LAUNCH_BLOCKING") == "1":
        remedy = "a debugging switch: unset it; it forbids graph_mode and cancels TASK_QUEUE_ENABLE"
        section.fail("launch blocking", "ASCEND_LAUNCH_BLOCKING=1", remedy)
    queue = env.get("TASK_QUEUE_ENABLE", "1")
    shown = f"TASK_QUEUE_ENABLE={queue}" + ("" if "TASK_QUEUE_ENABLE" in env else " (default)")
    if queue == "0":
        section.warn("task queue", shown, "export TASK_QUEUE_ENABLE=1; 0 puts every launch on the Python thread")
    elif queue == "2" and graph_mode:
        section.fail("task queue", shown, "export TASK_QUEUE_ENABLE=1: torch_npu refuses to capture graphs at level 2")
    elif queue == "2":
        section.warn("task queue", shown, "export TASK_QUEUE_ENABLE=1 before graph_mode: true, which level 2 forbids")
    else:
        section.ok("task queue", shown)
    if "CPU_AFFINITY_CONF" in env:
        section.ok("cpu affinity", f"CPU_AFFINITY_CONF={env['CPU_AFFINITY_CONF']}")
    else:
        tip = "CPU_AFFINITY_CONF=1 keeps launch threads near their card"
        section.ok("cpu affinity", "CPU_AFFINITY_CONF not set", tip)
    odd = [f"{name}={env[name]}" for name in _LEAVE_ALONE if name in env]
    if odd:
        section.warn("newer switches", ", ".join(odd), "leave these unset until the plain setting has been measured")


def _collectives(section: Section, env: Mapping[str, str], num_cards: int) -> None:
    mode = env.get("HCCL_OP_EXPANSION_MODE")
    if mode and mode.upper() == "AIV" and not uses_aiv(env):
        remedy = "AIV is ignored while deterministic mode is on: unset one of them"
        section.warn("collective mode", "HCCL_OP_EXPANSION_MODE=AIV with HCCL_DETERMINISTIC=true", remedy)
    elif uses_aiv(env):
        tip = "if capture or replay hangs with tensor_parallel > 1, unset it first"
        section.ok("collective mode", "HCCL_OP_EXPANSION_MODE=AIV", tip)
    elif num_cards > 1:
        tip = "AIV makes the small all-reduces of tensor parallel faster within one machine (inference only)"
        section.ok("collective mode", f"HCCL_OP_EXPANSION_MODE={mode or 'not set'}", tip)
    size = env.get("HCCL_BUFFSIZE", str(BUFFSIZE_DEFAULT_MB))
    if not size.isdigit() or int(size) == 0:
        section.fail("collective buffer", f"HCCL_BUFFSIZE={size!r}", "a whole number of MB, 200 by default")
    elif int(size) > 1000:
        remedy = "200 is enough for tensor parallel; the memory is missing from the KV cache"
        section.warn("collective buffer", f"HCCL_BUFFSIZE={size}: {2 * int(size)} MB per communication domain", remedy)
    else:
        section.ok("collective buffer", f"HCCL_BUFFSIZE={size} MB, twice that per communication domain")
    table = env.get("RANK_TABLE_FILE")
    if table:
        remedy = "unset it: negotiation works without, and a stale table misleads"
        section.warn("rank table", f"RANK_TABLE_FILE={table}", remedy)


def _timeouts(section: Section, env: Mapping[str, str]) -> None:
    low, high = CONNECT_TIMEOUT_RANGE_S
    connect = env.get("HCCL_CONNECT_TIMEOUT")
    if connect is None:
        section.ok("connect timeout", f"HCCL_CONNECT_TIMEOUT not set: {CONNECT_TIMEOUT_DEFAULT_S} s")
    elif not connect.isdigit() or not low <= int(connect) <= high:
        section.fail("connect timeout", f"HCCL_CONNECT_TIMEOUT={connect!r}", f"{low} to {high} seconds; 1200 is common")
    else:
        section.ok("connect timeout", f"HCCL_CONNECT_TIMEOUT={connect} s")
    asked, real = env.get("HCCL_EXEC_TIMEOUT"), effective_exec_timeout_s(env)
    if asked is not None and not asked.isdigit():
        section.fail("collective timeout", f"HCCL_EXEC_TIMEOUT={asked!r}", "a whole number of seconds")
    elif asked is not None and uses_aiv(env) and int(asked) != real:
        remedy = f"AIV mode ends at {AIV_EXEC_TIMEOUT_MAX_S} s and 0 does not mean never there: write {real}"
        section.warn("collective timeout", f"HCCL_EXEC_TIMEOUT={asked} becomes {real} s in AIV mode", remedy)
    else:
        shown = "never ends" if real is None else f"{real} s"
        section.ok("collective timeout", f"HCCL_EXEC_TIMEOUT={asked or 'not set'}: {shown}")


def _threads(section: Section, env: Mapping[str, str], num_cards: int) -> None:
    value = env.get("OMP_NUM_THREADS")
    if value is not None and not value.isdigit():
        section.fail("host threads", f"OMP_NUM_THREADS={value!r}", "a whole number")
    elif num_cards > 1 and (value is None or int(value) > 10):
        remedy = "1 to 10 when several ranks share the host, or their threads fight for the CPUs"
        section.warn("host threads", f"OMP_NUM_THREADS={value or 'not set'} with {num_cards} cards", remedy)
    else:
        section.ok("host threads", f"OMP_NUM_THREADS={value or 'not set'}")


def _logging_and_caches(section: Section, host: Host) -> None:
    env = host.env
    level = env.get("ASCEND_GLOBAL_LOG_LEVEL", "3")
    noisy = [f"ASCEND_GLOBAL_LOG_LEVEL={level}"] if level in ("0", "1") else []
    noisy += [
        f"{name}={env[name]}"
        for name in ("ASCEND_SLOG_PRINT_TO_STDOUT", "PROFILING_MODE")
        if env.get(name, "").lower() in ("1", "true")
    ]
    shown = ", ".join(noisy) or f"ASCEND_GLOBAL_LOG_LEVEL={env.get('ASCEND_GLOBAL_LOG_LEVEL', 'not set')}"
    section.judge("logging", shown, warn="unset before measuring: logs and profilers cost much of a step" * bool(noisy))
    folder = env.get("ACL_OP_COMPILER_CACHE_DIR")
    if folder and not host.can_create_in(folder):
        remedy = "choose a writable folder"
        section.fail("operator cache", f"ACL_OP_COMPILER_CACHE_DIR={folder} cannot be written", remedy)
    elif folder or "ACL_OP_COMPILER_CACHE_MODE" in env:
        evidence = f"mode {env.get('ACL_OP_COMPILER_CACHE_MODE', 'default')}, folder {folder or 'default'}"
        section.ok("operator cache", evidence)


def _numerics(section: Section, env: Mapping[str, str]) -> None:
    if env.get("INF_NAN_MODE_ENABLE") == "0":
        forced = env.get("INF_NAN_MODE_FORCE_DISABLE") == "1"
        remedy = "unset it: 1 is the default of Atlas A2, and 0 turns overflow into the largest number in silence"
        section.warn("overflow mode", "INF_NAN_MODE_ENABLE=0" + ("" if forced else ", without effect on A2"), remedy)
    found = [f"{name}={env[name]}" for name, value in _DETERMINISTIC.items() if env.get(name, "").lower() == value]
    if found:
        section.ok("deterministic", ", ".join(found), "repeatable and slower: unset for throughput")
    if env.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        section.ok("autoload", "TORCH_DEVICE_BACKEND_AUTOLOAD=0: `import torch` alone will not load torch_npu")
