"""A simulated model inside vLLM: steps of a fixed time and no CPU, as our own simulated runtime has them.

Runs in vLLM's own environment and imports nothing of ours. vLLM's frontend, engine process, scheduler, detokeniser and
everything between stay as they are; only what would run the model is replaced:

    vllm serve DIR --distributed-executor-backend experiments.front_overhead.vllm_executor.SimulatedExecutor

SIMULATED_STEP names a file of eight bytes, the seconds of a step as a double, read at every step. SIMULATED_LOG names
the file that gets a line per step: when its work began, by the machine's monotonic clock, and the requests it gave a
token. SIMULATED_TOKEN is the token every request gets.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from concurrent.futures import Future
from typing import Any

import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

_KV_BYTES = 1 << 30


class SimulatedExecutor(Executor):
    """Executes nothing, and takes its time."""

    def _init_executor(self) -> None:
        with open(os.environ["SIMULATED_STEP"], "rb") as file:
            self._step_bytes = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
        self._log = open(os.environ["SIMULATED_LOG"], "w", buffering=1)  # noqa: SIM115  # for as long as it lives
        self._token_id = int(os.environ["SIMULATED_TOKEN"])
        self._num_left: dict[str, int] = {}  # prompt tokens not computed yet

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """What workers would answer, before there is any work."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=64, dtype=torch.float32
        )
        answers = {
            "get_kv_cache_spec": {"model.layers.0.self_attn.attn": spec},
            "get_supported_kv_cache_layouts": ["NHD"],
            "determine_available_memory": _KV_BYTES,
            "get_supported_tasks": ("generate",),
        }
        return [answers.get(method)] if isinstance(method, str) else [None]

    def compile_or_warm_up_model(self) -> None:
        """There is nothing to compile."""

    def check_health(self) -> None:
        """There is nothing that could be ill."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """A token for each request whose prompt is computed, once the step's time is over."""
        began_s = time.monotonic()
        counts = scheduler_output.num_scheduled_tokens
        for request_id in scheduler_output.finished_req_ids:
            self._num_left.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._num_left[new.req_id] = len(new.prompt_token_ids) - new.num_computed_tokens
        sampled = []
        for request_id, count in counts.items():
            self._num_left[request_id] -= count
            sampled.append([self._token_id] if self._num_left[request_id] <= 0 else [])
        ids = list(counts)
        output = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={name: place for place, name in enumerate(ids)}, sampled_token_ids=sampled
        )
        if ids:
            (step_s,) = struct.unpack("d", self._step_bytes[:8])
            given = " ".join(name for name, tokens in zip(ids, sampled, strict=True) if tokens)
            self._log.write(f"{began_s!r} {given}\n")
            time.sleep(max(0.0, began_s + step_s - time.monotonic()))
        if not non_block:
            return output
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(output)
        return future
