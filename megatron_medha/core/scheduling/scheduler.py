"""The scheduler: takes events, gives batches. Pure: no clock, no tensor, no token; time comes in as an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
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
    Woken,
)
from megatron_medha.core.cost.step_cost import CostModel, StepLoad, step_s
from megatron_medha.core.cost.step_sizes import NO_STEP_SIZES, StepSizes
from megatron_medha.core.kv.kv_memory import KVMemory
from megatron_medha.core.kv.ops import KVOp, drop_op
from megatron_medha.core.kv.sequence import Sequence, Status
from megatron_medha.core.request import Request, rejection
from megatron_medha.core.scheduling.batch_builder import BatchBuilder
from megatron_medha.core.scheduling.batch_committer import BatchCommitter, SubmittedBatch
from megatron_medha.core.scheduling.cached_prefixes import CachedPrefixes
from megatron_medha.core.scheduling.deadlines import Deadlines
from megatron_medha.core.scheduling.overdue import OverdueHeap
from megatron_medha.core.scheduling.overtaking import Overtaking
from megatron_medha.core.scheduling.policies import Policy, policy_named
from megatron_medha.core.scheduling.preemption import victim
from megatron_medha.core.scheduling.prefill_packer import PrefillLimits, PrefillPacker
from megatron_medha.core.scheduling.prefill_queue import PrefillQueue
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.core.scheduling.step_budget import BudgetUtilization, min_efficient_step_s


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
        step_sizes: StepSizes = NO_STEP_SIZES,
    ) -> None:
        self.config = config
        self.cost = cost
        self.memory = memory
        self.policy = policy or policy_named(config.policy)
        self.spp = spp  # stages of the pipeline
        self._utilization = BudgetUtilization()
        self._sequences: dict[str, Sequence] = {}
        self._decodes: list[Sequence] = []          # ready for their next token, oldest first
        self._growing: list[Sequence] = []          # need a block before their next token
        self._overdue = OverdueHeap(self._sequences)
        self._builder = BatchBuilder(replace(config.chunk_rule, step_sizes=step_sizes), cost, memory)
        self._num_tpot_slos = 0                     # live sequences that bring a TPOT target
        self._in_flight: dict[int, SubmittedBatch] = {}
        self._num_overtaking = 0                    # batches in flight that overtake others
        self._num_on_first_stage = 0                # batches in flight that have not left it
        self._decodes_since_s = inf                 # since when the first of _decodes has been waiting
        self._now_s = 0.0                           # of the last event
        self._released: list[str] = []
        self._kv_ops: list[KVOp] = []               # for the next batch
        self._next_batch_id = 0
        self._deadlines = Deadlines(config, cost, spp, memory.max_request_tokens)
        self._prefills = PrefillQueue(self.policy.priority, config.is_preemptive, self._deadlines.num_step_tokens)
        self._prefixes: CachedPrefixes | None = None  # None: there is no prefix cache
        if memory.cache is not None:
            self._prefixes = CachedPrefixes(memory.cache, memory, self._deadlines, self.policy.priority)
            self._prefills.leads = self._prefixes.siblings.leads
        siblings = None if self._prefixes is None else self._prefixes.siblings
        self._packer = PrefillPacker(config, cost, memory, limits, siblings)
        self._committer = BatchCommitter(memory, self._deadlines, self._overdue, self._prefills, self._prefixes)
        self._overtaking = Overtaking(config, cost, memory, self.policy, spp, self._packer)

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
        return self._deadlines.prefill_s(num_tokens)

    def awaited(self, seq: Sequence) -> Sequence | None:
        """The prefill that a waiting sequence waits for, because it computes a prefix that they share."""
        return None if self._prefixes is None else self._prefixes.siblings.awaited(seq)

    def num_cached_tokens(self, request: Request) -> int:
        """Prompt tokens of a request that are in the prefix cache; a look, from any thread."""
        cache = self.memory.cache
        if cache is None or not (request.prefix_keys and request.reads_cache):
            return 0
        match = cache.longest(Sequence(request=request, keys=request.prefix_keys))
        return 0 if match is None else match.end * cache.granule_tokens

    def predicted_work_s(self, num_tokens: int, num_cached_tokens: int) -> float:
        """Predicted time of a prefill, alone, that begins behind cached tokens."""
        return self._deadlines.work_s(num_tokens, num_cached_tokens)

    def ttft_target_s(self, request: Request, total_work_s: float) -> float:
        """Seconds from arrival in which the first token is due: the request's own, its class's, or ours."""
        return self._deadlines.ttft_target_s(request, total_work_s)

    def is_deprioritized(self, seq: Sequence, now_s: float) -> bool:
        """Whether triage lets others go before this prefill: it takes more than a step, and its deadline is lost."""
        return seq.triage_s < now_s and seq.num_unscheduled_tokens > self._deadlines.num_step_tokens

    # ---- events ----

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """Take note of what happened; return what clients must hear of it."""
        outputs: list[Output] = []
        if self._prefixes is not None:
            self._prefixes.set_time(now_s)
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
            case Woken():
                pass
        if self._growing:
            self._grow(now_s, outputs)
        self._now_s = now_s
        if not self._decodes:
            self._decodes_since_s = inf
        elif self._decodes_since_s == inf:
            self._decodes_since_s = now_s
        if self._prefixes is not None and not (self._in_flight and isinstance(event, Arrived)):
            self._place_moved(self._prefixes, now_s)  # an arrival moves nobody, and the next batch is not made yet
        return outputs

    def _arrive(self, request: Request, now_s: float, outputs: list[Output]) -> None:
        is_in_use = request.request_id in self._sequences
        if (refused := rejection(request, is_in_use, self.memory.max_request_tokens)) is not None:
            outputs.append(Rejected(request.request_id, refused.message, is_client_fault=True))
            return
        self._refresh_times()
        seq = Sequence(request=request)
        if self._prefixes is not None:
            seq.keys = request.prefix_keys
            self._prefixes.stand(seq)
        self._deadlines.begin(seq)
        self._sequences[request.request_id] = seq
        self._num_tpot_slos += request.tpot_slo_s is not None
        self._overdue.add(seq)
        self._enqueue(seq, now_s)

    def _leave_first_stage(self, flight: SubmittedBatch) -> None:
        flight.has_left_first_stage = True
        self._num_on_first_stage -= 1
        num_decodes = flight.num_decodes
        chunks, sequences = flight.batch.chunks, flight.sequences
        for index in range(num_decodes, len(chunks)):
            chunk = chunks[index]
            sequences[index].num_first_stage_tokens = chunk.start + chunk.num_tokens

    def _complete(self, event: Completed, now_s: float, outputs: list[Output]) -> None:
        flight = self._in_flight.pop(event.batch_id)
        if not flight.has_left_first_stage:
            self._leave_first_stage(flight)
        if flight.batch.overtakes is not None:
            self._num_overtaking = 0
        self.cost.observe(flight.load, event.duration_s)
        if flight.num_decodes:  # others may have filled the whole budget
            self._utilization.learn(flight.batch, event.duration_s)
        self._refresh_times()
        if event.filled_keys and self._prefixes is not None:
            self._prefixes.take_keys(event.filled_keys, self._sequences)
        failed = dict(event.failed)
        is_calm = not event.stopped and not failed
        # This loop runs once per decode and step; what it needs from elsewhere is fetched before.
        decoding, decodes, batch_id = Status.DECODING, self._decodes, event.batch_id
        new_tuple = tuple.__new__  # half the time of the class's own, and it is a NamedTuple for the same reason
        token_out = TokenOut
        for chunk, seq in zip(flight.batch.chunks, flight.sequences):  # noqa: B905
            end = seq.num_scheduled_tokens  # of a decode: it is in no other batch
            if is_calm and seq.status is decoding and end < seq.grow_tokens:
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
            if self._prefixes is not None:
                self._prefixes.failed(seq)
            self._end(seq, Status.ABORTED, now_s)
            outputs.append(Rejected(request_id, failed[request_id], is_client_fault=False))
            return
        if seq.keys and self._prefixes is not None and seq.is_prefill:
            self._prefixes.computed(seq, chunk.samples_token)
        if chunk.samples_token:
            seq.num_output_tokens += 1
            num_cached = 0
            if seq.num_output_tokens == 1:
                num_cached = min(seq.num_cached_tokens, seq.request.num_prompt_tokens)
            reason = FinishReason.STOP if request_id in event.stopped else None
            if reason is None and seq.num_output_tokens >= seq.request.max_output_tokens:
                reason = FinishReason.LENGTH
            outputs.append(tuple.__new__(TokenOut, (request_id, event.batch_id, reason, num_cached)))
            if reason is not None:
                self._end(seq, Status.FINISHED, now_s)
                return
            if seq.status is not Status.DECODING:
                seq.move_to(Status.DECODING)
            if end >= seq.capacity_tokens:
                self._growing.append(seq)
                return
            if end >= seq.grow_tokens:
                self.memory.grow_early(seq)
            self._decodes.append(seq)

    def _end(self, seq: Sequence, status: Status, now_s: float) -> None:
        self._prefills.discard(seq, now_s)
        if self._prefixes is not None:
            self._prefixes.publish_output(seq)
            self._prefixes.leave(seq)
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
        self.memory.release(seq, seq.status is Status.FINISHED and seq.request.ends_session)
        if self._prefixes is not None:
            self._prefixes.ended(seq)
        del self._sequences[seq.request_id]
        self._num_tpot_slos -= seq.request.tpot_slo_s is not None
        self._released.append(seq.request_id)

    def _restart_all(self, now_s: float) -> None:
        """The ranks came up empty: every sequence that owned KV computes its known tokens again."""
        self._in_flight.clear()
        self._num_on_first_stage = self._num_overtaking = 0
        self._growing.clear()
        self._decodes.clear()
        if self._prefixes is not None:
            self._prefixes.lose_all()
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
        if self._prefixes is None:
            seq.start_behind(0)
        else:
            self._prefixes.leave(seq)
            self._prefixes.stand(seq)
        seq.remaining_work_s = self._deadlines.work_s(seq.num_known_tokens, seq.num_cached_tokens)
        self._overdue.add(seq)
        self._enqueue(seq, now_s)

    def _grow(self, now_s: float, outputs: list[Output]) -> None:
        """Give each decode that filled its last block a new one; if none is free, preempt by most relative slack."""
        still_growing: list[Sequence] = []
        growing, self._growing = self._growing, still_growing
        for seq in growing:
            if seq.status is not Status.DECODING:
                continue  # it was preempted itself
            while not self.memory.grow(seq):
                overdue = self._longest_overdue(now_s)
                lost = victim(self.memory, seq, now_s, self.config.progress_share, overdue)
                if lost is None:
                    still_growing.append(seq)  # all other owners are in flight: try again at the next event
                    break
                outputs.append(self._preempt(lost, now_s))
                if lost is seq:
                    break
            else:
                self._decodes.append(seq)

    def _preempt(self, seq: Sequence, now_s: float) -> Preempted:
        """It gives its blocks back, and waits for the memory to begin again behind what is cached of it."""
        num_computed = seq.num_computed_tokens
        self._kv_ops.append(drop_op(seq.request_id))
        if self._prefixes is not None:
            self._prefixes.publish_output(seq)
        self._restart(seq, now_s)
        num_cached = min(seq.num_cached_tokens, num_computed)
        return Preempted(seq.request_id, num_computed - num_cached, num_cached)

    # ---- batches ----

    def schedule(self, now_s: float) -> Batch | None:
        """Choose the next batch; None when nothing can run."""
        has_room = not self._num_on_first_stage and len(self._in_flight) - self._num_overtaking < self.spp
        overtaken = self._overtaking.overtaken(self._in_flight.values(), now_s)
        if not has_room and overtaken is None:
            return None
        if self._prefixes is not None:
            self._prefixes.set_time(now_s)
        budget_s, builder, decodes = self._budget_s(), self._builder, []
        if overtaken is not None:
            decodes = self._plan_overtaking(overtaken, budget_s, has_room, now_s)
        if has_room and (overtaken is None or builder.is_empty):
            is_behind = overtaken is not None or self._num_overtaking > 0
            decodes, overtaken = self._plan_step(budget_s, is_behind, now_s), None
        if builder.is_empty:
            return None
        load = builder.slowest_load
        if self._prefixes is not None and self.memory.kvp > 1:
            self._note_work(builder.loads)
        if decodes:
            self._decodes = []
            self._decodes_since_s = inf
        batch_id, num_decodes = self._next_batch_id, len(decodes)
        chunks = self._committer.commit(decodes, builder.prefills, self._kv_ops, now_s)
        released, predicted_s = tuple(self._released), step_s(self.cost, load)
        overtakes = None if overtaken is None else min(self._in_flight)
        may_be_held = overtaken is None and self._overtaking.may_be_held(num_decodes, predicted_s)
        if overtaken is not None:
            self._num_overtaking = 1
            for flight in self._in_flight.values():
                flight.held_s += self._overtaking.holds_s(predicted_s)
        ops, budget_s = tuple(self._kv_ops), max(budget_s, builder.budget_s)  # a large chunk has a budget of its own
        fields = (batch_id, chunks, released, now_s, budget_s, predicted_s, ops, overtakes, may_be_held)
        batch = tuple.__new__(Batch, fields)
        self._next_batch_id += 1
        self._released.clear()
        self._kv_ops.clear()
        sequences = decodes + [planned.seq for planned in builder.prefills]
        self._in_flight[batch_id] = SubmittedBatch(batch, sequences, num_decodes, load)
        self._num_on_first_stage += 1
        if self._prefixes is not None:
            self._prefixes.note_evicted()  # the next event, which is sure to come, gives them their new places
        return batch

    def _plan_step(self, budget_s: float, is_behind: bool, now_s: float) -> list[Sequence]:
        """Plan a batch that follows those in flight on every stage; its decodes come back.

        is_behind: one of those takes so long that decodes do not follow it; they overtake it, and this one too.
        """
        builder, has_decodes = self._builder, self._has_decodes()
        decodes = [] if is_behind else self._decodes
        builder.begin(self._utilization.share * budget_s if has_decodes else budget_s, has_decodes)
        builder.add_decodes(decodes)
        if not self._prefills:
            return decodes
        candidates, overdue = self._prefills.candidates(now_s), self._longest_overdue(now_s)
        if self._num_overtaking:
            candidates.exclude_small()  # they would wait for what another overtakes, and may be the next to do so
        self._packer.pack(builder, candidates, overdue, now_s)
        if not self._overtaking.is_on:
            return decodes
        in_flight = self._in_flight.values()
        elsewhere = [seq for flight in in_flight for seq in flight.sequences[: flight.num_decodes] if not seq.is_done]
        waited_s = now_s - self._decodes_since_s
        return self._overtaking.enlarge(builder, decodes, elsewhere, waited_s, overdue, now_s)

    def _plan_overtaking(
        self, overtaken: SubmittedBatch, budget_s: float, has_room: bool, now_s: float
    ) -> list[Sequence]:
        """Plan a batch that overtakes those in flight; its decodes come back."""
        is_idle = has_room and not self._prefills
        are_due = bool(self._decodes) and (is_idle or now_s >= self._decodes_due_s(budget_s))
        self._builder.begin(budget_s, are_due)
        return self._overtaking.pack(
            self._builder, overtaken, self._in_flight.values(), self._prefills.candidates(now_s),
            self._decodes if are_due else [], self._longest_overdue(now_s), now_s,
        )  # fmt: skip

    def wakes_at_s(self) -> float:
        """When the scheduler wants to hear of the time (Woken), because decodes then overtake; infinity: never."""
        if not self._decodes or self._overtaking.overtaken(self._in_flight.values(), self._now_s) is None:
            return inf
        due_s = self._decodes_due_s(self._budget_s())
        return due_s if due_s > self._now_s else inf

    def _decodes_due_s(self, budget_s: float) -> float:
        return self._overtaking.decodes_due_s(self._builder, self._decodes, self._decodes_since_s, budget_s)

    def _note_work(self, loads: list[StepLoad]) -> None:
        for rank, load in enumerate(loads):
            if load.num_sequences:
                self.memory.work_s[rank] += step_s(self.cost, load)

    def _has_decodes(self) -> bool:
        """Whether anybody's next token waits for the next step: with it, for memory, or behind it in the pipeline."""
        return bool(self._decodes or self._growing) or any(
            chunk.samples_token for flight in self._in_flight.values() for chunk in flight.batch.chunks
        )

    def _budget_s(self) -> float:
        budget_s = self._deadlines.feasible_s(self.config.step_budget_s)
        if not self._num_tpot_slos:
            return budget_s
        tpot_slos_s = [seq.request.tpot_slo_s for seq in self._decodes if seq.request.tpot_slo_s is not None]
        wanted_s = self._deadlines.feasible_s(min([budget_s, *tpot_slos_s]))
        # Where nobody prefills, a short step costs nobody anything.
        return max(wanted_s, min_efficient_step_s(budget_s, self.cost.linear_s(1, 1))) if self._prefills else wanted_s

    # ---- the prefix cache ----

    def _enqueue(self, seq: Sequence, now_s: float) -> None:
        """A waiting sequence may be chosen, unless it waits for what another computes."""
        other = None if self._prefixes is None else self._prefixes.siblings.wait(seq, now_s)
        if other is None:
            self._prefills.add(seq, now_s)
            return
        self._prefills.discard(seq, now_s)
        if other.num_unscheduled_tokens:
            self._prefills.add(other, now_s)  # which may be more urgent now

    def _place_moved(self, prefixes: CachedPrefixes, now_s: float) -> None:
        """Give those a new place in the queue of which another part is cached than before."""
        for seq in prefixes.moved(are_all=not self._in_flight):
            if self._deadlines.rematch(seq):
                self._overdue.add(seq)
            self._enqueue(seq, now_s)

    # ---- deadlines ----

    def _longest_overdue(self, now_s: float) -> Sequence | None:
        """The prefill that a share of every step is kept for."""
        if not self.config.progress_share:
            return None
        seq = self._overdue.longest(now_s)
        if seq is None or self._prefixes is None or (other := self._prefixes.siblings.awaited(seq)) is None:
            return seq
        return other if other.num_unscheduled_tokens else None  # what that computes, is computed for it

    def _refresh_times(self) -> None:
        if self._deadlines.refresh():
            self._prefills.num_step_tokens = self._deadlines.num_step_tokens
