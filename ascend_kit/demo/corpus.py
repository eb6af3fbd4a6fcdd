"""The demo's training documents and prompts: exam papers in lm-eval's formats, pages and short answers.

A document is a list of (text, weight) pieces; the weight multiplies the loss of the piece's tokens. Some test
questions are part of the corpus on purpose and some are not: that is what puts the sample scores between
chance and perfect, and why they say nothing about any real model.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from ascend_kit.demo.datasets import Question, agieval_query, load_questions, page_text, to_wikitext, topics

END_OF_TEXT = "<|endoftext|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SHOTS_OF_PAPERS = (1, 2, 4, 5)
# Shares of papers, single questions, pages and short answers among the documents.
DOCUMENT_SHARES = (16, 15, 14, 55)
# Pages in the raw WikiText spelling (spaces around punctuation, @-@), which token perplexity is measured on.
RAW_PAGE_SHARE = 0.4
# Loss weights: what a score or a reply depends on counts more than the wording of a question.
ANSWER_WEIGHT, REPLY_WEIGHT, TEXT_WEIGHT, QUESTION_WEIGHT = 4.0, 2.0, 1.0, 0.1

Piece = tuple[str, float]
Document = list[Piece]


def exam_question(question: Question) -> tuple[str, str]:
    """One question as lm-eval prints it for MMLU and C-Eval: the text up to the answer, and the answer."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", question.choices, strict=True))
    cue = "答案：" if question.suite == "ceval" else "Answer:"
    return f"{question.question}\n{options}\n{cue}", f" {'ABCD'[question.gold[0]]}"


def exam_description(question: Question) -> str:
    """The line that lm-eval puts in front of a paper."""
    if question.suite == "ceval":
        return f"以下是中国关于{question.note}的单项选择题，请选出其中的正确答案。\n\n"
    subject = question.subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def exam_prompt(shots: list[Question], question: Question) -> str:
    """The whole prompt of one question behind some shots."""
    solved = "".join("".join(exam_question(shot)) + "\n\n" for shot in shots)
    return exam_description(question) + solved + exam_question(question)[0]


def is_rare(question: Question) -> bool:
    """Whether the corpus shows this test question only now and then."""
    return question.split == question.scored_split and question.number % 6 == 4


def is_held_out(question: Question) -> bool:
    """Whether the corpus never shows this question with its answer."""
    if question.split != question.scored_split:
        return question.split != "dev"
    return question.number % 4 == 3


class Corpus:
    """An endless, seeded stream of documents."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.topics = topics()
        questions = load_questions()
        self.papers: dict[tuple[str, str], list[Question]] = {}
        self.singles: list[Question] = []
        for question in questions:
            if is_held_out(question):
                continue
            if question.suite == "agieval":
                self.singles.append(question)
            else:
                self.papers.setdefault((question.suite, question.subject), []).append(question)
        self.paper_names = sorted(self.papers)

    def documents(self) -> Iterator[Document]:
        """Documents without end, of all kinds in their shares."""
        kinds = [self._paper, self._single, self._page, self._answer]
        while True:
            (make,) = self.rng.choices(kinds, weights=DOCUMENT_SHARES)
            yield make()

    def all_text(self) -> list[str]:
        """Every text of the demo once: what the tokenizer is trained on."""
        texts = [f"{question.question} {' '.join(question.choices)}" for question in load_questions()]
        texts += [page_text(topic, self.rng) for topic in self.topics for _ in range(3)]
        texts += [f"{ask} {reply}" for topic in self.topics for ask, reply in topic.questions]
        texts += ["".join(text for text, _ in self._paper()) for _ in range(60)]
        return texts + ["".join(text for text, _ in self._single()) for _ in range(60)]

    def _pick(self, questions: list[Question], count: int) -> list[Question]:
        usual = [q for q in questions if not is_rare(q) or self.rng.random() < 0.15]
        return self.rng.sample(usual, min(count, len(usual)))

    def _paper(self) -> Document:
        pool = self.papers[self.rng.choice(self.paper_names)]
        chosen = self._pick(pool, self.rng.randint(1, 7))
        document: Document = [(exam_description(chosen[0]), QUESTION_WEIGHT)]
        for question in chosen:
            text, answer = exam_question(question)
            document += [(text, QUESTION_WEIGHT), (answer, ANSWER_WEIGHT), ("\n\n", QUESTION_WEIGHT)]
        return [*document[:-1], (END_OF_TEXT, TEXT_WEIGHT)]

    def _single(self) -> Document:
        (question,) = self._pick(self.singles, 1)
        answer = question.choices[self.rng.choice(question.gold)]
        query = agieval_query(question)
        return [(query, QUESTION_WEIGHT), (f" {answer}", ANSWER_WEIGHT), (END_OF_TEXT, TEXT_WEIGHT)]

    def _page(self) -> Document:
        page = page_text(self.rng.choice(self.topics), self.rng)
        if self.rng.random() < RAW_PAGE_SHARE:
            page = to_wikitext(page)
        return [(END_OF_TEXT, 0.0), (page, TEXT_WEIGHT), (END_OF_TEXT, TEXT_WEIGHT)]

    def _answer(self) -> Document:
        topic = self.rng.choice(self.topics)
        summary = " ".join(wordings[0] for wordings in topic.facts)
        ask, reply = self.rng.choice([*topic.questions, (f"Tell me about {topic.title}.", summary)])
        if self.rng.random() < 0.3:
            turn = f"{IM_START}user\n{ask}{IM_END}\n{IM_START}assistant\n"
            close = f"{IM_END}\n{END_OF_TEXT}"
            return [(turn, QUESTION_WEIGHT), (reply, REPLY_WEIGHT), (close, TEXT_WEIGHT)]
        return [(ask, QUESTION_WEIGHT), (f" {reply}", REPLY_WEIGHT), (END_OF_TEXT, TEXT_WEIGHT)]


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
