"""One HTML page per run: the answer on the first screen, the findings, then its executed notebooks, code folded.

The page is a single file with nothing to load; its content security policy allows one script, by its hash, so it opens
offline and is safe to pass on. outputs/index.html lists all runs. Charts are the SVG that matplotlib wrote: 12 figures
are 0.4 MB, where plotly's basic bundle is 1.19 MB and vega with its interpreter 0.84 MB before the first figure.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup

from ascend_kit.files import GIB, to_json, write_atomic
from ascend_kit.messages import LANGUAGES, Finding, in_language, language_in_use, phrase, translate, use_language
from ascend_kit.params.notebook import tagged
from ascend_kit.results import RunFolder, run_parameters, run_records
from ascend_kit.show import headline, render, tables
from ascend_kit.stages import RunRecord, Stage

HERE = Path(__file__).parent
SKIPPED_TAGS = frozenset(("papermill-error-cell-tag",))
SHOWING = re.compile(r"^\s*(tables|charts|explorer)\.\w+\(.*$", re.MULTILINE)  # a cell that only shows something
CONCLUDES = "findings.conclude("  # its printed findings stand at the top of the report
LINKED = ("*.ipynb", "*.csv", "rows.jsonl", "scores.jsonl", "documents.jsonl*", "generations.json", "figures/*.png")
AS_CSV = ("rows", "scores")


@dataclass
class Section:
    """One notebook in the report."""

    name: str
    state: str
    error: str = ""
    duration: str = ""
    title: str = ""
    headings: list[tuple[str, str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    body: str = ""
    shows_error: bool = False

    @property
    def id(self) -> str:
        return f"nb-{self.name}"


class Figures:
    """Numbers the figures of a page and writes their captions; `conditions` are said in every caption."""

    def __init__(self, folder: Path, conditions: str) -> None:
        self.folder, self.conditions, self.count = folder, conditions, 0
        self.alts: dict[str, str] = {}  # figure -> its values in words

    def html(self, url: str, about: dict[str, Any]) -> str:
        """A figure of an output: its SVG where one was saved, else the picture of the notebook."""
        self.count += 1
        name, alt = str(about.get("figure", "")), str(about.get("alt", about.get("caption", "figure")))
        self.alts[name] = alt
        drawing = self.drawing(name, alt, f"f{self.count}")
        width = about.get("width")
        size = f' width="{int(width)}"' if isinstance(width, (int, float)) else ""
        picture = drawing or f'<img src="{url}" alt="{tables.markup(alt)}"{size}>'
        link = f' <a href="figures/{quote(name)}.png">PNG</a>' if drawing else ""
        title = translate("report.figure", number=self.count, caption=about.get("caption", alt))
        told = f"{title} {self.conditions}" if about.get("of_this_run", True) else title
        return f"<figure>{picture}<figcaption>{tables.markup(told)}{link}</figcaption></figure>"

    def drawing(self, name: str, alt: str, prefix: str) -> str:
        """The saved SVG of that name for use inside the page; nothing where there is none."""
        path = self.folder / "figures" / f"{name}.svg"
        if not re.fullmatch(r"[\w-]+", name) or not path.is_file():
            return ""
        drawn = render.inline_svg(path.read_text(encoding="utf-8"), prefix, alt)
        sides = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
        shape = " tall" if sides and float(sides[2]) > float(sides[1]) else ""  # on paper it keeps a readable width
        return f'<div class="drawing{shape}">{drawn}</div>' if drawn else ""


def write_report(run_folder: str | Path) -> Path:
    """Write report.html, report.json (its first screen in each language) and the index beside it; returns the path."""
    folder = Path(run_folder).resolve()
    run, saved = RunRecord.read(folder), RunFolder(folder)
    parameters = run_parameters(saved)
    use_language(parameters.get("language", "en"))
    about = headline.about(run, parameters)
    figures = Figures(folder, ", ".join(about.values()))
    names = sorted({*(path.stem for path in folder.glob("*.ipynb")), *run.stages})
    sections = [_section(figures, name, run.stages.get(name) or Stage(name, "unknown")) for name in names]
    found = {name: _findings(folder, name) for name in names}
    every = [finding for some in found.values() for finding in some]
    above, screens = headline.serious(every), {}
    for section in sections:
        section.findings = [str(finding) for finding in found[section.name] if finding not in above]
    for language in LANGUAGES:
        with in_language(language):
            screens[language] = headline.first_screen(saved, run, every) | {"about": headline.about(run, parameters)}
    first = screens[language_in_use()]
    write_atomic(folder / "report.json", to_json({"updated": run.updated, **screens}, indent=1) + "\n")
    for name in AS_CSV:
        if len(table := saved.load(name)):
            write_atomic(folder / f"{name}.csv", table.to_csv(index=False))
    drawn = (figures.drawing(name, figures.alts.get(name, name), "top") for name in ("comparison", "tradeoff"))
    chart = next(filter(None, drawn), "")
    facts, written = tables.facts(_facts(run)), yaml.safe_dump(parameters, sort_keys=False, allow_unicode=True)
    report = {
        **first,
        "state": run.state if run.stages else "unknown",
        "updated": run.updated or "",
        "sections": sections,
        "chart": Markup(f"<figure>{chart}</figure>" if chart else ""),
        "files": sorted(str(path.relative_to(folder)) for pattern in LINKED for path in folder.glob(pattern)),
        "facts": Markup(facts.data if facts else ""),
        "parameters": tables.visible(written) if parameters else "",
    }
    title = f"{folder.parent.name} / {folder.name}"
    _write_page(folder / "report.html", title=title, report=report)
    write_index(folder.parent.parent)
    return Path(run_folder) / "report.html"


def write_index(root: Path) -> Path:
    """Write index.html in the language in use: every run below `root`, newest first, with its first screen."""
    runs = []
    for folder, run in run_records(root):
        path = folder.path
        first = _read_json(path / "report.json").get(language_in_use(), {})
        numbers = {entry["key"]: entry["listed"] for entry in first.get("numbers", [])}
        name = f"{path.parent.name}/{path.name}"
        link = quote(f"{name}/report.html") if (path / "report.html").is_file() else ""
        updated = (run.updated or "")[:16].replace("T", " ")
        runs.append({
            "name": name, "state": run.state, "updated": updated, "verdict": first.get("verdict", ""),
            "link": link, "about": ", ".join(first.get("about", {}).values()),
            "numbers": [numbers.get(name, "") for name in headline.NUMBERS],
        })  # fmt: skip
    columns = [*(translate(f"index.{name}") for name in ("run", "state", "changed")),
               *(translate(f"number.{name}") for name in headline.NUMBERS),
               *(translate(f"index.{name}") for name in ("about", "verdict"))]  # fmt: skip
    _write_page(root / "index.html", title=translate("index.title"), report=None, runs=runs, columns=columns)
    return root / "index.html"


def _write_page(path: Path, **values: Any) -> None:
    from jinja2 import Environment, FileSystemLoader
    from pygments.formatters import HtmlFormatter

    script, style = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    code = HtmlFormatter(style="friendly").get_style_defs(".code pre")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code pre")
    style += f"{code}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n.code pre {{ background: var(--wash) }}"
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("report.html")
    safe = {"style": Markup(style), "script": Markup(script)}
    write_atomic(path, page.render(say=translate, language=language_in_use(), policy=policy, **safe, **values))


def _findings(folder: Path, name: str) -> list[Finding]:
    """What a notebook concluded; a stage that runs again has not concluded yet."""
    return [Finding.from_row(row) for row in _read_json(folder / f"{name}.json").get("findings") or []]


def _facts(run: RunRecord) -> dict[str, Any]:
    """When and from which commit, and what the stages said of their device."""
    if not run.created:
        return {}
    commit = str(run.source.get("commit") or translate("state.unknown"))[:12]
    device = headline.device_facts(run)
    peak, size = device.get("peak") or {}, device.get("total_memory_bytes")
    rows = {
        "created": run.created,
        "commit": translate("facts.changed", commit=commit) if run.source.get("dirty") else commit,
        "seed": run.seed,
        "device": f"{device['kind']}: {device['name']}" if device.get("name") else None,
        "memory": f"{size / GIB:.1f}" if size else None,
        "peaks": f"{peak['name']} ({peak['source']})" if peak.get("source") else None,
    }
    named = {translate(f"facts.{key}"): value for key, value in rows.items()}
    versions = device.get("versions") or {}
    return named | {translate("facts.version", name=name): text for name, text in versions.items()}


# --- one notebook -----------------------------------------------------------------------------------------


def _section(figures: Figures, name: str, stage: Stage) -> Section:
    error = stage.error or "; ".join(phrase(alarm["text"]) for alarm in stage.alarms)
    duration = "" if stage.duration_s is None else f"{stage.duration_s:.1f}"
    section = Section(name, stage.state, error, duration, title=name)
    notebook = _read_json(figures.folder / f"{name}.ipynb")
    cells = [cell for cell in notebook.get("cells", []) if not tagged(cell, *SKIPPED_TAGS)]
    section.body = "".join(_cells(cells, section, figures))
    return section


def _cells(cells: list[dict[str, Any]], section: Section, figures: Figures) -> Iterator[str]:
    """The cells as HTML; a cell that was to show something and had nothing goes together with the prose above it."""
    prose = ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield prose
            text = render.markdown(source, lambda level, text: _heading(level, text, section))
            prose = f'<div class="prose">{text}</div>'
        elif cell["cell_type"] == "code" and source.strip():
            items = render.joined_streams(cell.get("outputs", []))
            if CONCLUDES in source:
                items = [item for item in items if item["output_type"] == "error"]
            outputs = "".join(_output(item, section, figures) for item in items)
            if not outputs and SHOWING.match(source.strip().splitlines()[-1]):
                prose = prose if "<h" in prose else ""
                continue
            yield prose
            prose = ""
            code = render.code(source, translate("report.code", cell=_cell_name(cell)))
            yield f'<div class="cell">{code}{outputs}</div>'
    yield prose


def _cell_name(cell: dict[str, Any]) -> str:
    return "injected parameters" if tagged(cell, "injected-parameters") else cell.get("id", "")


def _output(item: dict[str, Any], section: Section, figures: Figures) -> str:
    section.shows_error = section.shows_error or item["output_type"] == "error"
    picture = render.image(item)
    return render.output(item) if picture is None else figures.html(*picture)


def _heading(level: int, text: str, section: Section) -> str:
    plain = unescape(re.sub(r"<[^>]+>", "", text))
    if level == 1 and section.title == section.name:
        section.title = plain
        return f"<h2>{text}</h2>"
    anchor = f"{section.id}-{len(section.headings)}"
    section.headings.append((anchor, plain))
    return f'<h{min(6, level + 1)} id="{anchor}">{text}</h{min(6, level + 1)}>'


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
