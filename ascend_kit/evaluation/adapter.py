"""lm-eval's model interface over the engine: tokens in, log-probabilities and text out.

This module knows no tasks and no files. It imports lm-eval at its top (about a second and a half), so
everything else imports it inside functions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ascend_kit.engine import text
from ascend_kit.evaluation.interface import EvaluatedEngine
from ascend_kit.files import hash_value

if TYPE_CHECKING:
    from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Score

Facts = dict[str, Any]
OnAnswer = Callable[[int, Any, Facts], None]  # place of the request, lm-eval's answer, how it came about
DEFAULT_ANSWER_TOKENS = 256  # lm-eval's own default for generate_until
TokenPair = tuple[list[int], list[int]]
SAMPLING_KEYS = {"temperature", "top_k", "top_p", "min_p", "presence_penalty", "repetition_penalty"}
GENERATION_KEYS = {"until", "max_gen_toks", "do_sample"} | SAMPLING_KEYS
THINK_END = "</think>"
# Qwen's own sentence for a thinking budget (Qwen documentation, "Thinking Budget").
HURRY = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{THINK_END}\n\n"
)
PLAIN = {"skip_special_tokens": True}


class NotFiniteError(ValueError):
    """A log-probability is no number: the model's arithmetic has overflowed."""


class EngineLM(TemplateLM):
    """What lm-eval asks of a model, answered by `engine.score` and `engine.generate`.

    `max_length` caps the tokens fed to the model; a longer context loses its left end. With a `thinking_budget` the
    model thinks first, up to so many tokens, and the answer is what follows. Samples of a temperature draw from `seed`,
    their prompt and their number alone. `on_answer` hears of each request as it is answered, `on_step` after each step
    of the engine.
    """

    def __init__(
        self,
        engine: EvaluatedEngine,
        *,
        max_length: int | None = None,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        sampling: dict[str, Any] | None = None,
        seed: int = 0,
        on_answer: OnAnswer | None = None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.thinking, self.thinking_budget = thinking, thinking_budget
        self.sampling, self.seed = sampling or {}, seed
        self.on_answer: OnAnswer = on_answer or (lambda index, answer, facts: None)
        self._max_length = min(max_length or engine.max_seq_length, engine.max_seq_length)
        self._encode = lru_cache(maxsize=2)(partial(text.encode, self.tokenizer))  # the choices of a context follow it

    def on_step(self, *_: Any) -> None:
        """The engine has computed a step."""

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return DEFAULT_ANSWER_TOKENS

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        return self.engine.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: the begin-of-text token where there is one, else the end-of-text
        token.
        """
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one prompt."""
        return text.render_chat(
            self.tokenizer, chat_history, thinking=self.thinking, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, as the engine encodes a text unless `add_special_tokens` says otherwise."""
        if add_special_tokens is None:
            return text.encode(self.tokenizer, string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    # --- scoring --------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding would write it) per request, in the order
        given.
        """
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> TokenPair:
        return text.encode_pair(self.tokenizer, context, continuation, self._encode)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        def keep(index: int, score: Score) -> None:
            if math.isfinite(score.logprob):
                key, context, continuation = requests[index]
                answer = (float(score.logprob), bool(score.is_greedy))
                self.on_answer(index, answer, self._facts(context, continuation))
                self.cache_hook.add_partial("loglikelihood", key, answer)

        return [(_finite(score), bool(score.is_greedy)) for score in self._score(requests, keep)]

    def _score(self, requests: Sequence[tuple[Any, list[int], list[int]]], on_score: Any) -> list[Score]:
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        return self.engine.score(pairs, on_score=on_score, on_progress=self.on_step)

    def _fit(self, context: list[int], continuation: list[int]) -> TokenPair:
        """The pair cut to the last max_length + 1 tokens; the final one is predicted, never fed."""
        if not continuation:
            raise ValueError("nothing to score: the continuation adds no token to its context")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit max_length="
                f"{self.max_length}; raise eval_max_seq_length"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _facts(self, context: list[int], continuation: list[int]) -> Facts:
        kept = min(len(context), self.max_length + 1 - len(continuation))
        return {"num_prompt_tokens": kept, "cut_tokens": len(context) - kept}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text, every token predicted once in windows of max_length tokens."""
        windows = [self.windows(request.args[0]) for request in requests]
        owners = [number for number, part in enumerate(windows) for _ in part]
        found: list[list[float]] = [[] for _ in requests]

        def keep(index: int, score: Score) -> None:
            number = owners[index]
            found[number].append(score.logprob)
            total = math.fsum(found[number])
            if len(found[number]) == len(windows[number]) and math.isfinite(total):
                num_tokens = sum(len(continuation) for _, continuation in windows[number])
                self.on_answer(number, total, {"num_prompt_tokens": num_tokens, "cut_tokens": 0})
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, total)

        for score in self._score([(None, *pair) for part in windows for pair in part], keep):
            _finite(score)
        for number, part in enumerate(windows):
            if not part:  # a text without a token
                self.on_answer(number, 0.0, {"num_prompt_tokens": 0, "cut_tokens": 0})
        return [math.fsum(part) for part in found]

    def windows(self, whole: str) -> list[TokenPair]:
        """(context, tokens to score) pieces of a text: the first token follows the prefix token."""
        pieces = get_rolling_token_windows(self.tok_encode(whole), self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(piece) for piece in pieces]

    # --- generation -----------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text after each prompt, without what was thought before it, cut before the first stop string."""
        seen: Counter[str] = Counter()
        jobs = []
        for context, settings in (cast(tuple[str, dict], request.args[:2]) for request in requests):
            jobs.append(self.job(context, settings, seen[context]))  # a request stands there once for each sample
            seen[context] += 1
        texts: list[str] = [""] * len(requests)

        def keep(index: int, output: RequestOutput) -> None:
            if output.finish_reason in ("stop", "length"):
                job = jobs[index]
                texts[index] = job.answer(self.tokenizer.decode([*job.thought, *output.token_ids], **PLAIN))
                self.on_answer(index, texts[index], job.facts(output))
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])

        places = list(range(len(jobs)))
        if self.thinking_budget:
            done = self._think(jobs, self.thinking_budget)
            for place, output in done.items():
                keep(place, output)
            places = [place for place in places if place not in done]
        outputs = self.engine.generate(
            [jobs[place].prompt + jobs[place].thought for place in places],
            [jobs[place].sampling for place in places],
            on_progress=self.on_step,
            on_output=lambda output: keep(places[output.index], output),
        )
        _all_ended(outputs)
        return texts

    def _think(self, jobs: list[Job], budget: int) -> dict[int, RequestOutput]:
        """Let the model think for at most `budget` tokens, without the task's stop strings; whoever has not ended by
        then is told to answer (Qwen's thinking budget). Comes back: place -> answer of those who ended without a
        thought.
        """
        limits = [replace(job.sampling, max_new_tokens=budget, stop=(THINK_END,)) for job in jobs]
        outputs = self.engine.generate([job.prompt for job in jobs], limits, on_progress=self.on_step)
        _all_ended(outputs)
        hurry = self.tok_encode(HURRY, add_special_tokens=False)
        done = {}
        for place, (job, output) in enumerate(zip(jobs, outputs, strict=True)):
            is_over = output.finish_reason == "stop"
            if is_over and THINK_END not in self.tokenizer.decode(output.token_ids, **PLAIN):
                done[place] = output
                continue
            job.num_thinking, job.is_cut_short = len(output.token_ids), not is_over
            job.thought = [*output.token_ids, *([] if is_over else hurry)]
        return done

    def job(self, context: str, settings: dict[str, Any], number: int = 0) -> Job:
        """A prompt and how it is answered; ValueError for settings that this engine does not know or has no room for.

        Works on a copy of the settings and knows their aliases.
        """
        from ascend_kit.engine.sampler import mix
        from ascend_kit.engine.sequence import SamplingParams

        options = {**cast(dict[str, Any], normalize_gen_kwargs(settings, self.max_gen_toks)), **self.sampling}
        unknown = set(options) - GENERATION_KEYS
        if unknown:
            raise ValueError(
                f"generation settings {sorted(unknown)} are not supported; allowed: {sorted(GENERATION_KEYS)}"
            )
        new_tokens = int(options.pop("max_gen_toks"))
        room = self.max_length - new_tokens - (self.thinking_budget or 0)
        if self.thinking_budget:
            room -= len(self.tok_encode(HURRY, add_special_tokens=False))
        if room < 1:
            thinking = f" and {self.thinking_budget} tokens of thinking" if self.thinking_budget else ""
            raise ValueError(
                f"{new_tokens} new tokens{thinking} leave no room for a prompt within max_length="
                f"{self.max_length}; raise eval_max_seq_length"
            )
        until = [stop for stop in options.pop("until") if stop]
        options.pop("do_sample", None)  # the temperature says it
        sampling = SamplingParams(
            max_new_tokens=new_tokens,
            stop=tuple(until),
            stop_token_ids=(self.eot_token_id,),
            seed=mix(self.seed, int(hash_value([context, number])[:8], 16)),
            **options,
        )
        prompt = self.tok_encode(context)
        return Job(prompt[-room:], sampling, until, max(0, len(prompt) - room), is_thinking=bool(self.thinking_budget))


