"""Looking around in runs: lists, points, requests, documents and history come from files, whatever they hold."""

import json
import re

import pandas
import pytest

from ascend_kit.messages import translate
from ascend_kit.show import explore, history, tables
from ascend_kit.show.explorer import Explorer
from ascend_kit.stages import SCHEMA_VERSION

ENGINE = {"kind": "ascend_kit", "graph_mode": True}


def point(tokens_per_s, repeat=0, concurrency=4, identity="i", **also):
    return {"status": "ok", "backend": "ascend_kit", "point_id": f"p{concurrency}{repeat}", "concurrency": concurrency,
            "prompt_len": 64, "output_len": 32, "repeat": repeat, "output_tokens_per_s": tokens_per_s,
            "ttft_p50_ms": 20.0, "tpot_p50_ms": 1.5, "peak_memory_bytes": 2**30, "ceiling_tokens_per_s": 2000.0,
            "identity": identity, **also}  # fmt: skip


def document(doc, prediction, target=0, **also):
    row = {"task": "mmlu_anatomy", "set": "mmlu", "doc_id": doc, "doc_hash": f"h{doc}", "prompt_hash": f"p{doc}"}
    row |= {"target": target, "prediction": prediction, "acc": float(prediction == target), "identity": "d"}
    row |= {"choice_logprobs": [-0.5, -1.25], "question": f"<script>question {doc}</script>", "choices": ["yes", "no"]}
    return {**row, "status": "ok", **also}


