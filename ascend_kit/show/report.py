"""One HTML page per run: its executed notebooks with the code folded, its facts and parameters at the top.

The page is a single file without scripts and without anything to load, and its content security policy
forbids both, so it opens offline and is safe to pass on.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ascend_kit.files import write_atomic
from ascend_kit.messages import Finding
from ascend_kit.results import RunFolder, run_parameters
from ascend_kit.show import render
from ascend_kit.stages import RunRecord, Stage

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SKIPPED_TAGS = frozenset(("papermill-error-cell-tag",))
STATES = {
    "ok": "ok",
    "alarm": "alarm",
    "failed": "failed",
    "skipped": "skipped",
    "interrupted": "interrupted",
    "running": "not finished",
    "waiting": "not run",
}


def write_report(run_folder: str | Path) -> Path:
    """Write report.html from a run folder's record, JSON files and executed notebooks."""
    folder = Path(run_folder)
    run = RunRecord.read(folder)
    names = [path.stem for path in folder.glob("*.ipynb")]
    sections = [
        _section(folder, name, run.stages.get(name) or Stage(name, "unknown")) for name in sorted({*names, *run.stages})
    ]
    body = "\n".join(
        [
            _header(folder, run),
            _status_table(sections),
            _brief(folder, sections),
            _facts(run),
            _parameters(folder),
            *[section["html"] for section in sections],
        ]
    )
    title = f"{_run_title(folder)} · Ascend inference report"
    page = PAGE.format(
        title=escape(title), policy=POLICY, style=STYLE + _highlight_style(), toc=_toc(sections), body=body
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _run_title(folder: Path) -> str:
    path = folder.resolve()
    return f"{path.parent.name} / {path.name}"


def _header(folder: Path, run: RunRecord) -> str:
    state = run.state if run.stages else "unknown"
    return (
        f'<header id="top"><h1>{escape(_run_title(folder))} {_badge(state)}</h1>'
        f'<p class="note">Qwen inference on Ascend: speed and correctness of one run. '
        f"Last change {escape(run.updated or 'unknown')}.</p></header>"
    )


def _badge(state: str) -> str:
    return f'<span class="badge {escape(state)}">{escape(STATES.get(state, state))}</span>'


def _status_table(sections: list[dict[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td><a href="#{section["id"]}">{escape(section["name"])}</a></td>'
        f'<td>{_badge(section["state"])}</td><td class="number">{section["duration"]}</td>'
        f"<td>{escape(section['error'])}</td></tr>"
        for section in sections
    )
    return (
        '<h2 id="status">Notebooks</h2><div class="scroll"><table><thead><tr><th>notebook</th><th>state</th>'
        f"<th>time (s)</th><th>error</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _brief(folder: Path, sections: list[dict[str, Any]]) -> str:
    """The findings each notebook wrote into its result file."""
    parts = []
    for section in sections:
        findings = _read_json(folder / f"{section['name']}.json").get("findings") or []
        items = "".join(f"<li>{escape(str(Finding.from_row(row)))}</li>" for row in findings)
        if items:
            parts.append(f'<h3><a href="#{section["id"]}">{escape(section["title"])}</a></h3><ul>{items}</ul>')
    return f'<h2 id="findings">Findings</h2>{"".join(parts)}' if parts else ""


def _facts(run: RunRecord) -> str:
    if not run.created:
        return ""
    source = run.source
    commit = (source.get("commit") or "unknown")[:12] + (" with local changes" if source.get("dirty") else "")
    rows = {"created": run.created, "source commit": commit, "seed": run.seed}
    for stage in run.stages.values():
        rows |= _stage_facts(stage.facts)
    cells = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
        for key, value in rows.items()
        if value is not None
    )
    table = f'<div class="scroll"><table class="facts"><tbody>{cells}</tbody></table></div>'
    return f'<h2 id="facts">Run facts</h2>{table}'


def _stage_facts(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage said of its device, as readable rows; stages agree unless the run was moved."""
    device = stage.get("device") or {}
    rows = {"device": f"{device['kind']}: {device['name']}"} if device.get("name") else {}
    if device.get("total_memory_bytes"):
        rows["device memory, GiB"] = f"{device['total_memory_bytes'] / 2**30:.1f}"
    peak = device.get("peak") or {}
    if peak.get("source"):
        rows["nominal peaks used"] = f"{peak['name']} ({peak['source']})"
    return rows | {f"{name} version": version for name, version in (device.get("versions") or {}).items()}


def _parameters(folder: Path) -> str:
    values = run_parameters(RunFolder(folder))
    if not values:
        return ""
    text = escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    folded = f'<details><summary>all parameters</summary><pre class="plain">{text}</pre></details>'
    return f'<h2 id="parameters">Parameters</h2>{folded}'


# --- one notebook -----------------------------------------------------------------------------------------


def _section(folder: Path, name: str, stage: Stage) -> dict[str, Any]:
    """One notebook: id, title, headings for the table of contents, status texts and its HTML."""
    section = {
        "name": name,
        "id": f"nb-{name}",
        "title": name,
        "headings": [],
        "state": stage.state,
        "error": stage.error or "; ".join(alarm["text"] for alarm in stage.alarms),
        "duration": "" if stage.duration_s is None else f"{stage.duration_s:.1f}",
    }
    path = folder / f"{name}.ipynb"
    cells = _read_json(path).get("cells", [])
    body = "".join(_cell(cell, section) for cell in cells if not SKIPPED_TAGS & set(cell["metadata"].get("tags", [])))
    if section["error"]:
        body = f'<div class="error"><b>{escape(section["error"])}</b></div>' + body
    head = f'<p class="source">{escape(name)} {_badge(section["state"])}</p>'
    section["html"] = f'<section id="{section["id"]}">{head}{body}</section>'
    return section


def _cell(cell: dict[str, Any], section: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        prose = render.markdown(source, lambda level, text: _heading(level, text, section))
        return f'<div class="prose">{prose}</div>'
    if cell["cell_type"] != "code" or not source.strip():
        return ""
    outputs = "".join(map(_output, render.joined_streams(cell.get("outputs", []))))
    return f'<div class="cell">{render.code(source, cell.get("id", "code"))}{outputs}</div>'


def _output(item: dict[str, Any]) -> str:
    picture = render.image(item)
    if picture is None:
        return render.output(item)
    url, about = picture
    size = f' width="{int(about["width"])}"' if isinstance(about.get("width"), (int, float)) else ""
    return f'<figure><img src="{url}" alt="{escape(str(about.get("alt", "figure")))}"{size}></figure>'


def _heading(level: int, text: str, section: dict[str, Any]) -> str:
    if level == 1 and section["title"] == section["name"]:
        section["title"] = _plain_text(text)
        return f"<h2>{text}</h2>"
    anchor = f"{section['id']}-{len(section['headings'])}"
    section["headings"].append((anchor, _plain_text(text)))
    return f'<h{min(6, level + 1)} id="{anchor}">{text}</h{min(6, level + 1)}>'


def _plain_text(markup: str) -> str:
    from html import unescape

    return unescape(re.sub(r"<[^>]+>", "", markup))


def _toc(sections: list[dict[str, Any]]) -> str:
    lines = ['<a href="#top">Overview</a>']
    for section in sections:
        lines.append(f'<a href="#{section["id"]}">{escape(section["title"])}</a>')
        lines += [f'<a class="sub" href="#{anchor}">{escape(text)}</a>' for anchor, text in section["headings"]]
    return "\n".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _highlight_style() -> str:
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="friendly").get_style_defs(".code pre")


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><nav>{toc}</nav><main>{body}</main></body></html>
"""

STYLE = """
:root { --ink: #1c2330; --soft: #5c6675; --line: #dfe3ea; --wash: #f6f7f9; --link: #1a5fb4;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; display: grid;
  grid-template-columns: 250px minmax(0, 1fr);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 24px 16px; font-size: 13px;
  background: var(--wash); border-right: 1px solid var(--line); }
nav a { display: block; padding: 3px 6px; margin-top: 8px; font-weight: 600; color: var(--ink);
  text-decoration: none; }
nav a.sub { font-weight: 400; color: var(--soft); margin-top: 0; padding-left: 16px; }
nav a:hover { color: var(--link); }
main { padding: 24px 40px 80px; max-width: 1120px; width: 100%; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 21px; margin: 32px 0 10px; }
h3 { font-size: 16px; margin: 22px 0 8px; }
a { color: var(--link); }
.note, .source { color: var(--soft); }
.source { font-size: 13px; margin: 0; }
section { border-top: 2px solid var(--line); margin-top: 48px; padding-top: 14px; }
section > .prose:first-of-type h2 { margin-top: 4px; }
.scroll { overflow-x: auto; max-width: 100%; margin: 8px 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); white-space: nowrap; background: var(--wash); }
.cell td, .cell tbody th { max-width: 560px; overflow-wrap: break-word; }
.cell th { white-space: nowrap; }
td.number { text-align: right; }
table.facts th { font-weight: 600; white-space: nowrap; }
pre { font: 12.5px/1.5 var(--mono); overflow-x: auto; margin: 6px 0; padding: 8px 12px;
  background: var(--wash); border-radius: 4px; }
code { font: 0.9em var(--mono); background: var(--wash); padding: 1px 4px; border-radius: 3px; }
pre.stream { background: #fff; border: 1px solid var(--line); white-space: pre-wrap; }
pre.stderr { background: #fff8ec; border-color: #f0dcb4; }
details > summary { cursor: pointer; color: var(--soft); font-size: 12px; width: max-content; }
details.code { margin: 4px 0; }
figure { margin: 12px 0; }
figure img { max-width: min(100%, 900px); height: auto; }
.badge { font-size: 12px; font-weight: 600; padding: 2px 9px; border-radius: 10px; background: #e8ebf0;
  color: #3d4757; white-space: nowrap; }
.badge.ok { background: #dff3e4; color: #14622d; }
.badge.failed, .badge.alarm { background: #fbe0de; color: #99221a; }
.badge.skipped, .badge.interrupted, .badge.running { background: #fdeecb; color: #7a5200; }
h1 .badge { vertical-align: middle; }
.error { border-left: 4px solid #c8372d; background: #fdf1f0; padding: 8px 14px; margin: 10px 0; }
.error pre { background: transparent; padding: 4px 0; }
.error b { overflow-wrap: anywhere; }
@media (max-width: 860px) {
  body { display: block; }
  nav { position: static; height: auto; border-right: 0; }
  main { padding: 16px; }
}
@media print {
  nav { display: none; }
  body { display: block; }
  .scroll, pre { overflow: visible; white-space: pre-wrap; }
}
"""
