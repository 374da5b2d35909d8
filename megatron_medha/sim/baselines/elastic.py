"""Elastic sequence parallelism after LoongServe: whole prompts, each on as many instances as its batch is given.

The rules are those of LoongServe (arXiv:2404.09526) and its public code; which prompts start is in
`admission.py`, on which instances in `partition.py`. A prefill is never preempted. While one runs, nothing is begun
on its instances; when it ends, its KV has been left on as few of them as hold it (proactive scale-down during the
ring costs nothing), and the others are free. Decodes run in groups, each on instances of its own; a group with more
sequences than are memory-bound spreads over idle instances. A prefill may pause decodes whose instances it needs.

Assumed, in the baseline's favour: predictions are exact; pausing, merging and scaling groups costs nothing but the
migration of KV; activations always fit; paused decodes resume as soon as the prefill on their own instances ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from megatron_medha.core.batch import Arrived, Batch, Completed, Event, FinishReason, Output, TokenOut
from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.dispatch import AdmissionRules, InstanceUsage, PromptDispatcher
from megatron_medha.sim.baselines.instance_batch import InstanceSequence, instance_batch, too_long
from megatron_medha.sim.baselines.partition import partition
from megatron_medha.sim.baselines.ring_cost import RingCost


class Filling(Enum):
    """What may start while a prefill runs."""

    NONE = "none"    # nothing: the convoy of which Medha's paper speaks
    IDLE = "idle"    # prompts that end before it does, on instances that do nothing: LoongServe's code
    EAGER = "eager"  # also on instances that decode, where the prompts gain more than the decodes lose: not published


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticConfig:
    """Sizes and limits; the defaults are those of LoongServe's server."""

    instances: tuple[int, ...]
    tokens_per_instance: int           # of KV
    rules: AdmissionRules = AdmissionRules()
    filling: Filling = Filling.IDLE
    decode_rounds: int = 10            # between two admissions
    compute_bound_sequences: int = 100  # of a decode batch on one instance; more are spread over idle ones


@dataclass(slots=True, eq=False)
class _DecodeGroup:
    """Sequences that decode together."""

    instances: list[int]
    members: list[InstanceSequence]
    num_rounds: int = 0     # since prompts were last admitted
    delay_s: float = 0.0    # KV that must be moved before the next round


@dataclass(slots=True, eq=False)
class _RunningBatch:
    """A batch in flight."""

    instances: tuple[int, ...]
    ends_s: float
    group: _DecodeGroup | None        # decodes
    prompts: list[InstanceSequence]         # or prefills


