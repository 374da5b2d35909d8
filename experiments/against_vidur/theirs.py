"""Runs of vidur inside vidur's own environment: our cost model plugged in, its own policies, events and stages.

    <environment>/bin/python -m experiments.against_vidur.theirs

run.py sends jobs and reads answers (exchange.py), pickled, through the standard streams. Each job runs in a process
forked for it: vidur counts in class attributes, and takes 8 s to import. Nothing here replaces a rule of theirs but
`mended.py`, and that only where the job says so.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

from vidur import config as vidur_config
from vidur.entities import Batch, KVParallelBatch, Request
from vidur.events.batch_stage_arrival_event import BatchStageArrivalEvent
from vidur.events.batch_stage_end_event import BatchStageEndEvent
from vidur.execution_time_predictor import ExecutionTimePredictorRegistry
from vidur.execution_time_predictor.base_execution_time_predictor import BaseExecutionTimePredictor
from vidur.request_generator import RequestGeneratorRegistry
from vidur.request_generator.base_request_generator import BaseRequestGenerator
from vidur.scheduler.replica_scheduler import mnemosyne_edf_replica_scheduler as edf
from vidur.simulator import Simulator
from vidur.types import ExecutionTimePredictorType, RequestGeneratorType

from experiments.against_vidur.exchange import Answer, Job
from experiments.against_vidur.mended import mend
from megatron_medha.core.cost import StepLoad

GRANULARITY = edf.PREFILL_TIME_PREDICTION_CACHE_GRANULARITY


def take_hops(job: Job) -> None:
    """Let a batch arrive at its next stage later by the hop: it delays this batch, but occupies no stage.

    Theirs knows no time between stages.
    """
    cost, handle_event = job.cost(), BatchStageEndEvent.handle_event

    def handle(self: Any, scheduler: Any, metrics_store: Any) -> list[Any]:
        events: list[Any] = handle_event(self, scheduler, metrics_store)
        (batch,) = self._batch.batch_mapping.values()
        for event in events:
            if isinstance(event, BatchStageArrivalEvent):
                event._time += cost.hop_s(sum(batch.num_q_tokens), self._stage_id)
        return events

    BatchStageEndEvent.handle_event = handle


def predictor_class(job: Job) -> type:
    """Our cost model behind their protocol: seconds that a batch occupies a stage."""
    cost = job.cost()
    last = job.layout.spp - 1

    class OurCost(BaseExecutionTimePredictor):  # type: ignore[misc]  # vidur has no types
        seconds = 0.0

        def get_execution_time(self, batch: Batch | KVParallelBatch, pipeline_stage: int) -> Any:
            began_s = time.perf_counter()
            is_planned = not isinstance(batch, KVParallelBatch)
            if not is_planned:
                (batch,) = batch.batch_mapping.values()
            load = StepLoad()
            num_decodes = decode_context = 0
            for num_tokens, context in zip(batch.num_q_tokens, batch.num_kv_tokens, strict=True):
                if num_tokens == 1 and context:
                    num_decodes += 1
                    decode_context += context  # theirs counts the token itself already
                else:
                    load.add_chunk(context, num_tokens, cost.attention_s(context, num_tokens))
            if num_decodes:
                load.add_decodes(num_decodes, decode_context, cost.decode_attention_s(decode_context))
            seconds = cost.stage_s(load, pipeline_stage)
            if is_planned and pipeline_stage < last:
                seconds += cost.hop_s(load.num_tokens, pipeline_stage)  # of batches that run: `take_hops`
            OurCost.seconds += time.perf_counter() - began_s
            return SimpleNamespace(total_time=seconds, model_time=seconds)

        def to_dict(self) -> dict[str, object]:
            return {}

    OurCost.__abstractmethods__ = frozenset()  # the parts of a layer, which nobody asks for
    return OurCost


class SharedPathPrefillTimes(edf.PrefillTimeCalculator):  # type: ignore[misc]
    """Their table of prefill times, to the last bit, without its quadratic cost.

    Theirs walks every multiple of 256 tokens from the start. Up to 1,024 tokens before their ends, where the size of
    a chunk begins to depend on what is left, all walks are the same one.
    """

    seconds = 0.0
    shipped_seconds = 0.0  # what theirs would take, by the number of chunks it would look at

    def _initialize_prefill_time_cache(self) -> dict[int, float]:
        began_s = time.process_time()
        num_shipped = 0
        starts, times_s = [0], [0.0]
        while starts[-1] < self.max_prefill_length:
            count, seconds = self._chunk(starts[-1], self.max_prefill_length - starts[-1])
            starts.append(starts[-1] + count)
            times_s.append(times_s[-1] + seconds)
        table = {0: 0.0}
        num_looked_at = len(starts)
        for length in range(GRANULARITY, self.max_prefill_length + 1, GRANULARITY):
            index = max(bisect_right(starts, length - 2 * edf.EXECUTION_TIME_PREDICTION_START_CHUNK_SIZE - 1) - 1, 0)
            done, total_s = starts[index], times_s[index]
            num_shipped += index
            while done < length:
                count, seconds = self._chunk(done, length - done)
                done, total_s = done + count, total_s + seconds
                num_looked_at += 1
                num_shipped += 1
            table[length] = total_s
        took_s = time.process_time() - began_s
        SharedPathPrefillTimes.seconds = took_s
        SharedPathPrefillTimes.shipped_seconds = took_s * num_shipped / num_looked_at
        return table

    def _chunk(self, done: int, remaining: int) -> tuple[int, float]:
        return self._get_optimal_chunk_size(remaining_tokens=remaining, num_kvp_groups=1, num_kv_tokens=done)


def generator_class(requests: Sequence[Request]) -> type:
    """A generator that hands out these."""

    class Given(BaseRequestGenerator):  # type: ignore[misc]
        def generate_requests(self) -> list[Request]:
            return list(requests)

    return Given


def scheduler_config(job: Job) -> Any:
    """Their configuration of the policy; what the job does not say stays at their defaults."""
    budget = {"batch_size_cap": job.max_num_sequences, "target_batch_time": job.step_budget_s}
    deadline = {"deadline_multiplier": job.deadline_multiplier, "min_deadline": job.min_deadline_s}
    match job.policy:
        case "fcfs_fixed_chunk":
            return vidur_config.MnemosyneFCFSFixedChunkSchedulerConfig(
                batch_size_cap=job.max_num_sequences, chunk_size=job.chunk_tokens
            )
        case "fcfs":
            return vidur_config.MnemosyneFCFSSchedulerConfig(**budget)
        case "edf":
            return vidur_config.MnemosyneEDFSchedulerConfig(**budget, **deadline)
        case "lrs":
            return vidur_config.MnemosyneLRSSchedulerConfig(**budget, **deadline)
        case "st":
            return vidur_config.MnemosyneSTSchedulerConfig(
                **budget, **deadline, long_request_kv_cache_len_threshold=job.long_tokens
            )
    raise AssertionError(job.policy)


def run(job: Job) -> Answer:
    """Simulate."""
    requests = [
        Request(arrived_at=arrival_s, num_prefill_tokens=num_prompt, num_decode_tokens=num_output)
        for arrival_s, num_prompt, num_output in job.requests
    ]
    predictor = predictor_class(job)
    ExecutionTimePredictorRegistry.unregister(ExecutionTimePredictorType.RANDOM_FORREST)
    ExecutionTimePredictorRegistry.register(ExecutionTimePredictorType.RANDOM_FORREST, predictor)
    RequestGeneratorRegistry.unregister(RequestGeneratorType.SYNTHETIC)
    RequestGeneratorRegistry.register(RequestGeneratorType.SYNTHETIC, generator_class(requests))
    edf.PrefillTimeCalculator = SharedPathPrefillTimes
    take_hops(job)
    mend(job)
    config = vidur_config.SimulationConfig(
        log_level="warning",
        cluster_config=vidur_config.ClusterConfig(
            replica_config=vidur_config.ReplicaConfig(  # the model and devices say nothing: the cost model is ours
                num_pipeline_stages=job.layout.spp,
                tensor_parallel_size=job.layout.tp,
                enable_sequence_pipeline_parallel=job.layout.spp > 1,
            ),
            cache_config=vidur_config.CacheConfig(block_size=job.block_size, num_blocks=job.num_blocks),
            replica_scheduler_config=scheduler_config(job),
        ),
        request_generator_config=vidur_config.SyntheticRequestGeneratorConfig(
            length_generator_config=vidur_config.FixedRequestLengthGeneratorConfig(max_tokens=job.max_tokens)
        ),
        execution_time_predictor_config=vidur_config.RandomForrestExecutionTimePredictorConfig(cache_dir=job.scratch),
        metrics_config=vidur_config.MetricsConfig(
            write_metrics=job.has_metrics,
            enable_chrome_trace=job.has_metrics,
            store_plots=False,
            output_dir=job.scratch,
        ),
    )
    began_s = time.process_time()
    simulator = Simulator(config)
    predictor.seconds = 0.0  # type: ignore[attr-defined]  # what the table took is told apart
    simulator.run()
    took_s = time.process_time() - began_s - SharedPathPrefillTimes.seconds
    return Answer(
        ttft_s=tuple(request.prefill_completed_at - request.arrived_at for request in requests),
        seconds=took_s,
        cost_seconds=predictor.seconds,  # type: ignore[attr-defined]
        shipped_table_seconds=SharedPathPrefillTimes.shipped_seconds,
        num_batches=KVParallelBatch._id + 1,
        num_restarts=sum(request.num_restarts for request in requests),
    )


def main() -> int:
    """Answer jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever vidur prints is no answer
    while True:
        try:
            job: Job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return 0
        with get_context("fork").Pool(1) as pool:
            pickle.dump(pool.apply(run, (job,)), answers)
        answers.flush()


if __name__ == "__main__":
    raise SystemExit(main())
