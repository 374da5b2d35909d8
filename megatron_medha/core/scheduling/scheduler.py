"""The scheduler: takes events, gives batches. Pure: no clock, no tensor, no token; time comes in as an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from megatron_medha.core.batch import (
    Aborted,
    Arrived,
    Batch,
    Chunk,
    Completed,
    Event,
    FinishReason,
    FirstStageDone,
    Output,
    Preempted,
    RanksLost,
    Rejected,
    TokenOut,
)
from megatron_medha.core.cost.step_cost import CostModel, StepLoad, step_s
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.ops import KVOp, drop_op
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.kv.shards import num_shards
from megatron_medha.core.request import Rejection, Request
from megatron_medha.core.scheduling.batch_builder import BatchBuilder
from megatron_medha.core.scheduling.chunking import PrefillTimes
from megatron_medha.core.scheduling.overdue import OverdueHeap
from megatron_medha.core.scheduling.policies import POLICIES, Policy, relative_slack
from megatron_medha.core.scheduling.prefill_packer import PrefillLimits, PrefillPacker
from megatron_medha.core.scheduling.prefill_queue import PrefillQueue
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.core.scheduling.step_budget import BudgetUtilization, min_efficient_step_s

_MAX_MARGIN_SHARE = 0.8  # of a deadline


@dataclass(slots=True, eq=False)
class _SubmittedBatch:
    """A batch the runtime has, with what the cost model needs to learn from it."""

    batch: Batch
    sequences: list[Sequence]  # of its chunks, in their order
    num_decodes: int           # they come first
    load: StepLoad
    has_left_first_stage: bool = False


class Scheduler:
    """Owns every live sequence; one thread calls it, with a clock that never runs backwards.

    policy: None: the one that config names. limits: on prefills, for systems that ours is compared with.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cost: CostModel,
        memory: KVMemory,
        spp: int = 1,
        policy: Policy | None = None,
        limits: PrefillLimits | None = None,
    ) -> None:
        self.config = config
        self.cost = cost
        self.memory = memory
        self.policy = policy or POLICIES[config.policy]
        self.spp = spp  # stages of the pipeline
        self._rule = config.chunk_rule
        self._utilization = BudgetUtilization()
        self._sequences: dict[str, Sequence] = {}
        self._decodes: list[Sequence] = []          # ready for their next token, oldest first
        self._growing: list[Sequence] = []          # need a block before their next token
        self._overdue = OverdueHeap(self._sequences)
        self._builder = BatchBuilder(config.chunk_rule, cost, memory)
        self._packer = PrefillPacker(config, cost, memory, limits)
        self._num_tpot_slos = 0                     # live sequences that bring a TPOT target
        self._in_flight: dict[int, _SubmittedBatch] = {}
        self._is_first_stage_free = True
        self._released: list[str] = []
        self._kv_ops: list[KVOp] = []               # for the next batch
        self._next_batch_id = 0
        self._times = self._predict_times()
        self._prefills = PrefillQueue(self.policy.priority, config.is_preemptive, self._times.num_step_tokens)

    # ---- what the outside may look at ----

    @property
    def sequences(self) -> Iterable[Sequence]:
        """Every live sequence."""
        return self._sequences.values()

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        return len(self._sequences)

    def sequence(self, request_id: str) -> Sequence | None:
        """A live sequence; None if there is none of that id."""
        return self._sequences.get(request_id)

    @property
    def num_batches_in_flight(self) -> int:
        """Batches submitted and not completed."""
        return len(self._in_flight)

    def predicted_prefill_s(self, num_tokens: int) -> float:
        """Predicted time of a whole prefill, alone: w_total."""
        return self._times.prefill_s(num_tokens) / self.spp

    def ttft_target_s(self, request: Request, total_work_s: float) -> float:
        """Seconds from arrival in which the first token is due: the request's own, its class's, or ours."""
        if request.ttft_slo_s is not None:
            return request.ttft_slo_s
        multiplier, least_s = request.deadline_multiplier, request.min_deadline_s
        return max(
            (self.config.deadline_multiplier if multiplier is None else multiplier) * total_work_s,
            self.config.min_deadline_s if least_s is None else least_s,
        )

    def is_deprioritized(self, seq: Sequence, now_s: float) -> bool:
        """Whether triage lets others go before this prefill: it takes more than a step, and its deadline is lost."""
        return seq.triage_s < now_s and seq.num_unscheduled_tokens > self._times.num_step_tokens

    def _triage_deadline_s(self, request: Request, target_s: float, total_work_s: float) -> float:
        """The deadline that triage goes by: its own, or the one that its work alone would give it, if that is later.

        So a prompt that asks for what cannot be done is not put behind those that ask for nothing.
        """
        if not self.config.has_triage:
            return inf
        return request.arrival_s + max(target_s, self.config.deadline_multiplier * total_work_s)

    def _margin_s(self, target_s: float) -> float:
        """The safety margin before a target; most of the target if that is shorter than ten steps."""
        steps_s = self.config.slack_margin_steps * self._feasible_s(self.config.step_budget_s)
        return min(steps_s, _MAX_MARGIN_SHARE * target_s)

    # ---- events ----

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """Take note of what happened; what clients must be told comes back."""
        outputs: list[Output] = []
        match event:
            case Completed():
                self._complete(event, now_s, outputs)
            case FirstStageDone():
                self._leave_first_stage(self._in_flight[event.batch_id])
            case Arrived():
                self._arrive(event.request, now_s, outputs)
            case Aborted(request_id):
                if (seq := self._sequences.get(request_id)) is not None and not seq.is_done:
                    self._end(seq, Status.ABORTED, now_s)
            case RanksLost():
                self._restart_all(now_s)
        if self._growing:
            self._grow(now_s, outputs)
        return outputs

    def _arrive(self, request: Request, now_s: float, outputs: list[Output]) -> None:
        if (rejection := self._rejection(request)) is not None:
            outputs.append(Rejected(request.request_id, rejection.message, is_client_fault=True))
            return
        self._refresh_times()
        total_s = self.predicted_prefill_s(request.num_prompt_tokens)
        target_s = self.ttft_target_s(request, total_s)
        seq = Sequence(
            request=request,
            deadline_s=request.arrival_s + target_s,
            triage_deadline_s=self._triage_deadline_s(request, target_s, total_s),
            margin_s=self._margin_s(target_s),
            total_work_s=total_s,
            remaining_work_s=total_s,
        )
        self._sequences[request.request_id] = seq
        self._num_tpot_slos += request.tpot_slo_s is not None
        self._overdue.add(seq)
        self._prefills.add(seq, now_s)

    def _rejection(self, request: Request) -> Rejection | None:
        """Why the request is not admitted; None where it is."""
        num_tokens = request.num_prompt_tokens
        if request.max_output_tokens > 1:  # a lone output token is never computed: a prompt scored alone may fill all
            num_tokens += request.max_output_tokens
        if request.request_id in self._sequences:
            message = f"request id {request.request_id} is already in use"
        elif request.num_prompt_tokens < 1 or request.max_output_tokens < 1:
            message = "a request needs at least one prompt token and one output token"
        elif num_tokens > self.memory.max_request_tokens:
            message = (
                f"{request.num_prompt_tokens} prompt tokens and up to {request.max_output_tokens} output tokens "
                f"exceed the {self.memory.max_request_tokens} tokens one request may have"
            )
        else:
            return None
        return Rejection(reason="request_rejected", message=message)

    def _leave_first_stage(self, flight: _SubmittedBatch) -> None:
        flight.has_left_first_stage = True
        self._is_first_stage_free = True
        num_decodes = flight.num_decodes
        chunks, sequences = flight.batch.chunks, flight.sequences
        for index in range(num_decodes, len(chunks)):
            chunk = chunks[index]
            sequences[index].num_first_stage_tokens = chunk.start + chunk.num_tokens

    def _complete(self, event: Completed, now_s: float, outputs: list[Output]) -> None:
        flight = self._in_flight.pop(event.batch_id)
        if not flight.has_left_first_stage:
            self._leave_first_stage(flight)
        self.cost.observe(flight.load, event.duration_s)
        if flight.num_decodes:  # others may have filled the whole budget
            self._utilization.learn(flight.batch, event.duration_s)
        self._refresh_times()
        failed = dict(event.failed)
        is_calm = not event.stopped and not failed
        # This loop runs once per decode and step; what it needs from elsewhere is fetched before.
        decoding, decodes, batch_id = Status.DECODING, self._decodes, event.batch_id
        new_tuple = tuple.__new__  # half the time of the class's own, and it is a NamedTuple for the same reason
        token_out = TokenOut
        for chunk, seq in zip(flight.batch.chunks, flight.sequences):  # noqa: B905
            end = seq.num_scheduled_tokens  # of a decode: it is in no other batch
            if is_calm and seq.status is decoding and end < seq.change_tokens:
                seq.num_batches_in_flight = 0
                seq.num_computed_tokens = seq.num_first_stage_tokens = end
                seq.num_output_tokens += 1
                outputs.append(new_tuple(token_out, (seq.request_id, batch_id, None, 0)))
                decodes.append(seq)
            else:
                self._complete_chunk(chunk, seq, event, failed, now_s, outputs)

    def _complete_chunk(
        self,
        chunk: Chunk,
        seq: Sequence,
        event: Completed,
        failed: dict[str, str],
        now_s: float,
        outputs: list[Output],
    ) -> None:
        """Any chunk, of a prompt or of a decode, whatever has become of its sequence."""
        request_id = chunk.request_id
        seq.num_batches_in_flight -= 1
        if seq.is_done:
            if not seq.num_batches_in_flight:
                self._forget(seq)
            return
        seq.num_computed_tokens = end = chunk.start + chunk.num_tokens
        if seq.num_first_stage_tokens < end:
            seq.num_first_stage_tokens = end
        if request_id in failed:
            self._end(seq, Status.ABORTED, now_s)
            outputs.append(Rejected(request_id, failed[request_id], is_client_fault=False))
        elif chunk.samples_token:
            seq.num_output_tokens += 1
            reason = FinishReason.STOP if request_id in event.stopped else None
            if reason is None and seq.num_output_tokens >= seq.request.max_output_tokens:
                reason = FinishReason.LENGTH
            outputs.append(tuple.__new__(TokenOut, (request_id, event.batch_id, reason, 0)))
            if reason is not None:
                self._end(seq, Status.FINISHED, now_s)
                return
            if seq.status is not Status.DECODING:
                seq.move_to(Status.DECODING)
            if end >= seq.capacity_tokens:
                self._growing.append(seq)
                return
            if end >= seq.change_tokens:
                self.memory.grow_early(seq)
            self._decodes.append(seq)

    def _end(self, seq: Sequence, status: Status, now_s: float) -> None:
        self._prefills.discard(seq, now_s)
        seq.move_to(status)
        if self.policy.ended is not None:
            self.policy.ended(seq)
        if status is not Status.FINISHED:  # one that has finished comes from a batch and is in neither
            self._decodes[:] = [other for other in self._decodes if other is not seq]
            self._growing = [other for other in self._growing if other is not seq]
        # The blocks of a sequence in flight are still being written to: they return with its last batch.
        if not seq.num_batches_in_flight:
            self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        self.memory.release(seq)
        del self._sequences[seq.request_id]
        self._num_tpot_slos -= seq.request.tpot_slo_s is not None
        self._released.append(seq.request_id)

    def _restart_all(self, now_s: float) -> None:
        """The ranks came up empty: every sequence that owned KV computes its known tokens again."""
        self._in_flight.clear()
        self._is_first_stage_free = True
        self._growing.clear()
        self._decodes.clear()
        for seq in list(self._sequences.values()):
            seq.num_batches_in_flight = 0
            if seq.is_done:
                self._forget(seq)
            elif seq.status is not Status.WAITING:
                self._restart(seq, now_s)
        self._released.clear()  # the new ranks have nothing to forget
        self._kv_ops.clear()

    def _restart(self, seq: Sequence, now_s: float) -> None:
        self._prefills.discard(seq, now_s)
        self._decodes[:] = [other for other in self._decodes if other is not seq]
        self.memory.release(seq)
        seq.move_to(Status.WAITING)
        seq.num_preemptions += 1
        if seq.num_output_tokens:
            seq.triage_deadline_s = inf  # somebody is reading its answer: it is in time if it goes on at once
        seq.num_scheduled_tokens = seq.num_first_stage_tokens = seq.num_computed_tokens = 0
        seq.remaining_work_s = self.predicted_prefill_s(seq.num_known_tokens)
        self._overdue.add(seq)
        self._prefills.add(seq, now_s)

    def _grow(self, now_s: float, outputs: list[Output]) -> None:
        """Give each decode that filled its last block a new one; if none is free, preempt by most relative slack."""
        still_growing: list[Sequence] = []
        growing, self._growing = self._growing, still_growing
        for seq in growing:
            if seq.status is not Status.DECODING:
                continue  # it was preempted itself
            while not self.memory.grow(seq):
                victim = self._victim(seq, now_s)
                if victim is None:
                    still_growing.append(seq)  # all other owners are in flight: try again at the next event
                    break
                outputs.append(Preempted(victim.request_id, victim.num_computed_tokens))
                self._kv_ops.append(drop_op(victim.request_id))
                self._restart(victim, now_s)
                if victim is seq:
                    break
            else:
                self._decodes.append(seq)

    def _victim(self, growing: Sequence, now_s: float) -> Sequence | None:
        """Which sequence is preempted so that `growing` gets a block; None if all others are in flight."""
        ranks = self.memory.growth_ranks(growing)
        owners = [
            seq
            for seq in self.memory.owners.values()
            if not seq.num_batches_in_flight
            and not seq.is_done
            and (seq is growing or any(shard.kvp_rank in ranks for shard in seq.block_table.shards))
        ]
        if all(seq is growing for seq in owners):
            return None
        kept = self._preemption_exempt(owners, now_s)
        return max(
            owners,
            key=lambda seq: (
                -kept.count(seq.request_id), relative_slack(seq, now_s), seq.request.arrival_s, seq.request_id
            ),
        )  # fmt: skip

    def _preemption_exempt(self, owners: list[Sequence], now_s: float) -> list[str]:
        """Which owners are spared in overload: a long prefill that loses its KV again and again would never end.

        The longest overdue prefill, and the owner with the earliest deadline, most of all when they are the same: it
        runs to its end, then the next one is the earliest, so that every wait has an end.
        """
        if not self.config.progress_share:
            return []
        earliest = min(owners, key=lambda seq: (seq.deadline_s, seq.request.arrival_s, seq.request_id))
        overdue = self._longest_overdue(now_s)
        kept = [overdue.request_id] if overdue is not None else []
        return kept + 2 * [earliest.request_id] if earliest.deadline_s < now_s else kept

    # ---- batches ----

    def schedule(self, now_s: float) -> Batch | None:
        """Choose the next batch; None when nothing can run."""
        if not self._is_first_stage_free or len(self._in_flight) >= self.spp:
            return None
        budget_s = self._budget_s()
        builder = self._builder
        has_decodes = self._has_decodes()
        builder.begin(self._utilization.share * budget_s if has_decodes else budget_s, has_decodes)
        builder.add_decodes(self._decodes)
        if self._prefills:
            self._packer.pack(builder, self._prefills.candidates(now_s), self._longest_overdue(now_s), now_s)
        if builder.is_empty:
            return None
        load = builder.slowest_load
        sequences, self._decodes = self._decodes, []
        num_decodes = len(sequences)
        batch_id = self._next_batch_id
        chunks = self._commit(sequences, builder, now_s)
        released, predicted_s = tuple(self._released), step_s(self.cost, load)
        batch = tuple.__new__(Batch, (batch_id, chunks, released, now_s, budget_s, predicted_s, tuple(self._kv_ops)))
        self._next_batch_id += 1
        self._released.clear()
        self._kv_ops.clear()
        sequences += [planned.seq for planned in builder.prefills]
        self._in_flight[batch_id] = _SubmittedBatch(batch, sequences, num_decodes, load)
        self._is_first_stage_free = False
        return batch

    def _has_decodes(self) -> bool:
        """Whether anybody's next token waits for the next step: with it, for memory, or behind it in the pipeline."""
        return bool(self._decodes or self._growing) or any(
            chunk.samples_token for flight in self._in_flight.values() for chunk in flight.batch.chunks
        )

    def _budget_s(self) -> float:
        budget_s = self._feasible_s(self.config.step_budget_s)
        if not self._num_tpot_slos:
            return budget_s
        tpot_slos_s = [seq.request.tpot_slo_s for seq in self._decodes if seq.request.tpot_slo_s is not None]
        wanted_s = self._feasible_s(min([budget_s, *tpot_slos_s]))
        # Where nobody prefills, a short step costs nobody anything.
        return max(wanted_s, min_efficient_step_s(budget_s, self.cost.linear_s(1, 1))) if self._prefills else wanted_s

    def _feasible_s(self, budget_s: float) -> float:
        # A budget that the fixed costs of a step fill cannot be kept by any chunk size; tiles would then pay a
        # step's overhead each. Twice those costs is the least at which half of the time goes into tokens.
        return max(budget_s, 2.0 * self.cost.linear_s(1, 1))

    def _commit(self, decodes: list[Sequence], builder: BatchBuilder, now_s: float) -> tuple[Chunk, ...]:
        """Turn what was planned into chunks, and move every cursor."""
        chunks: list[Chunk] = []
        kv_ops = self._kv_ops
        new_tuple, chunk = tuple.__new__, Chunk  # as in _complete
        for seq in decodes:
            start, table = seq.num_scheduled_tokens, seq.block_table
            seq.num_scheduled_tokens = start + 1
            seq.num_batches_in_flight = 1
            if table.unsent:
                kv_ops += table.unsent
                table.unsent.clear()
            chunks.append(new_tuple(chunk, (seq.request_id, start, 1, True, table.kvp_ranks)))
        for planned in builder.prefills:
            seq, num_tokens = planned.seq, planned.num_tokens
            start = seq.num_scheduled_tokens
            if seq.is_waiting:
                seq.move_to(Status.PREFILLING)
                if seq.first_scheduled_s is None:
                    seq.first_scheduled_s = now_s
                kv_ops += seq.block_table.unsent
                seq.block_table.unsent.clear()
            seq.num_scheduled_tokens = start + num_tokens
            seq.last_chunk_tokens = num_tokens
            seq.num_batches_in_flight += 1
            self._predict_work(seq)
            if seq.num_unscheduled_tokens:
                self._prefills.add(seq, now_s)  # nobody asks for the next batch before this one has left stage 0
            else:
                self._prefills.discard(seq, now_s)
            chunks.append(self._prefill_chunk(seq, start, num_tokens))
        return tuple(chunks)

    def _predict_work(self, seq: Sequence) -> None:
        """What is left of a prefill, and what all of it is, both by what the cost model believes now.

        A deadline that was derived from the prompt's own work follows the belief: a first estimate that was half the
        truth would make a long prompt look overdue through no fault of anybody, and others would wait for it.
        """
        whole_s = self._times.prefill_s(seq.num_known_tokens)
        seq.remaining_work_s = max(0.0, (whole_s - self._times.prefill_s(seq.num_scheduled_tokens)) / self.spp)
        total_s = whole_s / self.spp
        if total_s == seq.total_work_s:
            return
        seq.total_work_s = total_s
        target_s = self.ttft_target_s(seq.request, total_s)
        if seq.triage_deadline_s < inf:
            seq.triage_deadline_s = self._triage_deadline_s(seq.request, target_s, total_s)
        if seq.request.ttft_slo_s is None:
            seq.deadline_s, seq.margin_s = seq.request.arrival_s + target_s, self._margin_s(target_s)
            self._overdue.add(seq)

    def _prefill_chunk(self, seq: Sequence, start: int, num_tokens: int) -> Chunk:
        end = start + num_tokens
        ranks = seq.block_table.kvp_ranks[: num_shards(end, self.memory.shard_tokens)]
        return tuple.__new__(Chunk, (seq.request_id, start, num_tokens, end == seq.num_known_tokens, ranks))

    # ---- deadlines ----

    def _longest_overdue(self, now_s: float) -> Sequence | None:
        """The prefill that a share of every step is kept for."""
        return self._overdue.longest(now_s) if self.config.progress_share else None

    def _refresh_times(self) -> None:
        if self._times.revision != self.cost.revision:
            self._times = self._predict_times()
            self._prefills.num_step_tokens = self._times.num_step_tokens

    def _predict_times(self) -> PrefillTimes:
        budget_s = self._feasible_s(self.config.step_budget_s)
        return PrefillTimes(self._rule, self.cost, budget_s, self.memory.max_request_tokens)
