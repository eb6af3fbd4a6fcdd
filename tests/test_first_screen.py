"""The first screen of a report and the index of all runs: the verdict, in the language of the run."""

import json
import re

import pytest
from chinese_text import english_in
from report_runs import PARAMETERS, STAGE, first_screen, point, write_run

from ascend_kit.messages import say, use_language
from ascend_kit.show.report import write_report


def test_first_screen_is_verdict_model_device_and_four_numbers(tmp_path):
    runs = [
        {
            "run": "e/fast",
            "accuracy_percent": 72.8,
            "difference_points": -0.44,
            "low_points": -1.91,
            "high_points": 1.04,
        }
    ]
    verdict = say("compare.verdict", text="Use e/fast.", best="e/fast", baseline="e/plain", runs=runs).to_row()
    rows = [point(900), point(1100), point(400, 1), point(5000, backend="transformers")]
    folder = write_run(
        tmp_path / "e/fast", {"04_throughput": STAGE}, rows=rows, **{"04_throughput": {"findings": [verdict]}}
    )

    screen = first_screen(folder)

    for text in ("Use e/fast.", "Qwen3-8B", "bf16, w8a8", "graph_mode", "torch 2.12.0", "2 x Ascend910B3", "CANN 8.5",
                 "1,000", "mean, 900 to 1,100 in 2 repeats", "20 ms", "1.5 ms", "-0.44",
                 "95 % interval -1.91 to +1.04"):  # fmt: skip
        assert text in screen, text


def test_the_best_point_is_of_one_engine_under_one_identity_and_never_anothers(tmp_path):
    rows = [point(900, identity="graphs"), point(1100, identity="graphs"), point(300, identity="plain"),
            point(9000, backend="vllm"), point(None, identity="odd")]  # fmt: skip

    screen = first_screen(write_run(tmp_path / "e/r", {"04_throughput": STAGE}, rows=rows))

    assert "mean, 900 to 1,100 in 2 repeats" in screen and "9,000" not in screen


def test_the_numbers_are_of_the_point_that_the_verdict_tells(tmp_path):
    place = {"concurrency": 16, "prompt_len": 64, "output_len": 32}
    values = {"best": "e/r", "baseline": "e/plain", "runs": [], "rate": 900.0, "speedup": 2.0, "n": 8, **place}
    use = say("compare.use", **values, difference=0.0, low=-1.0, high=1.0).to_row()
    rows = [point(900), point(1000, 4)]

    screen = first_screen(
        write_run(tmp_path / "e/r", {"06_compare": STAGE}, rows=rows, **{"06_compare": {"findings": [use]}})
    )

    assert "900 output tokens/s with 16 in flight" in screen and "one measurement, 16 in flight" in screen


def test_a_finding_that_lacks_a_value_of_this_version_keeps_its_text(tmp_path):
    old = {"key": "compare.use", "level": "note", "values": {"best": "e/r"}, "text": "Use e/r, said of old."}

    screen = first_screen(write_run(tmp_path / "e/r", {"06_compare": STAGE}, **{"06_compare": {"findings": [old]}}))

    assert "Use e/r, said of old." in (tmp_path / "e/r/report.html").read_text() and "Neither speed" in screen


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"state": "failed", "error": "CheckpointError: no folder"}, "No result: 05_evaluate failed. CheckpointError"),
        ({"state": "alarm", "alarms": [{"key": "k", "text": "answers as by guessing", "values": {}}]},
         "Do not trust this run: answers as by guessing"),
        ({"state": "ok"}, "Neither speed nor accuracy was measured"),
    ],
)  # fmt: skip
def test_failure_and_alarm_are_the_verdict_before_any_number(tmp_path, stage, words):
    screen = first_screen(write_run(tmp_path / "e/r", {"05_evaluate": stage}))

    assert words in screen