@dataclass
class Job:
    """One prompt to be answered: its tokens, and what the model thought before the answer."""

    prompt: list[int]
    sampling: SamplingParams
    until: list[str]
    cut_tokens: int
    is_thinking: bool = False
    thought: list[int] = field(default_factory=list)
    num_thinking: int = 0
    is_cut_short: bool = False

    def answer(self, whole: str) -> str:
        """What follows the last end of thinking in a text, cut at the stop strings; thoughts without an end are no
        answer.
        """
        if self.is_thinking:
            whole = whole.rpartition(THINK_END)[2].lstrip() if THINK_END in whole or "<think>" not in whole else ""
        for stop in self.until:
            whole = whole.split(stop)[0]
        return whole

    def facts(self, output: RequestOutput) -> Facts:
        """How the answer came about."""
        facts = {
            "num_prompt_tokens": len(self.prompt),
            "cut_tokens": self.cut_tokens,
            "num_output_tokens": len(output.token_ids),
            "finish_reason": output.finish_reason,
        }
        thinking = {"num_thinking_tokens": self.num_thinking, "thinking_is_cut": self.is_cut_short}
        return {**facts, **(thinking if self.is_thinking else {})}


def _all_ended(outputs: Sequence[RequestOutput]) -> None:
    for output in outputs:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"generation ended with {output.finish_reason}: {output.error}")


def _finite(score: Score) -> float:
    if not math.isfinite(score.logprob):
        raise NotFiniteError(
            f"the engine returned the log-probability {score.logprob}: an overflow in the model's arithmetic; "
            "try precision bf16 or fp32"
        )
    return float(score.logprob)
