"""Turns the chunks of one step into what the model takes: token ids, positions, slots and rows of interest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.shards import context_in
from megatron_medha.core.stage_plan import StagePlan
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV, QueryRange
from megatron_medha.kernels.attention.merge_tree import shard_nodes
from megatron_medha.kernels.attention.native_shards import NativeShards, SharedChunk
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.staging import Staging
from megatron_medha.model.inference_context import PackedBatch, SharedRows
from megatron_medha.model.rotary import Rotary
from megatron_medha.model.shared_attention import MergedNodes, MergedOutputs, SharedAttention
from megatron_medha.parallel.kv_exchange import KVExchange, RankSet
from megatron_medha.parallel.node_exchange import NodeExchange, SharedResults
from megatron_medha.parallel.shm_channel import ShmChannel
from megatron_medha.worker.prompt_rows import PromptRows
from megatron_medha.worker.token_store import StoredRequest
from megatron_medha.worker.windows import masked_range, windowed_ranges


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step, ready for the model."""

    token_ids_1T: Tensor  # int64
    batch: PackedBatch
    sampling_requests: tuple[StoredRequest, ...]  # in the order of the logit rows
    prompt_rows: tuple[PromptRows, ...]           # in the order of the kept hidden rows


@dataclass(frozen=True, slots=True)
class KVShards:
    """This rank's place among the kvp ranks, and how long a shard is."""

    kvp_rank: int
    shard_tokens: int  # see core/kv/shards.py
    group: dist.ProcessGroup  # of the kvp ranks
    shared_slots: ShmChannel | None = None  # between them, where they are on one machine
    partition_tokens: int | None = None     # see AttentionBackend; None: some rank's backend has no partitions

    @property
    def has_own_bits(self) -> bool:
        """Whether the last bits of shared rows are others than on one rank."""
        is_whole = self.partition_tokens is not None and self.shard_tokens % self.partition_tokens == 0
        return self.group.size() > 1 and not is_whole

    def is_last_of(self, chunk: Chunk) -> bool:
        """Whether this rank writes the chunk's keys and values, and samples after it."""
        return chunk.kvp_ranks[-1] == self.kvp_rank

    def query_range(self, chunk: Chunk, first_row: int, table: SlotTable) -> QueryRange:
        """What the chunk's rows see of this rank's shard. A chunk lies in the last shard as a whole."""
        num_slots, shard_tokens = table.num_slots, self.shard_tokens
        shard = chunk.kvp_ranks.index(self.kvp_rank)
        has_nodes = len(chunk.kvp_ranks) > 1 and self.partition_tokens is not None
        nodes = self.nodes(chunk, shard) if has_nodes else None
        first_position = shard * shard_tokens
        if not self.is_last_of(chunk):
            assert num_slots >= shard_tokens, f"{chunk}: {num_slots} slots in a shard of {shard_tokens}"
            return QueryRange(first_row, chunk.num_tokens, shard_tokens, table, False, first_position, nodes)
        context = context_in(shard, chunk.start, shard_tokens)
        end = context + chunk.num_tokens
        assert 0 <= context < end <= min(num_slots, shard_tokens), f"{chunk}: {num_slots} slots of {shard_tokens}"
        return QueryRange(first_row, chunk.num_tokens, context, table, True, first_position, nodes)

    def nodes(self, chunk: Chunk, shard: int) -> np.ndarray:
        """Of which nodes of the merge tree the rank of a shard has results for the chunk's rows."""
        assert self.partition_tokens is not None
        first, num_seen = shard * self.shard_tokens, chunk.start + chunk.num_tokens
        return shard_nodes(first, first + self.shard_tokens, num_seen, self.partition_tokens)

    def windowed(
        self, chunks: Sequence[Chunk], ranges: Sequence[QueryRange], window: int, *, is_masked: bool
    ) -> tuple[QueryRange, ...]:
        """The chunks' ranges in layers where a token sees `window` tokens, itself included.

        is_masked: for a backend with masks_windows; others read by slots.
        """
        found: list[QueryRange] = []
        for chunk, each in zip(chunks, ranges, strict=True):
            shard_start = chunk.kvp_ranks.index(self.kvp_rank) * self.shard_tokens
            if is_masked:
                found.append(masked_range(each, chunk.start, shard_start, window))
            else:
                found += windowed_ranges(each, chunk.start, shard_start, window)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class HostStep:
    """One step as the host packs it: rows of all chunks along one axis. Nothing of it is on the device yet."""

    token_ids_T: np.ndarray  # int64
    positions_T: np.ndarray  # int64
    lengths_T: np.ndarray    # int64, of the sequence when the token was computed
    logit_rows: tuple[int, ...]
    hidden_rows: tuple[np.ndarray, ...]
    ranges: tuple[QueryRange, ...]
    sampling_requests: tuple[StoredRequest, ...]
    prompt_rows: tuple[PromptRows, ...]


