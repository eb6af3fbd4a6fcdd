"""What decides the next token and the end of an answer, against transformers' own processors and hand-made cases."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from safetensors.torch import load_file, save_file
from small_engine import PROMPT, open_engine

from ascend_kit import SamplingParams
from ascend_kit.engine.sampler import NOT_FINITE, sample
from ascend_kit.engine.sequence import Sequence


@pytest.fixture(scope="module")
def engine(tiny_qwen3_dir, device):
    with open_engine(tiny_qwen3_dir, device=device) as engine:
        yield engine


def frequencies(logits, count=6000, written=(), **params):
    """Share of each token in many draws."""
    sequences = []
    for seed in range(count):
        sequence = Sequence([0], SamplingParams(**{"temperature": 1.0, "seed": seed, **params}), arrival_s=0.0)
        sequence.token_ids += written
        sequences.append(sequence)
    return torch.bincount(sample(logits.repeat(count, 1), sequences, ()), minlength=len(logits)) / count


def warped(logits, *processors, ids=((0,),)):
    scores = logits.unsqueeze(0)
    for processor in processors:
        scores = processor(torch.tensor(ids), scores)
    return scores[0].softmax(-1)


# --- sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k,top_p,min_p", [(3, 0.7, 0.0), (4, 0.85, 0.0), (None, 0.9, 0.0), (None, 1.0, 0.3)])
def test_top_k_top_p_and_min_p_are_those_of_transformers(top_k, top_p, min_p):
    logits = torch.tensor([0.2, 2.0, 1.0, -1.0, 0.6, 1.4])
    chain = [transformers.TemperatureLogitsWarper(0.8)]
    chain += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [transformers.MinPLogitsWarper(min_p)] if min_p else []

    got = frequencies(logits, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)

    expected = warped(logits, *chain)
    assert set(got.nonzero().flatten().tolist()) == set(expected.nonzero().flatten().tolist())
    assert (got - expected).abs().max() < 0.03  # standard error at most 0.0065


def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(tiny_qwen3_dir, engine):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval()
    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=1.7,
        pad_token_id=257,
    )[0, len(PROMPT) :].tolist()
    plain = engine.generate([PROMPT], SamplingParams(max_new_tokens=24))[0].token_ids

    got = engine.generate([PROMPT] * 2, [SamplingParams(max_new_tokens=24, repetition_penalty=1.7), SamplingParams()])

    assert got[0].token_ids == expected != plain
    assert got[1].token_ids[:24] == plain, "a neighbour without the penalty"


def test_the_presence_penalty_is_subtracted_once_from_what_the_answer_has():
    logits = torch.tensor([0.0, 1.0, 2.0, 1.5])

    got = frequencies(logits, written=[2, 2, 1], presence_penalty=1.2)

    expected = torch.tensor([0.0, -0.2, 0.8, 1.5]).softmax(-1)  # token 0 is in the prompt alone
    assert (got - expected).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy(engine, temperature):
    greedy = engine.generate([PROMPT], SamplingParams(max_new_tokens=8))[0].token_ids

    assert engine.generate([PROMPT], SamplingParams(max_new_tokens=8, temperature=temperature))[0].token_ids == greedy


def test_samples_without_a_seed_differ_and_repeat_with_the_engines_seed(tiny_qwen3_dir, device):
    def samples(seed):
        with open_engine(tiny_qwen3_dir, seed=seed, device=device) as engine:
            outputs = engine.generate([PROMPT] * 6, SamplingParams(max_new_tokens=10, temperature=1.5, ignore_eos=True))
            again = engine.generate([PROMPT], SamplingParams(max_new_tokens=10, temperature=1.5, ignore_eos=True))
            seeded = engine.generate([PROMPT] * 2, SamplingParams(max_new_tokens=10, temperature=1.5, seed=3))
            return [tuple(o.token_ids) for o in outputs + again], [tuple(o.token_ids) for o in seeded]

    first, seeded = samples(0)

    assert len(set(first)) == 7 and seeded[0] == seeded[1]
    assert samples(0) == (first, seeded)
    other, same = samples(1)
    assert not set(other) & set(first) and same == seeded


def test_generation_config_is_read_as_transformers_reads_it(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05})
    )
    sampling = SamplingParams.from_model(tmp_path, max_new_tokens=9, top_p=0.5)

    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.5)
    assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.05, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 0}')
    assert SamplingParams.from_model(tmp_path) == SamplingParams()  # without do_sample it is greedy
    with pytest.raises(ValueError, match=r"generation_config\.json is missing"):
        SamplingParams.from_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("max_new_tokens", 0),
        ("seed", 1.5),
        ("logprobs", 101),
        ("stop", ("",)),
        ("stop", (b"x",)),
        ("stop_token_ids", (True,)),
        ("stop_token_ids", ("a",)),
        ("min_new_tokens", 999),
    ],
)
def test_sampling_values_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: allowed"):
        SamplingParams(**{name: value})


def test_numbers_of_numpy_are_numbers():
    sampling = SamplingParams(max_new_tokens=np.int64(3), temperature=np.float32(0.5), stop_token_ids=(np.int32(4),))

    assert sampling == SamplingParams(max_new_tokens=3, temperature=0.5, stop_token_ids=(4,))


# --- logits that are not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_logit_that_is_not_finite_gets_no_token_and_its_neighbour_does(bad):
    logits = torch.zeros(2, 6)
    logits[1, 4], logits[0, 2] = 5.0, bad

    tokens = sample(logits, [Sequence([0], SamplingParams(), arrival_s=0.0) for _ in range(2)], ())

    assert tokens.tolist() == [NOT_FINITE, 4]


def test_an_overflowing_model_ends_requests_and_scores_with_an_error(tmp_path, device):
    folder = make_model(tmp_path / "m", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.0.mlp.down_proj.weight"]
    weight *= 3e4 / weight.abs().max()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with open_engine(folder, precision="fp16", operator_fusion=False, device=device) as engine:
        output = engine.generate([PROMPT], SamplingParams(max_new_tokens=4, logprobs=1, ignore_eos=True))[0]
        score = engine.score([(PROMPT, [65, 66])])[0]
        assert not engine.has_unfinished
        engine.core.blocks.check([])

    assert output.finish_reason == "error" and "not finite" in output.error
    assert output.token_ids == [] == output.logprobs
    assert math.isnan(score.logprob) and not score.is_greedy and "not finite" in score.error


# --- ends -----------------------------------------------------------------------------------------------------


def with_first_token(folder, token, prompt=PROMPT):
    """Change the head so that greedy decoding starts with `token`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1].detach()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][token] = hidden / hidden.norm() ** 2 * 90
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_eos(folder, config, generation):
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), "eos_token_id": value}))


