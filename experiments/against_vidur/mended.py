"""Rules of vidur's schedulers, one by one replaced by the rule as the paper (or the other simulator) has it.

A difference between the two simulators is traced to a rule if it is gone once the rule is replaced. Runs inside
vidur's environment; every class here is a subclass of ours, put in the place of theirs by its registry.
"""

from __future__ import annotations

from typing import Any

from vidur.scheduler.replica_scheduler import mnemosyne_fcfs_replica_scheduler as fcfs
from vidur.scheduler.replica_scheduler.replica_scheduler_registry import ReplicaSchedulerRegistry
from vidur.types import ReplicaSchedulerType

from experiments.against_vidur.exchange import RULES, Job


def mend(job: Job) -> None:
    """Put a scheduler with the job's mended rules in the place of theirs."""
    if not job.mended:
        return
    assert set(job.mended) <= set(RULES), job.mended
    key = ReplicaSchedulerType.from_str(f"mnemosyne_{job.policy}")
    base = ReplicaSchedulerRegistry.get_class(key)
    for rule in job.mended:
        base = _MENDERS[rule](base, job)
    ReplicaSchedulerRegistry.unregister(key)
    ReplicaSchedulerRegistry.register(key, base)


def _deadline(base: type, job: Job) -> type:
    class Mended(base):  # type: ignore[misc, valid-type]
        def add_request(self, request: Any) -> Any:
            if not hasattr(request, "deadline"):  # theirs leaves a deadline alone that is there
                request.prefill_time = self._prefill_time_calculator.get_prefill_time(request.num_prefill_tokens)
                request.deadline_time = max(job.deadline_multiplier * request.prefill_time, job.min_deadline_s)
                request.deadline = request.arrived_at + request.deadline_time
            return super().add_request(request)

    return Mended


def _queues(base: type, job: Job) -> type:
    class Mended(base):  # type: ignore[misc, valid-type]
        def _get_next_batch(self, time: float) -> Any:
            self._request_queue.extend(self._partial_prefill_queue)
            self._partial_prefill_queue.clear()
            return super()._get_next_batch(time)

    return Mended


def _slack(base: type, job: Job) -> type:
    class Mended(base):  # type: ignore[misc, valid-type]
        def _get_remaining_slack_fraction(self, time: float, request: Any) -> float:
            return float(super()._get_remaining_slack_fraction(time, request)) * (
                request.deadline_time / request.prefill_time
            )

    return Mended


def _answers(base: type, job: Job) -> type:
    class Mended(base):  # type: ignore[misc, valid-type]
        def _get_request_next_num_q_tokens(self, time: float, request: Any, tracker: Any) -> int:
            processed = tracker.batch_request_num_processed_tokens
            tracker.batch_request_num_processed_tokens = [
                [tokens for tokens, count in zip(of_group, counts, strict=True) if count > 1]
                for of_group, counts in zip(processed, tracker.batch_num_q_tokens, strict=True)
            ]
            num_tokens = int(super()._get_request_next_num_q_tokens(time, request, tracker))
            tracker.batch_request_num_processed_tokens = processed
            return num_tokens

    return Mended


def _chunks(base: type, job: Job) -> type:
    tile = fcfs.EXECUTION_TIME_PREDICTION_CHUNK_SIZE_GRANULARITY

    class Tracker(fcfs.BatchFormationTrackerWithRuntimePrediction):  # type: ignore[misc]
        def get_max_chunk_size_for_request(
            self, request: Any, num_processed_tokens: int, active_kvp_groups: list[int], target_batch_time: float
        ) -> int:
            remaining = request.num_prefill_tokens - num_processed_tokens
            (group,) = active_kvp_groups

            def fits(count: int) -> bool:
                seconds = self._compute_batch_execution_time(
                    group, [request], [count], [num_processed_tokens], [1], [group]
                )
                return bool(seconds <= target_batch_time)

            if remaining <= job.max_batch_tokens and fits(remaining):
                return remaining
            low, high = 0, min(remaining, job.max_batch_tokens) // tile + 1  # in tiles: low fits, high does not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle * tile) else (low, middle)
            if not low and not any(count > 1 for count in self.batch_num_q_tokens[group]):
                return min(tile, remaining)  # however full of decodes the step is, one tile goes in
            return low * tile

    class Mended(base):  # type: ignore[misc, valid-type]
        def _get_batch_formation_tracker(self) -> Any:
            return Tracker(
                self._replica_id,
                self._max_micro_batch_size,
                self._num_stages,
                self._kv_parallel_size,
                self._max_num_tokens_per_kvp_group,
                self._execution_time_predictor,
            )

    return Mended


_MENDERS = {"deadline": _deadline, "queues": _queues, "slack": _slack, "answers": _answers, "chunks": _chunks}