def host_step(
    chunks: Sequence[tuple[Chunk, StoredRequest]], *, plan: StagePlan, shards: KVShards, num_pending: int = 0
) -> HostStep:
    """Pack chunks, in the order of the plan made of them, along one token axis. Their tables hold their blocks.

    num_pending: 1 where these are decodes of tokens that the device alone knows; the ids here are 0 then.
    """
    num_tokens = plan.num_tokens
    token_ids = np.empty(num_tokens, dtype=np.int64)
    positions = np.empty(num_tokens, dtype=np.int64)
    lengths = np.empty(num_tokens, dtype=np.int64)
    ranges: list[QueryRange] = []
    logit_rows: list[int] = []
    hidden_rows: list[np.ndarray] = []
    sampling_requests: list[StoredRequest] = []
    prompt_rows: list[PromptRows] = []
    row = 0
    for chunk, request in (chunks[index] for index in plan.order):
        start, count = chunk.start, chunk.num_tokens
        end_row = row + count
        if count == 1:  # a decode, mostly
            token_ids[row], positions[row] = 0 if num_pending else request.token(start), start
            lengths[row] = max(start + 1, request.num_prompt_tokens)
        else:
            token_ids[row:end_row] = request.tokens(start, count)
            positions[row:end_row] = np.arange(start, start + count)
            np.maximum(positions[row:end_row] + 1, request.num_prompt_tokens, out=lengths[row:end_row])
        assert request.slot_table is not None, f"{chunk.request_id}: a chunk at {start} without blocks"
        ranges.append(shards.query_range(chunk, row, request.slot_table))
        if chunk.samples_token:
            assert start + count == request.num_tokens + num_pending, (
                f"{chunk.request_id}: samples after token {start + count} of {request.num_tokens} + {num_pending}"
            )
        if shards.is_last_of(chunk):
            if chunk.samples_token:
                logit_rows.append(end_row - 1)
                sampling_requests.append(request)
            if request.sampling.num_prompt_logprobs is not None:
                num_predicted = min(start + count, request.num_prompt_tokens - 1) - start
                if num_predicted > 0:
                    hidden_rows.append(np.arange(row, row + num_predicted))
                    prompt_rows.append(PromptRows(request, start + 1, num_predicted))
        row = end_row
    return HostStep(
        token_ids_T=token_ids,
        positions_T=positions,
        lengths_T=lengths,
        logit_rows=tuple(logit_rows),
        hidden_rows=tuple(hidden_rows),
        ranges=tuple(ranges),
        sampling_requests=tuple(sampling_requests),
        prompt_rows=tuple(prompt_rows),
    )