class ElasticSystem:
    """Decisions of one pool of instances. Batch ids are taken from `ids`, so that several pools can share a world."""

    def __init__(self, config: ElasticConfig, cost: RingCost, ids: Iterable[int]) -> None:
        self._config = config
        self._cost = cost
        self._ids = iter(ids)
        self._used = dict.fromkeys(config.instances, 0)  # tokens of KV
        self._waiting: deque[Request] = deque()
        self._groups: list[_DecodeGroup] = []
        self._running: dict[int, _RunningBatch] = {}
        self._ready: list[_RunningBatch] = []
        self._admission = PromptDispatcher(config.rules, cost, len(config.instances), config.tokens_per_instance)
        self._is_holding = False  # decodes wait for each other, so that prompts can be admitted
        self._released: list[str] = []

    def knows(self, batch_id: int) -> bool:
        """Whether this pool has that batch in flight."""
        return batch_id in self._running

    def handle(self, event: Event, now_s: float) -> list[Output]:
        """See Decisions."""
        match event:
            case Arrived(request):
                return self._arrive(request)
            case Completed():
                running = self._running.pop(event.batch_id)
                if running.group is None:
                    return self._end_prefill(running, event.batch_id)
                return self._end_round(running.group, event.batch_id)
            case _:
                raise AssertionError(f"{event}: in this simulation nobody goes away and no rank is lost")

    def schedule(self, now_s: float) -> Batch | None:
        """See Decisions."""
        if not self._ready and self._waiting:
            self._admit(now_s)
        if self._ready:
            running = self._ready.pop()
            return self._batch(running, running.prompts, now_s)
        if self._is_holding:
            return None
        busy = self._busy()
        for group in self._groups:
            if busy.isdisjoint(group.instances):
                batch = self._decode_batch(group, busy, now_s)
                if batch is not None:
                    return batch
        return None

    # ---- events ----

    def _arrive(self, request: Request) -> list[Output]:
        if refusal := too_long(request, len(self._used) * self._config.tokens_per_instance):
            return [refusal]
        self._waiting.append(request)
        return []

    def _end_prefill(self, running: _RunningBatch, batch_id: int) -> list[Output]:
        instances = sorted({instance for live in running.prompts for instance in live.kv_tokens})
        group = _DecodeGroup(instances, [])
        outputs = self._give_tokens(group, running.prompts, batch_id)
        overlapping = [other for other in self._groups if not set(instances).isdisjoint(other.instances)]
        if group.members or overlapping:
            self._merge([group, *overlapping])
        return outputs

    def _end_round(self, group: _DecodeGroup, batch_id: int) -> list[Output]:
        group.num_rounds += 1
        members, group.members = group.members, []
        outputs = self._give_tokens(group, members, batch_id)
        self._settle(group)
        return outputs

    def _give_tokens(self, group: _DecodeGroup, members: list[InstanceSequence], batch_id: int) -> list[Output]:
        outputs: list[Output] = []
        for live in members:
            request = live.request
            live.num_output_tokens += 1
            if live.num_output_tokens >= request.max_output_tokens:
                outputs.append(TokenOut(request.request_id, batch_id, FinishReason.LENGTH))
                for instance, num_tokens in live.kv_tokens.items():
                    self._used[instance] -= num_tokens
                self._admission.learn(live.num_output_tokens)
                self._released.append(request.request_id)
            else:
                outputs.append(TokenOut(request.request_id, batch_id, None))
                group.members.append(live)
        return outputs

    def _merge(self, groups: list[_DecodeGroup]) -> None:
        merged = groups[0]
        for other in groups[1:]:
            self._groups.remove(other)
            merged.members += other.members
            merged.instances = sorted({*merged.instances, *other.instances})
            merged.num_rounds = max(merged.num_rounds, other.num_rounds)
            merged.delay_s += other.delay_s
        self._groups.append(merged)
        self._settle(merged)

    def _settle(self, group: _DecodeGroup) -> None:
        """Give back the instances on which the group has no KV, and the group itself when it is empty."""
        group.instances = [instance for instance in group.instances if self._used[instance]]
        if not group.members:
            self._groups.remove(group)

    # ---- prompts ----

    def _admit(self, now_s: float) -> None:
        self._is_holding = False
        prefills = [running for running in self._running.values() if running.group is None]
        if prefills:
            if self._config.filling is Filling.NONE:
                return
            self._fill(max(running.ends_s for running in prefills) - now_s, now_s)
            return
        if self._groups and max(group.num_rounds for group in self._groups) < self._config.decode_rounds:
            return
        if self._running:
            self._is_holding = True
            return
        chosen = self._admission.choose(self._waiting, self._census())
        if not chosen:
            return
        for group in self._groups:
            group.num_rounds = 0
        self._pack_decodes(chosen)
        available = self._free_instances() + self._instances_to_pause(chosen)
        self._start(chosen, available, now_s)

    def _fill(self, left_s: float, now_s: float) -> None:
        """Begin prompts beside the prefills that run, if they end before those."""
        free = self._free_instances()
        if free:
            chosen = self._admission.choose_within(self._waiting, self._census(), len(free), left_s)
            if chosen and not self._start(chosen, free, now_s):
                self._waiting.extendleft(reversed(chosen))
            return
        if self._config.filling is not Filling.EAGER:
            return
        busy = self._busy()
        for group in self._groups:
            if not busy.isdisjoint(group.instances):
                continue
            count = len(group.instances)
            chosen = self._admission.choose_within(self._waiting, self._census(), count, left_s)
            if not chosen:
                return
            gain = left_s * sum(1.0 / request.num_prompt_tokens for request in chosen)
            if gain < self._cost.prompts_s(count, chosen) * self._loss_per_s(group) or not self._start(
                chosen, list(group.instances), now_s
            ):
                self._waiting.extendleft(reversed(chosen))
            else:
                return

    def _start(self, chosen: list[Request], instances: list[int], now_s: float) -> bool:
        """Cut prompts and instances into batches, and hand the KV out; False, and nothing done, if it cannot fit."""
        chosen = sorted(chosen, key=lambda request: -request.num_prompt_tokens)
        instances = sorted(instances, key=lambda instance: (self._used[instance], instance))
        room = [self._config.tokens_per_instance - self._used[instance] for instance in instances]
        shares = partition(self._cost, [request.num_prompt_tokens for request in chosen], room)
        for share in shares:
            mine = instances[share.first_instance : share.first_instance + share.num_instances]
            prompts = [
                InstanceSequence(request)
                for request in chosen[share.first_prompt : share.first_prompt + share.num_prompts]
            ]
            self._place(prompts, mine)
            self._ready.append(_RunningBatch(tuple(mine), now_s + share.prefill_s, None, prompts))
        return bool(shares)

    def _place(self, prompts: list[InstanceSequence], instances: list[int]) -> None:
        """Leave the KV on as few instances as hold it, the fullest first."""
        order = sorted(instances, key=lambda instance: -self._used[instance])
        for live in prompts:
            left = live.request.num_prompt_tokens
            for instance in order:
                count = min(left, self._config.tokens_per_instance - self._used[instance])
                if count:
                    live.kv_tokens[instance] = count
                    self._used[instance] += count
                    left -= count
            assert not left, f"{left} tokens of {live.request.request_id} have no place"

    def _census(self) -> InstanceUsage:
        return InstanceUsage(
            num_used_tokens=sum(self._used.values()),
            num_sequences=sum(len(group.members) for group in self._groups)
            + sum(len(running.prompts) for running in self._running.values()),
            output_counts=[live.num_output_tokens for group in self._groups for live in group.members],
            num_promised_tokens=sum(
                live.request.max_output_tokens - live.num_output_tokens
                for group in self._groups
                for live in group.members
            ),
        )

    # ---- instances ----

    def _busy(self) -> set[int]:
        return {instance for running in self._running.values() for instance in running.instances}

    def _free_instances(self) -> list[int]:
        taken = self._busy().union(*(group.instances for group in self._groups))
        return [instance for instance in self._config.instances if instance not in taken]

    def _loss_per_s(self, group: _DecodeGroup) -> float:
        """What a second's pause costs a group, in LoongServe's terms: seconds per output token, over its members."""
        num_outputs = sum(live.num_output_tokens for live in group.members)
        return len(group.members) ** 2 / num_outputs

    def _instances_to_pause(self, chosen: list[Request]) -> list[int]:
        """Of the decoding groups, those whose instances the prefills need, or gain more from than the decodes lose."""
        capacity = self._config.tokens_per_instance
        taken: list[int] = []
        num_free = len(self._free_instances())
        num_missing = sum(request.num_prompt_tokens for request in chosen) - num_free * capacity
        weight = sum(1.0 / request.num_prompt_tokens for request in chosen)

        def num_open(group: _DecodeGroup) -> int:
            return sum(capacity - self._used[instance] for instance in group.instances)

        for group in sorted(self._groups, key=num_open, reverse=True):
            now = self._cost.prompts_s(num_free, chosen) if num_free else float("inf")
            then = self._cost.prompts_s(num_free + len(group.instances), chosen)
            if num_missing > 0 or (now - then) * weight >= then * self._loss_per_s(group):
                num_missing -= num_open(group)
                num_free += len(group.instances)
                taken += group.instances
        return taken

    def _pack_decodes(self, chosen: list[Request]) -> None:
        """Move the KV of small groups into others while the prefills gain more than the moved decodes lose."""
        weight = sum(1.0 / request.num_prompt_tokens for request in chosen)
        while len(self._groups) > 1:
            small, host = sorted(self._groups, key=lambda group: sum(self._used[i] for i in group.instances))[:2]
            num_moved = sum(self._used[instance] for instance in small.instances)
            num_open = sum(self._config.tokens_per_instance - self._used[i] for i in host.instances)
            num_growing = len(small.members) + len(host.members)
            num_free = len(self._free_instances())
            now = self._cost.prompts_s(num_free, chosen) if num_free else float("inf")
            then = self._cost.prompts_s(num_free + len(small.instances), chosen)
            delay_s = self._cost.migration_s(num_moved)
            if num_moved + num_growing > num_open or (now - then) * weight < delay_s * self._loss_per_s(small):
                return
            for live in small.members:
                count = sum(live.kv_tokens.values())
                for instance, num_tokens in live.kv_tokens.items():
                    self._used[instance] -= num_tokens
                live.kv_tokens.clear()
                for instance in host.instances:
                    part = min(count, self._config.tokens_per_instance - self._used[instance])
                    if part:
                        live.kv_tokens[instance] = part
                        self._used[instance] += part
                        count -= part
            host.delay_s += delay_s + small.delay_s
            host.members += small.members
            self._groups.remove(small)

    # ---- decodes ----

    def _decode_batch(self, group: _DecodeGroup, busy: set[int], now_s: float) -> Batch | None:
        """The next token of all members; None while there is no room for them and none to be had."""
        capacity, count = self._config.tokens_per_instance, len(group.members)
        masters = [instance for instance in group.instances if self._used[instance] + count <= capacity]
        while count > self._config.compute_bound_sequences * len(masters) or not masters:
            free = self._free_instances()
            if not free:
                break
            group.instances.append(free[0])
            masters.append(free[0])
        if not masters:
            return None
        # Only those that are needed work for others; the rest hold KV.
        masters = masters[: max(1, -(-count // self._config.compute_bound_sequences))]
        decode_s = self._cost.decode_s(
            len(group.instances), len(masters), count, max(self._used[instance] for instance in group.instances)
        )
        for index, live in enumerate(group.members):
            master = masters[index % len(masters)]
            live.kv_tokens[master] = live.kv_tokens.get(master, 0) + 1
        for index, master in enumerate(masters):
            self._used[master] += len(range(index, count, len(masters)))
        running = _RunningBatch(tuple(group.instances), now_s + decode_s + group.delay_s, group, [])
        group.delay_s = 0.0
        return self._batch(running, group.members, now_s)

    def _batch(self, running: _RunningBatch, sequences: list[InstanceSequence], now_s: float) -> Batch:
        batch_id = next(self._ids)
        self._running[batch_id] = running
        seconds = running.ends_s - now_s
        return instance_batch(batch_id, running.instances, sequences, self._released, now_s, seconds)