def test_the_report_of_a_run_in_chinese_is_chinese_from_its_first_line(tmp_path):
    runs = {
        "best": "e/r",
        "baseline": "e/plain",
        "runs": [],
        "rate": 3500.0,
        "speedup": 4.0,
        "n": 228,
        "concurrency": 16,
    }
    verdict = say("compare.use", **runs, difference=-0.44, low=-1.91, high=1.04).to_row()
    stage = {**STAGE, "parameters": {**PARAMETERS, "language": "zh"}}
    folder = write_run(
        tmp_path / "e/r", {"06_compare": stage}, rows=[point(900)], **{"06_compare": {"findings": [verdict]}}
    )

    try:
        page = write_report(folder).read_text(encoding="utf-8")
    finally:
        use_language("en")

    assert '<html lang="zh">' in page and "推荐 e/r：并发 16 时每秒输出 3,500 个 token，是 e/plain 的 4.00 倍" in page
    assert "输出 token/秒" in page and "output tokens/s" not in page.split("<header")[1].split("</header>")[0]
    assert verdict["text"].startswith("Use e/r: 3,500 output tokens/s with 16 in flight, 4.00 times e/plain")


def test_cautions_stand_on_the_first_screen_and_what_failed_is_said_once(tmp_path):
    findings = [say("sweep.preemptions", "caution", count=2).to_row(), say("sweep.nothing").to_row()]
    stages = {"04_throughput": STAGE, "05_evaluate": {"state": "failed", "error": "DataError: no file"}}
    folder = write_run(tmp_path / "e/r", stages, **{"04_throughput": {"findings": findings}})

    screen = first_screen(folder)

    assert (
        "2 preemptions" in screen and screen.count("DataError: no file") == 1 and "Nothing was measured" not in screen
    )


def test_index_lists_all_runs_newest_first_with_their_verdicts(tmp_path):
    for name, day in (("old", "2026-01-01"), ("new", "2026-01-03")):
        folder = write_run(tmp_path / "e" / name, {"04_throughput": STAGE}, rows=[point(900)])
        record = json.loads((folder / "run.json").read_text()) | {"updated": day}
        (folder / "run.json").write_text(json.dumps(record))
        write_report(folder)
    (tmp_path / "e/broken").mkdir()
    (tmp_path / "e/broken/run.json").write_text("{ torn")

    page = (tmp_path / "index.html").read_text()

    assert page.index("e/new/report.html") < page.index("e/old/report.html") and "900" in page and "torn" not in page


def test_the_index_is_in_one_language_whatever_its_reports_are_in_and_each_number_is_in_its_column(tmp_path):
    score = say("scores.percent", task="mmlu", metric="acc", count=72, unit="fraction", value=63.9).to_row()
    write_report(write_run(tmp_path / "e/en", {"05_evaluate": STAGE}, **{"05_evaluate": {"findings": [score]}}))
    compared = {"run": "e/zh", "accuracy_percent": 72.8, "difference_points": -0.44, "low_points": -2, "high_points": 1}
    verdict = say("compare.verdict", text="Use e/zh.", best="e/zh", baseline="e/en", runs=[compared]).to_row()
    stage = {**STAGE, "parameters": {**PARAMETERS, "language": "zh"}}
    told = {"rows": [point(9)], "06_compare": {"findings": [verdict]}}
    folder = write_run(tmp_path / "e/zh", {"06_compare": stage}, **told)

    try:
        write_report(folder)
    finally:
        use_language("en")

    page = (tmp_path / "index.html").read_text()
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("(?s)<tr>(.*?)</tr>", page)[1:]]
    assert english_in(page, "zh", "bf16", "graph", "mode", "Qwen3", "Use") == [] and "未比较" not in page
    assert sorted(line[2:6] for line in lines) == [["", "", "", "63.9 %"], ["9", "20 ms", "1.5 ms", "72.8 %"]]


def test_of_equal_cautions_about_a_busy_machine_the_last_stands_on_the_first_screen_the_other_below(tmp_path):
    busy = {"count": 2, "most": 1.5, "cores": 2}
    first, last = (say("sweep.disturbed", "caution", points=name, **busy) for name in ("ours 1/2/3", "e/r 1/2/3"))
    stages = {"04_throughput": STAGE, "06_compare": STAGE}
    told = {"04_throughput": {"findings": [first.to_row()]}, "06_compare": {"findings": [last.to_row()]}}
    folder = write_run(tmp_path / "e/r", stages, **told)

    screen = first_screen(folder)

    assert "e/r 1/2/3" in screen and "ours 1/2/3" not in screen
    assert (folder / "report.html").read_text().count("ours 1/2/3") == 1
