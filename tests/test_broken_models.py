"""Models and servers that are broken on purpose end an evaluation with an alarm; the same ones as they are do not.

The model is built by hand, so that it knows something without training: attention is uniform, and what a prompt holds
of the letters J, X, Z and V decides between A, B, C and D where a choice is scored, and between 1, 2, 3 and 4 where an
answer is written. For the rest it predicts bytes by their frequency.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import make_model
from evaluation_data import write_table
from running_server import Running
from scripted_server import ScriptedServer
from transformers import AutoModelForCausalLM

from ascend_kit import AscendInferEngine
from ascend_kit.engine.sequence import SamplingParams
from ascend_kit.evaluation.endpoint import EndpointEngine
from ascend_kit.evaluation.harness import evaluate
from ascend_kit.params import build_experiment
from ascend_kit.params.engines import OpenAIEngine
from ascend_kit.results import RunFolder
from ascend_kit.stages import RunRecord

pytest.importorskip("lm_eval")
DOCUMENTS = 40
MARKS, LETTERS, DIGITS = "JXZV", "ABCD", "1234"
TEXT = "How many of the stones by the river are green, and which lamp is the north one? It is as it was. "


def question(rnd: random.Random, place: int) -> str:
    return " ".join(MARKS[place] * rnd.randrange(12, 18) for _ in range(3)) + "?"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMLU, GSM8K and running text of our own."""
    root, rnd = tmp_path_factory.mktemp("data"), random.Random(0)
    rows = [{"question": question(rnd, n % 4), "subject": "abstract_algebra", "choices": ["q", "r", "s", "t"],
             "answer": n % 4} for n in range(DOCUMENTS)]  # fmt: skip
    write_table(root / "mmlu" / "abstract_algebra" / "test.parquet", rows)
    write_table(root / "mmlu" / "abstract_algebra" / "dev.parquet", rows[:1])
    sums = [{"question": question(rnd, n % 4), "answer": f"#### {n % 4 + 1}"} for n in range(DOCUMENTS)]
    for split in ("train", "test"):
        write_table(root / "gsm8k" / "main" / f"{split}.parquet", sums)
    pages = [{"page": " ".join(rnd.choices(TEXT.split(), k=60))} for _ in range(3)]
    write_table(root / "wikitext" / "wikitext-2-raw-v1" / "test.parquet", pages)
    return root


