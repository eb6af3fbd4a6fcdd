"""Notebook cells as HTML that is safe to open: text is escaped, markup filtered by nh3, nothing is loaded.

Generated text counts as hostile: a prompt may hold a script element, and reports are opened by other people.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from html import escape
from typing import Any
from xml.etree import ElementTree

import nh3

from ascend_kit.messages import translate
from ascend_kit.show.drawing import TIP, TIP_SEPARATOR
from ascend_kit.show.tables import markup, visible

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
OVERWRITTEN = re.compile(r"[^\n]*\r")  # a terminal shows what was printed after the carriage return
LONG_OUTPUT_LINES = 40
TAGS = {
    *("table", "thead", "tbody", "tfoot", "tr", "th", "td", "caption", "colgroup", "col", "div", "span", "p", "b"),
    *("strong", "i", "em", "code", "pre", "br", "wbr", "hr", "ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("small", "sub", "sup", "a", "img", "details", "summary", "dl", "dt", "dd"),
}
# Elements that go together with what they hold.
DROPPED_WITH_CONTENT = {"script", "style", "iframe", "object", "template", "noscript", "svg", "math", "title"}
ATTRIBUTES = set(["colspan", "rowspan", "scope", "title", "alt", "width", "height", "align", "style"])
STYLES = {"text-align", "color", "background-color", "font-weight", "font-style", "white-space"}
SAFE_IMAGE = re.compile(r"^data:image/(png|jpeg|gif|svg\+xml);base64,[A-Za-z0-9+/=\s]+$")
SVG = "{http://www.w3.org/2000/svg}"
SVG_TAGS = frozenset(("svg", "g", "path", "use", "text", "tspan", "defs", "clipPath", "pattern", "rect", "image"))
SVG_ATTRIBUTES = frozenset(
    ("d", "x", "y", "width", "height", "viewBox", "transform", "preserveAspectRatio", "text-anchor", "patternUnits")
)
# What a dark page shows in its own colours; matplotlib writes these for text, grid and background.
THEME = {"#000000": "--ink", "#222222": "--ink", "#ffffff": "--paper", "#e5e5e5": "--line", "#444444": "--soft",
         "#555555": "--soft", "#7f7f7f": "--grey", "#0072b2": "--blue", "#d55e00": "--orange", "#009e73": "--teal",
         "#6a3d9a": "--violet", "#b15928": "--brown", "#c00000": "--red"}  # fmt: skip
THEME_COLOUR = re.compile("|".join(THEME), re.IGNORECASE)
WIDGET = "application/vnd.jupyter.widget-view+json"


def sanitize(text: str) -> str:
    """The markup with only harmless elements and attributes left, every element closed."""
    return nh3.clean(
        text,
        tags=TAGS,
        clean_content_tags=DROPPED_WITH_CONTENT,
        attributes={"*": ATTRIBUTES, "a": {"href"}, "img": {"src"}},
        attribute_filter=lambda tag, name, value: value if name != "src" or SAFE_IMAGE.match(value) else None,
        url_schemes={"http", "https", "mailto", "data"},
        filter_style_properties=STYLES,
        link_rel="noopener noreferrer",
    )


def markdown(text: str, heading: Callable[[int, str], str]) -> str:
    """Markdown as HTML, raw HTML in it escaped; `heading(level, inner_html)` renders each heading."""
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **attrs: Any) -> str:
            return heading(level, text)

        def image(self, text: str, url: str, title: str | None = None) -> str:
            # Nothing may be loaded from outside; an embedded image may stay.
            return f'<img src="{escape(url)}" alt="{text}">' if SAFE_IMAGE.match(url) else f"[{text}]"

    return str(
        mistune.create_markdown(renderer=Renderer(escape=True), plugins=["table", "strikethrough"])(visible(text))
    )


def code(source: str, name: str) -> str:
    """Highlighted Python source in a fold called `name`."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    body = highlight(visible(source), PythonLexer(), HtmlFormatter(nowrap=True))
    return f'<details class="code"><summary>{markup(name)}</summary><pre>{body}</pre></details>'


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
    """One cell output as HTML; figures are for `report`, which numbers them."""
    kind = item["output_type"]
    if kind == "stream":
        return _text(_joined(item["text"]), f"stream {escape(item.get('name', 'stdout'))}")
    if kind == "error":
        return error(item["ename"], item["evalue"], "\n".join(item.get("traceback") or []))
    data = item.get("data", {})
    if WIDGET in data and "text/html" not in data:
        return f'<p class="note">{escape(translate("report.widget"))}</p>'
    if "text/html" in data:
        return f'<div class="scroll">{sanitize(_joined(data["text/html"]))}</div>'
    if "text/markdown" in data:
        return markdown(
            _joined(data["text/markdown"]), lambda level, text: f"<h{min(6, level + 2)}>{text}</h{min(6, level + 2)}>"
        )
    return _text(_joined(data.get("text/plain", "")), "plain")


