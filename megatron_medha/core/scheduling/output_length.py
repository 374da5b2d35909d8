"""How long an answer will be, as far as anybody can know before it is written; policies by total work ask here."""

from __future__ import annotations

import random
from enum import Enum

from megatron_medha.core.request import Request

_FIRST_MEAN_TOKENS = 256.0  # believed before any answer has ended; forgotten as they do


class OutputLengths(Enum):
    """Sources of a predicted answer length."""

    ORACLE = "oracle"  # max_output_tokens is the length: true in simulations and with ignore_eos
    MEAN = "mean"      # the mean of the answers that have ended so far
    NOISY = "noisy"    # the oracle times a lognormal error, the same for the same request: a trained predictor


class OutputPredictor:
    """Predicts answer lengths, and learns their mean."""

    def __init__(self, lengths: OutputLengths, error: float) -> None:
        self._lengths = lengths
        self._error = error
        self._num_tokens = _FIRST_MEAN_TOKENS
        self._num_answers = 1

    def predict(self, request: Request) -> float:
        """Output tokens of this request."""
        match self._lengths:
            case OutputLengths.ORACLE:
                return request.max_output_tokens
            case OutputLengths.MEAN:
                return min(self._num_tokens / self._num_answers, request.max_output_tokens)
            case OutputLengths.NOISY:
                # Seeded by text: the same in every process and on every replay.
                return request.max_output_tokens * random.Random(request.request_id).lognormvariate(0.0, self._error)

    def learn(self, num_output_tokens: int) -> None:
        """Take note of an answer that has ended."""
        self._num_tokens += num_output_tokens
        self._num_answers += 1
