"""Progress of long calls: a widget bar in the browser, plain lines headless, so that both copies read well.

Stored widgets are not drawn by static readers, hence the lines.
"""

from __future__ import annotations

import os
import time

# The Jupyter server names the session in the kernel's environment; headless executors do not.
BROWSER_VARIABLE = "JPY_SESSION_NAME"
LINE_EVERY_S = 5.0
LINE_EVERY_SHARE = 0.1


def in_browser() -> bool:
    """Whether this process is a kernel behind an open notebook and not a headless execution."""
    if BROWSER_VARIABLE not in os.environ:
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


class Progress:
    """A callback `(done, total, text)`, for every `on_progress` of this package; also a context manager.

    A call that returns to the start (another sweep with the same bar) starts a new count.
    """

    def __init__(self, label: str, *, browser: bool | None = None) -> None:
        self.label = label
        self._browser = in_browser() if browser is None else browser
        self._bar: _Bar | None = None  # made by the first call: work that was done before shows no bar
        self._start = self._last_line_s = time.monotonic()
        self._last_share = self._share = 0.0

    def __call__(self, done: float, total: float, text: str = "") -> None:
        share = done / total if total else 1.0
        if share < self._share:
            self._start, self._last_share, self._last_line_s = time.monotonic(), 0.0, 0.0
        self._share = share
        seconds = time.monotonic() - self._start
        time_text = _clock(seconds) + _remaining(share, seconds)
        line = f"{_count(done, text)}/{_count(total, text)} ({share:.0%}), {time_text}"
        if self._browser:
            self._bar = self._bar or _Bar(self.label)
            self._bar.update(share, f"{line}  {text}")
        elif self._is_due(share):
            self._last_share, self._last_line_s = share, time.monotonic()
            print(f"{self.label}: {line}{'  ' + text if text else ''}", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.finish(failed=kind is not None)

    def _is_due(self, share: float) -> bool:
        """The end always, else a tenth further or a while later: enough to follow, few enough to keep."""
        if share >= 1.0:
            return self._last_share < 1.0
        waited = time.monotonic() - self._last_line_s
        return waited >= LINE_EVERY_S or (share - self._last_share >= LINE_EVERY_SHARE and waited >= 1.0)


class _Bar:
    def __init__(self, label: str) -> None:
        import ipywidgets
        from IPython.display import display

        self._bar = ipywidgets.FloatProgress(value=0.0, max=1.0, description=label,
                                             style={"description_width": "initial"})  # fmt: skip
        self._text = ipywidgets.Label()  # a Label shows text as it is; generated text is never markup
        display(ipywidgets.HBox([self._bar, self._text]))

    def update(self, share: float, text: str) -> None:
        self._bar.value = share
        self._text.value = text

    def finish(self, *, failed: bool) -> None:
        self._bar.bar_style = "danger" if failed else "success"


def _count(value: float, text: str) -> str:
    """Counts as they are; where the caller counts bytes, MB."""
    return f"{value / 1e6:.1f} MB" if text.startswith("bytes") else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min" if minutes else f"{rest} s"


def _remaining(share: float, seconds: float) -> str:
    if not 0.0 < share < 1.0:
        return ""
    return f", about {_clock(seconds / share - seconds)} left"
