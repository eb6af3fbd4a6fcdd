"""The demo's prompts file: short questions, requests for a summary, page openings and whole exam papers."""

import json
import random
from pathlib import Path

from ascend_kit.demo.corpus import exam_prompt
from ascend_kit.demo.datasets import load_questions
from ascend_kit.demo.pages import page_text, topics

SHOTS_OF_PAPERS = (1, 2, 4, 5)


def demo_prompts() -> list[str]:
    """32 prompts of 6 to about 240 tokens, in a fixed mixed order."""
    rng = random.Random(0)
    chosen = topics()
    rng.shuffle(chosen)
    prompts = [rng.choice(topic.questions)[0] for topic in chosen[:12]]
    prompts += [f"Tell me about {topic.title}." for topic in chosen[12:20]]
    prompts += [page_text(topic, rng).split("==")[0].rstrip(" ") for topic in chosen[20:24]]
    prompts += _papers("mmlu", rng) + _papers("ceval", rng)
    rng.shuffle(prompts)
    return prompts


def write_prompts(path: Path) -> None:
    """Write the prompts as JSON lines with the one field `prompt`."""
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in demo_prompts()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _papers(suite: str, rng: random.Random) -> list[str]:
    questions = [question for question in load_questions() if question.suite == suite]
    subjects = sorted({question.subject for question in questions})
    prompts = []
    for shots, subject in zip(SHOTS_OF_PAPERS, rng.sample(subjects, len(SHOTS_OF_PAPERS)), strict=True):
        of_subject = [question for question in questions if question.subject == subject]
        dev = [question for question in of_subject if question.split == "dev"]
        scored = [question for question in of_subject if question.split == question.scored_split]
        prompts.append(exam_prompt(dev[:shots], rng.choice(scored)))
    return prompts
