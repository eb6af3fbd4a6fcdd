"""Evaluation through an OpenAI-compatible server: vLLM, MindIE, SGLang or our own `python -m ascend_kit serve`.

Prompts are built and encoded here, with the local tokenizer and template, so that the documents are the same as those
of our engine and can be paired with them. Log-probabilities come through `echo` with `logprobs` of `/completions`; what
a server cannot do is found out by one small request before work.
"""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import cached_property
from typing import Any

from ascend_kit.checkpoint.huggingface import load_tokenizer
from ascend_kit.checkpoint.identity import check_converted, model_identity
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Score, Timeline
from ascend_kit.evaluation.interface import Ids
from ascend_kit.files import Table
from ascend_kit.identity import Identity
from ascend_kit.measure.agreement import check_against, reference_answers
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import Experiment

KEY_VARIABLE = "OPENAI_API_KEY"  # where the server wants a key; it is never stored
TIMEOUT_S = 600.0
TRIES = 4  # of a request whose connection fails or that the server refuses as too many
WAIT_S = 1.0
BUSY = (408, 429, 500, 502, 503, 504)
PROBE = 6  # tokens
TIE = 1e-6  # nats by which rounding may part the chosen token from the most probable one


class EndpointError(RuntimeError):
    """The server cannot be reached, has another model, or cannot do what is asked; the text says which."""


class _Nowhere:
    """The device of a model that runs elsewhere: it has no memory to be measured here."""

    kind, index, name = "endpoint", 0, "endpoint"

    def reset_peak_memory(self) -> None:
        """There is nothing to reset."""