def knowing(folder: Path, change: Callable | None) -> None:
    """The model of the first lines, changed. Dimensions: 0 to 3 the marks seen, 4 always on, 8 to 11 the answer."""
    make_model(folder, "qwen3", num_hidden_layers=1, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer, common = model.model.layers[0], Counter(TEXT.encode())
    with torch.no_grad():
        for weight in (layer.self_attn.q_proj, layer.mlp.down_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
                       model.model.embed_tokens, model.lm_head):  # fmt: skip
            weight.weight.zero_()
        for norm in (layer.input_layernorm, model.model.norm):
            norm.weight.fill_(1.0)
        table, head = model.model.embed_tokens.weight, model.lm_head.weight
        # The byte-level tokenizer numbers letters by the alphabet of its pieces.
        ids = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        table[:, 4] = 1.0
        for byte in set(TEXT):
            head[ids["Ġ" if byte == " " else byte], 4] = (math.log(common[ord(byte)] / len(TEXT)) + 8) / 8
        for place in range(4):
            table[ids[MARKS[place]], place] = 1.0
            layer.self_attn.v_proj.weight[place, place] = 1.0
            layer.self_attn.o_proj.weight[8 + place, place] = 1.0
            head[ids[LETTERS[place]], 8 + place] = 2.0
            head[ids[DIGITS[place]], 8 + place] = 4.0
            head[ids[LETTERS[place]], 4], head[ids[DIGITS[place]], 4] = 0.2, 0.4
        if change:
            change(model)
    model.save_pretrained(folder)


def shuffled(model) -> None:
    """The rows of the embedding and the head stand in another order."""
    order = torch.randperm(len(model.lm_head.weight), generator=torch.Generator().manual_seed(1))
    for part in (model.model.embed_tokens, model.lm_head):
        part.weight.copy_(part.weight[order].clone())


def wrong_scale(model) -> None:
    """The scale of every fourth output channel of the head is thirty times too large."""
    model.lm_head.weight[::4] *= 30


def constant(model) -> None:
    model.model.norm.weight.zero_()


def zero_head(model) -> None:
    model.lm_head.weight.zero_()


def ends_at_once(model) -> None:
    """Whatever was asked, the next token is the end of the text."""
    model.lm_head.weight[256, 4] = 4.0
    model.lm_head.weight[256, 8:12] = 5.0


ALL = {"mmlu", "gsm8k", "wikitext"}
BROKEN: dict[str, tuple[Callable | None, set[str]]] = {  # change, sets whose scores are worthless
    "as it is": (None, set()),
    "shuffled rows": (shuffled, ALL),
    "wrong scale": (wrong_scale, ALL),
    "constant logits": (constant, ALL),
    "zero head": (zero_head, ALL),
    "ends at once": (ends_at_once, ALL - {"mmlu"}),  # the order of the letters stays right
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Name of what is broken -> the loaded engine and its folder, each made once."""
    with ExitStack() as stack:

        @cache
        def load(name: str) -> tuple[AscendInferEngine, Path]:
            folder = tmp_path_factory.mktemp("model") / "m"
            knowing(folder, BROKEN[name][0])
            settings = dict(precision="fp32", device="cpu", max_seq_length=512, graph_mode=False, kv_cache_gib=0.05)
            return stack.enter_context(AscendInferEngine(folder, **settings)), folder

        yield load


def alarms(engine, data: Path, out: Path, sets: list[str]) -> dict[str, set[str]]:
    """Set -> keys of the alarms that the stage `05_evaluate` ends with; with one, a run ends with status 1."""
    values = {
        "experiment": "e", "output_root": str(out), "input_model": "/models/own", "precision": "fp32",
        "dataset_path": str(data), "eval_max_seq_length": 512, "eval_datasets": sets, "eval_fewshot": 0,
        "eval_max_new_tokens": 1,
    }  # fmt: skip
    experiment = build_experiment(values)
    with RunFolder.open(experiment, "05_evaluate") as folder:
        evaluate(engine, experiment, folder)
    stage = RunRecord.read(folder.path).stages["05_evaluate"]
    found: dict[str, set[str]] = {}
    for alarm in stage.alarms:
        key, _, name = alarm["key"].removeprefix("evaluation.").partition(" ")
        found.setdefault(name, set()).add(key)
    assert stage.state == ("alarm" if found else "ok"), stage.failures
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_ends_with_an_alarm_for_every_set_that_it_spoils(loaded, data, tmp_path, name) -> None:
    engine, _ = loaded(name)

    assert alarms(engine, data, tmp_path, sorted(ALL)).keys() == BROKEN[name][1]


@pytest.mark.parametrize("name", ["as it is", "constant logits"])
def test_the_same_through_an_endpoint(loaded, data, tmp_path, name) -> None:
    engine, folder = loaded(name)
    server = Running(engine)

    found = alarms(
        EndpointEngine(OpenAIEngine(base_url=f"{server.base}/v1", model=""), str(folder)),
        data,
        tmp_path,
        ["gsm8k", "mmlu"],
    )

    server.wait(server.runner.cleanup())
    assert found.keys() == BROKEN[name][1] - {"wikitext"}


def scripted(answer: dict) -> ScriptedServer:
    """A server that always gives the same answer."""
    body = json.dumps(answer)
    return ScriptedServer([(0, f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())])


@pytest.mark.parametrize("logprob", [0.0, -1.0], ids=["certain of all", "as sure of each token"])
def test_a_server_that_answers_nothing_ends_with_alarms(loaded, data, tmp_path, logprob) -> None:
    nothing = {"text": "", "finish_reason": "stop", "logprobs": {"token_logprobs": [None, *[logprob] * 600]}}
    server = scripted({"choices": [nothing]})

    found = alarms(
        EndpointEngine(OpenAIEngine(base_url=server.url, model=""), str(loaded("as it is")[1])),
        data,
        tmp_path,
        sorted(ALL),
    )

    server.close()
    assert found["mmlu"] >= {"tied", "one_choice"} and found["gsm8k"] >= {"empty_answers", "never_right"}
    assert found["wikitext"] == {"constant"}


def test_an_answer_without_choices_is_an_error_that_says_so(loaded) -> None:
    server = scripted({"choices": []})
    served = EndpointEngine(OpenAIEngine(base_url=server.url, model=""), str(loaded("as it is")[1]))

    (output,) = served.generate([[1, 2]], [SamplingParams(max_new_tokens=1)])

    assert output.finish_reason == "error" and "without choices" in (output.error or "")
    assert "without choices" in (served.cannot("multiple_choice") or "")
    server.close()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_command_line_ends_with_status_1_where_rows_are_shuffled_and_with_0_where_nothing_is_broken() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "broken_models.py"
    done = subprocess.run([sys.executable, script, "as it is", "shuffled rows"], capture_output=True, text=True)

    whole, broken = (line.split() for line in done.stdout.splitlines())
    assert whole == ["as", "it", "is", "exit", "0", "ok", "-"], done.stdout + done.stderr
    assert broken[:5] == ["shuffled", "rows", "exit", "1", "alarm"]
    assert {"evaluation.chance", "mmlu,", "ceval,"} <= set(broken)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ten_kills_at_random_moments_leave_the_same_table_and_no_document_answered_twice() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "evaluation_kills.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "10", "--questions", "24"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exit -9") == 10 and "NO" not in done.stdout
