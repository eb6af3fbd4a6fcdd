"""Between text and tokens: prompts and pairs encoded, chats rendered, answers as text piece by piece, stop rules."""

from __future__ import annotations

import numbers
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from ascend_kit.engine.sequence import SamplingParams, Sequence, whole_number
from ascend_kit.model.config import end_ids_in

Messages = Seq[Mapping[str, Any]]
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """What the engine uses of a tokenizer of transformers."""

    name_or_path: str
    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any
    chat_template: Any
    added_tokens_decoder: dict[int, Any]
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class NotEncodable(ValueError):
    """A prompt cannot become token ids; it fails alone."""


# --- text to tokens -------------------------------------------------------------------------------------------


def as_list(prompts: Any) -> list[Any]:
    """The prompts of a list, an iterator or a matrix; a single prompt, text or token ids, as a list of one."""
    is_one = isinstance(prompts, (str, bytes, Mapping)) or getattr(prompts, "ndim", 2) == 1
    if is_one or not hasattr(prompts, "__iter__"):
        return [prompts]
    every = list(prompts)
    is_one = bool(every) and isinstance(every[0], numbers.Number)
    return [every] if is_one else every


def check_prompt(prompt: Any, name: str) -> None:
    """TypeError unless `prompt` is text or a series of token ids."""
    if isinstance(prompt, (bytes, Mapping)) or not (isinstance(prompt, str) or hasattr(prompt, "__iter__")):
        raise TypeError(f"{name}: expected text or a list of token ids, got {prompt!r:.80}")


def encode(tokenizer: Tokenizer, prompt: Any) -> list[int]:
    """Token ids of a prompt; ids are taken as they are. NotEncodable says why it cannot be.

    A text that starts with the begin-of-text token, as rendered chats do, gets no second one.
    """
    if not isinstance(prompt, str):
        return _token_ids(prompt)
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotEncodable(
            f"the text holds half a character (surrogate U+{ord(prompt[error.start]):04X} at position {error.start}), "
            "which no tokenizer can encode"
        ) from None
    ids = list(tokenizer.encode(prompt))
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def encode_pair(
    tokenizer: Tokenizer, context: Any, continuation: Any, encode_context: Callable[[str], list[int]] | None = None
) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it. Two texts are encoded together and cut after the context, and spaces
    at the context's end count to what follows, as lm-eval does; an empty context is the begin-of-text token.

    `encode_context` is `encode` with a memory, for callers whose pairs share contexts."""
    if not (isinstance(context, str) and isinstance(continuation, str)):
        if isinstance(continuation, str):
            return encode(tokenizer, context), list(tokenizer.encode(continuation, add_special_tokens=False))
        return encode(tokenizer, context), _token_ids(continuation)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = encode(tokenizer, continuation)
        return [prefix], ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
    head = encode_context(context) if encode_context else encode(tokenizer, context)
    return head, encode(tokenizer, context + continuation)[len(head) :]


def _token_ids(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    try:
        return values if all(type(value) is int for value in values) else [whole_number(value) for value in values]
    except TypeError as error:
        raise NotEncodable(f"token id {error}") from None


def thinking_option(tokenizer: Tokenizer, thinking: bool | None) -> dict[str, bool]:
    """The chat template's own switch, where it has one: {"enable_thinking": ...} or {}. None is off where it can be.

    ValueError when the template cannot do what is asked.
    """
    template = str(tokenizer.chat_template or "")
    if "enable_thinking" in template:
        return {"enable_thinking": bool(thinking)}
    if thinking or (thinking is False and "think>" in template):
        raise ValueError(f"thinking={thinking}: the chat template has no switch enable_thinking; leave thinking out")
    return {}


def render_chat(
    tokenizer: Tokenizer, messages: str | Messages, *, thinking: bool | None = None, add_generation_prompt: bool = True
) -> str:
    """A conversation, or one text of a user, in the tokenizer's chat template, with its special tokens.

    A template without a system role gets the conversation without that message. Encode the result with
    add_special_tokens=False.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set chat_template: false and give plain prompts")
    options = thinking_option(tokenizer, thinking)
    history = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]

    def render(conversation: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **options,
        )

    try:
        return render(history)
    except TemplateError:
        return render([message for message in history if message.get("role") != "system"])


# --- ends -----------------------------------------------------------------------------------------------------


