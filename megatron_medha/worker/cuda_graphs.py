"""Steps replayed as CUDA graphs: one launch instead of hundreds, for decodes and for small chunks.

A graph is captured per number of tokens, over static buffers that each step fills by one copy. What a step lacks is
filled up with rows that belong to nobody: they write nothing, attend to nothing and nobody looks at their logits. The
attention's work lists are data too, so a graph serves any mixture of lengths. Steps that fit no graph run eagerly.
Tested over buffers that are replayed by hand on a CPU; no graph has been captured on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.core.cost.step_sizes import GRAPH_SIZES
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.staging import Staging, packed_offsets, views_of
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.rotary import Rotary
from megatron_medha.parallel.groups import MedhaPGs, min_over_ranks
from megatron_medha.worker.batch_tensors import HostStep
from megatron_medha.worker.windows import masked_range

log = logging.getLogger(__name__)

LARGEST_GRAPH_TOKENS = GRAPH_SIZES.chunks[-1]
# In a step that has a chunk; decodes are most of them, and under load there are more than a few.
_CHUNK_SEQUENCES = (32, GRAPH_SIZES.max_sequences)

# work, whether it is run before -> (replay, its output)
Capture = Callable[[Callable[[], Tensor], bool], tuple[Callable[[], None], Tensor]]


class GraphShape(NamedTuple):
    """What a graph has room for; smaller ones sort first."""

    num_tokens: int
    num_sequences: int  # hence rows of logits
    has_chunks: bool


@dataclass(frozen=True, slots=True)
class _Captured:
    room: Any
    buffer: Tensor
    token_ids_T: Tensor  # a view of it
    replay: Callable[[], None]
    logits_RV: Tensor


class StepGraphs:
    """The captured graphs of one rank."""

    def __init__(
        self,
        model: GPTModel,
        backend: Any,
        kv_layers: Sequence[LayerKV],
        rotary: Rotary,
        device: torch.device,
        *,
        shapes: Sequence[GraphShape],
        new_capture: Callable[[], Capture],
        window: int | None = None,
    ) -> None:
        """backend: one with padded plans. new_capture: for graphs captured together. window: of layers that have one.

        Captures at once; raises what a capture raises.
        """
        self._model, self._backend, self._kv_layers, self._rotary = model, backend, kv_layers, rotary
        self._device = device
        self._new_capture = new_capture
        self._window = window
        self._staging = Staging(device)
        self._shapes = sorted(shapes)
        self._graphs: dict[GraphShape, _Captured] = {}
        self._capture_all()

    @torch.inference_mode()
    def run(self, host: HostStep, token_ids_T: Tensor | None = None) -> Tensor | None:
        """Logits of the step's sampling rows, valid until the next call; None when no graph fits.

        token_ids_T: int64, on the device, in place of the host's. Nothing waits: a step may be launched while the one
        before is under way, as all that writes the buffers and reads the logits is on one stream.
        """
        if host.prompt_rows or not all(r.is_written for r in host.ranges):
            return None
        shape = self.shape_for(host)
        if shape is None:
            return None
        plan = self._backend.host_plan(host.ranges)
        plans = [plan]
        if self._window is not None:
            plans.append(self._backend.host_plan([masked_range(r, r.start, 0, self._window) for r in host.ranges]))
        if self._generation != self._backend.tables.generation:  # perhaps for this very plan
            log.info("cuda_graphs_recaptured reason=block_tables_grew")
            # Without a run before: ranks of a tensor-parallel group come here at steps of their own, as each
            # drops tables when it hears of it, and none may wait for the others.
            self._capture_all(is_run_before=False)
        graph = self._graphs[shape]
        try:
            fitted = [self._backend.padded(each, graph.room) for each in plans]
        except ValueError as error:
            # The tables have taken note of the blocks that are new; the eager path would not hear of them again.
            self._send_table_updates(plan)
            log.info("cuda_graph_skipped tokens=%d reason=%s", len(host.token_ids_T), error)
            return None
        self._send_table_updates(plan)
        self._staging.upload(self._arrays(shape, host, fitted), graph.buffer)
        if token_ids_T is not None:
            graph.token_ids_T[: len(token_ids_T)].copy_(token_ids_T)
        graph.replay()
        return graph.logits_RV[: len(host.logit_rows)]

    def shape_for(self, host: HostStep) -> GraphShape | None:
        """The smallest graph with room for the step."""
        num_tokens, num_sequences = len(host.token_ids_T), len(host.ranges)
        has_chunks = any(r.num_rows > 1 for r in host.ranges)
        for shape in self._shapes:
            if shape.num_tokens >= num_tokens and shape.num_sequences >= num_sequences and (
                shape.has_chunks or not has_chunks
            ):
                return shape
        return None

    def _send_table_updates(self, plan: Any) -> None:
        if len(plan.places):
            self._backend.tables.tell(*self._staging.upload([plan.places, plan.blocks]))

    @torch.inference_mode()
    def _capture_all(self, is_run_before: bool = True) -> None:
        from megatron_medha.kernels.triton.triton_backend import with_window

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a step under way still uses the buffers given up here
        self._graphs.clear()
        capture = self._new_capture()
        self._generation = self._backend.tables.generation
        # The largest first: smaller ones then find all the memory they need in the pool.
        for shape in reversed(self._shapes):
            room = self._backend.room(shape.num_tokens, shape.num_sequences, has_chunks=shape.has_chunks)
            empty = [self._backend.empty_plan(room)]
            if self._window is not None:
                empty.append(with_window(empty[0]))
            arrays = self._arrays(shape, None, empty)
            _, num_bytes = packed_offsets([array.nbytes for array in arrays])
            buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
            self._staging.upload(arrays, buffer)
            tensors = views_of(buffer, [(array.shape, array.dtype) for array in arrays])
            replay, logits_RV = capture(lambda t=tensors, p=empty: self._forward(t, p), is_run_before)  # type: ignore[misc]
            self._graphs[shape] = _Captured(room, buffer, tensors[0], replay, logits_RV)

    def _forward(self, tensors: Sequence[Tensor], empty: Sequence[Any]) -> Tensor:
        token_ids_T, positions_T, lengths_T, logit_rows_R, *lists = tensors
        nothing = torch.empty(0, dtype=torch.int64, device=self._device)
        each = len(lists) // len(empty)
        plans = [
            self._backend.on_device(
                one, [*lists[i * each : (i + 1) * each], nothing, nothing.to(torch.int32)], is_padded=True
            )
            for i, one in enumerate(empty)
        ]
        batch = PackedBatch(
            backend=self._backend,
            plan=plans[0],
            window_plan=plans[1] if len(plans) > 1 else None,
            kv_layers=self._kv_layers,
            rotation=self._rotary.at(positions_T, lengths_T),
            positions_T=positions_T,
            logit_rows=logit_rows_R,
        )
        logits_1RV = self._model(
            token_ids_T.unsqueeze(0), None, None, inference_context=batch, runtime_gather_output=True
        )
        return logits_1RV[0]

    def _arrays(self, shape: GraphShape, host: HostStep | None, plans: Sequence[Any]) -> list[np.ndarray]:
        """A step's arrays at the graph's lengths, in the order `_forward` takes them."""
        token_ids, positions, lengths = (np.zeros(shape.num_tokens, np.int64) for _ in range(3))
        logit_rows = np.zeros(shape.num_sequences, np.int64)
        lengths += 1
        if host is not None:
            num_tokens = len(host.token_ids_T)
            token_ids[:num_tokens], positions[:num_tokens] = host.token_ids_T, host.positions_T
            lengths[:num_tokens] = host.lengths_T
            logit_rows[: len(host.logit_rows)] = host.logit_rows
        lists = [array for plan in plans for array in plan.arrays[:-2]]
        return [token_ids, positions, lengths, logit_rows, *lists]


def graph_shapes() -> list[GraphShape]:
    """What graphs are captured for."""
    shapes = [GraphShape(size, size, False) for size in GRAPH_SIZES.decodes]
    return shapes + [
        GraphShape(size, min(count, size), True) for size in GRAPH_SIZES.chunks for count in _CHUNK_SEQUENCES
    ]


def step_graphs(
    model: GPTModel,
    backend: AttentionBackend,
    kv_layers: Sequence[LayerKV],
    rotary: Rotary,
    device: torch.device,
    pgs: MedhaPGs,
    new_capture: Callable[[int], Callable[[], Capture]] | None = None,
    shapes: Sequence[GraphShape] | None = None,
    window: int | None = None,
) -> StepGraphs | None:
    """Graphs for decodes and small chunks; None, with the reason in the log, where there can be none. Collective.

    new_capture: of so many tensor-parallel ranks. window: of the layers that have one.
    """
    reason = None
    if not backend.has_padded_plans:
        reason = f"attention_backend={backend.name} looks at lengths on the host"
    elif pgs.pp.size() * pgs.kvp.size() > 1:
        reason = "pipeline stages and kvp ranks exchange data whose size depends on the step"
    elif rotary.depends_on_lengths:
        reason = "dynamic rotary scaling looks at lengths on the host"
    if reason is not None:
        log.warning("cuda_graphs_disabled reason=%s", reason)
        return None
    tp = pgs.tp.size()
    new_captures = new_capture(tp) if new_capture is not None else partial(cuda_capture, tp)
    graphs = None
    try:
        graphs = StepGraphs(
            model, backend, kv_layers, rotary, device, shapes=shapes or graph_shapes(), new_capture=new_captures,
            window=window,
        )  # fmt: skip
    except Exception as error:  # torch, Triton and Transformer Engine raise types of their own
        log.warning("cuda_graphs_disabled reason=%s: %s", type(error).__name__, error, exc_info=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    # A graph sums over more rows than the step has; a rank without one would sum over other sizes than its partners.
    if tp > 1 and not min_over_ranks(int(graphs is not None)):
        log.warning("cuda_graphs_disabled reason=another rank of this replica has none")
        return None
    return graphs


def cuda_capture(tp: int) -> Capture:
    """Capture as torch's CUDA graphs that share one memory pool, as they never run at the same time.

    The pool is theirs alone: torch's allocator refuses one whose graphs have all been given up ("use_count > 0 INTERNAL
    ASSERT FAILED").
    tp: ranks that sum over a step's rows together; NCCL's own thread asks for events while they capture.
    """
    mode = "global" if tp == 1 else "thread_local"
    pool = torch.cuda.graph_pool_handle()
    stream = _capture_stream()

    def capture(work: Callable[[], Tensor], is_run_before: bool) -> tuple[Callable[[], None], Tensor]:
        # Once outside of it: kernels are compiled and workspaces allocated, which capturing forbids.
        if is_run_before:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            output = work()
        return graph.replay, output

    return capture


@cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace of 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream()
