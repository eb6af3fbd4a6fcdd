"""What of a Chinese page is still English: words that are neither names, units, code nor the reader's own data."""

from __future__ import annotations

import re
from html import unescape

from ascend_kit.params import Experiment

# Columns whose cells are data of the run or words of the API, by their names in the files.
DATA = frozenset(("prompt", "text", "question", "choices", "expected", "given", "name", "finish_reason", "run",
                  "parameter", "meaning", "default", "metric"))  # fmt: skip
# Names of projects, data sets, machines and formats, units, and terms that Chinese texts keep.
TERMS = frozenset(
    re.findall(
        "[A-Za-z]+",
        """
    acc agieval AGIEval AISBench AMD ascend Ascend auto Brier CANN ceval cmmlu cpu CPU EPYC Eval evalscope Face
    false generate GiB glibc gpqa GSM harness HCCL HCCS Holm hub Hugging huggingface ifeval Insight Intel ITL
    JupyterLab KiB length Linux linux logit mbu Megatron mfu MiB min MindSpore MindStudio mmlu MMLU NaN nat none
    npu NPU numpy OpenCompass Perfetto PNG python Qwen ray safetensors serve stop tasks token tokenizers tokens
    torch TPOT transformers true TTFT vllm WikiText wikitext Xeon
""",
    )
)
WORD = re.compile(
    r"(?<![\w./:=+-])[A-Za-z][a-z]{2,}(?![\w/=+-]|\.\w)"
)  # a part of a path, a version or an option is none


def english_in(page: str, *names: str) -> list[str]:
    """Texts of a report, alternative texts and tips among them, that hold English words other than `names`."""
    main = page.split("<main>")[-1].split("<script>")[0]
    main = re.sub(r'<details class="code">.*?</details>|<code>.*?</code>|<style>.*?</style>', "", main, flags=re.DOTALL)
    main = re.sub(r"<table.*?</table>", lambda found: own_cells(found[0]), main, flags=re.DOTALL)
    told = re.findall(r'(?:aria-label|alt)="([^"]*)"', main)
    allowed = TERMS | {*names} | {word for words in _choices() for word in re.findall("[A-Za-z]+", words)}
    texts = dict.fromkeys(unescape(text).strip() for text in (*re.split(r"<[^>]+>", main.replace("<wbr>", "")), *told))
    return [text for text in texts if text not in Experiment.model_fields and set(WORD.findall(text)) - allowed]


def _choices() -> list[str]:
    return [repr(field.annotation) for field in Experiment.model_fields.values() if "Literal" in repr(field.annotation)]


def own_cells(table: str) -> str:
    """The table without the cells of columns that hold data; heads of columns stay, a head is never data."""
    head, *rows = (re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL) for row in table.split("<tr>")[1:])
    names = [re.search(r'title="([^"]*)"|>([^<]*)<', cell) for cell in head]
    is_data = [bool(name and DATA & {name[1], name[2]}) for name in names]
    return "".join((*head, *(cell for row in rows for cell, hidden in zip(row, is_data, strict=True) if not hidden)))
