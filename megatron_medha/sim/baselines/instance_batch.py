"""What systems of instances share: a sequence whose prompt runs in one pass, and batches that occupy instances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_medha.core.batch import Batch, Chunk, Rejected
from megatron_medha.core.request import Request


@dataclass(slots=True, eq=False)
class InstanceSequence:
    """A request that runs."""

    request: Request
    num_output_tokens: int = 0
    kv_tokens: dict[int, int] = field(default_factory=dict)  # by instance


def too_long(request: Request, max_tokens: int) -> Rejected | None:
    """The end of a request that fits on no instances; None if it does."""
    num_tokens = request.num_prompt_tokens + request.max_output_tokens
    if num_tokens <= max_tokens:
        return None
    return Rejected(request.request_id, f"{num_tokens} tokens exceed the {max_tokens} that fit", is_client_fault=True)


def instance_batch(
    batch_id: int, instances: tuple[int, ...], sequences: Iterable[InstanceSequence], released: list[str],
    now_s: float, seconds: float,
) -> Batch:  # fmt: skip
    """A pass over the whole prompts of new sequences, or the next token of others. Empties `released`."""
    chunks: list[Chunk] = []
    for seq in sequences:
        start = seq.request.num_prompt_tokens + seq.num_output_tokens - 1 if seq.num_output_tokens else 0
        num_tokens = 1 if start else seq.request.num_prompt_tokens
        chunks.append(Chunk(seq.request.request_id, start, num_tokens, True, instances))
    ended = tuple(released)
    released.clear()
    return Batch(batch_id, tuple(chunks), ended, now_s, budget_s=seconds, predicted_s=seconds)
