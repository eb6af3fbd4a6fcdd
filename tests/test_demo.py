"""The demo assets: the schema lm-eval reads, valid questions, a tokenizer that loses no byte, one build."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from ascend_kit.demo import cached_model, ensure_data, ensure_model
from ascend_kit.demo.corpus import Corpus, demo_prompts, exam_description, exam_prompt, exam_question, is_held_out
from ascend_kit.demo.datasets import SCORED_SPLIT, WIKITEXT_CONFIG, load_questions, page_text, to_wikitext, topics

REPOSITORY = Path(__file__).parents[1]
TASKS = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
QUESTIONS = load_questions()
EXAM_SUBJECTS = sorted({(q.suite, q.subject) for q in QUESTIONS if q.suite != "agieval"})


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return ensure_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def short_training(tmp_path_factory) -> Path:
    """The model after three training steps: everything but a trained model."""
    return ensure_model(tmp_path_factory.mktemp("cache"), steps=3)


def packaged_task(name: str) -> dict:
    """A packaged lm-eval task, its includes merged; functions stay unresolved."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    path = TASKS / name
    task = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    base = packaged_task(str(path.parent.relative_to(TASKS) / task["include"])) if "include" in task else {}
    return base | task


def packaged_module(name: str):
    spec = importlib.util.spec_from_file_location("packaged_lm_eval_module", TASKS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_file(suite: str, subject: str) -> str:
    return f"mmlu/default/mmlu_{subject}.yaml" if suite == "mmlu" else f"ceval/ceval-valid_{subject}.yaml"


def rows_of(folder: Path, split: str) -> list[dict]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


@pytest.mark.parametrize("suite", ["mmlu", "ceval", "agieval"])
def test_every_set_scores_at_least_sixty_questions(suite):
    scored = [q for q in QUESTIONS if q.suite == suite and q.split == SCORED_SPLIT[suite]]

    assert len(scored) >= 60


def test_no_question_appears_in_two_splits_or_twice():
    texts = Counter((q.suite, q.question) for q in QUESTIONS)

    assert [text for text, count in texts.items() if count > 1] == []


def test_every_exam_subject_has_five_shots_and_four_different_options():
    shots = Counter((q.suite, q.subject) for q in QUESTIONS if q.split == "dev")

    assert shots == {subject: 5 for subject in EXAM_SUBJECTS}
    assert all(len(set(q.choices)) == 4 for q in QUESTIONS if q.suite != "agieval")
    assert all(len(set(q.choices)) == len(q.choices) for q in QUESTIONS)


@pytest.mark.parametrize("suite", ["mmlu", "ceval", "agieval"])
def test_right_answers_are_spread_over_the_letters(suite):
    scored = [q for q in QUESTIONS if q.suite == suite and q.split == SCORED_SPLIT[suite]]
    choosing = [q for q in scored if len(q.choices) > 1]

    letters = Counter(q.gold[0] for q in choosing)

    # Answering one letter throughout must not beat chance by much.
    assert set(letters) >= {0, 1, 2, 3}
    assert max(letters.values()) < 0.35 * len(choosing)


def test_mmlu_files_have_the_columns_and_splits_of_the_real_set(data_dir):
    for suite, subject in EXAM_SUBJECTS:
        if suite == "mmlu":
            for split in ("test", "validation", "dev"):
                rows = rows_of(data_dir / "mmlu" / subject, split)
                assert list(rows[0]) == ["question", "subject", "choices", "answer"]
                assert all(row["subject"] == subject and len(row["choices"]) == 4 for row in rows)
                assert all(row["answer"] in range(4) for row in rows)


def test_ceval_files_have_the_columns_and_splits_of_the_real_set(data_dir):
    for suite, subject in EXAM_SUBJECTS:
        if suite == "ceval":
            folder = data_dir / "ceval" / subject
            for split in ("val", "dev", "test"):
                columns = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
                assert list(rows_of(folder, split)[0]) == columns
            assert all(row["answer"] in "ABCD" and row["answer"] for row in rows_of(folder, "val"))
            assert all(row["explanation"] for row in rows_of(folder, "dev"))
            # The real test split keeps its answers to itself.
            assert {row["answer"] for row in rows_of(folder, "test")} == {""}


def test_agieval_subsets_are_known_to_lm_eval_and_hold_valid_answers(data_dir):
    known = {packaged_task(f"agieval/{path.name}")["dataset_path"] for path in TASKS.glob("agieval/*-*.yaml")}
    known.add(packaged_task("agieval/math.yaml")["dataset_path"])
    folders = sorted((data_dir / "agieval").iterdir())

    assert {f"hails/agieval-{folder.name}" for folder in folders} <= known
    several_gold = 0
    for folder in folders:
        for row in rows_of(folder, "test"):
            if folder.name == "math":
                assert list(row) == ["query", "answer"]
                continue
            assert list(row) == ["query", "choices", "gold"]
            assert all(f"({letter})" in row["query"] for letter in "ABCD")
            assert row["gold"] and all(place in range(len(row["choices"])) for place in row["gold"])
            several_gold += len(row["gold"]) > 1
    assert several_gold >= 3


def test_agieval_generated_answers_are_accepted_by_lm_eval(data_dir):
    judge = packaged_module("agieval/utils.py").process_results

    for row in rows_of(data_dir / "agieval" / "math", "test"):
        assert judge(row, [f" {row['answer']}"]) == {"acc": 1}
        assert judge(row, [" 7"]) == {"acc": 0}


@pytest.mark.parametrize("name", ["mmlu", "ceval", "agieval/sat-en", "agieval/math", "wikitext"])
def test_folders_load_offline_by_configuration_name(data_dir, tmp_path, name):
    import datasets

    config = {"mmlu": "astronomy", "ceval": "computer_network", "wikitext": WIKITEXT_CONFIG}.get(name)
    splits = {"mmlu": {"test", "validation", "dev"}, "ceval": {"val", "dev", "test"}}
    splits["wikitext"] = {"train", "validation", "test"}

    loaded = datasets.load_dataset(str(data_dir / name), config, cache_dir=str(tmp_path))

    assert set(loaded) == splits.get(name, {"test"})
    assert all(len(split) > 0 for split in loaded.values())


@pytest.mark.parametrize(("suite", "subject"), EXAM_SUBJECTS)
def test_training_papers_read_exactly_like_lm_evals_prompts(data_dir, suite, subject):
    import jinja2

    task = packaged_task(task_file(suite, subject))
    template = jinja2.Template(task["doc_to_text"])
    shots = rows_of(data_dir / suite / subject, "dev")
    row = rows_of(data_dir / suite / subject, SCORED_SPLIT[suite])[3]
    answers = [shot["answer"] if suite == "ceval" else "ABCD"[shot["answer"]] for shot in shots]
    solved = [f"{template.render(shot)} {answer}\n\n" for shot, answer in zip(shots, answers, strict=True)]
    expected = task["description"] + "".join(solved) + template.render(row)

    of_subject = [q for q in QUESTIONS if (q.suite, q.subject) == (suite, subject)]
    scored = [q for q in of_subject if q.split == q.scored_split]
    prompt = exam_prompt([q for q in of_subject if q.split == "dev"], scored[3])

    assert prompt == expected
    assert exam_description(scored[3]) == task["description"]


def test_wikitext_pages_are_detokenised_to_the_text_the_model_was_trained_on(data_dir):
    detokenise = packaged_module("wikitext/preprocess_wikitext.py").wikitext_detokenizer

    for topic in topics():
        text = page_text(topic, random.Random(topic.title))
        assert detokenise({"page": to_wikitext(text)}) == text
    pages = {split: rows_of(data_dir / "wikitext" / WIKITEXT_CONFIG, split) for split in ("train", "test")}
    assert list(pages["test"][0]) == ["page"]
    assert len(pages["test"]) >= 20


def test_held_out_questions_never_enter_the_corpus_with_their_answer():
    held_out = ["".join(exam_question(q)) for q in QUESTIONS if is_held_out(q) and q.suite != "agieval"]
    documents = Corpus(seed=1).documents()

    text = "\n".join("".join(piece for piece, _ in next(documents)) for _ in range(2000))

    assert len(held_out) >= 60
    assert [question for question in held_out if question in text] == []


def test_prompts_are_many_different_and_of_mixed_length(data_dir):
    lines = (data_dir / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]

    assert prompts == demo_prompts()
    assert 24 <= len(prompts) <= 32
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) > 10 * min(map(len, prompts))


