"""Text in pieces, prompts and pairs as lm-eval and transformers encode them, chats."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from small_engine import PROMPT, open_engine

from ascend_kit import SamplingParams
from ascend_kit.engine import text

# --- text -----------------------------------------------------------------------------------------------------

TEXT = "Ascend 昇腾 910B, 🙂👩\u200d🚀 é ñ . isn't it ? yes ! \n\t tab  two spaces — ‘quotes’ 𠮷野家 end"


@pytest.fixture(scope="module")
def engine(tiny_qwen3_dir, device):
    with open_engine(tiny_qwen3_dir, device=device) as engine:
        yield engine


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw)


def sentencepiece(clean=False):
    """Words behind ▁, letters, and bytes for the rest: as the tokenizers of Llama decode."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [f"<0x{number:02X}>" for number in range(256)] + ["▁", "▁is", "n't", "▁two", "▁,", "end", "tab"]
    pieces += [letter for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "i"), ("▁i", "s")]
    vocab["▁i"] = len(vocab)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token=None))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", clean_up_tokenization_spaces=clean
    )


def cleaning():
    return sentencepiece(clean=True)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, cleaning])
@pytest.mark.parametrize("window,context", [(24, 8), (2, 1), (5, 2), (1000, 8)])
def test_text_in_pieces_is_the_text_decoded_whole(make, window, context, monkeypatch):
    monkeypatch.setattr(text.Detokenizer, "WINDOW", window)
    monkeypatch.setattr(text.Detokenizer, "CONTEXT", context)
    tokenizer = make()
    draw = np.random.default_rng(0)
    cases = [tokenizer.encode(TEXT * 3), [0xE6, 0x98], [0x98, 0xF0, 0x9F, 65, 66], list(range(150, 256))]
    cases += [draw.integers(0, len(tokenizer), 80).tolist() for _ in range(30)]
    for special in tokenizer.all_special_ids:  # answers that go on behind an end token
        cases += [
            [0xE6, special, 0x98, special, 0xAF, 65, special],
            np.where(draw.random(80) < 0.3, special, cases[-1]),
        ]
    cases = [[int(token) for token in ids] for ids in cases]
    for ids in cases:
        detokenizer = text.Detokenizer(tokenizer)

        certain = [""]
        for token in ids:
            detokenizer.add(token)
            certain.append(detokenizer.text)

        assert all(after.startswith(before) for before, after in itertools.pairwise(certain))
        assert detokenizer.text + detokenizer.pending == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_newline_that_is_a_byte_token_stops_at_once():
    tokenizer = sentencepiece()
    detokenizer = text.Detokenizer(tokenizer, ("\n",))
    found = []
    for token in tokenizer.encode("end\nmore"):
        detokenizer.add(token)
        found.append(detokenizer.cut_at_stop())
        if found[-1]:
            break

    assert (
        detokenizer.text == "end"
        and tokenizer.convert_ids_to_tokens(tokenizer.encode("end\nmore"))[len(found) - 1] == "<0x0A>"
    )


# --- prompts and pairs ----------------------------------------------------------------------------------------


def bos_tokenizer(folder):
    """Byte-level with a begin-of-text token (257) before every text."""
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 257)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


def test_texts_are_encoded_together_as_lm_eval_does(tmp_path):
    from lm_eval.models.huggingface import HFLM

    folder = make_model(tmp_path / "m", "qwen3")
    tokenizer = bos_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    pairs = [("The sky is", " blue"), ("The sky is ", "blue"), ("a  ", " b"), ("x", "y"), ("Ü", "ß")]

    with open_engine(folder) as engine:
        scores = engine.score(pairs)

    for pair, score in zip(pairs, scores, strict=True):
        (expected, greedy) = judge._loglikelihood_tokens([(pair, *judge._encode_pair(*pair))], disable_tqdm=True)[0]
        assert score.logprob == pytest.approx(expected, abs=1e-3) and score.is_greedy == greedy


def test_a_prompt_that_has_its_begin_token_gets_no_second_one(tmp_path):
    folder = make_model(tmp_path / "m", "qwen3")
    bos_tokenizer(folder)

    with open_engine(folder) as engine:
        outputs = engine.generate(["<pad>Hi", "Hi"], SamplingParams(max_new_tokens=1))

    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids
    assert outputs[0].prompt_token_ids.count(257) == 1


