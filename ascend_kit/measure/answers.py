"""The answers of a batch as they lie in a run folder, those that were asked for last. Reads files, needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.identity import Identity
from ascend_kit.measure.metrics import RequestRecord, summarize
from ascend_kit.params import Experiment
from ascend_kit.results import RunFolder, newest_rows

if TYPE_CHECKING:
    import pandas

TABLE = "answers"


def answers_file(experiment: Experiment) -> Path:
    """The JSON file that holds the answers: `output_path`, or generations.json in the run folder."""
    return Path(experiment.output_path) if experiment.output_path else experiment.run_folder / "generations.json"


def load_answers(folder: RunFolder) -> pandas.DataFrame:
    """`asked_answers` as a table."""
    import pandas

    return pandas.DataFrame(asked_answers(folder))


def asked_answers(folder: RunFolder) -> list[dict[str, Any]]:
    """The newest answer to each prompt that was asked for last, in prompt order; reads files only.

    All answers of a folder that says nothing of what was asked.
    """
    asked = folder.read_json("batch")
    if asked is None:
        return list(folder.rows(TABLE))
    rows = list(folder.rows_of(TABLE, Identity.from_row(asked["identity"])))
    in_place = newest_rows(rows, ("prompt_hash", "index"))
    # A sampled answer depends on its place in the file, by its seed; a greedy one is the same wherever it stands.
    anywhere = {} if asked["is_sampled"] else newest_rows(rows, ("prompt_hash",))
    found = []
    for index, text in enumerate(asked["prompts"]):
        row = in_place.get((text, index))
        if row is None or row["status"] != "ok":
            row = anywhere.get((text,), row)
        if row is not None:
            found.append({**row, "index": index})
    return found


def load_metrics(answers: pandas.DataFrame) -> pandas.DataFrame:
    """`summarize` of each session's requests. Clocks of different processes do not compare, so a resumed run
    has one row for each time it was started, called `start 1`, `start 2` and so on; else `value`.
    """
    import pandas

    sessions = answers.groupby("session", sort=False) if len(answers) else []
    rows = [
        {
            **summarize([RequestRecord.from_row(row) for row in group.to_dict("records")]),
            "plain_ops": group["plain_ops"].iloc[0] if "plain_ops" in group else None,
        }
        for _, group in sessions
    ]
    names = [f"start {place}" for place in range(1, len(rows) + 1)]
    return pandas.DataFrame(rows, index=names if len(rows) > 1 else ["value"] * len(rows))
