"""lm-eval's model interface over the engine: tokens in, log-probabilities and text out.

This module knows no tasks and no files. It imports lm-eval at its top (about a second and a half), so
everything else imports it inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ascend_kit.engine import text
from ascend_kit.evaluation.interface import EvaluatedEngine

if TYPE_CHECKING:
    from ascend_kit.engine.sequence import SamplingParams

DEFAULT_ANSWER_TOKENS = 256  # lm-eval's own default for generate_until
GENERATE_TOGETHER = 64  # prompts handed to the engine at once; it batches them continuously
TokenPair = tuple[list[int], list[int]]
GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class NotFiniteError(ValueError):
    """A log-probability is no number: the model's arithmetic has overflowed."""


class EngineLM(TemplateLM):
    """What lm-eval asks of a model, answered by `engine.score` and `engine.generate`.

    `max_length` caps the tokens fed to the model; a longer context loses its left end. `batch_size` is how
    many different contexts are scored together. `on_requests(n)` is called as n more requests have been
    answered.
    """

    def __init__(
        self,
        engine: EvaluatedEngine,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        thinking: bool | None = None,
        on_requests: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.batch_size = batch_size
        self.thinking = thinking
        self.cut_tokens: dict[str, int] = {}  # context -> tokens of its left end that the limit took
        self.finish_reasons: dict[str, str] = {}  # prompt -> why its generation ended
        self._max_length = min(max_length or engine.max_seq_length, engine.max_seq_length)
        self.on_requests = on_requests or (lambda count: None)
        self._encode = lru_cache(maxsize=2)(partial(text.encode, self.tokenizer))  # the choices of a context follow it

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
        answers: list[tuple[float, bool]] = []
        for batch in self._batches(requests):
            scores = self.engine.score([self._fit(*request) for request in batch])
            for (key, _, _), score in zip(batch, scores, strict=True):
                answer = (_finite(score.logprob), bool(score.is_greedy))
                answers.append(answer)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
            self.on_requests(len(batch))
        return answers

    def _batches(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> Iterator[list[tuple]]:
        """Runs of requests with at most `batch_size` different neighbouring contexts: a question stays
        whole.
        """
        batch: list[tuple] = []
        contexts = 0
        for request in requests:
            is_new = not batch or request[1] != batch[-1][1]
            if is_new and contexts == self.batch_size:
                yield batch
                batch, contexts = [], 0
            batch.append(request)
            contexts += is_new
        if batch:
            yield batch

    def _fit(self, key: tuple[str, str] | None, context: list[int], continuation: list[int]) -> TokenPair:
        """The pair cut to the last max_length + 1 tokens; the final one is predicted, never fed."""
        if not continuation:
            raise ValueError("nothing to score: the continuation adds no token to its context")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit max_length="
                f"{self.max_length}; raise eval_max_seq_length"
            )
        room = self.max_length + 1 - len(continuation)
        if key is not None and len(context) > room:
            self.cut_tokens[key[0]] = len(context) - room
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text, every token predicted once in windows of max_length tokens."""
        totals: list[float] = []
        for start in range(0, len(requests), self.batch_size):
            texts = [request.args[0] for request in requests[start : start + self.batch_size]]
            windows = [self.windows(whole) for whole in texts]
            scores = iter(self._loglikelihood_tokens([(None, *pair) for part in windows for pair in part]))
            for whole, part in zip(texts, windows, strict=True):
                total = sum(next(scores)[0] for _ in part)
                totals.append(float(total))
                self.cache_hook.add_partial("loglikelihood_rolling", (whole,), float(total))
        return totals

    def windows(self, whole: str) -> list[TokenPair]:
        """(context, tokens to score) pieces of a text: the first token follows the prefix token."""
        pieces = get_rolling_token_windows(self.tok_encode(whole), self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(piece) for piece in pieces]

    # --- generation -----------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text after each prompt, cut before the first stop string."""
        texts: list[str] = []
        for start in range(0, len(requests), GENERATE_TOGETHER):
            part = [cast(tuple[str, dict], request.args[:2]) for request in requests[start : start + GENERATE_TOGETHER]]
            jobs = [self._generation_job(context, settings) for context, settings in part]
            outputs = self.engine.generate([prompt for prompt, _, _ in jobs], [sampling for _, sampling, _ in jobs])
            for (context, settings), (_, _, until), output in zip(part, jobs, outputs, strict=True):
                if output.finish_reason not in ("stop", "length"):
                    raise RuntimeError(f"generation ended with {output.finish_reason}: {output.error}")
                answer = _cut(self.tokenizer.decode(output.token_ids, skip_special_tokens=True), until)
                texts.append(answer)
                self.finish_reasons[context] = output.finish_reason
                self.cache_hook.add_partial("generate_until", (context, settings), answer)
            self.on_requests(len(part))
        return texts

    def _generation_job(self, context: str, settings: dict[str, Any]) -> tuple[list[int], SamplingParams, list[str]]:
        from ascend_kit.engine.sequence import SamplingParams

        # Works on a copy and knows the aliases.
        options = cast(dict[str, Any], normalize_gen_kwargs(settings, self.max_gen_toks))
        unknown = set(options) - GENERATION_KEYS
        if unknown:
            raise ValueError(
                f"generation settings {sorted(unknown)} are not supported; allowed: {sorted(GENERATION_KEYS)}"
            )
        new_tokens = int(options["max_gen_toks"])
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"{new_tokens} new tokens leave no room for a prompt within max_length="
                f"{self.max_length}; raise eval_max_seq_length"
            )
        until = [stop for stop in options["until"] if stop]
        sampling = SamplingParams(
            max_new_tokens=new_tokens,
            temperature=options.get("temperature", 0.0),
            top_k=options.get("top_k"),
            top_p=options.get("top_p", 1.0),
            stop=tuple(until),
            stop_token_ids=(self.eot_token_id,),
        )
        prompt = self.tok_encode(context)
        if len(prompt) > room:
            self.cut_tokens[context] = len(prompt) - room
        return prompt[-room:], sampling, until


def _finite(logprob: float) -> float:
    if not math.isfinite(logprob):
        raise NotFiniteError(
            f"the engine returned the log-probability {logprob}: an overflow in the model's arithmetic; "
            "try precision bf16 or fp32"
        )
    return float(logprob)


def _cut(answer: str, until: list[str]) -> str:
    for stop in until:
        answer = answer.split(stop)[0]
    return answer
