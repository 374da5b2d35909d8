"""How the next token of a request is chosen, and what is said of it: parameters and results, not the choosing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of one request, validated where they enter (the server).

    temperature 0 is greedy; then top_k, top_p, min_p and seed have no effect.
    Penalties and logit_bias apply before the temperature, in the order of the OpenAI and vLLM servers.
    """

    max_output_tokens: int
    min_output_tokens: int = 0            # stop tokens are masked out until then
    temperature: float = 1.0
    top_k: int = 0                        # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None               # None: the server draws one, so every request has its own stream
    repetition_penalty: float = 1.0       # over prompt and output
    presence_penalty: float = 0.0         # over output only
    frequency_penalty: float = 0.0        # over output only
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # the model's end tokens included, unless ignore_eos
    grammar: str | None = None            # what the output must match, in llguidance's form; None: any text
    num_logprobs: int | None = None       # None: no logprobs; 0: the chosen token's only; n: and the n best
    num_prompt_logprobs: int | None = None  # the same for every prompt position after the first

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0


class TokenLogprobs(NamedTuple):
    """Log-probability (natural) of one token and of the most likely ones at its position, best first."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely
    top: tuple[tuple[int, float], ...] = ()
