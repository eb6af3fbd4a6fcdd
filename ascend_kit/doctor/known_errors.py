"""Error texts and symptoms met on Ascend, what they mean, and what to do.

Each entry was collected from issue threads and vendor pages (named in `source`); the wording of EI/EE codes
and their numbers varies between CANN releases, so the patterns look for codes first and for short stable
phrases second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TROUBLESHOOTING = "Ascend/pytorch docs/zh/user_guide/troubleshooting"


@dataclass(frozen=True)
class KnownError:
    """`kind`: a "cause", a "wrapper" that only says that something failed, or a "symptom" in words."""

    key: str
    patterns: tuple[str, ...]
    meaning: str
    actions: tuple[str, ...]
    source: str
    kind: str = "cause"


@dataclass(frozen=True)
class Explanation:
    """A known error found in a text: `line_number` counts from 1, `matched` is that line."""

    key: str
    line_number: int
    matched: str
    meaning: str
    actions: tuple[str, ...]
    source: str


def _known(
    key: str, patterns: list[str], meaning: str, actions: list[str], source: str, kind: str = "cause"
) -> KnownError:
    return KnownError(key, tuple(patterns), meaning, tuple(actions), source, kind)


KNOWN_ERRORS: tuple[KnownError, ...] = (
    # installation
    _known(
        "atb library missing",
        [r"libatb\.so.*(No such file|cannot open)", r"cannot open.*libatb\.so"],
        "NNAL (the ATB operators) is not installed or not on the library path.",
        [
            "source /usr/local/Ascend/nnal/atb/set_env.sh after CANN's own set_env.sh",
            "ascend_kit itself needs no ATB operator; if nothing else does, leave NNAL out",
        ],
        "vllm-ascend #130",
    ),
    _known(
        "cann library missing",
        [
            r"lib(hccl|ascendcl|ascend_hal|opapi|ge_runner|graph)\w*\.so[^\n]*(No such|cannot open)",
            r"cannot open shared object file: .*lib(hccl|ascendcl)",
        ],
        "The CANN libraries are not on the library path of this process.",
        [
            "source /usr/local/Ascend/ascend-toolkit/set_env.sh in this shell, service file or notebook kernel",
            "libascend_hal.so belongs to the driver: in a container mount /usr/local/Ascend/driver/lib64",
            "check that ASCEND_HOME_PATH is set and that the file exists below it",
        ],
        "vllm-ascend #152, #130",
    ),
    _known(
        "undefined symbol",
        [r"undefined symbol", r"symbol lookup error"],
        "A library of CANN or ATB is older than the torch_npu (or the operator package) that loads it.",
        [
            "compare torch, torch_npu and CANN with the table that the doctor prints, and install a published triple",
            "after an upgrade of CANN upgrade NNAL too, and open a new shell so that no old path remains",
        ],
        "vllm-ascend #117, #750; Ascend/pytorch #99",
    ),
    _known(
        "wrong torch for torch_npu",
        [
            r"torch[-_]npu\S*[^\n]* (requires|depends on) torch",
            r"requires torch==[\d.]+",
            r"conflict[^\n]*torch[-_]npu|torch[-_]npu[^\n]*conflict",
        ],
        "pip has chosen a torch that torch_npu was not built for.",
        [
            "pip install torch==X.Y.Z torch-npu==X.Y.Z.* in one command, so that no third package moves torch",
            "on x86 install torch from the CPU index of the PyTorch project",
        ],
        "vllm-ascend #5710, #1796, #754",
    ),
    _known(
        "initialisation 500001",
        [r"SetPrecisionMode", r"\b500001\b"],
        "The first call on the device failed: CANN and torch_npu do not belong together, or the operator "
        "package is half "
        "installed.",
        [
            "install the operator package for 910b of the same CANN version as the toolkit",
            "compare the versions with the doctor's table",
        ],
        f"vllm-ascend #2244; {_TROUBLESHOOTING}",
    ),
    _known(
        "device not visible",
        [
            r"no (NPU|npu) device",
            r"(NPU|npu)[^\n]*is (unavailable|not available)",
            r"\b(107001|507033)\b",
            r"DrvMngGetConsoleLogLevel failed",
            r"dcmi (module|model) initialize",
        ],
        "The process cannot open a card: no device files, no permission, or another container owns the card.",
        [
            "in a container pass --device /dev/davinciN, /dev/davinci_manager, /dev/devmm_svm and "
            "/dev/hisi_hdc, and mount the "
            "driver folder",
            "outside: the user must be in the group HwHiAiUser; npu-smi info must work",
            "check ASCEND_RT_VISIBLE_DEVICES for blanks and for cards that do not exist",
        ],
        "vllm-ascend installation page and issue list",
    ),
    _known(
        "allocator set twice",
        [r"PYTORCH_ALLOC_CONF[^\n]*PYTORCH_NPU_ALLOC_CONF", r"PYTORCH_NPU_ALLOC_CONF[^\n]*PYTORCH_ALLOC_CONF"],
        "Both PYTORCH_ALLOC_CONF and PYTORCH_NPU_ALLOC_CONF are set, which torch_npu refuses.",
        ["unset one of the two; PYTORCH_NPU_ALLOC_CONF=expandable_segments:True is the usual one"],
        "Ascend/pytorch docs/zh/api/environment_variable",
    ),
    # graphs and streams
    _known(
        "streams exhausted",
        [r"\b20700[85]\b", r"Insufficient_Stream_Resources"],
        "The card has no streams left: every captured graph and every communication domain takes some.",
        [
            "capture fewer batch sizes (smaller batch_size), or graph_mode: false",
            "full graphs, not graphs per layer; fewer process groups",
            "driver (HDK) 25.5.1 or newer with CANN 8.5 or newer lifts the old limit",
        ],
        "vllm-ascend #9596, #9564, #3869, #9691, #8393; faqs 17",
    ),
    _known(
        "sq cq",
        [r"Alloc sq ?cq fail", r"alloc sqcq"],
        "A limit of the driver on task queues was reached.",
        ["update the driver (HDK) to 25.5.1 or newer", "capture fewer batch sizes meanwhile"],
        "vllm-ascend #8393",
    ),
    _known(
        "hang in graph update",
        [r"graph_task_update_(begin|end)"],
        "A graph waits for an update that was lost: update and replay ran in the wrong order, or the stack is old.",
        [
            "every replay needs exactly one update, and the next replay must not start before the previous "
            "one has ended",
            "try graph_mode: false to confirm; update torch_npu and CANN",
        ],
        "vllm-ascend #4180",
    ),
    _known(
        "AIV inside a graph",
        [r"task not support(ed)?[^\n]*", r"AIV[^\n]*(capture|graph)"],
        "Collectives on vector cores (HCCL_OP_EXPANSION_MODE=AIV) cannot be captured in a task group on some stacks.",
        ["unset HCCL_OP_EXPANSION_MODE and capture again", "or graph_mode: false when tensor_parallel > 1"],
        "vllm-ascend #13688",
    ),
    _known(
        "step watchdog",
        [r"(capture|replay|decode step)[^\n]*(hang|hung|no progress|timed? ?out)", r"watchdog"],
        "A step did not end in time; in graph mode the usual cause is a missing or overtaking update.",
        [
            "graph_mode: false to confirm",
            "unset HCCL_OP_EXPANSION_MODE when several cards are used",
            "look for an ended peer process",
        ],
        "vllm-ascend #4180, #13688",
    ),
    _known(
        "launch blocking with graphs",
        [r"ASCEND_LAUNCH_BLOCKING"],
        "ASCEND_LAUNCH_BLOCKING=1 is a debugging switch: it stops asynchronous launches and cannot be used "
        "with graphs.",
        ["unset ASCEND_LAUNCH_BLOCKING and start a new process"],
        "vllm-ascend faqs",
    ),
    _known(
        "task queue level 2 with graphs",
        [r"TASK_QUEUE_ENABLE ?= ?2"],
        "torch_npu refuses to capture graphs while TASK_QUEUE_ENABLE is 2.",
        ["export TASK_QUEUE_ENABLE=1 and start a new process", "or graph_mode: false"],
        "NPUGraph.cpp of torch_npu 2.12.0 to 2.14.0",
    ),
    # operators
    _known(
        "attention parameter check",
        [r"\b561002\b"],
        "The attention kernel refused its arguments on the host: number of lengths, rows of the block table "
        "or number of "
        "query tokens do not agree.",
        [
            "the cumulative query lengths must end at the number of query rows; KV lengths are per request when paged",
            "the block table needs one row per request; padded rows take KV length 1 and block 0",
            "if ascend_kit made the call, report it with `doctor --self-test` output",
        ],
        "aclnn parameter rules of npu_fused_infer_attention_score",
    ),
    _known(
        "operator parameter check",
        [r"\b561103\b", r"\b161002\b", r"aclnn\w+[^\n]*(failed|error)"],
        "An operator refused its arguments (dtype, layout, alignment) or has no kernel for them in this CANN.",
        [
            "read the operator's name in the text; print shapes, dtypes and contiguity of its inputs",
            "operator_fusion: false runs the same model without fused operators",
            "check that the operator package for this card (910b) is installed",
        ],
        "several vllm-ascend threads",
        kind="wrapper",
    ),
    _known(
        "fp8 on A2",
        [r"(fp8|float8)[^\n]*(not support|unsupport)", r"(not support|unsupport)\w*[^\n]*(fp8|float8)"],
        "Atlas A2 (910B) has no FP8 matrix unit, so FP8 checkpoints do not run on it.",
        ["use the BF16 checkpoint, or quantize: w8a8 (int8)"],
        "user report on gitcode",
    ),
    _known(
        "static kernel compilation",
        [r"static_kernel_compile"],
        "Static kernels are compiled once, which takes minutes to tens of minutes.",
        ["wait once and keep the cache, or turn the option off"],
        "Ascend/torchair docs",
    ),
    # memory
    _known(
        "out of memory",
        [r"NPU out of memory", r"\b207001\b", r"\bEL0004\b", r"Failed to allocate memory", r"OutOfMemoryError"],
        "The card has no memory left for this request, even though other tools may show some free.",
        [
            "npu-smi info: end leftover processes of earlier jobs (an idle card holds about 3.3 GB by itself)",
            "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True against fragmentation",
            "every communication domain holds twice HCCL_BUFFSIZE (200 MB by default)",
            "lower kv_cache_gib, max_seq_length or batch_size; quantize: w8a8 halves the weights",
        ],
        "many threads",
    ),
    # communication
    _known(
        "connection timeout (EI0006)",
        [r"\bEI0006\b", r"[Gg]etting socket times? ?out", r"connect(ion)? time(d )?out"],
        "A rank waited for a peer that did not connect: the peer ended or never started, started later than "
        "the timeout, uses "
        "another interface, is blocked by a firewall, or has another TLS setting.",
        [
            "look at the log of the rank that failed first",
            "the same HCCL_CONNECT_TIMEOUT on all machines (120-7200 s; 1200 is common)",
            "set HCCL_IF_IP or HCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and TP_SOCKET_IFNAME before starting Ray",
            "hccn_tool -i N -tls -g must print the same on all machines; hccn_tool -i N -ping -g address "
            "PEER must answer",
        ],
        f"{_TROUBLESHOOTING}; vllm-ascend #486, #5461",
    ),
    _known(
        "notify timeout (EI0002)",
        [r"\bEI0002\b", r"notify[^\n]*timed? ?out", r"fftsplus task timeout"],
        "A collective did not finish: one rank took another path, was much slower, or has ended.",
        [
            "read the log of the rank with the earliest error, not of the one that reports this",
            "HCCL_EXEC_TIMEOUT is 1836 s by default and ends at 1091 s in AIV mode, so a hang is reported late",
        ],
        _TROUBLESHOOTING,
    ),
    _known(
        "stream synchronise timeout",
        [r"\b507046\b", r"\bEE1002\b", r"stream sync(hronize)? timeout"],
        "The host waited for the card longer than allowed; the card hangs, or waits for a peer or a graph update.",
        ["with several cards look for an ended rank first", "graph_mode: false to see whether graphs are the cause"],
        "Ascend/pytorch #62",
    ),
    _known(
        "port in use",
        [r"[Aa]ddress already in use", r"EADDRINUSE", r"port[^\n]*(conflict|in use|is occupied)", r"\bEI0019\b"],
        "Another job uses MASTER_PORT or the range that begins at HCCL_IF_BASE_PORT.",
        [
            "end the other job or choose another MASTER_PORT or HCCL_IF_BASE_PORT",
            "keep the range free: sysctl -w net.ipv4.ip_local_reserved_ports=60000-60015",
        ],
        _TROUBLESHOOTING,
    ),
    _known(
        "non-contiguous tensor in a collective",
        [r"(hccl|collective|all_?reduce|tensor)[^\n]*non-?contiguous", r"tensors? must be contiguous"],
        "HCCL takes contiguous tensors only.",
        ["call .contiguous() before the collective"],
        f"{_TROUBLESHOOTING}: communication_operator_transfers_Non-contiguous_tensors",
    ),
    _known(
        "distributed wrapper (ERR02200)",
        [r"\bERR02200\b"],
        "A general message of torch_npu's distributed layer; it does not name the cause.",
        [
            "read ~/ascend/log (or ASCEND_PROCESS_LOG_PATH) of the rank that failed first",
            "ASCEND_GLOBAL_LOG_LEVEL=1 ASCEND_SLOG_PRINT_TO_STDOUT=1 prints the log to the terminal",
        ],
        _TROUBLESHOOTING,
        kind="wrapper",
    ),
    # symptoms in words, so that a sentence can be explained too
    _known(
        "slow decode",
        [
            r"\b(decode|generation|inference|tokens?)\b[^\n]*\bslow",
            r"\bslow\b[^\n]*\b(decode|generation|inference|tokens?)\b",
        ],
        "Steps far above the floor of the card mean that the host is the limit: too many launches, one by one.",
        [
            "graph_mode: true, TASK_QUEUE_ENABLE=1, CPU governor performance, CPU_AFFINITY_CONF=1",
            "unset ASCEND_LAUNCH_BLOCKING; end profilers; compare with the floor that 01_environment prints",
        ],
        "vllm-ascend #111, #12113, #10401",
        kind="symptom",
    ),
    _known(
        "slow first request",
        [r"first (request|call|token|step)[^\n]*(slow|long|minutes)", r"(slow|long)[^\n]*first (request|call|step)"],
        "Kernels are loaded, graphs captured and communication set up at the first call.",
        ["warm up before measuring; the engine does so when it is opened"],
        "vllm-ascend docs and issues",
        kind="symptom",
    ),
    _known(
        "slow under load",
        [r"TPOT[^\n]*(explode|grow|rise|high)", r"preempt(ion|ed)[^\n]*(many|often|high)"],
        "The KV cache is too small for the load: sequences are put back and computed again.",
        ["lower concurrency or max_seq_length, raise kv_cache_gib, or use more cards"],
        "vllm-ascend faqs 22",
        kind="symptom",
    ),
    _known(
        "output differs from GPU",
        [r"(output|result|text|logit|accuracy)s?\b[^\n]*\bdiffer", r"different (output|result|token)s?"],
        "Other summation orders in bf16 change a token after some steps, which is normal; large errors of "
        "the logits are not.",
        [
            "compare with a float32 run on the CPU over a fixed prompt set (doctor --self-test, then 05_evaluate)",
            "a large error points to scale, mask or rope width; turn FRACTAL_NZ off (allow_internal_format "
            "False) and compare",
            "run to run differences: HCCL_DETERMINISTIC=true, LCCL_DETERMINISTIC=1, "
            "ATB_MATMUL_SHUFFLE_K_ENABLE=0, "
            "ATB_LLM_LCOC_ENABLE=0",
        ],
        "vllm-ascend #31, faqs 15; sglang #18481; nz_format_precision_issue",
        kind="symptom",
    ),
    _known(
        "leftover processes",
        [r"(leftover|zombie|orphan)\w*[^\n]*process"],
        "Processes of an ended job still hold memory of the card.",
        ["npu-smi info lists them; npu-smi info -t proc-mem -i N for one card; end your own with kill"],
        "many threads",
        kind="symptom",
    ),
)


def explain(error_text: str) -> list[Explanation]:
    """Known errors in a text, earliest first, wrappers after causes; [] when nothing is recognised.

    Symptoms in words are looked for only where no error was found: logs are full of ordinary words.
    """
    for kinds in (("cause", "wrapper"), ("symptom",)):
        found = [
            (known, start)
            for known in KNOWN_ERRORS
            if known.kind in kinds
            if (start := _first_match(known, error_text)) is not None
        ]
        if found:
            found.sort(key=lambda item: (kinds.index(item[0].kind), item[1]))
            return [_explanation(known, error_text, start) for known, start in found]
    return []


def _first_match(known: KnownError, text: str) -> int | None:
    hits = (re.search(pattern, text, re.IGNORECASE) for pattern in known.patterns)
    return min((hit.start() for hit in hits if hit), default=None)


def _explanation(known: KnownError, text: str, start: int) -> Explanation:
    line = text[text.rfind("\n", 0, start) + 1 :].partition("\n")[0].strip()
    number = text.count("\n", 0, start) + 1
    return Explanation(known.key, number, line[:200], known.meaning, known.actions, known.source)


def render_explanations(explanations: list[Explanation]) -> str:
    """Terminal text, or what to collect when nothing was recognised."""
    if not explanations:
        return (
            "No known error in this text. To get more of it: read ~/ascend/log (ASCEND_PROCESS_LOG_PATH "
            "moves it) of the rank "
            "that failed first, or run again with ASCEND_GLOBAL_LOG_LEVEL=1 ASCEND_SLOG_PRINT_TO_STDOUT=1."
        )
    blocks = []
    for item in explanations:
        actions = "\n".join(f"  - {action}" for action in item.actions)
        blocks.append(
            f"{item.key} (line {item.line_number}: {item.matched})\n  {item.meaning}\n{actions}\n  seen in: "
            f"{item.source}"
        )
    return "\n\n".join(blocks)
