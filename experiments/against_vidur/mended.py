"""Rules of vidur's schedulers, one by one replaced by the rule as the paper (or the other simulator) has it.

A difference between the two simulators is traced to a rule if it is gone once the rule is replaced. Runs inside
vidur's environment; every class here is a subclass of ours, put in the place of theirs by its registry.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vidur.scheduler.replica_scheduler import mnemosyne_fcfs_replica_scheduler as fcfs
from vidur.scheduler.replica_scheduler import mnemosyne_st_replica_scheduler as st
from vidur.scheduler.replica_scheduler.replica_scheduler_registry import ReplicaSchedulerRegistry
from vidur.types import ReplicaSchedulerType

from experiments.against_vidur.exchange import RULES, Job
from megatron_medha.core.chunking import Chunking, ChunkRule, PrefillTimes

TILE = fcfs.EXECUTION_TIME_PREDICTION_CHUNK_SIZE_GRANULARITY


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
            low, high = 0, min(remaining, job.max_batch_tokens) // TILE + 1  # in tiles: low fits, high does not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle * TILE) else (low, middle)
            if not low and not any(count > 1 for count in self.batch_num_q_tokens[group]):
                return min(TILE, remaining)  # however full of decodes the step is, one tile goes in
            return low * TILE

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


def _stages(base: type, job: Job) -> type:
    class WholeSteps:
        """The predictor, but the first stage stands for the mean of all."""

        def __init__(self, predictor: Any) -> None:
            self._predictor = predictor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._predictor, name)

        def get_execution_time(self, batch: Any, pipeline_stage: int) -> Any:
            seconds = sum(
                self._predictor.get_execution_time(batch, stage).total_time for stage in range(job.layout.spp)
            )
            return SimpleNamespace(total_time=seconds / job.layout.spp)

    class Mended(base):  # type: ignore[misc, valid-type]
        # What runs asks the predictor that theirs was made with; this is for batches being formed and the table.
        @property
        def _execution_time_predictor(self) -> Any:
            return self._whole_steps

        @_execution_time_predictor.setter
        def _execution_time_predictor(self, predictor: Any) -> None:
            self._whole_steps = WholeSteps(predictor)

    return Mended


def _work(base: type, job: Job) -> type:
    rule = ChunkRule(
        chunking=Chunking.ADAPTIVE, tile_tokens=TILE, max_tokens=job.max_batch_tokens, fixed_tokens=job.chunk_tokens
    )
    times = PrefillTimes(rule, job.cost(), job.step_budget_s, job.max_tokens)

    class OurTable:
        def get_prefill_time(self, num_prefill_tokens: int, num_processed_tokens: int = 0) -> float:
            return times.remaining_s(num_processed_tokens, num_prefill_tokens) / job.layout.spp

    class Mended(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._prefill_time_calculator = OurTable()

    return Mended


def _rest(base: type, job: Job) -> type:
    class Mended(base):  # type: ignore[misc, valid-type]
        def _get_batch_formation_tracker(self) -> Any:
            tracker = super()._get_batch_formation_tracker()
            get_batch = tracker.get_batch

            def get_batch_without_rest() -> Any:
                if tracker.long_request is not None:
                    self._take_back(tracker, tracker.long_request)
                return get_batch()

            tracker.get_batch, tracker.long_request = get_batch_without_rest, None
            return tracker

        def _get_request_next_num_q_tokens(self, time: float, request: Any, tracker: Any) -> int:
            num_tokens = int(super()._get_request_next_num_q_tokens(time, request, tracker))
            done = self._get_num_processed_tokens(request)
            if done < job.long_tokens or tracker.long_request is not None:
                return num_tokens
            if not num_tokens:  # a tile, however much others have taken of it
                most = tracker.get_max_chunk_size_for_request(request, done, [0], job.step_budget_s)
                num_tokens = min(TILE, most)
            if num_tokens:
                tracker.long_request = request
            return num_tokens

        def _take_back(self, tracker: Any, request: Any) -> None:
            index = tracker.batch_requests[0].index(request)
            num_tokens = tracker.batch_num_q_tokens[0][index]
            for (of_group,) in (
                tracker.batch_requests, tracker.batch_request_num_processed_tokens, tracker.batch_num_q_tokens,
                tracker.batch_num_kv_tokens, tracker.batch_num_active_kvp_groups, tracker.batch_last_kvp_group_ids,
            ):  # fmt: skip
                del of_group[index]
            tracker.num_requests -= 1
            tracker.batch_total_num_q_tokens[0] -= num_tokens
            done = self._get_num_processed_tokens(request)
            most = tracker.get_max_chunk_size_for_request(request, done, [0], job.step_budget_s)
            tracker.add_request(request, max(num_tokens, most), done, [0])

    return Mended


def _debts(base: type, job: Job) -> type:
    class Mended(base):  # type: ignore[misc, valid-type]
        _owed_s = 0.0  # what others have taken beyond the gifts, while a long prefill was in every step

        def _get_next_batch(self, time: float) -> Any:
            self._is_sized, self._offered_s, self._taken_s = False, None, 0.0
            batch = super()._get_next_batch(time)
            if batch is not None:
                self._owed_s = 0.0 if self._offered_s is None else max(0.0, self._taken_s - self._offered_s)
            return batch

        def _get_request_next_num_q_tokens(self, time: float, request: Any, tracker: Any) -> int:
            done = self._get_num_processed_tokens(request)
            self._is_sized = True
            num_tokens = int(super()._get_request_next_num_q_tokens(time, request, tracker))
            self._is_sized = False
            if not num_tokens and done >= job.long_tokens and not tracker.long_request:
                self._offered_s = None  # it is not in this step
            if num_tokens and done < job.long_tokens:
                self._taken_s += tracker._compute_batch_execution_time(
                    0, [request], [num_tokens], [done], [1], [0]
                ) - tracker._compute_batch_execution_time(0)
            return num_tokens

        def _get_remaining_slack_fraction(self, time: float, request: Any) -> float:
            fraction = float(super()._get_remaining_slack_fraction(time, request))
            if not self._is_sized:
                return fraction
            self._offered_s = min(max(fraction, 0.0), st.MAX_SPACE_SHARE_FRAC) * job.step_budget_s - self._owed_s
            return max(0.0, self._offered_s) / job.step_budget_s

    return Mended


_MENDERS = {
    "deadline": _deadline, "queues": _queues, "slack": _slack, "answers": _answers, "chunks": _chunks,
    "stages": _stages, "work": _work, "rest": _rest, "debts": _debts,
}  # fmt: skip