def write_run(root, name, created, rows, documents=(), versions=None):
    folder = root / name
    folder.mkdir(parents=True)
    stage = {"state": "ok", "tables": ["rows"], "parameters": {"model_name": "Qwen3-8B", "precision": "bf16",
             "graph_mode": True, "operator_fusion": False}}  # fmt: skip
    record = {"schema_version": SCHEMA_VERSION, "created": created, "updated": created,
              "stages": {"04_throughput": stage}, "source": {"commit": "abc"}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    parts = {"weights": "w", "engine": ENGINE, "versions": versions or {"torch": "2.12"}, "device": {"cann": "9.1"}}
    score = {"task": "mmlu_anatomy", "set": "mmlu", "metric": "acc", "value": 0.5, "n": len(documents), "status": "ok"}
    scores = [{**score, "identity": "d"}] if documents else []
    request = {"point_id": "p40", "num_prompt_tokens": 64, "num_output_tokens": 3, "arrival_s": 1.0,
               "token_times_s": [1.02, 1.03, 1.05], "finish_reason": "length", "scheduled_s": 1.01}  # fmt: skip
    requests = [{**request, "index": n} for n in range(2)]
    lines = {"rows": rows, "documents": documents, "scores": scores, "requests": requests,
             "identities": [{"id": "i", "parts": parts}, {"id": "d", "parts": {**parts, "data": "x"}}]}  # fmt: skip
    for table, found in lines.items():
        (folder / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "evaluation.json").write_text(json.dumps({"identities": {"mmlu_anatomy": "d"}}))


@pytest.fixture
def root(tmp_path):
    write_run(tmp_path, "e/old", "2026-01-01", [point(900), point(1100, 1), point(300, concurrency=1)],
              [document(0, 0), document(1, 1), document(2, 0)])  # fmt: skip
    write_run(tmp_path, "e/new", "2026-02-01", [point(500), point(520, 1)],
              [document(0, 1), document(1, 1), document(2, 0)], {"torch": "2.13"})  # fmt: skip
    (tmp_path / "e/torn").mkdir()
    (tmp_path / "e/looks").mkdir()
    looks = {"schema_version": SCHEMA_VERSION, "stages": {"07_explore": {"state": "ok"}}}
    (tmp_path / "e/looks/run.json").write_text(json.dumps(looks))
    (tmp_path / "e/torn/run.json").write_text("{ torn")
    return tmp_path


def test_runs_are_listed_newest_first_with_their_best_point_and_accuracy(root):
    table = explore.run_list(explore.find_runs(root).values())

    assert list(table["run"]) == ["e/new", "e/old"]  # neither the torn record nor the run that explores
    old = table.iloc[1]
    assert (old["tokens/s"], old["accuracy, %"]) == (1000, 50)  # the mean of 900 and 1,100, not the luckier repeat
    assert (old["model"], old["engine, switches"]) == ("Qwen3-8B, bf16", "ascend_kit, graph_mode")


def test_a_run_that_is_only_looked_around_in_just_now_is_as_it_was(root):
    path = root / "e/new/run.json"
    record = json.loads(path.read_text())
    record["stages"]["07_explore"] = {"state": "running"}
    path.write_text(json.dumps(record))  # nobody runs it: interrupted

    assert list(explore.run_list(explore.find_runs(root).values())["state"]) == ["ok", "ok"]


def test_points_become_means_with_the_range_of_their_repeats(root):
    table = explore.points(explore.find_runs(root).values())

    found = explore.means(table, "concurrency", "output_tokens_per_s").set_index(["label", "concurrency"])

    assert found.loc[("e/old", 4), ["y", "low", "high", "ceiling"]].tolist() == [1000, 900, 1100, 2000]
    assert explore.means(table, "concurrency", "tpot_p50_ms")["ceiling"].isna().all()


def test_the_chart_of_jupyterlab_holds_the_same_values_and_nothing_to_load(root):
    table = explore.points(explore.find_runs(root).values())

    spec = explore.vega(table, "median TPOT, ms", "output tokens/s")

    assert sorted(row["y"] for row in spec["data"]["values"]) == [300, 510, 1000]
    assert set(spec["data"]) == {"values"} and "url" not in json.dumps(spec)
    assert any(layer.get("params", [{}])[0].get("bind") == "scales" for layer in spec["layer"])


def test_many_lengths_become_a_heat_map_over_the_load_and_small_panels_else(tmp_path):
    lengths = [(prompt, output) for prompt in (128, 1024, 4096, 16384) for output in (128, 1024)]
    rows = [point(100 * load, concurrency=load, prompt_len=p, output_len=o, tpot_p50_ms=load)
            for p, o in lengths for load in (1, 4)]  # fmt: skip
    write_run(tmp_path, "e/big", "2026-01-01", rows)
    table = explore.points(explore.find_runs(tmp_path).values())

    heat = explore.chart(table, "requests in flight", "output tokens/s")
    panels = explore.chart(table, "median TPOT, ms", "output tokens/s")

    (axes,) = heat.axes
    assert sorted({text.get_text() for text in axes.texts}) == ["100", "400"] and len(axes.get_yticks()) == 8
    assert len(panels.axes) == 8 and panels.get_figwidth() < 16 and panels.get_figheight() < 8


def test_histograms_show_the_raw_gaps_of_a_point(root):
    run = explore.find_runs(root)["e/old"]

    figure = explore.histograms(explore.lines_of(run, "requests", "p40"))

    ttft, itl = (axes.get_title() for axes in figure.axes)
    assert ttft == "median 20, most 20" and itl == "median 15, most 20"


def test_wrong_documents_and_those_that_turned_over_are_found_and_searched(root):
    runs = explore.find_runs(root)

    wrong = explore.documents(runs["e/new"], "mmlu_anatomy")
    flipped = explore.documents(runs["e/old"], "mmlu_anatomy", runs["e/new"])

    assert list(wrong["document"]) == [0, 1] and list(wrong["given"]) == ["B", "B"] and set(wrong["expected"]) == {"A"}
    assert wrong["choices"][0] == "A yes (-0.50) B no (-1.25)"
    assert list(flipped["document"]) == [0] and flipped["right"][0] == "e/old"
    assert list(explore.documents(runs["e/new"], "mmlu_anatomy", search="QUESTION 1")["document"]) == [1]


def test_the_chart_begins_with_throughput_and_an_axis_that_no_run_has_shows_one_sentence(root, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts, **_: shown.extend(parts))
    explorer = Explorer(root, browser=True)

    explorer.chart()

    (view,) = explorer._views
    assert view.values() == {"axis_x": "requests in flight", "axis_y": "output tokens/s"}
    assert explore.VEGA_LITE in shown[-1].data
    table = explore.points(explorer.runs).assign(rate=None)
    assert explore.vega(table, "requests in flight", "rate, requests per second") is None


def test_a_choice_that_names_its_letter_is_not_named_again(tmp_path):
    write_run(tmp_path, "e/r", "2026-01-01", [point(1)], [document(0, 1, choices=["(A)16", "no"])])

    (run,) = explore.find_runs(tmp_path).values()

    assert list(explore.documents(run, "mmlu_anatomy")["choices"]) == ["(A)16 (-0.50) B no (-1.25)"]


def test_a_run_whose_repeats_are_all_slower_than_before_is_a_regression_and_the_change_is_named(root):
    runs = explore.find_runs(root)

    table = history.history(runs.values())
    findings = explore.exploring_findings(explore.run_list(runs.values()), table)

    assert list(table["run"]) == ["e/old", "e/new"] and list(table["regression"]) == [None, True]
    assert round(table["change, %"][1]) == -49 and "versions.torch: '2.12' -> '2.13'" in table["what changed"][1]
    assert "Slower than before: e/new by -49.0 %" in str(findings[1]) and findings[1].level == "caution"


def test_equal_versions_with_overlapping_repeats_are_no_regression(tmp_path):
    write_run(tmp_path, "e/a", "2026-01-01", [point(900), point(1100, 1)])
    write_run(tmp_path, "e/b", "2026-01-02", [point(850), point(950, 1)])

    table = history.history(explore.find_runs(tmp_path).values())

    assert not table["regression"][1] and history.history([]).empty


def test_history_joins_only_runs_of_equal_load_and_of_those_the_heaviest_that_most_share(tmp_path):
    closed, timed = {"load": "closed", "num_requests": 8}, {"load": "poisson", "rate": 2.0, "num_requests": 8}
    write_run(tmp_path, "e/a", "2026-01-01", [point(1000, **closed), point(300, concurrency=1, **closed)])
    write_run(tmp_path, "e/b", "2026-01-02", [point(500, **timed), point(200, concurrency=1, **closed)])
    write_run(tmp_path, "e/c", "2026-01-03", [point(400, **timed), point(310, 0, 1, **closed, shared_prefix=0.5)])
    write_run(tmp_path, "e/d", "2026-01-04", [point(100, **timed, seed=7)])  # other lengths and arrivals

    table = history.history(explore.find_runs(tmp_path).values())
    figure = history.history_chart(table)

    lines = table[["series", "at", "run", "tokens/s", "regression"]].values.tolist()
    poisson, alone = "poisson 2 requests/s, prompt 64, output 32", "concurrency 1, prompt 64, output 32"
    assert lines == [[1, poisson, "e/b", 500, None], [1, poisson, "e/c", 400, True],
                     [2, alone, "e/a", 300, None], [2, alone, "e/b", 200, True]]  # fmt: skip
    assert [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() != "x"] == [2, 2]


def test_headless_every_view_shows_its_first_choice_and_escapes_what_is_in_it(root, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts, **_: shown.extend(parts))
    explorer = Explorer(root, browser=False)

    explorer.choose()
    explorer.chart()
    explorer.point()
    explorer.documents()

    texts = "".join(part.data for part in shown if hasattr(part, "data") and isinstance(part.data, str))
    assert explorer.chosen == ["e/new", "e/old"]
    assert "<script>" not in texts
    for text in ("&lt;script&gt;question 1", "1100", "p41", "<p>e/new, mmlu_anatomy, wrong documents of the run</p>",
                 "<p>e/old: concurrency 4, prompt 64, output 32, repeat 1</p>"):  # fmt: skip
        assert text in texts, text


def test_the_profile_of_a_run_shows_operators_and_the_hosts_gap(root, monkeypatch):
    step = {"phase": "decode", "profile_id": "a", "batch": 4, "host_gap_ms": 0.5, "host_share": 0.25, "bound": "host",
            "counted_step_ms": 2.0, "status": "ok"}  # fmt: skip
    operators = (("MatMul", "product", 1.0), ("Copy", "copy", 0.5))
    rows = [{"profile_id": "a", "phase": "decode", "operator": name, "kind": kind, "ms_per_step": ms, "share": ms / 2,
             "calls_per_step": 7} for name, kind, ms in operators]  # fmt: skip
    (root / "e/new/profile_steps.jsonl").write_text(json.dumps(step) + "\n")
    (root / "e/new/profile.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts, **_: shown.extend(parts))

    Explorer(root, browser=False).profile()
    found = len(shown)
    Explorer(root, ["e/old"], browser=False).profile()

    lines = [re.findall(">([^<]+)</t[dh]>", line) for line in shown[1].data.split("<tr>")[2:]]
    assert [line[1] for line in lines] == ["MatMul", "host gap", "Copy"]
    assert lines[0] == ["decode", "MatMul", "product", "1", "0.5", "7"]
    assert [part.data for part in shown[found:]] == [f"<p>{translate('explore.no_profile')}</p>"]
    assert found == 3 and shown[0].data == "<p>e/new</p>"


def test_a_folder_without_runs_is_no_error(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts, **_: shown.extend(parts))
    explorer = Explorer(tmp_path, browser=False)

    for view in (explorer.choose, explorer.chart, explorer.point, explorer.documents, explorer.history):
        view()

    assert explorer.listed.empty and isinstance(explorer.listed, pandas.DataFrame)
    why = ("explore.no_point", "explore.no_documents", "explore.no_runs_again")
    assert [part.data for part in shown if part is not None] == [
        f"<p>{tables.markup(translate(key))}</p>" for key in why
    ]
