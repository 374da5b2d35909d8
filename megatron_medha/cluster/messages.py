"""What the API server and the ranks say to each other: frozen, msgpack-encoded, deltas only."""

from __future__ import annotations

import msgspec

from megatron_medha.core.batch import Chunk
from megatron_medha.core.cost.step_sizes import NO_STEP_SIZES, StepSizes
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.sampling import Sampling, TokenLogprobs


class NewRequest(msgspec.Struct, frozen=True, array_like=True):
    """Tokens and parameters of a request, sent once to each rank, with the first step it has a part in."""

    request_id: str
    token_ids: bytes  # all tokens known so far, prompt and output, as little-endian int32
    num_prompt_tokens: int
    sampling: Sampling


class RankStep(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """API server to rank: compute this batch. Every rank of a replica gets every batch, in batch order.

    Released requests are forgotten first, new ones added next, then sampled tokens appended: all that at once. The KV
    operations are executed when the step's turn to be computed comes, before its chunks.
    """

    batch_id: int
    chunks: tuple[Chunk, ...]  # that this rank's kvp index takes part in, in the batch's order; may be none
    new_requests: tuple[NewRequest, ...] = ()  # of which this rank's kvp index gets blocks for the first time
    released: tuple[str, ...] = ()
    # (request_id, token_id) since the last Step to this rank, of requests it knows of. A layout of one rank gets
    # none: it sampled them itself.
    sampled: tuple[tuple[str, int], ...] = ()
    kv_ops: tuple[KVOp, ...] = ()  # on this rank's kvp index
    overtakes: int | None = None  # the oldest batch that it may pass where that one is being computed; see Batch
    may_be_held: bool = False     # others may pass this one at the points that its ranks agree on
    predicted_s: float = 0.0      # of the batch, over all stages
    longest_chunk: int = 0        # of the batch, tokens
    leader: int = 0               # the kvp index, of those with a chunk in the batch, whose rank decides at the points
    runs_ahead: bool = False      # stages go on to the batch's next decodes; no other step comes until this is answered


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """API server to rank: finish the step at hand and exit."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """API server to rank: nothing. That it cannot be sent any more tells that the rank has closed its connection."""


class PrepareGrammar(msgspec.Struct, frozen=True, array_like=True, tag="prepare"):
    """API server to rank: compile this grammar beside the steps, and say when that is done."""

    number: int
    grammar: str


ToRank = RankStep | Shutdown | Ping | PrepareGrammar


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """One request's result of a step."""

    request_id: str
    token_id: int
    is_stop: bool = False  # a stop token; it ends the request
    logprobs: TokenLogprobs | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of the prompt tokens [first_position, ...), as far as this step knows them."""

    request_id: str
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


class RankLoading(msgspec.Struct, frozen=True, array_like=True, tag="loading"):
    """Rank to API server: still starting."""

    rank: int
    what: str
    fraction: float  # 0..1


class RankReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Rank to API server: all ranks have met, the model is loaded and this much KV memory is there."""

    rank: int
    shape: ModelShape
    num_blocks: int
    block_size: int
    stop_token_ids: tuple[int, ...]  # the checkpoint's own end tokens
    device: str                      # e.g. "cpu, 2 threads, float32"
    shard_tokens: int | None = None  # of one request on one kvp rank; None: there is one kvp rank, which holds it all
    can_hold: bool = False           # whether a step that may be held can be here
    step_sizes: StepSizes = NO_STEP_SIZES  # that it fills steps up to
    can_run_ahead: bool = False      # whether stages give tokens to one another on their devices


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="heartbeat"):
    """Rank to API server: its process runs. Sent every second, also while it loads or computes."""

    rank: int


class GrammarPrepared(msgspec.Struct, frozen=True, array_like=True, tag="prepared"):
    """Rank to API server: that grammar is compiled, or cannot be, of which its request will hear."""

    rank: int
    number: int


class HeldKV(msgspec.Struct, frozen=True, array_like=True):
    """What a rank holds: a checksum."""

    num_requests: int
    num_blocks: int
    block_numbers: int  # their sum


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag="step_done"):
    """Rank to API server: its stage's work of the batch is done. Ranks with tp index 0 send it.

    Results come from the last stage alone, and for a request on several kvp ranks from the last of chunk.kvp_ranks.
    """

    batch_id: int
    rank: int
    duration_s: float  # of this rank's work; waiting for the stage before is not in it, merges with kvp ranks are
    tokens: tuple[SampledToken, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()  # (request_id, why): only that request is harmed
    audit_counts: HeldKV | None = None  # by this rank with this step; sent under audit only
    held_s: float = 0.0  # while other steps overtook this one; not in duration_s


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag="rank_failed"):
    """Rank to API server: it is about to exit because of this."""

    rank: int
    kind: str     # class name of the error
    message: str


FromRank = RankLoading | RankReady | Heartbeat | GrammarPrepared | StepDone | RankFailed
