"""Elastic sequence parallelism after LoongServe: whole prompts, each on as many instances as its batch is given.

The rules are those of LoongServe (arXiv:2404.09526) and its public code; which prompts start is in
`dispatch.py`, on which instances in `partition.py`. A prefill is never preempted. While one runs, nothing is begun
on its instances; when it ends, its KV has been left on as few of them as hold it (proactive scale-down during the
ring costs nothing), and the others are free. Decodes run in groups, each on instances of its own; a group with more
sequences than are memory-bound spreads over idle instances. A prefill may pause decodes whose instances it needs.

Assumed, in the baseline's favour: predictions are exact; pausing, merging and scaling groups costs nothing but the
migration of KV; activations always fit; paused decodes resume as soon as the prefill on their own instances ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from megatron_medha.core.batch import Batch, Output
from megatron_medha.core.request import Request
from megatron_medha.sim.baselines.dispatch import InstanceUsage, PromptDispatcher, delay_weight
from megatron_medha.sim.baselines.instance_system import (
    COMPUTE_BOUND_SEQUENCES,
    DECODE_ROUNDS,
    InstanceSequence,
    InstanceSystem,
)
from megatron_medha.sim.baselines.partition import partition
from megatron_medha.sim.baselines.ring_cost import RingCost


class Filling(Enum):
    """What may start while a prefill runs."""

    NONE = "none"    # nothing: the convoy of which Medha's paper speaks
    IDLE = "idle"    # prompts that end before it does, on instances that do nothing: LoongServe's code
    EAGER = "eager"  # also on instances that decode, where the prompts gain more than the decodes lose: not published


@dataclass(slots=True, eq=False)
class _DecodeGroup:
    """Sequences that decode together."""

    instances: list[int]
    members: list[InstanceSequence]
    num_rounds: int = 0     # since prompts were last admitted
    delay_s: float = 0.0    # KV that must be moved before the next round

    @property
    def loss_per_s(self) -> float:
        """What a second's pause costs it, in LoongServe's terms: seconds per output token, over its members."""
        return len(self.members) ** 2 / sum(live.num_output_tokens for live in self.members)


@dataclass(slots=True, eq=False)
class _RunningBatch:
    """A batch in flight."""

    instances: tuple[int, ...]
    ends_s: float
    group: _DecodeGroup | None       # decodes
    prompts: list[InstanceSequence]  # or prefills


class ElasticSystem(InstanceSystem):
    """The scheduler of one pool of instances."""

    def __init__(
        self, instances: tuple[int, ...], tokens_per_instance: int, cost: RingCost, ids: Iterator[int],
        filling: Filling = Filling.IDLE,
    ) -> None:  # fmt: skip
        super().__init__(instances, tokens_per_instance, cost, ids)
        self._filling = filling
        self._used = dict.fromkeys(instances, 0)  # tokens of KV
        self._groups: list[_DecodeGroup] = []
        self._running: dict[int, _RunningBatch] = {}
        self._ready: list[_RunningBatch] = []
        self._dispatcher = PromptDispatcher(cost, len(instances), tokens_per_instance)
        self._is_holding = False  # decodes wait for each other, so that prompts can be admitted

    def knows(self, batch_id: int) -> bool:
        """Whether this pool has that batch in flight."""
        return batch_id in self._running

    def schedule(self, now_s: float) -> Batch | None:
        """See SchedulerProtocol."""
        if not self._ready and self._waiting:
            self._admit(now_s)
        if self._ready:
            running = self._ready.pop()
            return self._submit(running, running.prompts, now_s)
        if self._is_holding:
            return None
        busy = self._busy()
        for group in self._groups:
            if busy.isdisjoint(group.instances) and (batch := self._decode_batch(group, now_s)) is not None:
                return batch
        return None

    # ---- batches that have run ----

    def _complete(self, batch_id: int) -> list[Output]:
        running = self._running.pop(batch_id)
        if (group := running.group) is not None:
            group.num_rounds += 1
            members, group.members = group.members, []
            outputs = self._give_tokens(members, batch_id, group.members)
            self._settle(group)
            return outputs
        instances = sorted({instance for live in running.prompts for instance in live.kv_tokens})
        group = _DecodeGroup(instances, [])
        outputs = self._give_tokens(running.prompts, batch_id, group.members)
        overlapping = [other for other in self._groups if not set(instances).isdisjoint(other.instances)]
        if group.members or overlapping:
            self._merge(group, overlapping)
        return outputs

    def _forget(self, live: InstanceSequence) -> None:
        super()._forget(live)
        self._take_back(live)
        self._dispatcher.learn(live.num_output_tokens)

    def _merge(self, merged: _DecodeGroup, others: list[_DecodeGroup]) -> None:
        for other in others:
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
        if prefills := [running for running in self._running.values() if running.group is None]:
            if self._filling is not Filling.NONE:
                self._fill(max(running.ends_s for running in prefills) - now_s, now_s)
            return
        if self._groups and max(group.num_rounds for group in self._groups) < DECODE_ROUNDS:
            return
        if self._running:
            self._is_holding = True
            return
        chosen = self._dispatcher.choose(self._waiting, self._usage())
        if not chosen:
            return
        for group in self._groups:
            group.num_rounds = 0
        self._pack_decodes(chosen)
        self._start(chosen, self._free_instances() + self._instances_to_pause(chosen), now_s)

    def _fill(self, left_s: float, now_s: float) -> None:
        """Begin prompts beside the prefills that run, if they end before those."""
        groups: list[_DecodeGroup | None] = [None]  # on free instances if there are any, else on those of one group
        if not (free := self._free_instances()):
            busy = self._busy() if self._filling is Filling.EAGER else set(self._instances)
            groups = [group for group in self._groups if busy.isdisjoint(group.instances)]
        for group in groups:
            instances = free if group is None else list(group.instances)
            chosen = self._dispatcher.choose_within(self._waiting, self._usage(), len(instances), left_s)
            if not chosen:
                return
            is_worth_it = group is None or (
                left_s * delay_weight(chosen) >= self._cost.prompts_s(len(instances), chosen) * group.loss_per_s
            )
            if is_worth_it and self._start(chosen, instances, now_s):
                return
            self._waiting.extendleft(reversed(chosen))

    def _start(self, chosen: list[Request], instances: list[int], now_s: float) -> bool:
        """Cut prompts and instances into batches, and hand the KV out; False, and nothing done, if it cannot fit."""
        chosen = sorted(chosen, key=lambda request: -request.num_prompt_tokens)
        instances = sorted(instances, key=lambda instance: (self._used[instance], instance))
        room = [self._num_open([instance]) for instance in instances]
        shares = partition(self._cost, [request.num_prompt_tokens for request in chosen], room)
        for share in shares:
            mine = instances[share.first_instance : share.first_instance + share.num_instances]
            requests = chosen[share.first_prompt : share.first_prompt + share.num_prompts]
            prompts = [InstanceSequence(request) for request in requests]
            # KV is left on as few instances as hold it, the fullest first.
            fullest_first = sorted(mine, key=lambda instance: -self._used[instance])
            for live in prompts:
                self._place(live, live.request.num_prompt_tokens, fullest_first)
            self._ready.append(_RunningBatch(tuple(mine), now_s + share.prefill_s, None, prompts))
        return bool(shares)

    def _usage(self) -> InstanceUsage:
        members = [live for group in self._groups for live in group.members]
        return InstanceUsage(
            num_used_tokens=sum(self._used.values()),
            num_sequences=len(members) + sum(len(running.prompts) for running in self._running.values()),
            output_counts=[live.num_output_tokens for live in members],
            num_promised_tokens=sum(live.request.max_output_tokens - live.num_output_tokens for live in members),
        )

    # ---- KV and instances ----

    def _place(self, live: InstanceSequence, num_tokens: int, instances: list[int]) -> None:
        """Put KV of a sequence on these instances, as much as they take, in their order."""
        for instance in instances:
            if count := min(num_tokens, self._num_open([instance])):
                live.kv_tokens[instance] = count
                self._used[instance] += count
                num_tokens -= count
        assert not num_tokens, f"{num_tokens} tokens of {live.request.request_id} have no place"

    def _take_back(self, live: InstanceSequence) -> int:
        """Free the KV of a sequence; how many tokens it was."""
        for instance, num_tokens in live.kv_tokens.items():
            self._used[instance] -= num_tokens
        num_tokens = sum(live.kv_tokens.values())
        live.kv_tokens.clear()
        return num_tokens

    def _num_open(self, instances: Iterable[int]) -> int:
        return sum(self._tokens_per_instance - self._used[instance] for instance in instances)

    def _busy(self) -> set[int]:
        return {instance for running in self._running.values() for instance in running.instances}

    def _free_instances(self) -> list[int]:
        taken = self._busy().union(*(group.instances for group in self._groups))
        return [instance for instance in self._instances if instance not in taken]

    def _gain(self, chosen: list[Request], num_free: int, num_more: int) -> float:
        """What prompts gain by more instances than are free."""
        saved_s = self._cost.prompts_s(num_free, chosen) - self._cost.prompts_s(num_free + num_more, chosen)
        return saved_s * delay_weight(chosen)

    def _instances_to_pause(self, chosen: list[Request]) -> list[int]:
        """Of the decoding groups, those whose instances the prefills need, or gain more from than the decodes lose."""
        taken: list[int] = []
        num_free = len(self._free_instances())
        num_missing = sum(request.num_prompt_tokens for request in chosen) - num_free * self._tokens_per_instance
        for group in sorted(self._groups, key=lambda group: self._num_open(group.instances), reverse=True):
            count = len(group.instances)
            loss = self._cost.prompts_s(num_free + count, chosen) * group.loss_per_s
            if num_missing > 0 or self._gain(chosen, num_free, count) >= loss:
                num_missing -= self._num_open(group.instances)
                num_free += count
                taken += group.instances
        return taken

    def _pack_decodes(self, chosen: list[Request]) -> None:
        """Move the KV of small groups into others while the prefills gain more than the moved decodes lose."""
        while len(self._groups) > 1:
            small, host = sorted(self._groups, key=lambda group: sum(self._used[i] for i in group.instances))[:2]
            num_moved = sum(self._used[instance] for instance in small.instances)
            num_growing = len(small.members) + len(host.members)
            delay_s = self._cost.migration_s(num_moved)
            gain = self._gain(chosen, len(self._free_instances()), len(small.instances))
            if num_moved + num_growing > self._num_open(host.instances) or gain < delay_s * small.loss_per_s:
                return
            for live in small.members:
                self._place(live, self._take_back(live), host.instances)
            host.delay_s += delay_s + small.delay_s
            host.members += small.members
            self._groups.remove(small)

    # ---- decodes ----

    def _decode_batch(self, group: _DecodeGroup, now_s: float) -> Batch | None:
        """The next token of all members; None while there is no room for them and none to be had."""
        count = len(group.members)
        masters = [instance for instance in group.instances if self._num_open([instance]) >= count]
        while count > COMPUTE_BOUND_SEQUENCES * len(masters) or not masters:
            if not (free := self._free_instances()):
                break
            group.instances.append(free[0])
            masters.append(free[0])
        if not masters:
            return None
        # Only those that are needed work for others; the rest hold KV.
        masters = masters[: max(1, -(-count // COMPUTE_BOUND_SEQUENCES))]
        longest_context = max(self._used[instance] for instance in group.instances)
        decode_s = self._cost.decode_s(len(group.instances), len(masters), count, longest_context)
        for index, live in enumerate(group.members):
            master = masters[index % len(masters)]
            live.kv_tokens[master] = live.kv_tokens.get(master, 0) + 1
            self._used[master] += 1
        running = _RunningBatch(tuple(group.instances), now_s + decode_s + group.delay_s, group, [])
        group.delay_s = 0.0
        return self._submit(running, group.members, now_s)

    def _submit(self, running: _RunningBatch, sequences: list[InstanceSequence], now_s: float) -> Batch:
        batch = self._batch(sequences, running.instances, now_s, running.ends_s - now_s)
        self._running[batch.batch_id] = running
        return batch
