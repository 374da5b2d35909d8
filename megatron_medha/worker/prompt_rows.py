"""Rows of a step that predict prompt tokens, and the log-probabilities of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.cluster.messages import PromptLogprobs
from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.model.logprobs import prompt_logprobs
from megatron_medha.worker.token_store import StoredRequest

# Logits of a whole chunk may not fit in memory (8192 x 152K fp32 is 5 GB); prompt logprobs go through in slices.
_SLICE_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows whose logits predict prompt tokens that were asked for with their log-probabilities."""

    request: StoredRequest
    first_position: int  # of the predicted tokens
    num_tokens: int


def logprobs_of_prompts(
    model: GPTModel, hidden_PC: Tensor, prompt_rows: Sequence[PromptRows], vocab_size: int
) -> list[PromptLogprobs]:
    """The output layer once more, over the rows that predict prompt tokens. hidden_PC: of these, end to end."""
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    slice_rows = max(1, _SLICE_LOGITS // vocab_size)
    found: list[PromptLogprobs] = []
    first_row = 0
    for rows in prompt_rows:
        num_top = rows.request.sampling.num_prompt_logprobs or 0
        logprobs: list[TokenLogprobs] = []
        for done in range(0, rows.num_tokens, slice_rows):
            count = min(slice_rows, rows.num_tokens - done)
            hidden_R1C = hidden_PC[first_row + done : first_row + done + count].unsqueeze(1)
            logits_R1V, _ = model.output_layer(hidden_R1C, weight=weight, runtime_gather_output=True)
            next_ids = torch.tensor(rows.request.tokens(rows.first_position + done, count))
            logprobs += prompt_logprobs(logits_R1V[:, 0, : vocab_size], next_ids, num_top)
        found.append(PromptLogprobs(rows.request.request_id, rows.first_position, tuple(logprobs)))
        first_row += rows.num_tokens
    return found
