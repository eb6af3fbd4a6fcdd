"""Thinking, several samples, stopping early, export, endpoints and real kills of an evaluation."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from evaluated import SUMS, run, stand_in, task_experiment
from evaluation_data import write_sets
from running_server import Running

from ascend_kit import AscendInferEngine
from ascend_kit.evaluation.compare import Run, pair_documents
from ascend_kit.evaluation.datasets import allocate, detectable, draw
from ascend_kit.evaluation.endpoint import EndpointEngine
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.scores import pass_at_k
from ascend_kit.measure.http import EndpointError
from ascend_kit.params.engines import OpenAIEngine
from ascend_kit.params.notebook import parameters_of
from ascend_kit.run.checks import RunError, check_contents

pytest.importorskip("lm_eval")


# --- thinking and samples ---------------------------------------------------------------------------------------------


def test_the_answer_is_what_follows_the_thought_and_the_thoughts_length_is_kept(engine) -> None:
    from lm_eval.api.instance import Instance

    from ascend_kit.evaluation.adapter import HURRY, EngineLM

    def answer(prompt, sampling):
        if sampling.stop == ("</think>",):  # the thinking part, in which the task's stop strings mean nothing
            return {"a": ("<think>Q: 1?</think>", "stop"), "b": ("<think>endless", "length"), "c": ("7", "stop")}[
                prompt
            ]
        return {"a<": (" 42 Q: next", "stop"), "b<": ("9", "length")}[prompt[:2]]

    facts: dict[int, dict] = {}
    lm = EngineLM(
        stand_in(engine, answer=answer), thinking_budget=64, on_answer=lambda i, text, told: facts.update({i: told})
    )
    asked = [
        Instance("generate_until", {}, (name, {"until": ["Q:"], "max_gen_toks": 8}), 0, metadata=("t", 0, 1))
        for name in "abc"
    ]

    assert lm.generate_until(asked) == ["42 ", "9", "7"]
    assert [facts[i]["num_thinking_tokens"] for i in range(3)] == [20, 14, 0]  # the tokenizer's tokens are bytes
    assert [facts[i]["thinking_is_cut"] for i in range(3)] == [False, True, False]
    assert HURRY.endswith("</think>\n\n")


def test_several_samples_give_mean_pass_and_majority(engine, gsm8k, tmp_path) -> None:
    seeds: list[int] = []

    def answer(prompt, sampling):
        seeds.append(sampling.seed)
        first, second = map(int, prompt.split("What is ")[-1].split("?")[0].split(" + "))
        offset = (len(seeds) - 1) % 3 == 2  # of three samples to a question the third is wrong
        return f"#### {first + second + offset}", "stop"

    experiment = task_experiment(
        gsm8k, tmp_path, eval_datasets=["gsm8k"], eval_fewshot=0, eval_samples=3, eval_temperature=0.7
    )
    result, _ = run(stand_in(engine, answer=answer), experiment)

    values = result.tasks.set_index("metric")["value"]
    name = "exact_match,strict-match"
    assert values[f"mean@3 {name}"] == pytest.approx(2 / 3) and values[f"maj@3 {name}"] == 1.0
    assert values[f"pass@1 {name}"] == pytest.approx(2 / 3) and values[f"pass@3 {name}"] == 1.0
    assert len(set(seeds)) == 18


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # of six pairs one holds no right answer


def test_documents_are_spread_over_subjects_and_drawn_by_seed() -> None:
    sizes = {"a": 100, "b": 50, "c": 1}

    assert allocate(sizes, 30) == {"a": 19, "b": 10, "c": 1}  # 19.9, 9.9 and 0.2, at least one each
    assert draw(sizes, 30, 0) == draw(sizes, 30, 0) != draw(sizes, 30, 1)
    assert {name: len(found) for name, found in draw(sizes, 30, 0).items()} == {"a": 19, "b": 10}  # c is asked whole
    assert draw(sizes, None, 0) == {} == draw(sizes, 151, 0)
    assert 100 * detectable(200) == pytest.approx(6.26, abs=0.01)  # (1.96 + 0.84) sqrt(0.1 / 200)


# --- stopping and export ----------------------------------------------------------------------------------------------


def test_an_evaluation_stops_when_its_comparison_with_a_finished_run_is_certain(engine, tmp_path) -> None:
    data = write_sets(tmp_path / "data", documents=25)
    base = task_experiment(data, tmp_path / "out", run="base", eval_datasets=["mmlu"], eval_fewshot=0)
    whole, _ = run(engine, base)
    stopping = base.with_changes(
        run="again", eval_stop_against="base", eval_batch_size=4, accuracy_margin_points=20.0, experiment="e"
    )

    result, folder = run(engine, stopping)

    stopped = folder.read_json("evaluation")["stopped"]
    assert (stopped["outcome"], stopped["lost"], stopped["won"]) == ("within margin", 0, 0)
    assert stopped["documents"] <= len(result.documents) < len(whole.documents) == 50
    assert any(flag.key == "evaluation.stopped" for flag in result.flags) and result.ok
    again = whole.documents.set_index(["task", "doc_id"])["acc"]
    assert all(again[row.task, row.doc_id] == row.acc for row in result.documents.itertuples())
    with pytest.raises(DataError, match="multiple-choice sets only"):
        run(engine, stopping.with_changes(eval_datasets=["wikitext"]))
    lost = stopping.with_changes(eval_stop_against="basis")
    with pytest.raises(RunError, match=r"eval_stop_against: no run 'basis' .*did you mean 'base'"):  # before any work
        check_contents(lost, parameters_of("05_evaluate"), converts=False)


def test_lm_evals_own_readers_read_the_export(engine, gsm8k, tmp_path) -> None:
    from lm_eval.utils import get_file_task_name, get_results_filenames, get_sample_results_filenames, make_table

    data = write_sets(gsm8k, documents=4)
    changes = {"eval_datasets": ["ceval", "gsm8k"], "eval_fewshot": 0, "eval_max_new_tokens": 8}
    result, folder = run(engine, task_experiment(data, tmp_path, model_name="tiny", **changes))

    files = [str(path) for path in (folder.path / "lm_eval" / "tiny").iterdir()]
    (results,) = get_results_filenames(files)
    samples = {get_file_task_name(Path(name).name): name for name in get_sample_results_filenames(files)}
    found = json.loads(Path(results).read_text())
    assert set(samples) == set(result.tasks["task"])
    rows = [json.loads(line) for line in Path(samples["gsm8k"]).read_text().splitlines()]
    assert len(rows) == 2 * len(SUMS) and {row["filter"] for row in rows} == {"strict-match", "flexible-extract"}
    table = make_table(found)
    assert "ceval-valid_law" in table and "gsm8k" in table and "ceval-valid" in make_table(found, "groups")
    value = result.groups.set_index("metric").loc["acc", "value"]
    assert found["groups"]["ceval-valid"]["acc,none"] == value
    assert found["n-samples"]["gsm8k"]["effective"] == len(SUMS) and found["model_name"] == "tiny"


# --- endpoints --------------------------------------------------------------------------------------------------------


def test_documents_through_an_endpoint_are_those_of_the_engine_and_pair_with_them(
    engine, gsm8k, tiny_qwen3_dir, tmp_path
) -> None:
    data = write_sets(gsm8k, documents=4)
    changes = {"eval_datasets": ["mmlu", "gsm8k"], "eval_fewshot": 1, "eval_max_new_tokens": 12}
    ours, one = run(engine, task_experiment(data, tmp_path, run="ours", **changes))
    with AscendInferEngine(tiny_qwen3_dir, precision="fp32", device="cpu", max_seq_length=2048) as behind:
        server = Running(behind)
        entry = {"name": "ours", "base_url": f"{server.base}/v1", "model": "tiny", "leave_out": ["top_k"]}
        changes |= {"engines": [entry], "eval_endpoint": "ours", "input_model": str(tiny_qwen3_dir)}
        asked = task_experiment(data, tmp_path, run="served", **changes)
        theirs, two = run(EndpointEngine.from_experiment(asked), asked)
        server.wait(server.runner.cleanup())

    key = ["task", "doc_id", "doc_hash", "prompt_hash"]
    both = ours.documents.merge(theirs.documents, on=key, suffixes=("", "_served"))
    assert len(both) == len(ours.documents) == 2 * 4 + len(SUMS)
    for row in both.to_dict("records"):
        if isinstance(row["answer"], str):
            assert row["answer"] == row["answer_served"]
        else:
            assert row["choice_logprobs_served"] == pytest.approx(row["choice_logprobs"], abs=1e-4)
            assert row["choice_is_greedy_served"] == row["choice_is_greedy"]
    assert two.identities()[theirs.tasks["identity"][0]].declared == ("weights", "engine")
    pairs = pair_documents(Run(one), Run(two), "acc")
    assert len(pairs.rows) == 8 + len(SUMS) and not pairs.refused
    assert {row["right_by"] for row, _ in pairs.rows if row["set"] == "gsm8k"} == {"exact_match,flexible-extract"}


def test_what_a_server_cannot_do_is_said_before_work(tiny_qwen3_dir, tmp_path) -> None:
    class Terse(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": "m"}]})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply({"choices": [{"text": "x", "logprobs": {"token_logprobs": [None], "tokens": ["x"]}}]})

        def reply(self, value):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Terse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        served = EndpointEngine(OpenAIEngine(base_url=url, model=""), str(tiny_qwen3_dir))
        data = write_sets(tmp_path / "data", documents=2)
        with pytest.raises(DataError, match=r"mmlu_abstract_algebra, .* cannot be asked: .* 0 log-probabilities of 6"):
            run(served, task_experiment(data, tmp_path, eval_datasets=["mmlu"], eval_fewshot=0))
        with pytest.raises(EndpointError, match="serves m, not 'other'"):
            EndpointEngine(OpenAIEngine(base_url=url, model="other"), str(tiny_qwen3_dir))
        server.shutdown()


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_where_it_stopped_and_answers_nothing_twice(engine, tmp_path) -> None:
    def score(pairs, *, on_score, on_progress):
        for place, (context, ids) in enumerate(pairs):
            on_score(
                place, SimpleNamespace(logprob=-(zlib.crc32(bytes(str(context + ids), "ascii")) % 999), is_greedy=False)
            )
            if place % 4 == 3:
                on_progress(place, len(pairs))
                time.sleep(0.01)
        on_progress(len(pairs), len(pairs))
        return [SimpleNamespace(logprob=-1.0, is_greedy=False)] * len(pairs)

    data = write_sets(tmp_path / "data", documents=12)
    experiment = task_experiment(data, tmp_path / "out", eval_datasets=["mmlu", "ceval"], eval_fewshot=0)
    slow = stand_in(engine, score=score)
    table = experiment.run_folder / "documents.jsonl"
    process = multiprocessing.get_context("fork").Process(target=run, args=(slow, experiment))
    process.start()
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if table.exists() and table.read_bytes().count(b"\n") >= 9:
            process.kill()
        time.sleep(0.01)
    process.join()

    before = [json.loads(line) for line in table.read_text().splitlines()]
    result, folder = run(slow, experiment)
    undisturbed, _ = run(slow, experiment.with_changes(run="undisturbed"))

    assert process.exitcode == -9 and 9 <= len(before) < 48
    assert not table.exists() and folder.written_path("documents").suffix == ".gz"
    rows = list(folder.rows("documents"))
    assert rows[: len(before)] == before and len(rows) == len({(row["task"], row["doc_id"]) for row in rows}) == 48
    columns = ["task", "metric", "value", "stderr", "n"]
    pandas.testing.assert_frame_equal(result.tasks[columns], undisturbed.tasks[columns])
