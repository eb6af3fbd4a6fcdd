"""The server over the real engine, spoken to through a socket; the engine itself and lm-eval say what is right."""

from __future__ import annotations

import asyncio
import json
import threading

import aiohttp
import pytest

from ascend_kit import AscendInferEngine, SamplingParams

PROMPT = [72, 101, 108, 108, 111, 33]
GREEDY = {"temperature": 0, "ignore_eos": True}


def events_of(text: str) -> list:
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n")[:-2]]


def direct(engine: AscendInferEngine, tmp=PROMPT, **sampling):
    """What the engine gives, through a subscriber: the server's thread has the stepping."""
    done = threading.Event()
    found = []

    def on_step(sequence):
        if sequence.is_finished:
            found.append(list(sequence.output_ids))
            done.set()

    engine.add_request(tmp, SamplingParams(**sampling), on_step=on_step)
    while not done.is_set():
        engine.step()
    return found[0]


def test_a_stream_joined_is_the_whole_answer_and_usage_counts_its_tokens(served):
    body = {"prompt": PROMPT, "max_tokens": 20, **GREEDY}
    whole = served.json("/v1/completions", {**body, "return_token_ids": True})

    _, text = served.post("/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})

    *chunks, last = events_of(text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert whole["choices"][0]["token_ids"] == direct(served.engine, max_new_tokens=20, ignore_eos=True)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 19 + ["length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 20 and last["usage"]["prompt_tokens"] == 6


def test_many_streams_at_once_get_their_own_answers(served):
    prompts = [[number + 1] * 5 for number in range(16)]
    alone = [direct(served.engine, prompt, max_new_tokens=12, ignore_eos=True) for prompt in prompts]

    async def all_at_once():
        async with aiohttp.ClientSession() as session:

            async def one(prompt):
                body = {"prompt": prompt, "max_tokens": 12, "return_token_ids": True, **GREEDY}
                async with session.post(served.base + "/v1/completions", json=body) as answer:
                    return (await answer.json())["choices"][0]["token_ids"]

            return await asyncio.gather(*map(one, prompts))

    assert served.wait(all_at_once()) == alone


def test_prompt_logprobs_are_those_of_transformers_and_lm_eval_reads_them(served, tiny_qwen3_dir):
    import torch
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoModelForCausalLM

    body = {"prompt": [PROMPT], "max_tokens": 1, "logprobs": 1, "echo": True, **GREEDY}
    answer = served.json("/v1/completions", body)

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)
    with torch.inference_mode():
        table = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    right = [table[i, token].item() for i, token in enumerate(PROMPT[1:])]
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:-1] == pytest.approx(right, abs=1e-4)  # float32, sums in another order
    ((total, is_greedy),) = LocalCompletionsAPI.parse_logprobs(answer, tokens=[PROMPT], ctxlens=[2])
    assert total == pytest.approx(sum(right[1:]), abs=1e-4)
    assert is_greedy == all(table[i].argmax().item() == PROMPT[i + 1] for i in range(1, 5))
    greedy = PROMPT + direct(served.engine, max_new_tokens=4, ignore_eos=True)
    answer = served.json("/v1/completions", {**body, "prompt": [greedy], "max_tokens": 0})
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 10
    tail = {key: values[6:] for key, values in answer["choices"][0]["logprobs"].items()}
    assert all(own == max(top.values()) for own, top in zip(tail["token_logprobs"], tail["top_logprobs"], strict=True))


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("completions", {"prompt": "a", "n": 2}, "n: allowed 1, got 2"),
        ("completions", {"prompt": []}, "empty"),
        ("completions", {"prompt": [999]}, "token id 999 is outside the vocabulary"),
        ("completions", {"prompt": "a", "stream": True, "echo": True}, "a stream has one prompt and neither echo"),
        ("completions", {"max_tokens": 3}, "prompt"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(served, path, body, told):
    status, text = served.post(f"/v1/{path}", body)

    assert status == 400 and told in json.loads(text)["error"]["message"]


def test_chats_are_rendered_and_stop_strings_end_them(served):
    tokenizer = served.engine.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 20, **GREEDY}
    whole = served.json("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    _, text = served.post("/v1/chat/completions", {**body, "stream": True, "stop": whole[2:4]})

    tokenizer.chat_template = None
    deltas = [chunk["choices"][0]["delta"] for chunk in events_of(text)]
    right = direct(served.engine, tokenizer.encode("Hello!"), max_new_tokens=20, ignore_eos=True)
    assert whole == tokenizer.decode(right)
    assert deltas[0]["role"] == "assistant" and all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == whole[: whole.index(whole[2:4])]


def test_null_asks_for_nothing_and_stop_token_ids_end_an_answer(served):
    body = {"prompt": PROMPT, "max_tokens": None, "suffix": None, "return_token_ids": True, **GREEDY}
    whole = served.json("/v1/completions", body)["choices"][0]["token_ids"]

    ended = served.json("/v1/completions", {**body, "stop_token_ids": [whole[5]]})["choices"][0]

    assert len(whole) == 16 and ended["finish_reason"] == "stop"
    assert ended["token_ids"] == whole[: len(ended["token_ids"])] and len(ended["token_ids"]) <= 6


def test_a_client_that_leaves_ends_its_request(served):
    async def leave():
        body = {"prompt": PROMPT, "max_tokens": 240, "stream": True, **GREEDY}
        async with (
            aiohttp.ClientSession() as session,
            session.post(served.base + "/v1/completions", json=body) as answer,
        ):
            await answer.content.readline()

    before = served.engine.stats()["output_tokens"]
    served.wait(leave())

    served.wait_until_idle()
    assert served.engine.stats()["output_tokens"] - before < 240


def test_an_engine_that_fails_in_mid_stream_says_so_in_the_stream(served, monkeypatch):
    step, count = served.engine.step, iter(range(100))

    def failing():
        if next(count) == 5:
            raise MemoryError("no block left")
        return step()

    monkeypatch.setattr(served.engine, "step", failing)
    status, text = served.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 20, "stream": True, **GREEDY})

    assert status == 200
    assert events_of(text)[-1]["error"]["message"] == "MemoryError: no block left"


def test_models_and_metrics_tell_what_is_served(served):
    async def get(path):
        async with aiohttp.ClientSession() as session, session.get(served.base + path) as answer:
            return await answer.text()

    served.wait_until_idle()  # a request of the test before may still be on its way out
    models = json.loads(served.wait(get("/v1/models")))
    lines = dict(line.split() for line in served.wait(get("/metrics")).splitlines())

    assert models["data"][0]["id"] == "tiny" and models["data"][0]["max_model_len"] == 256
    assert float(lines["ascend_kit:generation_tokens_total"]) == served.engine.stats()["output_tokens"]
    assert float(lines["ascend_kit:kv_cache_usage_perc"]) == 0
