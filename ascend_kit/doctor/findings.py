"""What a check or a comparison found, and how that is shown: terminal text, rows, a table."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partialmethod
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas

Status = Literal["ok", "warn", "fail", "n/a"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail", "n/a")


@dataclass(frozen=True)
class Finding:
    """One checked item: `evidence` is what was seen, `remedy` what to do about it (a tip when ok)."""

    section: str
    check: str
    status: Status
    evidence: str
    remedy: str = ""


class Section(list[Finding]):
    """The findings of one section, so that a check reads as a list of statements."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def add(self, status: Status, check: str, evidence: str, remedy: str = "") -> None:
        """Another finding; `ok`, `warn`, `fail` and `na` are this with a status."""
        self.append(Finding(self.name, check, status, evidence, remedy))

    ok = partialmethod(add, "ok")
    warn = partialmethod(add, "warn")
    fail = partialmethod(add, "fail")
    na = partialmethod(add, "n/a")

    def judge(self, check: str, evidence: str, *, fail: str = "", warn: str = "", tip: str = "") -> None:
        """What was seen is a failure or a warning where there is a remedy for it, else it is well."""
        self.add("fail" if fail else "warn" if warn else "ok", check, evidence, fail or warn or tip)


@dataclass(frozen=True)
class OpCheck:
    """One comparison: `error` is the largest difference over the largest wanted value (None: not run)."""

    stage: str
    op: str
    case: str
    status: Literal["ok", "fail", "skip"]
    error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0
    detail: str = ""
    remedy: str = ""

    def describe(self) -> str:
        """One row of the self-test's table."""
        error = "" if self.error is None else f"{self.error:9.2e}"
        bound = "" if self.tolerance is None else f"<= {self.tolerance:.0e}"
        text = f"{self.detail}. {self.remedy}" if self.remedy else self.detail
        return f"  [{self.status:^4}] {self.op:<18} {self.case:<46} {error:>9} {bound:<9} {text}".rstrip()


def as_table(items: Iterable[Any]) -> pandas.DataFrame:
    """One row per finding (or per comparison of the self-test)."""
    import pandas

    return pandas.DataFrame([asdict(item) for item in items])


def render(findings: Sequence[Finding], width: int = 110) -> str:
    """Terminal text: `render_sections`, an empty line, `totals`."""
    return f"{render_sections(findings, width)}\n\n{totals(findings)}"


def render_sections(findings: Sequence[Finding], width: int = 110) -> str:
    """Sections in order, remedies below their item; a section that does not apply takes one line."""
    lines: list[str] = []
    for name, group in groupby(findings, key=lambda finding: finding.section):
        lines += _render_section(name, list(group), width)
    return "\n".join(lines)


def totals(findings: Sequence[Finding]) -> str:
    """Number of findings by status, and the failure to begin with: later ones often follow from it."""
    counts = Counter(finding.status for finding in findings)
    text = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    first = next((finding for finding in findings if finding.status == "fail"), None)
    return text if first is None else f"{text}. Begin with: {first.section}, {first.check}"


def _render_section(name: str, items: list[Finding], width: int) -> list[str]:
    reasons = {item.evidence for item in items}
    if len(reasons) == 1 and all(item.status == "n/a" for item in items):
        return [f"{name}: not applicable ({items[0].evidence})"]
    lines = [name]
    label_width = max(len(item.check) for item in items)
    for item in items:
        lines += _hanging(f"  [{item.status:^4}] {item.check:<{label_width}}  ", item.evidence, width)
        if item.remedy:
            lines += _hanging("         -> " if item.status != "ok" else "         tip: ", item.remedy, width)
    return lines


def _hanging(head: str, text: str, width: int) -> list[str]:
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    wrapper.subsequent_indent = " " * min(len(head), 36)
    return wrapper.wrap(head + text)