@pytest.mark.parametrize("config,generation", [(300, 300), (256, 300), (300, [256, 300])])
def test_end_ids_of_config_generation_config_and_tokenizer_count_together(tmp_path, config, generation):
    folder = make_model(tmp_path / "m", "qwen3")
    set_eos(folder, config, generation)
    with_first_token(folder, 256)  # the tokenizer's own end

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_engine(folder) as engine:
            output = engine.generate([PROMPT], SamplingParams(max_new_tokens=5))[0]

    assert (output.token_ids, output.finish_reason) == ([256], "stop")
    said = [str(one.message) for one in caught if "end tokens disagree" in str(one.message)]
    assert len(said) == (0 if generation == [256, 300] else 1)


@pytest.mark.parametrize("config,generation", [(999, 256), ([256, -1], 256), (256, [None, 256, 999])])
def test_an_end_id_that_is_no_token_forbids_nothing_while_an_answer_is_short(tmp_path, config, generation):
    folder = make_model(tmp_path / "m", "qwen3")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    set_eos(folder, config, generation)
    with_first_token(folder, vocabulary - 1)  # what -1 would mean as an index

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_engine(folder) as engine:
            sampling = SamplingParams(max_new_tokens=3, min_new_tokens=3, stop_token_ids=(5000, -1))
            output = engine.generate([PROMPT], sampling)[0]

    assert (output.token_ids[0], output.finish_reason, output.error) == (vocabulary - 1, "length", None)
    said = any("[999] are outside the vocabulary" in str(one.message) for one in caught)
    assert said == ("999" in f"{config}{generation}")


def test_end_ids_that_are_no_ids_are_refused_with_their_file(tmp_path):
    folder = make_model(tmp_path / "m", "qwen3")
    set_eos(folder, ["<eos>"], 256)
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id"):
        open_engine(folder)


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path):
    folder = make_model(tmp_path / "m", "qwen3")
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...\n")

    with open_engine(folder):
        pass
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"no tokenizer in {folder}"):
        open_engine(folder).load_model()

    assert not (tmp_path / "ran").exists()


def test_a_stop_string_that_is_a_special_token_ends_the_answer(tmp_path):
    folder = make_model(tmp_path / "m", "qwen3")
    with_first_token(folder, 257)  # <pad>, which is never shown

    with open_engine(folder) as engine:
        output = engine.generate([PROMPT], SamplingParams(max_new_tokens=5, stop=("no such text", "<pad>")))[0]

    assert (output.token_ids, output.finish_reason, output.text) == ([257], "stop", "")


def test_a_stop_string_across_tokens_cuts_the_text(engine):
    plain = engine.generate([PROMPT], SamplingParams(max_new_tokens=30, ignore_eos=True))[0].text
    at = next(n for n in range(3, 20) if plain[n : n + 3].isprintable() and "\ufffd" not in plain[n : n + 3])
    word = plain[at : at + 3]  # byte-level: one token a character at most

    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=word)
    whole = engine.generate([PROMPT], sampling)[0]
    events = list(engine.stream([PROMPT], sampling))

    assert (whole.text, whole.finish_reason) == (plain[: plain.index(word)], "stop")
    assert "".join(event.text for event in events) == whole.text
