"""A figure on the disk and in the notebook at once, as an image that every reader can draw."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ascend_kit.results import RunFolder

# Figures are saved with 150 dots per inch; on a page an inch has 96 pixels, and a little less reads better.
PAGE_SCALE = 0.58


def keep(folder: RunFolder, name: str, figure: Figure, alt: str) -> Any:
    """Save figures/<name>.png and return it for display; `alt` describes it to who cannot see it."""
    from IPython.display import Image

    data = folder.save_figure(name, figure).read_bytes()
    (pixels,) = struct.unpack(">I", data[16:20])  # width in the PNG header
    return Image(data=data, format="png", width=round(pixels * PAGE_SCALE), alt=alt)
