"""The engine against transformers: the same greedy tokens and scores whatever the batching."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from ascend_kit import AscendInferEngine, SamplingParams

NEW = 12
SWITCHES = [(False, False, False), (False, True, True), (True, True, True)]


def make_engine(folder, device="cpu", **changes):
    settings = dict(precision="fp32", device=device, max_seq_length=512, batch_size=8, block_size=16, kv_cache_gib=0.05)
    return AscendInferEngine(folder, **{**settings, **changes})


def prompts_of(lengths, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="session")
def hf(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def hf_greedy(model, prompt, new=NEW):
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=257,
        )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("graph_mode,operator_fusion,memory_optimize", SWITCHES)
def test_greedy_tokens_equal_transformers_for_mixed_lengths(
    tiny_model_dir, hf, graph_mode, operator_fusion, memory_optimize, device
):
    prompts = prompts_of([1, 7, 40, 100, 16, 33])

    with make_engine(
        tiny_model_dir, device, graph_mode=graph_mode, operator_fusion=operator_fusion, memory_optimize=memory_optimize
    ) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))

    assert [o.token_ids for o in outputs] == [hf_greedy(hf, p) for p in prompts]
    assert len({tuple(o.token_ids) for o in outputs}) > 1, "the tiny model must depend on its prompt"


def test_more_requests_than_a_graph_holds_are_computed_without_one(tiny_qwen3_dir, device):
    prompts = prompts_of([5 + i for i in range(24)])
    sampling = SamplingParams(max_new_tokens=6, ignore_eos=True)

    with make_engine(tiny_qwen3_dir, device, graph_mode=True, batch_size=24) as engine:
        together = [o.token_ids for o in engine.generate(prompts, sampling)]
        alone = [engine.generate([p], sampling)[0].token_ids for p in prompts]

    assert together == alone


def test_a_single_request_equals_transformers(tiny_model_dir, hf, device):
    prompt = prompts_of([25])[0]

    with make_engine(tiny_model_dir, device) as engine:
        output = engine.generate([prompt], SamplingParams(max_new_tokens=NEW))[0]

    assert output.token_ids == hf_greedy(hf, prompt)
    assert output.finish_reason in ("length", "stop")


def test_a_prompt_split_over_several_steps_gives_the_same_tokens(tiny_model_dir, hf, device):
    prompts = prompts_of([90, 70, 5])

    with make_engine(tiny_model_dir, device, max_tokens_per_step=16) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
        steps = engine.stats()["steps"]

    assert [o.token_ids for o in outputs] == [hf_greedy(hf, p) for p in prompts]
    assert steps > math.ceil(165 / 16)


def test_preempted_sequence_resumes_with_same_tokens(tiny_model_dir, hf, device):
    prompts = prompts_of([30, 30, 30, 30])

    with make_engine(tiny_model_dir, device, max_seq_length=64) as engine:
        engine.core.blocks.free = engine.core.blocks.free[:8]  # room for two sequences at full length
        engine.core.blocks.num_blocks = 9
        engine.core.blocks.references = [0] * 9
        engine.core.blocks.free = list(range(8, 0, -1))
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=NEW + 16))
        preemptions = engine.stats()["preemptions"]

    assert preemptions > 0
    assert [o.token_ids for o in outputs] == [hf_greedy(hf, p, NEW + 16) for p in prompts]
    assert sum(o.num_preemptions for o in outputs) == preemptions


def test_requests_with_a_shared_prefix_reuse_its_blocks_and_keep_their_tokens(tiny_model_dir, hf, device):
    shared = prompts_of([64])[0]
    prompts = [shared + tail for tail in prompts_of([3, 9, 1, 20], seed=5)]

    with make_engine(tiny_model_dir, device) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
        again = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))

    assert [o.token_ids for o in outputs] == [hf_greedy(hf, p) for p in prompts]
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs]
    assert [o.num_cached_tokens for o in outputs] == [0, 64, 64, 64]
    assert all(o.num_cached_tokens >= 64 for o in again)


def test_without_memory_optimize_every_slot_reserves_its_whole_length(tiny_qwen3_dir):
    with make_engine(tiny_qwen3_dir, memory_optimize=False, max_seq_length=64, batch_size=2) as engine:
        engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=4))
        engine.step()
        free = engine.stats()["kv_blocks_free"]
        while engine.has_unfinished:
            engine.step()

    assert free == 4  # 2 slots x 64 / 16 blocks, one slot taken


def test_scores_equal_transformers(tiny_model_dir, hf, device):
    contexts = prompts_of([5, 30, 30, 64, 1])
    pairs = [(c, t) for c, t in zip(contexts, prompts_of([3, 1, 8, 2, 40], seed=9), strict=True)]
    pairs.append((pairs[1][0], [7]))  # the same input as pair 1, another continuation

    with make_engine(tiny_model_dir, device, max_tokens_per_step=24) as engine:
        scores = engine.score(pairs)

    for (context, continuation), score in zip(pairs, scores, strict=True):
        with torch.inference_mode():
            logits = hf(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        rows = logits[len(context) - 1 : -1]
        expected = rows.gather(-1, torch.tensor(continuation).unsqueeze(-1)).sum().item()
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert score.is_greedy == (rows.argmax(-1).tolist() == continuation)


def test_greedy_continuation_is_scored_as_greedy(tiny_model_dir, hf):
    prompt = prompts_of([20])[0]
    greedy = hf_greedy(hf, prompt, 4)

    with make_engine(tiny_model_dir) as engine:
        assert engine.score([(prompt, greedy)])[0].is_greedy


def test_sampling_depends_on_the_seed_and_not_on_the_batch(tiny_qwen3_dir, device):
    prompts = prompts_of([10, 20, 30, 15])
    params = [SamplingParams(max_new_tokens=10, temperature=1.0, top_k=50, top_p=0.95, seed=s) for s in range(4)]

    with make_engine(tiny_qwen3_dir, device) as engine:
        together = [o.token_ids for o in engine.generate(prompts, params)]
        alone = [engine.generate([p], s)[0].token_ids for p, s in zip(prompts, params, strict=True)]
        other = engine.generate([prompts[0]], SamplingParams(max_new_tokens=10, temperature=1.0, seed=99))[0].token_ids

    assert together == alone
    assert other != alone[0]


def test_logprobs_are_those_of_the_chosen_tokens(tiny_qwen3_dir):
    prompt = prompts_of([12])[0]

    with make_engine(tiny_qwen3_dir) as engine:
        output = engine.generate([prompt], SamplingParams(max_new_tokens=5, logprobs=3))[0]
        score = engine.score([(prompt, output.token_ids)])[0]

    assert sum(item.logprob for item in output.logprobs) == pytest.approx(score.logprob, abs=1e-4)
    assert all(
        len(item.top) == 3 and item.top[0][0] == token
        for item, token in zip(output.logprobs, output.token_ids, strict=True)
    )


def test_a_stop_string_cuts_the_text_and_ends_the_request(tiny_qwen3_dir):
    prompt = prompts_of([12])[0]
    with make_engine(tiny_qwen3_dir) as engine:
        free = engine.generate([prompt], SamplingParams(max_new_tokens=20, ignore_eos=True))[0]
        letter = next(c for c in free.text[2:] if c.isprintable() and c != "\ufffd")
        cut = engine.generate([prompt], SamplingParams(max_new_tokens=20, ignore_eos=True, stop=(letter,)))[0]

    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(letter)]


def test_stop_token_ids_and_min_new_tokens_are_honoured(tiny_qwen3_dir):
    prompt = prompts_of([12])[0]
    with make_engine(tiny_qwen3_dir) as engine:
        free = engine.generate([prompt], SamplingParams(max_new_tokens=8, ignore_eos=True))[0].token_ids
        stopped = engine.generate([prompt], SamplingParams(max_new_tokens=8, stop_token_ids=(free[0],)))[0]
        longer = engine.generate(
            [prompt], SamplingParams(max_new_tokens=8, stop_token_ids=(free[0],), min_new_tokens=4)
        )[0]

    assert stopped.token_ids == free[:1] and stopped.finish_reason == "stop"
    assert len(longer.token_ids) >= 4 and free[0] not in longer.token_ids[:4]


def test_a_stream_gives_the_same_text_as_generate(tiny_qwen3_dir):
    prompts = prompts_of([12, 30])
    with make_engine(tiny_qwen3_dir) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=15, ignore_eos=True))
        events = list(engine.stream(prompts, SamplingParams(max_new_tokens=15, ignore_eos=True)))

    for number, output in enumerate(outputs):
        mine = [event for event in events if event.index == number]
        assert [event.token_id for event in mine] == output.token_ids
        assert "".join(event.text for event in mine) == output.text
        assert [event.finish_reason for event in mine] == [None] * 14 + ["length"]


def test_leaving_a_stream_early_frees_its_blocks(tiny_qwen3_dir):
    with make_engine(tiny_qwen3_dir) as engine:
        for _ in engine.stream(prompts_of([12, 30]), SamplingParams(max_new_tokens=50)):
            break
        assert not engine.has_unfinished
        engine.core.blocks.check([])


@pytest.mark.parametrize("side", ["left", "right"])
def test_infer_takes_padded_arrays_and_returns_only_new_tokens(tiny_qwen3_dir, side):
    prompts = prompts_of([4, 9, 6])
    ids, mask = np.full((3, 9), 257), np.zeros((3, 9), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        where = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = prompt, 1

    with make_engine(tiny_qwen3_dir) as engine:
        result = engine.infer(ids, mask, max_new_tokens=6)
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=6))

    for row, output in zip(result, outputs, strict=True):
        assert row[: len(output.token_ids)].tolist() == output.token_ids
        assert (row[len(output.token_ids) :] == 257).all()


def test_bad_requests_end_with_their_reason_and_the_others_go_on(tiny_qwen3_dir):
    good = prompts_of([10])[0]
    with make_engine(tiny_qwen3_dir, max_seq_length=64, kv_cache_gib=0.001) as engine:
        engine.core.blocks.num_blocks = 4  # three blocks of 16 tokens
        engine.core.blocks.references = [0] * 4
        engine.core.blocks.free = [3, 2, 1]
        outputs = engine.generate([good, [], [5] * 64, [5, 320], [5] * 40], SamplingParams(max_new_tokens=20))

    assert [o.finish_reason == "error" for o in outputs] == [False, True, True, True, True]
    assert "empty" in outputs[1].error
    assert "64 tokens" in outputs[2].error and "max_seq_length=64" in outputs[2].error
    assert "320" in outputs[3].error and "0 to 319" in outputs[3].error
    assert "KV blocks" in outputs[4].error and "kv_cache_gib" in outputs[4].error


def test_an_answer_stops_at_max_seq_length(tiny_qwen3_dir):
    with make_engine(tiny_qwen3_dir, max_seq_length=32) as engine:
        output = engine.generate([prompts_of([20])[0]], SamplingParams(max_new_tokens=100, ignore_eos=True))[0]

    assert output.finish_reason == "length" and len(output.token_ids) == 12


def test_timelines_are_ordered(tiny_qwen3_dir):
    with make_engine(tiny_qwen3_dir) as engine:
        output = engine.generate(prompts_of([20]), SamplingParams(max_new_tokens=5, ignore_eos=True))[0]

    times = [output.timeline.arrival_s, output.timeline.scheduled_s, *output.timeline.token_times_s]
    assert times == sorted(times) and len(output.timeline.token_times_s) == 5
    assert output.timeline.finished_s == output.timeline.token_times_s[-1]


def test_a_stop_string_is_only_looked_for_after_min_new_tokens(tiny_qwen3_dir):
    prompt = prompts_of([12])[0]
    with make_engine(tiny_qwen3_dir) as engine:
        free = engine.generate([prompt], SamplingParams(max_new_tokens=12, ignore_eos=True))[0]
        letter = next(c for c in free.text[:3] if c != "\ufffd")
        late = engine.generate(
            [prompt], SamplingParams(max_new_tokens=12, ignore_eos=True, stop=(letter,), min_new_tokens=12)
        )[0]

    assert len(late.token_ids) == 12


def test_half_a_character_is_never_shown(tiny_qwen3_dir):
    from transformers import AutoTokenizer

    from ascend_kit.engine.text import Detokenizer

    text = "昇腾 ascend é🙂!"
    detokenizer = Detokenizer(AutoTokenizer.from_pretrained(tiny_qwen3_dir, trust_remote_code=False))
    for token in detokenizer.tokenizer.encode(text):
        detokenizer.add(token)
        assert "\ufffd" not in detokenizer.text

    assert detokenizer.text + detokenizer.pending == text


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"precision": "int3"}, "precision"),
        ({"max_seq_length": 5000}, "max_position_embeddings"),
        ({"kv_cache_gib": 1e-9}, "kv_cache_gib"),
    ],
)
def test_impossible_settings_are_refused_by_name(tiny_qwen3_dir, changes, word):
    with pytest.raises(ValueError, match=word):
        make_engine(tiny_qwen3_dir, **changes).load_model()


def test_a_converted_folder_that_was_changed_is_refused_by_file_name(tiny_qwen3_dir, tmp_path):
    from ascend_kit import convert
    from ascend_kit.checkpoint.tensor_file import CheckpointError

    weights = convert(tiny_qwen3_dir, tmp_path / "model", precision="fp32").folder / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))  # one bit of the last weight: only a full check can see it

    make_engine(weights.parent).load_model().close()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not have the hash"):
        make_engine(weights.parent, check_all_bytes=True).load_model()
    with open(weights, "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes"):
        make_engine(weights.parent).load_model()


def test_plain_operators_reach_the_engine_and_its_identity(tiny_qwen3_dir):
    from ascend_kit.engine.config import EngineConfig

    settings = dict(device="cpu", precision="fp32", max_seq_length=64, batch_size=2, kv_cache_gib=0.01)
    sampling = SamplingParams(max_new_tokens=6, ignore_eos=True)

    with AscendInferEngine(tiny_qwen3_dir, **settings, graph_mode=False) as engine:
        expected = engine.generate([[1, 2, 3]], sampling)[0].token_ids
    with AscendInferEngine(tiny_qwen3_dir, **settings, graph_mode=False, plain_ops=["rotary", "linear"]) as engine:
        assert engine.generate([[1, 2, 3]], sampling)[0].token_ids == expected
        assert engine.identity.to_row()["engine"]["plain_ops"] == ["linear", "rotary"]
    assert EngineConfig("m", plain_ops=["b", "a"]).plain_ops == ("a", "b")
    with pytest.raises(ValueError, match=r"plain_ops: no operator 'rotery'; did you mean 'rotary'"):
        AscendInferEngine(tiny_qwen3_dir, **settings, plain_ops=["rotery"]).load_model()
