"""Notebook cells as HTML that is safe to open: text is escaped, markup filtered, nothing is loaded.

Generated text counts as hostile: a prompt may hold a script element, and reports are opened by other people.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from typing import Any

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONG_OUTPUT_LINES = 40
ALLOWED_TAGS = frozenset(
    [
        "table",
        "thead",
        "tbody",
        "tfoot",
        "tr",
        "th",
        "td",
        "caption",
        "colgroup",
        "col",
        "div",
        "span",
        "p",
        "b",
        "strong",
        "i",
        "em",
        "code",
        "pre",
        "br",
        "hr",
        "ul",
        "ol",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "small",
        "sub",
        "sup",
        "a",
        "img",
        "details",
        "summary",
        "dl",
        "dt",
        "dd",
    ]
)
VOID_TAGS = frozenset(("br", "hr", "img", "col"))
# Elements that go together with what they hold.
DROPPED_WITH_CONTENT = frozenset(
    ("script", "style", "iframe", "object", "template", "noscript", "svg", "math", "title")
)
ALLOWED_ATTRIBUTES = frozenset(("colspan", "rowspan", "scope", "title", "alt", "width", "height", "align"))
SAFE_LINK = re.compile(r"^(https?://|#|mailto:)", re.IGNORECASE)
SAFE_IMAGE = re.compile(r"^data:image/(png|jpeg|gif|svg\+xml);base64,[A-Za-z0-9+/=\s]+$")
SAFE_STYLE = re.compile(
    r"^\s*(text-align|min-width|color|background-color|font-weight|font-style|white-space)\s*:\s*[\w#%. -]+$"
)


class _Sanitizer(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.open: list[str] = []
        self.dropping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in DROPPED_WITH_CONTENT:
            self.dropping += 1
        elif not self.dropping and tag in ALLOWED_TAGS:
            self.out.append(f"<{tag}{''.join(_attribute(name, value or '') for name, value in attrs)}>")
            if tag not in VOID_TAGS:
                self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in DROPPED_WITH_CONTENT:
            self.dropping = max(0, self.dropping - 1)
        elif not self.dropping and tag in self.open:
            while self.open:
                last = self.open.pop()
                self.out.append(f"</{last}>")
                if last == tag:
                    break

    def handle_data(self, data: str) -> None:
        if not self.dropping:
            self.out.append(escape(data))


def _attribute(name: str, value: str) -> str:
    if name == "style":
        value = "; ".join(part.strip() for part in value.split(";") if SAFE_STYLE.match(part))
        keep = bool(value)
    else:
        keep = (
            name in ALLOWED_ATTRIBUTES
            or (name == "href" and bool(SAFE_LINK.match(value)))
            or (name == "src" and bool(SAFE_IMAGE.match(value)))
        )
    return f' {name}="{escape(value)}"' if keep else ""


def sanitize(markup: str) -> str:
    """The markup with only harmless elements and attributes left, every element closed."""
    parser = _Sanitizer()
    parser.feed(markup)
    parser.close()
    return "".join(parser.out) + "".join(f"</{tag}>" for tag in reversed(parser.open))


def markdown(text: str, heading: Callable[[int, str], str]) -> str:
    """Markdown as HTML, raw HTML in it escaped; `heading(level, inner_html)` renders each heading."""
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **attrs: Any) -> str:
            return heading(level, text)

        def image(self, text: str, url: str, title: str | None = None) -> str:
            # Nothing may be loaded from outside; an embedded image may stay.
            return f'<img src="{escape(url)}" alt="{text}">' if SAFE_IMAGE.match(url) else f"[{text}]"

    return mistune.create_markdown(renderer=Renderer(escape=True), plugins=["table", "strikethrough"])(text)


def code(source: str) -> str:
    """Highlighted Python source, folded."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    body = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))
    return f'<details class="code"><summary>code</summary><pre>{body}</pre></details>'


def joined_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs with neighbouring pieces of one stream made one."""
    joined: list[dict[str, Any]] = []
    for item in outputs:
        last = joined[-1] if joined else {}
        if item["output_type"] == "stream" == last.get("output_type") and item["name"] == last["name"]:
            joined[-1] = {**last, "text": _joined(last["text"]) + _joined(item["text"])}
        else:
            joined.append(item)
    return joined


def output(item: dict[str, Any]) -> str:
    """One cell output as HTML."""
    kind = item["output_type"]
    if kind == "stream":
        return _text(_joined(item["text"]), f"stream {item.get('name', 'stdout')}")
    if kind == "error":
        trace = ANSI.sub("", "\n".join(item.get("traceback") or [])) or f"{item['ename']}: {item['evalue']}"
        head = f"<b>{escape(item['ename'])}: {escape(item['evalue'][:600])}</b>"
        return f'<div class="error">{head}{_text(trace, "trace")}</div>'
    return _rich(item.get("data", {}), item.get("metadata", {}))


def _rich(data: dict[str, Any], metadata: dict[str, Any]) -> str:
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            packed = re.sub(r"\s", "", _joined(data[kind]))
            return _image(kind, packed, metadata.get(kind, {}), data)
    if "image/svg+xml" in data:
        packed = base64.b64encode(_joined(data["image/svg+xml"]).encode()).decode()
        return _image("image/svg+xml", packed, {}, data)
    if "application/vnd.jupyter.widget-view+json" in data:
        return '<p class="note">An interactive control stands here when the notebook is open in JupyterLab.</p>'
    if "text/html" in data:
        return f'<div class="scroll">{sanitize(_joined(data["text/html"]))}</div>'
    if "text/markdown" in data:
        return markdown(
            _joined(data["text/markdown"]), lambda level, text: f"<h{min(6, level + 2)}>{text}</h{min(6, level + 2)}>"
        )
    return _text(_joined(data.get("text/plain", "")), "plain")


def _image(kind: str, packed: str, metadata: Any, data: dict[str, Any]) -> str:
    metadata = metadata if isinstance(metadata, dict) else {}
    alt = str(metadata.get("alt") or _joined(data.get("text/plain", "figure")))
    width = metadata.get("width")
    size = f' width="{int(width)}"' if isinstance(width, (int, float)) else ""
    return f'<figure><img src="data:{kind};base64,{escape(packed)}" alt="{escape(alt)}"{size}></figure>'


def _text(text: str, style: str) -> str:
    text = ANSI.sub("", text).rstrip()
    if not text:
        return ""
    body = f'<pre class="{style}">{escape(text)}</pre>'
    lines = text.count("\n") + 1
    if lines <= LONG_OUTPUT_LINES:
        return body
    return f'<details class="long"><summary>{lines} lines of output</summary>{body}</details>'


def _joined(text: str | list[str]) -> str:
    return "".join(text) if isinstance(text, list) else str(text)