def step_tensors(
    host: HostStep,
    chunks: Sequence[tuple[Chunk, StoredRequest]],
    *,
    plan: StagePlan,
    backend: AttentionBackend,
    kv_layers: Sequence[LayerKV],
    rotary: Rotary,
    shards: KVShards,
    staging: Staging,
    window: int | None = None,
) -> StepTensors:
    """A packed step on its way to the device, by `staging`; nothing waits for the device.

    window: of the layers that have one; None: none has.
    """
    hidden_rows, ranges = host.hidden_rows, host.ranges
    alone, shared = ranges[: plan.num_alone], ranges[plan.num_alone :]
    window_alone, window_shared = (), ()
    if window is not None:
        in_order = [chunks[index][0] for index in plan.order]
        is_masked = backend.masks_windows
        window_alone = shards.windowed(in_order[: plan.num_alone], alone, window, is_masked=is_masked)
        window_shared = shards.windowed(in_order[plan.num_alone :], shared, window, is_masked=is_masked)
    token_ids_T, positions_T, lengths_T, logit_rows_R, hidden_rows_P = staging.upload(
        [
            host.token_ids_T,
            host.positions_T,
            host.lengths_T,
            np.array(host.logit_rows, dtype=np.int64),
            np.concatenate(hidden_rows) if hidden_rows else np.empty(0, dtype=np.int64),
        ]
    )
    batch = PackedBatch(
        backend=backend,
        plan=backend.plan(alone) if alone else None,
        window_plan=backend.plan(window_alone) if window_alone else None,
        kv_layers=kv_layers,
        rotation=rotary.at(positions_T, lengths_T),
        positions_T=positions_T,
        logit_rows=logit_rows_R,
        hidden_rows=hidden_rows_P if hidden_rows else None,
        shared=_shared_rows(chunks, shared, window_shared, plan, backend, shards) if shared else None,
    )
    return StepTensors(token_ids_T.unsqueeze(0), batch, host.sampling_requests, host.prompt_rows)


def _shared_rows(
    chunks: Sequence[tuple[Chunk, StoredRequest]],
    ranges: Sequence[QueryRange],
    window_ranges: Sequence[QueryRange],
    plan: StagePlan,
    backend: AttentionBackend,
    shards: KVShards,
) -> SharedRows:
    first_row = ranges[0].first_row
    of_rows = [each._replace(first_row=each.first_row - first_row) for each in ranges]
    of_windows = [each._replace(first_row=each.first_row - first_row) for each in window_ranges]
    in_order = [chunks[index][0] for _, indices in plan.shared for index in indices]
    make = _merged_outputs if shards.partition_tokens is None else _merged_nodes
    attention = make(in_order, plan, backend, shards)
    return SharedRows(first_row, attention(of_rows), attention(of_windows) if of_windows else None)


def _merged_outputs(
    chunks: Sequence[Chunk], plan: StagePlan, backend: AttentionBackend, shards: KVShards
) -> Callable[[Sequence[QueryRange]], SharedAttention]:
    sets, row = [], 0
    for kvp_ranks, indices in plan.shared:
        own, chunks = chunks[: len(indices)], chunks[len(indices) :]
        num_rows = sum(chunk.num_tokens for chunk in own)
        sets.append(RankSet(kvp_ranks, row, num_rows))
        row += num_rows
    exchange = KVExchange(shards.group, sets, shards.shared_slots)
    return lambda ranges: MergedOutputs(backend, backend.plan(ranges), exchange)


def _merged_nodes(
    chunks: Sequence[Chunk], _: StagePlan, backend: AttentionBackend, shards: KVShards
) -> Callable[[Sequence[QueryRange]], SharedAttention]:
    shared, results, row = [], [], 0
    for chunk in chunks:
        of_shards = [shards.nodes(chunk, shard) for shard in range(len(chunk.kvp_ranks))]
        shared.append(SharedChunk(row, chunk.num_tokens, tuple(zip(chunk.kvp_ranks, of_shards, strict=True))))
        counts = tuple([chunk.num_tokens * len(nodes) for nodes in of_shards])
        results.append(SharedResults(chunk.kvp_ranks, counts))
        row += chunk.num_tokens
    exchange = NodeExchange(shards.group, results, shards.shared_slots)
    return lambda ranges: MergedNodes(
        NativeShards(backend, backend.plan(ranges), exchange.rank, exchange.links, shared), exchange
    )