def error(name: str, text: str, trace: str = "") -> str:
    """What went wrong in one line; the traceback in a fold."""
    frames = _text(trace, "trace")
    folded = f"<details><summary>{escape(translate('report.traceback'))}</summary>{frames}</details>" if frames else ""
    return f'<div class="error"><b>{markup(f"{name}: {text}"[:600])}</b>{folded}</div>'


def image(item: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(data URL, metadata) of an output that is a picture, else None."""
    data, metadata = item.get("data", {}), item.get("metadata", {})
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            about = metadata.get(kind)
            packed = escape(re.sub(r"\s", "", _joined(data[kind])))
            return f"data:{kind};base64,{packed}", about if isinstance(about, dict) else {}
    if "image/svg+xml" in data:
        packed = base64.b64encode(_joined(data["image/svg+xml"]).encode()).decode()
        return f"data:image/svg+xml;base64,{packed}", {}
    return None


def inline_svg(text: str, prefix: str, alt: str) -> str:
    """A chart's SVG for use inside a page: known elements and attributes only, ids with `prefix`, theme colours.

    The texts that `drawing.tip` put into ids become titles of the points. Empty when the file is no SVG.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return ""
    for element in root.iter():
        if (own := element.get("id", "")).startswith(TIP):
            points = element.findall(f".//{SVG}use") or element.iter(f"{SVG}path")
            for point, told in zip(points, own.removeprefix(TIP).split(TIP_SEPARATOR), strict=False):
                point.set(TIP, told)
    shown = f'<svg role="img" aria-label="{markup(alt)}" '
    return _svg_element(root, prefix).replace("<svg ", shown, 1)


def _svg_element(element: ElementTree.Element, prefix: str) -> str:
    name = element.tag.rpartition("}")[2]
    if name not in SVG_TAGS:
        return ""
    inner = f"<title>{markup(element.attrib[TIP])}</title>" if TIP in element.attrib else ""
    inner += escape(visible(element.text or "")) if name in ("text", "tspan") else ""
    inner += "".join(_svg_element(child, prefix) for child in element)
    return f"<{name}{''.join(_svg_attributes(element, prefix, name))}>{inner}</{name}>"


def _svg_attributes(element: ElementTree.Element, prefix: str, name: str) -> Iterator[str]:
    for key, value in element.items():
        key = key.rpartition("}")[2]
        if key == "id" and name in ("path", "clipPath", "pattern"):
            value = f"{prefix}-{value}"
        elif key == "href":
            if not value.startswith("#") and not SAFE_IMAGE.match(value):
                continue
            value = f"#{prefix}-{value[1:]}" if value.startswith("#") else value
        elif key in ("style", "clip-path", "fill", "stroke"):
            value = THEME_COLOUR.sub(lambda m: f"var({THEME[m[0].lower()]})", value)
            value = re.sub(r"url\(#", f"url(#{prefix}-", value)
            if re.search(r"url\((?!#)|expression|@import", value):
                continue
        elif key not in SVG_ATTRIBUTES:
            continue
        yield f' {key}="{escape(value)}"'


def _text(text: str, style: str) -> str:
    text = OVERWRITTEN.sub("", ANSI.sub("", text).replace("\r\n", "\n")).rstrip()
    if not text:
        return ""
    body = f'<pre class="{style}">{escape(visible(text))}</pre>'
    lines = text.count("\n") + 1
    if lines <= LONG_OUTPUT_LINES:
        return body
    title = escape(translate("report.long_output", count=lines))
    return f'<details class="long"><summary>{title}</summary>{body}</details>'


def _joined(text: str | list[str]) -> str:
    return "".join(text) if isinstance(text, list) else str(text)
