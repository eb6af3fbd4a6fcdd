"""The rows of a sweep as they lie in a run folder: which point a row is of, and those that were asked for last.

Reads files only: results are shown without a device, and need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ascend_kit.identity import Identity
from ascend_kit.measure.metrics import Limits
from ascend_kit.results import newest_rows

if TYPE_CHECKING:
    import pandas

    from ascend_kit.results import RunFolder


class SweepError(ValueError):
    """The sweep asks for something that no engine could do, or some of its points could not be measured."""


@dataclass(frozen=True)
class Point:
    """One measurement: so many requests of these lengths, at most so many of them in flight, arriving in this way.

    Its fields are a row's key. Those of the load are None where they have no meaning; `data` stands for the content of
    a trace or of a user's prompts.
    """

    concurrency: int
    prompt_len: int
    output_len: int
    num_requests: int
    seed: int = 0
    ttft_limit_ms: float | None = None  # of goodput
    tpot_limit_ms: float | None = None
    itl_limit_ms: float | None = None
    e2e_limit_ms: float | None = None
    load: str = "closed"
    rate: float | None = None
    burstiness: float | None = None
    rate_end: float | None = None
    turns: int = 1
    think_s: float = 0.0
    shared_prefix: float = 0.0
    length_spread: str = "fixed"
    data: str | None = None
    repeat: int = 0

    def __str__(self) -> str:
        return f"{self.place}, repeat {self.repeat}"

    @property
    def place(self) -> str:
        """The load in words, the same for every repeat."""
        load = f"concurrency {self.concurrency}" if self.rate is None else f"{self.load} {self.rate:g} requests/s"
        return f"{load}, prompt {self.prompt_len}, output {self.output_len}"

    @property
    def load_parts(self) -> tuple[Any, ...]:
        """All that an engine is given to do: the key less the repeat and the limits of goodput."""
        return tuple(getattr(self, name) for name in KEY if name != "repeat" and not name.endswith("_limit_ms"))

    @property
    def longest_len(self) -> int:
        """Tokens of its longest request, the lengths as given."""
        return self.turns * (self.prompt_len + self.output_len)

    @property
    def limits(self) -> Limits:
        """Of goodput."""
        return Limits(self.ttft_limit_ms, self.tpot_limit_ms, self.itl_limit_ms, self.e2e_limit_ms)


RATE = "output_tokens_per_s"
KEY = tuple(item.name for item in fields(Point))
DEFAULTS = {item.name: item.default for item in fields(Point)}
# What makes two runs' speeds comparable: the key less how much and how often was measured, and the limits of goodput.
LOAD = tuple(name for name in KEY if name not in ("num_requests", "seed", "repeat") and not name.endswith("_limit_ms"))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """A row's key; a field that rows did not have once is at its default."""
    return tuple(row.get(name, DEFAULTS[name]) for name in KEY)


def load_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The values of LOAD; a field that rows did not have once is at its default."""
    return tuple(row.get(name, DEFAULTS[name]) for name in LOAD)


def load_text(load: tuple[Any, ...]) -> str:
    """The values of LOAD in words, those at their defaults left out."""
    values = dict(zip(LOAD, load, strict=True))
    point = Point(num_requests=0, **values)
    named = ("concurrency", "prompt_len", "output_len", "rate", *(("load",) if point.rate is not None else ()))
    unusual = [f"{name} {value}" for name, value in values.items() if name not in named and value != DEFAULTS[name]]
    return ", ".join([point.place, *unusual])


def load_rows(folder: RunFolder) -> pandas.DataFrame:
    """`asked_rows` as a table."""
    import pandas

    return pandas.DataFrame(asked_rows(folder))


def asked_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The newest row of every point that was asked for last, engine by engine, pruned points among them.

    Reads files only. A good row goes before a failed one. All rows of a folder that says nothing of what was asked.
    """
    asked = folder.read_json("sweep")
    if asked is None:
        return list(folder.rows("rows"))
    rows: list[dict[str, Any]] = []
    for entry in asked.values():
        for parts, points in zip(entry["identities"], entry["points"], strict=True):
            own = ({**DEFAULTS, **row} for row in folder.rows_of("rows", Identity.from_row(parts)))
            found = newest_rows(own, KEY)
            rows += [found[key] for key in map(key_of, points) if key in found]
    return rows


def load_cards(folder: RunFolder) -> pandas.DataFrame:
    """What each card did during the points that `load_rows` gives."""
    cards, rows = folder.load("cards"), load_rows(folder)
    return cards if cards.empty or rows.empty else cards.loc[cards["point_id"].isin(rows["point_id"])]


def load_profile(folder: RunFolder) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The newest row of each phase and their operators; empty tables where nothing was profiled."""
    import pandas

    steps = list(newest_rows(folder.rows("profile_steps"), ("phase",)).values())
    asked = {row["profile_id"] for row in steps}
    operators = [row for row in folder.rows("profile") if row.get("profile_id") in asked]
    return pandas.DataFrame(steps), pandas.DataFrame(operators)


def failed_points(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of `load_rows` whose point could not be measured; those that nobody could measure are not among them."""
    return rows if rows.empty else rows.loc[~rows["status"].isin(["ok", "pruned"])]


def raise_if_failed(rows: pandas.DataFrame) -> None:
    """SweepError naming points that could not be measured, if there are any: what ends a notebook with a failure."""
    failed = failed_points(rows)
    if not failed.empty:
        first = failed.iloc[0]
        point = f"concurrency {first['concurrency']}, prompt {first['prompt_len']}, output {first['output_len']}"
        raise SweepError(
            f"{len(failed)} of {len(rows)} points failed; the first: {first['backend']}, {point}: {first['error']}"
        )