def end_ids(model_path: str | Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Every token that ends an answer: those of config.json, generation_config.json and the tokenizer together.

    Warns when they contradict each other: when the tokenizer's is in neither file, or generation_config.json leaves
    out one of config.json; and when one is outside the vocabulary, so that it can never come.
    """
    names = ("config.json", "generation_config.json")
    config, generation = (list(end_ids_in(Path(model_path) / name)) for name in names)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    written = {*config, *generation}
    if (written and not {*own} <= written) or (generation and not {*config} <= {*generation}):
        warnings.warn(
            f"end tokens disagree: config.json {config}, generation_config.json {generation}, tokenizer {own}; each of "
            "them ends an answer",
            stacklevel=3,
        )
    every = list(dict.fromkeys([*generation, *config, *own]))
    outside = [token for token in every if token >= vocab_size]
    if outside:
        warnings.warn(
            f"end tokens {outside} are outside the vocabulary of {vocab_size} tokens: they end no answer", stacklevel=3
        )
    return tuple(token for token in every if token < vocab_size)


def stop_on_special_tokens(tokenizer: Tokenizer, sampling: SamplingParams) -> SamplingParams:
    """Stop strings that are special tokens as stop ids: text is decoded without them, so they would never show."""
    if not sampling.stop:
        return sampling
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {str(tokenizer.convert_ids_to_tokens(number)): number for number in tokenizer.all_special_ids}
    ids = [special[word] for word in sampling.stop if word in special]
    words = tuple(word for word in sampling.stop if word not in special)
    return replace(sampling, stop=words, stop_token_ids=(*sampling.stop_token_ids, *ids))


class StopRules:
    """Called after each new token: "stop", "length" or None. Keeps the text of requests whose text matters meanwhile.

    `tokenizer` is called when the first request needs text, so that a process which never does loads none.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], eos_token_ids: tuple[int, ...], max_seq_length: int):
        self._tokenizer, self.eos_token_ids, self.max_seq_length = tokenizer, eos_token_ids, max_seq_length
        self._texts: dict[int, Detokenizer] = {}

    def __call__(self, sequence: Sequence, token: int) -> str | None:
        sampling = sequence.sampling
        if sampling.stop and sequence.id not in self._texts:
            self.keep_text(sequence)
        if self.is_end(sequence, token):
            return "stop"
        text = self._texts.get(sequence.id)
        if text is not None:
            text.add(token)
            if text.cut_at_stop(is_allowed=sequence.num_output_tokens >= sampling.min_new_tokens):
                return "stop"
        full = sequence.num_tokens >= self.max_seq_length
        return "length" if full or sequence.num_output_tokens >= sampling.max_new_tokens else None

    def is_end(self, sequence: Sequence, token: int) -> bool:
        """Whether this token ends the answer, whatever its text."""
        sampling = sequence.sampling
        return token in sampling.stop_token_ids or (not sampling.ignore_eos and token in self.eos_token_ids)

    def keep_text(self, sequence: Sequence) -> None:
        """Keep the text of a request, but for its latest token, from now on."""
        text = self._texts[sequence.id] = Detokenizer(self._tokenizer(), sequence.sampling.stop)
        for token in sequence.output_ids[:-1]:
            text.add(token)

    def text_so_far(self, sequence: Sequence) -> str:
        """The part of a kept text that no later token can change."""
        return self._texts[sequence.id].text

    def final_text(self, sequence: Sequence) -> str:
        """The whole answer, without the token that ended it; nothing is kept of it any more."""
        text, ids = self._texts.pop(sequence.id, None), sequence.output_ids
        if text is not None and text.is_cut:
            return text.text
        if sequence.finish_reason == "stop" and ids and self.is_end(sequence, ids[-1]):
            ids = ids[:-1]
        return self._tokenizer().decode(ids, skip_special_tokens=True) if ids else ""

    def forget(self, request_id: int) -> None:
        """Keep nothing of a request."""
        self._texts.pop(request_id, None)


# --- tokens to text -------------------------------------------------------------------------------------------