def test_one_prompt_alone_is_one_prompt_in_any_form(engine):
    sampling = SamplingParams(max_new_tokens=3)
    expected = engine.generate([PROMPT], sampling)[0].token_ids

    assert len(engine.generate("Hello", sampling)) == 1
    for form in (PROMPT, tuple(PROMPT), np.array(PROMPT), [np.array(PROMPT)], [[np.int64(t) for t in PROMPT]]):
        assert [output.token_ids for output in engine.generate(form, sampling)] == [expected]
    assert len(engine.generate(np.array([PROMPT, PROMPT]), sampling)) == 2
    assert engine.generate([], sampling) == []


@pytest.mark.parametrize(
    "prompt,word", [([1, True], "True"), ([1.5], "1.5"), (["a", "b"], "'a'"), ("half \ud83d", "U+D83D")]
)
def test_a_prompt_that_cannot_be_encoded_fails_alone(engine, prompt, word):
    outputs = engine.generate([[1, 2], prompt, "whole \U0001f600"], SamplingParams(max_new_tokens=2))

    assert [output.finish_reason == "error" for output in outputs] == [False, True, False]
    assert word in outputs[1].error
    number = engine.add_request(prompt)
    assert [(output.index, output.finish_reason) for output in engine.step()] == [(number, "error")]


def test_a_pair_that_cannot_be_encoded_fails_alone(engine):
    scores = engine.score([([1, 2], [3]), ("half \ud83d", " x"), ([1, 2], [4])])

    assert [score.error is None for score in scores] == [True, False, True]
    assert math.isnan(scores[1].logprob) and "D83D" in scores[1].error


@pytest.mark.parametrize("prompts", [[b"bytes"], b"bytes", [None], [{"a": 1}], {"prompt": "x"}, 5])
def test_what_is_no_prompt_is_refused_by_name(engine, prompts):
    with pytest.raises(TypeError, match="expected text or a list of token ids"):
        engine.generate(prompts)
    assert not engine.has_unfinished


@pytest.mark.parametrize("pairs", [["ab"], [("a", "b", "c")], ["a"], ("context", "continuation")])
def test_what_is_no_pair_is_refused_by_name(engine, pairs):
    with pytest.raises(ValueError, match=r"pair 0: expected \(context, continuation\)"):
        engine.score(pairs)


def test_use_before_loading_says_what_to_do(tiny_qwen3_dir):
    engine = open_engine(tiny_qwen3_dir)
    calls = [
        lambda: engine.generate(["a"]),
        lambda: engine.stream(["a"]),
        lambda: engine.score([("a", "b")]),
        lambda: engine.infer([[1]]),
        lambda: engine.add_request("a"),
        lambda: engine.step(),
        lambda: engine.cancel(0),
        lambda: engine.stats(),
        lambda: engine.render_chat("a"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"call load_model\(\)"):
            call()


# --- chats ----------------------------------------------------------------------------------------------------

SWITCH = (
    "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def test_thinking_is_switched_in_the_template(engine):
    engine.tokenizer.chat_template = SWITCH
    try:
        assert engine.render_chat("Hi", thinking=False) == "<u>Hi</u><a><think></think>" == engine.render_chat("Hi")
        assert engine.render_chat("Hi", thinking=True) == "<u>Hi</u><a>"
        assert engine.render_chat([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]) == (
            "<u>1</u><u>2</u><a><think></think>"
        )
        engine.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        assert engine.render_chat("Hi", thinking=False) == "Hi"
        with pytest.raises(ValueError, match="thinking=True: the chat template has no switch"):
            engine.render_chat("Hi", thinking=True)
        # DeepSeek-R1-Distill's removes earlier thoughts and cannot keep the model from new ones.
        engine.tokenizer.chat_template = "{{ messages[-1]['content'].split('</think>')[-1] }}"
        with pytest.raises(ValueError, match="thinking=False: the chat template has no switch"):
            engine.render_chat("Hi", thinking=False)
    finally:
        engine.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        engine.render_chat("Hi")
