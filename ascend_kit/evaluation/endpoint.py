"""Evaluation through an OpenAI-compatible server: vLLM, MindIE, SGLang or our own `python -m ascend_kit serve`.

Prompts are built and encoded here, with the local tokenizer and template, so that the documents are the same as those
of our engine and can be paired with them. Log-probabilities come through `echo` with `logprobs` of `/completions`; what
a server cannot do is found out by one small request before work.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ascend_kit.checkpoint.huggingface import load_tokenizer
from ascend_kit.checkpoint.manifest import check_converted, model_identity
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Score, Timeline
from ascend_kit.evaluation.interface import Ids
from ascend_kit.files import Table
from ascend_kit.identity import Identity
from ascend_kit.measure import http
from ascend_kit.measure.agreement import check_against, reference_answers
from ascend_kit.measure.http import EndpointError
from ascend_kit.measure.server_process import ServerProcess
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import Experiment
from ascend_kit.params.engines import OpenAIEngine

KEY_VARIABLE = "OPENAI_API_KEY"  # where the server wants a key; it is never stored
TIMEOUT_S = 600.0  # of an answer that comes as a whole
RETRIES = 3  # of a request whose connection fails or that the server refuses as too many
PROBE = 6  # tokens
MODELS, COMPLETIONS = "/v1/models", "/v1/completions"
TIE = 1e-6  # nats by which rounding may part the chosen token from the most probable one


class _Nowhere:
    """The device of a model that runs elsewhere: it has no memory to be measured here."""

    kind, index, name = "endpoint", 0, "endpoint"

    def reset_peak_memory(self) -> None:
        """There is nothing to reset."""


class EndpointEngine:
    """A served model as the evaluation sees an engine; tokenizer and config are local files.

    At most `concurrency` requests are on their way at once; one that fails for the connection's sake is sent again.
    An endpoint without a model is asked for its only one. `process` is the server where it is started here; it is ended
    by `close`. Raises EndpointError where the server does not answer or has another model.
    """

    def __init__(
        self,
        endpoint: OpenAIEngine,
        model_path: str,
        *,
        tokenizer_path: str | None = None,
        concurrency: int = 8,
        process: ServerProcess | None = None,
    ) -> None:
        self.url, self.concurrency, self._process = endpoint.base_url.rstrip("/"), concurrency, process
        if endpoint.api == "chat":
            raise EndpointError(
                f"{self.url}: api is chat, but prompts are built and encoded here: completions is needed"
            )
        patience = {"retries": max(RETRIES, endpoint.retries), "idle_s": max(TIMEOUT_S, endpoint.idle_s)}
        self.endpoint = endpoint.model_copy(update=patience)
        self.tokenizer: Any = load_tokenizer(tokenizer_path or model_path)
        self.config = ModelConfig.from_folder(tokenizer_path or model_path)
        self.device: Any = _Nowhere()
        self._paths = (model_path, tokenizer_path)
        if process is not None:
            once = self.endpoint.model_copy(update={"retries": 0})
            process.start(lambda: isinstance(http.ask(once, MODELS, [None])[0], dict), endpoint.ready_timeout_s)
        try:
            self.served = self._find()
        except EndpointError:
            self.close()
            raise
        self.endpoint = self.endpoint.model_copy(update={"model": str(self.served["id"])})
        self.max_seq_length = int(self.served.get("max_model_len") or self.config.max_position_embeddings)

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> EndpointEngine:
        """The server that `eval_endpoint` names, an address or an entry of `engines`, with the tokenizer of the model
        that is evaluated.
        """
        assert experiment.eval_endpoint is not None
        spec, process = experiment.endpoint_spec, None
        if spec is None:
            model = experiment.eval_endpoint_model or ""
            spec = OpenAIEngine(base_url=experiment.eval_endpoint, model=model, api_key_env=KEY_VARIABLE)
        if spec.engine_command:
            process = ServerProcess(spec.engine_command, experiment.run_folder / f"{experiment.eval_endpoint}.log")
        return cls(
            spec,
            experiment.input_model,
            tokenizer_path=experiment.tokenizer_path,
            concurrency=experiment.batch_size,
            process=process,
        )

    @property
    def identity(self) -> Identity:
        """What can be known: tokenizer and template by content; weights and engine as the server names them, and fields
        that are sent to it in other ways than usual.
        """
        local = model_identity(*self._paths)
        served = {key: self.served.get(key) for key in ("id", "owned_by", "max_model_len", "root")}
        own = {key: value for key in ("extra_body", "leave_out") if (value := getattr(self.endpoint, key))}
        return local.with_parts(
            weights={"served": served}, engine={"kind": "openai", **served, **own}, declared=("weights", "engine")
        )

    def stats(self) -> dict[str, Any]:
        """Nothing: the server's own counters are not ours."""
        return {}

    def load_model(self) -> EndpointEngine:
        """The model is loaded where it is served."""
        return self

    def close(self) -> None:
        """End the server where it was started here; any other goes on."""
        if self._process is not None:
            self._process.stop()

    def _find(self) -> dict[str, Any]:
        (answer,) = http.ask(self.endpoint, MODELS, [None])
        if isinstance(answer, EndpointError):
            raise answer
        served, model = answer.get("data") or [], self.endpoint.model
        names = [str(item.get("id")) for item in served]
        if not model and len(served) != 1:
            raise EndpointError(f"{self.url} serves {', '.join(names) or 'no model'}: set eval_endpoint_model to one")
        if model and model not in names:
            raise EndpointError(f"eval_endpoint_model: {self.url} serves {', '.join(names)}, not {model!r}")
        return next(item for item in served if not model or item.get("id") == model)

    # --- what it can do -----------------------------------------------------------------------------------------------

    def cannot(self, output_type: str) -> str | None:
        """Why tasks of this kind cannot be asked here; None where they can."""
        if output_type == "generate_until":
            return None
        return self._no_scores

    @cached_property
    def _no_scores(self) -> str | None:
        if self.endpoint.send_prompts_as == "text":
            return f"{self.url} takes prompts as text and may cut other tokens: set send_prompts_as: ids"
        ids = list(range(3, 3 + PROBE))
        answer = _checked(http.ask(self.endpoint, COMPLETIONS, [_scoring(ids)])[0])
        if isinstance(answer, EndpointError):
            return f"{self.url} gives no log-probabilities of prompts (echo with logprobs): {answer}"
        found = _prompt_logprobs(answer, len(ids))
        known = [row for row in found[1:] if row is not None and math.isfinite(row[0])]
        if len(found) < PROBE or len(known) < PROBE - 1:
            return f"{self.url} answers echo with logprobs, but gives {len(known)} log-probabilities of {PROBE} tokens"
        return None

    # --- answers ------------------------------------------------------------------------------------------------------

    def score(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_score: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Log-probability of each continuation after its context; NaN and an error where the server refuses one."""
        bodies = [_scoring([*context, *continuation]) for context, continuation in pairs]
        return self._ask(bodies, lambda place, answer: self._score(*pairs[place], answer), on_progress, on_score)

    def generate(
        self,
        prompts: Sequence[Ids],
        params: Sequence[SamplingParams],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """The text after each prompt; one that the server refuses ends with an error, alone."""
        bodies = [self._writing(prompt, sampling) for prompt, sampling in zip(prompts, params, strict=True)]
        return self._ask(
            bodies,
            lambda place, answer: self._output(place, prompts[place], params[place], answer),
            on_progress,
            None if on_output is None else lambda _, output: on_output(output),
        )

    def _ask(
        self,
        bodies: list[dict[str, Any]],
        read: Callable[[int, http.Answer], Any],
        on_progress: Callable[[int, int], None] | None,
        on_result: Callable[[int, Any], None] | None,
    ) -> list[Any]:
        """What `read` makes of each answer, in the order of `bodies`; each is told as it comes."""
        found: list[Any] = [None] * len(bodies)
        done = itertools.count(1)

        def keep(place: int, answer: http.Answer) -> None:
            found[place] = read(place, _checked(answer))
            if on_result is not None:
                on_result(place, found[place])
            if on_progress is not None:
                on_progress(next(done), len(bodies))

        http.ask(self.endpoint, COMPLETIONS, bodies, self.concurrency, keep)
        return found

    def _score(self, context: Ids, continuation: Ids, answer: http.Answer) -> Score:
        if isinstance(answer, EndpointError):
            return Score(math.nan, False, str(answer))
        rows = _prompt_logprobs(answer, len(context) + len(continuation))[len(context) :]
        if len(rows) != len(continuation) or any(row is None for row in rows):
            return Score(math.nan, False, f"{self.url} left out log-probabilities of the prompt")
        known = [row for row in rows if row is not None]
        return Score(math.fsum(own for own, _ in known), all(own >= best - TIE for own, best in known))

    def _writing(self, prompt: Ids, sampling: SamplingParams) -> dict[str, Any]:
        """The fields of a request for text."""
        is_text = self.endpoint.send_prompts_as == "text"
        return {
            "prompt": self.tokenizer.decode(prompt) if is_text else prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "return_token_ids": True,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"seed": sampling.seed % (1 << 63)} if sampling.seed is not None and sampling.temperature else {}),
            **{key: value for key in ("top_k", "min_p", "presence_penalty") if (value := getattr(sampling, key))},
        }

    def _output(self, place: int, prompt: Ids, sampling: SamplingParams, answer: http.Answer) -> RequestOutput:
        now = Timeline(arrival_s=time.perf_counter())
        if isinstance(answer, EndpointError):
            return RequestOutput(place, prompt, [], "", "error", str(answer), None, now)
        choice = answer["choices"][0]
        written, reason = choice.get("text") or "", choice.get("finish_reason") or "stop"
        stop = choice.get("stop_reason")
        if isinstance(stop, str) and stop in sampling.stop and stop not in written:
            written, choice["token_ids"] = written + stop, None  # vLLM leaves it out; here it says what ended the text
        ids = choice.get("token_ids") or self.tokenizer.encode(written, add_special_tokens=False)
        return RequestOutput(place, prompt, ids, written, reason, None, None, now)


def _checked(answer: http.Answer) -> http.Answer:
    """The answer, or why it is none: a server may say 200 and give nothing."""
    if isinstance(answer, dict) and not answer.get("choices"):
        return EndpointError(f"an answer without choices: {str(answer)[:200]}")
    return answer


def _scoring(ids: Ids) -> dict[str, Any]:
    """The fields of a request for the log-probabilities of a prompt."""
    return {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}


def _prompt_logprobs(answer: dict[str, Any], count: int) -> list[tuple[float, float] | None]:
    """(log-probability, that of the most probable token) of each of `count` prompt tokens; None where there is none."""
    logprobs = answer["choices"][0].get("logprobs") or {}
    own, tops = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
    tops = [*tops, *[None] * (len(own) - len(tops))]
    pairs = list(zip(own, tops, strict=False))[:count]
    return [None if value is None else (value, max([value, *(top or {}).values()])) for value, top in pairs]


def check_evaluated(experiment: Experiment) -> None:
    """What is evaluated must be made from `input_model`; a served model is what its server says."""
    if experiment.eval_endpoint is None:
        check_converted(experiment)


def evaluated_engine(experiment: Experiment) -> tuple[AscendInferEngine | EndpointEngine, Table]:
    """The loaded engine, or the server that `eval_endpoint` names, and the check that came first, a row per prompt.

    Our engine must answer as plain operators do (WrongAnswerError); of a server is told what it can do.
    """
    import pandas

    if experiment.eval_endpoint is None:
        reference = reference_answers(experiment)
        engine = AscendInferEngine.from_experiment(experiment).load_model()
        return engine, check_against(reference, engine)
    served = EndpointEngine.from_experiment(experiment)
    row = {"server": served.url, "model": served.endpoint.model, "log-probabilities": served.cannot("") or "yes"}
    return served, pandas.DataFrame([row])
