"""A folder of runs as one archive for mail: what a reader opens, and what the figures were drawn from."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ascend_kit.run.checks import RunError

# Weights, kernels' files and working copies stay at home; so do locks and half-written files, which begin with a dot.
LEFT_OUT = frozenset(("models", "work", "__pycache__", ".ipynb_checkpoints"))
LEFT_OUT_KINDS = frozenset((".safetensors", ".bin", ".pt", ".npy", ".lock"))
LINK = re.compile(r'<a [^>]*?href="([^"]+)"[^>]*>(.*?)</a>', re.DOTALL)


def pack(folder: Path, target: Path, *, with_rows: bool = True) -> int:
    """Write the runs below `folder` (all, one experiment or one run) to the zip file `target`; bytes of the archive.

    Paths inside begin with the folder's name. Without `with_rows` the .jsonl tables stay out, which are the most of a
    large run. A link to what is not inside becomes plain text. RunError when there is no report, or when the target
    lies inside the folder.
    """
    folder = folder.resolve()
    if folder in target.resolve().parents:
        raise RunError(f"{target} lies inside {folder}, which is to be packed; name a file elsewhere")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_wanted(path.relative_to(folder))]
    files = [path for path in files if with_rows or ".jsonl" not in path.suffixes]
    if not any(path.name == "report.html" for path in files):
        raise RunError(f"{folder} holds no report.html; write one with: python -m ascend_kit report <run folder>")
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                name = str(Path(folder.name) / path.relative_to(folder))
                if path.suffix == ".html":
                    archive.writestr(name, _with_living_links(path, set(files)))
                else:
                    archive.write(path, name)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def _is_wanted(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and not LEFT_OUT & set(path.parts) and path.suffix not in LEFT_OUT_KINDS


def _with_living_links(page: Path, packed: Collection[Path]) -> str:
    def kept(link: re.Match[str]) -> str:
        target = urlsplit(link[1])
        is_there = not target.path or Path(os.path.normpath(page.parent / unquote(target.path))) in packed
        return link[0] if target.scheme or is_there else link[2]

    return LINK.sub(kept, page.read_text(encoding="utf-8"))