def test_tokenizer_loses_no_byte(short_training):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(short_training, trust_remote_code=False)
    everything = "".join(chr(code) for code in [*range(0x20, 0x250), 0x4E2D, 0x6587, 0x1F600, 0x10FFFD])
    texts = ["中国的首都是北京。", " leading, double  spaces\n\n\ttabs\r\n", "e\u0301 is not é", everything]

    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    # Every byte value has a token of its own, so invalid pieces of UTF-8 can be represented too.
    alphabet = set(tokenizer.get_vocab())
    assert sum(len(token) == 1 for token in alphabet) >= 256


def test_answer_letters_are_single_tokens_behind_every_prompt(short_training):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(short_training, trust_remote_code=False)

    for cue in ("Answer:", "答案："):
        for letter in "ABCD":
            context, whole = tokenizer.encode(cue), tokenizer.encode(f"{cue} {letter}")
            assert whole[:-1] == context


def test_chat_template_opens_a_turn_and_special_tokens_end_texts(short_training):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(short_training, trust_remote_code=False)
    chat = [{"role": "user", "content": "Hello"}]
    settings = GenerationConfig.from_pretrained(short_training)

    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert settings.eos_token_id == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_checkpoint_is_sharded_bfloat16_qwen3(short_training):
    import torch
    from safetensors import safe_open

    config = json.loads((short_training / "config.json").read_text())
    shards = sorted(short_training.glob("model-*.safetensors"))

    assert (config["model_type"], config["max_position_embeddings"]) == ("qwen3", 32768)
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert len(shards) >= 2
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_training_reports_each_step_and_repeats_itself(tmp_path):
    import torch

    from ascend_kit.demo.train import train_model, train_tokenizer

    tokenizer = train_tokenizer()
    seen: list[tuple[int, int]] = []
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)

    first = train_model(tokenizer, steps=2, on_progress=lambda done, total: seen.append((done, total)))
    draw = torch.rand(1)
    second = train_model(tokenizer, steps=2)

    assert seen == [(1, 2), (2, 2)]
    assert torch.equal(draw, expected_draw)
    for (name, left), right in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_fully_trained_model_answers_and_stops_if_the_cache_has_it():
    folder = cached_model()
    if folder is None:
        pytest.skip("the fully trained demo model is not in the cache; `make demo` puts it there")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    prompt = tokenizer("What is the capital of Japan?", return_tensors="pt")

    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])

    assert text == " The capital of Japan is Tokyo.<|endoftext|>"


def test_assets_are_cached_apart_by_training_length_and_kept(short_training):
    cache = short_training.parent

    again = ensure_model(cache, on_progress=lambda *_: pytest.fail("trained twice"), steps=3)

    assert again == short_training
    assert cached_model(cache) is None