class Detokenizer:
    """Turns the token ids of one answer into text piece by piece; the pieces joined are the text decoded whole.

    Only the last tokens are decoded again each time, from `anchor` on. `text` is what no later token can change; what
    is `pending` may: half a character, a run of byte tokens (as a whole valid or not), and the last characters where
    the tokenizer removes spaces before punctuation.
    """

    WINDOW = 24  # tokens after which the anchor moves ...
    CONTEXT = 8  # ... to so many before the end
    CLEANED = 8  # characters that removing spaces can still change

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.anchor = 0
        self.text = self.pending = ""
        self.is_cut = False  # at a stop string
        self._taken = 0  # characters of the window's text that are in `text`
        self._held = self.CLEANED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._run = 0  # byte tokens at the end, and special tokens between them, which decoding leaves out
        self._left_out = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._looked = 0  # characters in which no new stop string ends

    def add(self, token_id: int) -> None:
        """Add to the text what became certain with this token."""
        self.ids.append(token_id)
        goes_on = self._is_byte(token_id) or (self._run > 0 and token_id in self._left_out)
        self._run = self._run + 1 if goes_on else 0
        window = self._decode(self.ids[self.anchor :])
        if self._run:
            certain = len(self._decode(self.ids[self.anchor : len(self.ids) - self._run]))
        else:
            certain = len(window) - window.endswith("\ufffd")
        certain = max(self._taken, certain - self._held)
        self.text, self.pending, self._taken = self.text + window[self._taken : certain], window[certain:], certain
        if len(self.ids) - self.anchor > self.WINDOW:
            self._move_anchor(window)

    def cut_at_stop(self, is_allowed: bool = True) -> bool:
        """Cut the text before the first stop string that is new; True when there was one. Those that come while it is
        not allowed are passed over for good."""
        if not self.stop:
            return False
        text = self.text + self.pending
        found = [text.find(word, max(0, self._looked - len(word) + 1)) for word in self.stop] if is_allowed else []
        found = [at for at in found if at >= 0]
        if found:
            self.text, self.pending, self.is_cut = text[: min(found)], "", True
        self._looked = len(self.text) if is_allowed else len(text)
        return bool(found)

    def _move_anchor(self, window: str) -> None:
        """Start later, where the shorter window's text is the end of the longer one's and goes on like it."""
        place = len(self.ids) - self.CONTEXT
        if self._is_byte(self.ids[place]) or (self._run and self.ids[place] in self._left_out):
            return
        tail = self._decode(self.ids[place:])
        offset = len(window) - len(tail)
        if tail and window.endswith(tail) and tail[0] != "\ufffd" and self._taken > offset:
            self.anchor, self._taken = place, self._taken - offset

    def _is_byte(self, token_id: int) -> bool:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(token, str) and BYTE_TOKEN.fullmatch(token) is not None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# --- streams --------------------------------------------------------------------------------------------------


class StreamEvent(NamedTuple):
    """One new token of one request; `finish_reason` is set on its last event, which may carry no token."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # hides tuple.index; place among the prompts
    token_id: int | None
    text: str
    finish_reason: str | None


class TextPieces:
    """The text of one request piece by piece; `text_of` gives its text so far. The pieces joined are its text."""

    def __init__(self, text_of: Callable[[Sequence], str]) -> None:
        self._text_of, self._sent = text_of, 0

    def new(self, sequence: Sequence) -> str:
        """What the latest step made certain."""
        text, before = self._text_of(sequence), self._sent
        if not sequence.is_finished:
            # A stop string may still be completed by the next token: hold its longest possible start back.
            held = max((len(word) - 1 for word in sequence.sampling.stop), default=0)
            text = text[: max(0, len(text) - held)]
        self._sent = max(len(text), before)
        return text[before:]


class TokenStream:
    """Collects the events of requests, numbered by their place, in a thread that does not wait for who reads them.

    `text_of` gives a request's text so far.
    """

    def __init__(self, text_of: Callable[[Sequence], str]) -> None:
        self._text_of = text_of
        self._events: SimpleQueue[StreamEvent | BaseException] = SimpleQueue()
        self._pieces: dict[int, TextPieces] = {}  # by place

    def on_step(self, place: int, sequence: Sequence) -> None:
        """Add what the latest step brought for this request."""
        new = self._pieces.setdefault(place, TextPieces(self._text_of)).new(sequence)
        token = None if sequence.error is not None else sequence.token_ids[-1]
        self._events.put(StreamEvent(place, token, new, sequence.finish_reason))

    def read(self, sequences: list[Sequence], advance: Callable[[], None]) -> Iterator[StreamEvent]:
        """Yield events until all `sequences` have ended, while a thread calls `advance`; its errors are raised here."""
        left = threading.Event()

        def pump() -> None:
            try:
                while not left.is_set() and not all(sequence.is_finished for sequence in sequences):
                    advance()
            except BaseException as error:
                self._events.put(error)

        thread = threading.Thread(target=pump, name="ascend-kit-stream", daemon=True)
        thread.start()
        try:
            unfinished = len(sequences)
            while unfinished:
                event = self._events.get()
                if isinstance(event, BaseException):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            left.set()
            thread.join()