class EndpointEngine:
    """A served model as the evaluation sees an engine. `url` ends in /v1; tokenizer and config are local files.

    At most `concurrency` requests are on their way at once; one that fails for the connection's sake is sent again.
    """

    def __init__(
        self,
        url: str,
        model_path: str,
        *,
        tokenizer_path: str | None = None,
        concurrency: int = 8,
        model: str | None = None,
    ) -> None:
        self.url, self.concurrency = url.rstrip("/"), concurrency
        self.tokenizer: Any = load_tokenizer(tokenizer_path or model_path)
        self.config = ModelConfig.from_folder(tokenizer_path or model_path)
        self.device: Any = _Nowhere()
        self._paths = (model_path, tokenizer_path)
        self.served = self._find(model)
        self.max_seq_length = int(self.served.get("max_model_len") or self.config.max_position_embeddings)

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> EndpointEngine:
        """The server that `eval_endpoint` names, with the tokenizer of the model that is evaluated."""
        assert experiment.eval_endpoint is not None
        return cls(
            experiment.eval_endpoint,
            experiment.input_model,
            tokenizer_path=experiment.tokenizer_path,
            concurrency=experiment.batch_size,
            model=experiment.eval_endpoint_model,
        )

    @property
    def identity(self) -> Identity:
        """What can be known: tokenizer and template by content; weights and engine as the server names them."""
        local = model_identity(*self._paths)
        served = {key: self.served.get(key) for key in ("id", "owned_by", "max_model_len", "root")}
        return local.with_parts(
            weights={"served": served}, engine={"kind": "openai", **served}, declared=("weights", "engine")
        )

    def stats(self) -> dict[str, Any]:
        """Nothing: the server's own counters are not ours."""
        return {}

    def load_model(self) -> EndpointEngine:
        """The model is loaded where it is served."""
        return self

    def close(self) -> None:
        """The server goes on."""

    # --- what it can do -----------------------------------------------------------------------------------------------

    def cannot(self, output_type: str) -> str | None:
        """Why tasks of this kind cannot be asked here; None where they can."""
        if output_type == "generate_until":
            return None
        return self._no_scores

    @cached_property
    def _no_scores(self) -> str | None:
        ids = list(range(3, 3 + PROBE))
        try:
            found = self._prompt_logprobs(ids)
        except EndpointError as error:
            return f"{self.url} gives no log-probabilities of prompts (echo with logprobs): {error}"
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
        found: dict[int, Score] = {}
        for done, (place, score) in enumerate(self._together(self._score_pair, pairs), 1):
            found[place] = score
            if on_score is not None:
                on_score(place, score)
            if on_progress is not None:
                on_progress(done, len(pairs))
        return [found[place] for place in range(len(pairs))]

    def generate(
        self,
        prompts: Sequence[Ids],
        params: Sequence[SamplingParams],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """The text after each prompt; one that the server refuses ends with an error, alone."""
        found: dict[int, RequestOutput] = {}
        jobs = list(zip(prompts, params, strict=True))
        for done, (place, output) in enumerate(self._together(self._answer, jobs), 1):
            output.index, found[place] = place, output
            if on_output is not None:
                on_output(output)
            if on_progress is not None:
                on_progress(done, len(jobs))
        return [found[place] for place in range(len(jobs))]

    def _together(self, ask: Callable[..., Any], jobs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[int, Any]]:
        """(place, answer) as the answers come."""
        pool = ThreadPoolExecutor(self.concurrency)
        waiting: dict[Future[Any], int] = {pool.submit(ask, *job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _score_pair(self, context: Ids, continuation: Ids) -> Score:
        try:
            rows = self._prompt_logprobs([*context, *continuation])[len(context) :]
        except EndpointError as error:
            return Score(math.nan, False, str(error))
        if len(rows) != len(continuation) or any(row is None for row in rows):
            return Score(math.nan, False, f"{self.url} left out log-probabilities of the prompt")
        known = [row for row in rows if row is not None]
        return Score(math.fsum(own for own, _ in known), all(own >= best - TIE for own, best in known))

    def _prompt_logprobs(self, ids: Ids) -> list[tuple[float, float] | None]:
        """(log-probability, that of the most probable token) of each prompt token; None where there is none."""
        body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        logprobs = self._post("/completions", body)["choices"][0].get("logprobs") or {}
        own, tops = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
        tops = [*tops, *[None] * (len(own) - len(tops))]
        pairs = list(zip(own, tops, strict=False))[: len(ids)]
        return [None if value is None else (value, max([value, *(top or {}).values()])) for value, top in pairs]

    def _answer(self, prompt: Ids, sampling: SamplingParams) -> RequestOutput:
        body = {
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "return_token_ids": True,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"seed": sampling.seed % (1 << 63)} if sampling.seed is not None and sampling.temperature else {}),
            **{key: getattr(sampling, key) for key in ("top_k",) if getattr(sampling, key) is not None},
            **{key: getattr(sampling, key) for key in ("min_p", "presence_penalty") if getattr(sampling, key)},
        }
        try:
            choice = self._post("/completions", body)["choices"][0]
        except EndpointError as error:
            return RequestOutput(0, prompt, [], "", "error", str(error), None, Timeline(arrival_s=time.perf_counter()))
        written, reason = choice.get("text") or "", choice.get("finish_reason") or "stop"
        stop = choice.get("stop_reason")
        if isinstance(stop, str) and stop in sampling.stop and stop not in written:
            written, choice["token_ids"] = written + stop, None  # vLLM leaves it out; here it says what ended the text
        ids = choice.get("token_ids") or self.tokenizer.encode(written, add_special_tokens=False)
        return RequestOutput(0, prompt, ids, written, reason, None, None, Timeline(arrival_s=time.perf_counter()))

    # --- the connection -----------------------------------------------------------------------------------------------

    def _find(self, model: str | None) -> dict[str, Any]:
        served = self._request("/models", None).get("data") or []
        names = [str(item.get("id")) for item in served]
        if model is None and len(served) != 1:
            raise EndpointError(f"{self.url} serves {', '.join(names) or 'no model'}: set eval_endpoint_model to one")
        if model is not None and model not in names:
            raise EndpointError(f"eval_endpoint_model: {self.url} serves {', '.join(names)}, not {model!r}")
        return next(item for item in served if model is None or item.get("id") == model)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._request(path, json.dumps({"model": self.served["id"], **body}).encode())

    def _request(self, path: str, data: bytes | None) -> dict[str, Any]:
        """The JSON answer; EndpointError after a refusal, or when the connection fails again and again."""
        fault = ""
        for wait in self._waits():
            time.sleep(wait)
            key = os.environ.get(KEY_VARIABLE)
            headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                fault = f"{error.code}: {error.read(2000).decode(errors='replace')}"
                if error.code not in BUSY:
                    break
            except (OSError, ValueError) as error:
                fault = str(error)
        raise EndpointError(f"{self.url}{path}: {fault}")

    def _waits(self) -> Iterable[float]:
        return [0.0, *(WAIT_S * 2**number for number in range(TRIES - 1))]


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
    row = {"server": served.url, "model": served.served["id"], "log-probabilities": served.cannot("") or "yes"}
    return served, pandas.DataFrame([row])
