"""How many prompt tokens a step may take while other requests decode, learned from how long steps take."""

from __future__ import annotations

STRETCH = 2.5  # a step that also computes prompts may last this many decode steps; token gaps then stay within 3x
LEAST = 16  # prompt tokens a step: prompts must move on however slow they are
PROBE_EVERY = 16  # steps: then one computes no prompt, so that the time of decoding alone is known for today's batch
WEIGHT = 0.5  # of the latest measurement in the running means


class StepPace:
    """Durations in seconds. A step is taken to last decode_s, and token_s more for every prompt token."""

    def __init__(self) -> None:
        self.decode_s: float | None = None
        self.token_s: float | None = None
        self._mixed_steps = 0  # since decoding alone was last timed

    def prompt_tokens(self) -> int:
        """Prompt tokens for the next step, if somebody decodes in it; 0 asks for a step that decodes alone."""
        if self.decode_s is None or self._mixed_steps >= PROBE_EVERY:
            return 0
        if self.token_s is None:
            return LEAST
        return max(LEAST, int((STRETCH - 1) * self.decode_s / self.token_s))

    def observe(self, num_decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took `seconds` for that many decoding sequences and prompt tokens."""
        if prompt_tokens == 0:
            self.decode_s, self._mixed_steps = _mean(self.decode_s, seconds), 0
            return
        if num_decoding:
            self._mixed_steps += 1
        if prompt_tokens >= LEAST and (not num_decoding or self.decode_s is not None):
            beyond = seconds - (self.decode_s if num_decoding else 0.0)
            # What decoding takes is an estimate: the rest may come out far too small, or below zero.
            self.token_s = _mean(self.token_s, max(beyond, seconds / 10) / prompt_tokens)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - WEIGHT) * old + WEIGHT * new
