"""One row of logits to sample from: its parameters and the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_medha.core.sampling import Sampling


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What choosing one request's next token depends on, besides its logits."""

    sampling: Sampling
    # (num_prompt_tokens,), any integer dtype, on the sampler's device; read by the repetition penalty alone
    prompt_ids: Tensor | None
    output_ids: Sequence[int]  # tokens emitted so far; read by the penalties
    seed: int
    num_output_tokens: int     # emitted so far, hence also the index of this draw
