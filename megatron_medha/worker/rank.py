"""One rank's work: steps in, their part of the work done, StepDone out. Sockets and processes are elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.cluster.kv_audit import SentBlocks
from megatron_medha.cluster.messages import HeldKV, PromptLogprobs, RankStep, SampledToken, StepDone
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.ops import KVOp
from megatron_medha.core.stage_plan import StagePlan, stage_plan
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.linear.native_decoder import NativeDecoder
from megatron_medha.kernels.points import HeldStep
from megatron_medha.kernels.staging import Staging
from megatron_medha.model.draw import SamplingRow
from megatron_medha.model.rotary import Rotary
from megatron_medha.model.sampler import Sampler
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import MedhaPGs
from megatron_medha.parallel.shm_channel import ShmChannel, is_true_for_all
from megatron_medha.parallel.stage_link import PendingReceive, StageLink
from megatron_medha.worker.batch_tensors import HostStep, KVShards, StepTensors, host_step, step_tensors
from megatron_medha.worker.cuda_graphs import StepGraphs
from megatron_medha.worker.grammar_masks import GrammarMasks
from megatron_medha.worker.hold_points import HoldPoints, StepPoints, num_blocks_of
from megatron_medha.worker.plain_decodes import PlainDecodes
from megatron_medha.worker.prompt_rows import logprobs_of_prompts
from megatron_medha.worker.run_ahead import (
    PartnersTokens,
    PendingTokens,
    RunAheadDecodes,
    StepWork,
    next_decodes,
    pending_rows,
)
from megatron_medha.worker.step_clock import StepTimer
from megatron_medha.worker.table_ops import execute_kv_ops
from megatron_medha.worker.token_store import StoredRequest, TokenStore

_ANY_POSITION = 1 << 62


_AHEAD = 1 << 29  # added to a step's number: messages of its next decodes


@dataclass(frozen=True, slots=True)
class _QueuedStep:
    """A step this rank knows of and has not computed."""

    step: RankStep
    chunks: tuple[tuple[Chunk, StoredRequest], ...]  # that can be computed
    failed: tuple[tuple[str, str], ...]
    plan: StagePlan | None  # None: made when it is computed
    arriving: PendingReceive | None
    duration_s: float  # spent on it so far
    audit_counts: HeldKV | None  # under audit
    held: RunAheadDecodes | None = None  # of stages: computed ahead for the step announced next, this one


@dataclass(frozen=True, slots=True)
class _ForwardResult:
    """What a run of the model has given."""

    requests: tuple[StoredRequest, ...]  # in the order of the logit rows
    logits_RV: Tensor
    prompt: Sequence[PromptLogprobs] = ()
    output: Tensor | None = None  # for the next stage


class Rank:
    """Model, KV memory and live requests of one rank.

    Steps are announced in the same order, on this rank and on all others of the replica, and computed in that order
    too, unless one overtakes another (hold_points.py). Announcing makes room for what the stage before will send, so
    it is done as early as the step is known: `take_arrived` is called while a step is computed, for others that have
    come meanwhile; `take_next` waits for one.
    """

    take_arrived: Callable[[], None] | None = None
    take_next: Callable[[], None] | None = None
    take_done: Callable[[StepDone], None] | None = None  # the answer of a step that has overtaken another
    graphs: StepGraphs | None = None  # set once they are captured
    sent_blocks: SentBlocks | None = None  # set where the rank is audited

    def __init__(
        self,
        *,
        rank: int,
        model: GPTModel,
        config: ModelConfig,
        backend: AttentionBackend,
        kv_layers: Sequence[LayerKV],
        num_blocks: int,
        block_size: int,
        shard_tokens: int,
        device: torch.device,
        pgs: MedhaPGs,
        decoder: NativeDecoder | None = None,
        guided: GrammarMasks | None = None,
        points: HoldPoints | None = None,
    ) -> None:
        """num_blocks: of each of kv_layers. shard_tokens: of one request on one kvp rank.

        decoder: the model in one call of the library (cpu_model.py). guided: None where no request has a grammar.
        points: None where no step is held.
        """
        self.model = model
        self._rank = rank
        self._config = config
        self._backend = backend
        self._kv_layers = kv_layers
        self._num_blocks, self._block_size = num_blocks, block_size
        slots = ShmChannel.open(pgs.kvp, device)
        # Where all ranks have the library, they exchange what does not depend on where shards begin.
        has_partitions = pgs.kvp.size() > 1 and device.type == "cpu" and is_true_for_all(backend.is_native, pgs.kvp)
        partition_tokens = backend.partition_tokens if has_partitions else None
        self.shards = KVShards(pgs.kvp.rank(), shard_tokens, pgs.kvp, slots, partition_tokens)
        self._link = StageLink(
            pgs.pp, hidden_size=config.hidden_size, dtype=next(model.parameters()).dtype, device=device
        )
        self._is_last_stage = self._link.stage == self._link.num_stages - 1
        self.receives = self._link.stage > 0  # from the stage before
        self.answers = pgs.tp.rank() == 0     # one rank of each tensor-parallel group reports its steps
        # In a layout of several, tokens are sampled elsewhere too; the API server tells every rank all it needs.
        self.samples_for_itself = pgs.tp.size() == pgs.pp.size() == pgs.kvp.size() == 1
        # Tensor-parallel ranks do the same work, so that they need not hear from the API server to go on.
        self._tp = pgs.tp if pgs.tp.size() > 1 and pgs.kvp.size() == 1 else None
        self._has_stages = pgs.pp.size() > 1 and pgs.kvp.size() == 1
        self._runs_ahead = False  # the step at hand, on all stages
        self._rotary = Rotary(config)
        self._plain_decodes: PlainDecodes | None = None
        angles = self._rotary.first_positions() if decoder is not None and self.samples_for_itself else None
        if decoder is not None and angles is not None:
            self._plain_decodes = PlainDecodes(decoder, kv_layers, angles, backend.partition_tokens)
        self._staging = Staging(device)
        self._device = device
        self._sampler = Sampler(config.vocab_size, device)
        self._guided = guided
        self._requests = TokenStore(config.vocab_size)
        self._num_positions = config.max_context_len if config.positions == "learned" else _ANY_POSITION
        self._announced: deque[_QueuedStep] = deque()
        self._last: StepWork = ()            # what was computed last, if its decodes may be computed ahead
        self._held: RunAheadDecodes | None = None   # computed ahead of the API server's asking
        self._points = points
        self._overtaken_s = 0.0  # spent on steps that have overtaken others

    @property
    def num_queued_steps(self) -> int:
        """Steps this rank knows of and has not computed."""
        return len(self._announced)

    @property
    def kvp_rank(self) -> int:
        """Its index among the kvp ranks."""
        return self.shards.kvp_rank

    def clear_kv(self) -> None:
        """Set all KV memory to zero. What nobody has written may hold anything, and on a CPU is not in memory yet."""
        for layer in self._kv_layers:
            for values in layer:
                values.view(torch.uint8).zero_()

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that a request to come will have; on any thread."""
        assert self._guided is not None, "a request has a grammar"
        self._guided.prepare(grammar)

    def run(self, step: RankStep) -> StepDone:
        """Announce and compute one step."""
        self.announce(step)
        return self.compute()

    def announce(self, step: RankStep) -> None:
        """Take note of a step: what it tells of requests at once; its KV operations and chunks when its turn comes.

        That is safe while earlier steps wait: the API server releases no request that a step in flight has a part in,
        and samples no second token of one.
        """
        started_s = time.monotonic()
        self._requests.release(step.released)
        self._requests.add(step.new_requests)
        for request_id, token_id in step.sampled:
            self._requests.append(request_id, token_id)
        failed: list[tuple[str, str]] = []
        chunks: list[tuple[Chunk, StoredRequest]] = []
        for chunk in step.chunks:
            request = self._requests[chunk.request_id]
            assert chunk.start + chunk.num_tokens <= self._num_positions, f"{chunk}: {self._num_positions} positions"
            if request.fault is None:
                chunks.append((chunk, request))
            else:  # every rank finds the same fault in it, so all of them leave it out
                failed.append((chunk.request_id, request.fault))
        held = self._taken_by(step) if self._has_stages else None
        plan = self._plan(chunks if held is None else held.split(chunks)[0]) if self.receives else None
        self._announced.append(
            _QueuedStep(
                step=step,
                chunks=tuple(chunks),
                failed=tuple(failed),
                plan=plan,
                arriving=self._link.post_receive(plan.num_tokens, step.batch_id) if plan and plan.num_tokens else None,
                duration_s=time.monotonic() - started_s,
                audit_counts=self._held_kv(step),
                held=held,
            )
        )

    def _taken_by(self, step: RankStep) -> RunAheadDecodes | None:
        """Decodes that stages have computed ahead are of the step announced next, which says what it drops of them."""
        held, self._held = self._held, None
        if held is not None:
            held.forget({op.request_id for op in step.kv_ops if op.kind == "drop"})
        return held

    def _held_kv(self, step: RankStep) -> HeldKV | None:
        if self.sent_blocks is None:
            return None
        audit_counts = self.sent_blocks.note(step.released, step.kv_ops)
        return HeldKV(len(self._requests), audit_counts.num_blocks, audit_counts.block_numbers)

    def finish(self) -> None:
        """Wait until the next stage has what this rank has sent it."""
        self._link.finish()

    def compute(self) -> StepDone:
        """Compute the step announced first. A fault of one request fails that request alone."""
        work = self._announced.popleft()
        if self._points is None or not work.step.may_be_held:
            return self._compute(work, None)
        points = StepPoints(self._points, work.step, self._take_queued, self._overtake)
        if work.chunks:
            points.begin()
        else:
            points.end()
        done = self._compute(work, points)
        points.end()
        return done

    def _take_queued(self) -> Sequence[RankStep]:
        if self.take_arrived is not None:
            self.take_arrived()
        return [work.step for work in self._announced]

    def _overtake(self, batch_id: int) -> None:
        """Compute that step now, whatever is before it; waits for its announcement."""
        while (work := next((work for work in self._announced if work.step.batch_id == batch_id), None)) is None:
            assert self.take_next is not None
            self.take_next()
        self._announced.remove(work)
        started_s = time.monotonic()
        done = self._compute(work, None)
        if self.answers and self.take_done is not None:
            self.take_done(done)
        self._overtaken_s += time.monotonic() - started_s

    @torch.inference_mode()
    def _compute(self, work: _QueuedStep, points: StepPoints | None) -> StepDone:
        hidden_T1C = None if work.arriving is None else work.arriving.wait()
        span, overtaken_before_s = StepTimer(self._device), self._overtaken_s
        failed, self._runs_ahead = list(work.failed), work.step.runs_ahead
        chunks: Sequence[tuple[Chunk, StoredRequest]] = work.chunks
        underway, ahead = [], None
        if work.step.kv_ops:
            self._execute(work.step.kv_ops)
        held = work.held or self._held
        self._held = None
        if held is not None:
            chunks, found = held.split(chunks)
            if found is not None:
                ahead = held.span
                if self._is_last_stage:
                    underway.append(found)
        prompt: Sequence[PromptLogprobs] = ()
        if chunks:
            forward = self._forward(chunks, work, hidden_T1C, points)
            if forward.output is not None:
                self._link.send(forward.output, work.step.batch_id)
            elif self.answers or self._shares_tokens:
                underway.append(self._choose(forward.logits_RV, forward.requests))
                prompt = forward.prompt
        if self._points is not None:
            self._points.computed(work.step)
        held_s = self._overtaken_s - overtaken_before_s
        span.stop()
        # Before anyone waits for the device.
        if work.step.runs_ahead:
            self._held = self._launch_ahead_in_stages(work, underway)
        else:
            self._held = self._launch_ahead(work.chunks, underway)
        tokens = [token for one in underway for token in self._tokens(one, failed)] if self.answers else []
        can_run_ahead = self.samples_for_itself and self._held is None and not failed
        self._last = work.chunks if can_run_ahead else ()
        duration_s = span.seconds() - held_s + (ahead.seconds() if ahead is not None else 0.0)
        return StepDone(
            batch_id=work.step.batch_id,
            rank=self._rank,
            duration_s=work.duration_s + duration_s,
            tokens=tuple(tokens),
            prompt_logprobs=tuple(prompt),
            failed=tuple(failed) if self._is_last_stage else (),
            audit_counts=work.audit_counts,
            held_s=held_s,
        )

    def _execute(self, kv_ops: Sequence[KVOp]) -> None:
        dropped = execute_kv_ops(
            kv_ops,
            self._requests,
            backend=self._backend,
            kv_layers=self._kv_layers,
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            kvp_rank=self.kvp_rank,
            device=self._device,
        )
        if self._held is not None and dropped:
            self._held.forget(dropped)

    @torch.inference_mode()
    def run_ahead(self) -> bool:
        """Compute the decodes that surely follow the last step, before the API server asks; False if none are known.

        Nothing is said of them and no token is appended until they are asked for. Their keys and values go where the
        API server will want them: to blocks that are the requests' own until a later step says otherwise.
        """
        decodes = next_decodes(self._last)
        self._last = ()
        if not decodes:
            return False
        span = StepTimer(self._device)
        found = self._forward(decodes)
        underway = self._choose(found.logits_RV, found.requests)
        span.stop()
        self._held = RunAheadDecodes(decodes, underway, span)
        return True

    def _launch_ahead(self, work: StepWork, underway: Sequence[PendingTokens]) -> RunAheadDecodes | None:
        """`run_ahead` before the host has seen a step's tokens: they are taken where they are, on the device.

        None where what follows is not known yet, or fits no graph.
        """
        if self.graphs is None or not (self.samples_for_itself and not self._announced or self._shares_tokens):
            return None  # what has been announced is a matter of time, and partners must decide alike
        decodes = next_decodes(work, num_pending=1)
        if not decodes:
            return None
        span = StepTimer(self._device)
        token_ids_R = self._ids_in_order(decodes, underway)
        host = host_step(decodes, plan=self._plan(decodes), shards=self.shards, num_pending=1)
        logits_RV = self.graphs.run(host, token_ids_R)
        if logits_RV is None:
            return None
        chosen = self._choose(logits_RV, host.sampling_requests, num_pending=1)
        span.stop()
        return RunAheadDecodes(decodes, chosen, span)

    def _launch_ahead_in_stages(self, work: _QueuedStep, underway: Sequence[PendingTokens]) -> RunAheadDecodes | None:
        """The decodes that follow a step, on every stage of the pipeline: none of them gets the tokens from outside.

        The last stage's go to the first one on the devices. All stages come here after the same step, from which they
        find the same decodes, and with no other step announced (RankStep.runs_ahead).
        """
        assert self._has_stages and not self._announced, "a step was announced beside one that runs ahead"
        decodes = next_decodes(work.chunks, num_pending=1)
        if not decodes:
            return None
        span, step_id = StepTimer(self._device), work.step.batch_id + _AHEAD
        host = host_step(decodes, plan=self._plan(decodes), shards=self.shards, num_pending=1)
        is_last = self._is_last_stage
        ids_R = self._ids_in_order(decodes, underway) if is_last else self._room_for_ids(len(decodes))
        tensors = self._tensors(decodes, host)
        if not self.receives or is_last:
            tensors = replace(tensors, token_ids_1T=self._link.give_tokens(ids_R).unsqueeze(0))
        if self.receives:
            self.model.set_input_tensor(self._link.post_receive(len(decodes), step_id).wait())
        output = self.model(
            tensors.token_ids_1T, None, None, inference_context=tensors.batch, runtime_gather_output=True
        )
        if is_last:
            chosen = self._choose(output[0], host.sampling_requests, num_pending=1)
        else:
            self._link.send(output, step_id)
            chosen = PendingTokens(host.sampling_requests, PartnersTokens(ids_R), {}, range(len(decodes)))
        span.stop()
        return RunAheadDecodes(decodes, chosen, span)

    def _room_for_ids(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=self._device)

    def _ids_in_order(self, decodes: StepWork, underway: Sequence[PendingTokens]) -> Tensor:
        """The last tokens of the decodes' requests, where they are, on the device."""
        token_ids_R = torch.cat([one.choices.token_ids_R for one in underway])
        places = pending_rows(decodes, underway)
        if places != list(range(len(token_ids_R))):
            (places_T,) = self._staging.upload([np.array(places, np.int64)])
            token_ids_R = token_ids_R.index_select(0, places_T)
        return token_ids_R

    def _plan(self, chunks: Sequence[tuple[Chunk, StoredRequest]]) -> StagePlan:
        return stage_plan([chunk for chunk, _ in chunks], self.shards.kvp_rank)

    def _forward(
        self,
        chunks: Sequence[tuple[Chunk, StoredRequest]],
        work: _QueuedStep | None = None,
        hidden_T1C: Tensor | None = None,
        points: StepPoints | None = None,
    ) -> _ForwardResult:
        """Run the model over chunks, whose tables hold their blocks. work: the step they are of."""
        if self._plain_decodes is not None and self._plain_decodes.takes(chunks):
            return _ForwardResult(tuple(request for _, request in chunks), self._plain_decodes.logits(chunks))
        host = self._host(chunks, None if work is None else work.plan)
        logits_RV = None if self.graphs is None else self.graphs.run(host)
        if logits_RV is not None:
            return _ForwardResult(host.sampling_requests, logits_RV)
        tensors = self._tensors(chunks, host, None if work is None else work.plan)
        if points is not None:
            num_blocks = num_blocks_of(points.step, self._config.num_layers)
            tensors.batch.held = HeldStep(points, num_blocks, points.is_alone)
        elif self.receives:  # only later stages gain from receiving the next step while they compute one
            tensors.batch.before_layer = self.take_arrived
        if hidden_T1C is not None:
            self.model.set_input_tensor(hidden_T1C)
        output = self.model(
            tensors.token_ids_1T, None, None, inference_context=tensors.batch, runtime_gather_output=True
        )
        if not self._is_last_stage:
            return _ForwardResult((), output, output=output)
        prompt: list[PromptLogprobs] = []
        if tensors.prompt_rows:  # all ranks of a tensor-parallel group take part in the output layer
            assert tensors.batch.hidden is not None
            prompt = logprobs_of_prompts(self.model, tensors.batch.hidden, tensors.prompt_rows, self._config.vocab_size)
        return _ForwardResult(tensors.sampling_requests, output[0], prompt)

    def _host(self, chunks: Sequence[tuple[Chunk, StoredRequest]], plan: StagePlan | None = None) -> HostStep:
        return host_step(chunks, plan=plan or self._plan(chunks), shards=self.shards)

    def _tensors(
        self, chunks: Sequence[tuple[Chunk, StoredRequest]], host: HostStep, plan: StagePlan | None = None
    ) -> StepTensors:
        return step_tensors(
            host,
            chunks,
            plan=plan or self._plan(chunks),
            backend=self._backend,
            kv_layers=self._kv_layers,
            rotary=self._rotary,
            shards=self.shards,
            staging=self._staging,
            window=self._config.window,
        )

    def _tokens(self, underway: PendingTokens, failed: list[tuple[str, str]]) -> list[SampledToken]:
        """Wait for tokens and note each request's; requests that have none go to `failed`."""
        tokens: list[SampledToken] = []
        for request, sampled in underway.chosen():
            if isinstance(sampled, str):
                failed.append((request.request_id, sampled))
                continue
            if self.samples_for_itself:
                request.append(sampled.token_id)
            is_stop = sampled.token_id in request.stop_token_ids
            tokens.append(SampledToken(request.request_id, sampled.token_id, is_stop, sampled.logprobs))
        return tokens

    @property
    def _shares_tokens(self) -> bool:
        """Whether the first tensor-parallel rank gives its tokens to the others, on the devices."""
        return self._tp is not None and (self.graphs is not None or self._runs_ahead)

    def _choose(self, logits_RV: Tensor, requests: Sequence[StoredRequest], num_pending: int = 0) -> PendingTokens:
        """Have a token chosen for each. num_pending: 1 where the ones before them are on the device alone."""
        if not self._shares_tokens:
            return self._chosen_here(logits_RV, requests, num_pending)
        if self.answers:
            pending = self._chosen_here(logits_RV, requests, num_pending)
        else:
            ids_R = self._room_for_ids(len(requests))
            pending = PendingTokens(requests, PartnersTokens(ids_R), {}, range(len(requests)))
        if requests:
            dist.broadcast(pending.choices.token_ids_R, group=self._tp, group_src=0)
        return pending

    def _chosen_here(self, logits_RV: Tensor, requests: Sequence[StoredRequest], num_pending: int) -> PendingTokens:
        every = range(len(requests))
        if all(request.is_plain_greedy for request in requests):
            return PendingTokens(requests, self._sampler.choose_greedy(logits_RV), {}, every)
        rows = [
            SamplingRow(
                sampling=request.sampling,
                prompt_ids=request.prompt_ids(self._staging),
                output_ids=request.output_ids,
                seed=request.sampling.seed or 0,
                num_output_tokens=len(request.output_ids) + num_pending,
            )
            for request in requests
        ]
        allowed = None
        if any(request.sampling.grammar is not None for request in requests):
            assert self._guided is not None, "a request has a grammar"
            allowed = self._guided.allowed(requests)
        choices = self._sampler.choose(logits_RV, rows, None if allowed is None else allowed.by_row)
        return PendingTokens(requests, choices, {} if allowed is None else allowed.faults, every)
