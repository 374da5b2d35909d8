"""One rank's work: steps in, their part of the work done, StepDone out. Sockets and processes are elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.cluster.messages import PromptLogprobs, SampledToken, Step, StepDone
from megatron_medha.core.batch import Chunk
from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.core.stream_pipeline import Place, StagePlan, stage_plan
from megatron_medha.kernels.backends import AttentionBackend, LayerKV
from megatron_medha.kernels.staging import Staging
from megatron_medha.model.model_config import ModelConfig
from megatron_medha.model.rotary import Rotary
from megatron_medha.model.sampler import Sampler, SamplingRow, prompt_logprobs
from megatron_medha.parallel.groups import MedhaPGs
from megatron_medha.parallel.shared_slots import SharedSlots
from megatron_medha.parallel.stage_link import Arriving, StageLink
from megatron_medha.worker.batch_tensors import (
    KVShards,
    PromptRows,
    StepTensors,
    append_extents,
    host_step,
    step_tensors,
)
from megatron_medha.worker.cuda_graphs import StepGraphs
from megatron_medha.worker.token_store import StoredRequest, TokenStore

# Logits of a whole chunk may not fit in memory (8192 x 152K fp32 is 5 GB); prompt logprobs go through in slices.
_PROMPT_SLICE_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class _Announced:
    """A step this rank knows of and has not computed."""

    step: Step
    chunks: tuple[tuple[Chunk, StoredRequest], ...]  # that can be computed
    failed: tuple[tuple[str, str], ...]
    plan: StagePlan
    arriving: Arriving | None
    duration_s: float  # spent on it so far


class Rank:
    """Model, KV memory and live requests of one rank.

    Steps are announced and computed in the same order, on this rank and on all others of the replica. Announcing
    makes room for what the stage before will send, so it is done as early as the step is known: `before_layer` is
    called between the layers of a step being computed, for others that have come meanwhile.
    """

    before_layer: Callable[[], None] | None = None
    graphs: StepGraphs | None = None  # set once they are captured

    def __init__(
        self,
        *,
        rank: int,
        model: GPTModel,
        config: ModelConfig,
        backend: AttentionBackend,
        kv_layers: Sequence[LayerKV],
        block_size: int,
        shard_tokens: int,
        device: torch.device,
        pgs: MedhaPGs,
    ) -> None:
        """shard_tokens: of one request on one kvp rank."""
        self.model = model
        self._rank = rank
        self._config = config
        self._backend = backend
        self._kv_layers = kv_layers
        self._block_size = block_size
        self._shards = KVShards(pgs.kvp.rank(), shard_tokens, pgs.kvp, SharedSlots.open(pgs.kvp, device))
        self._link = StageLink(
            pgs.pp, hidden_size=config.hidden_size, dtype=next(model.parameters()).dtype, device=device
        )
        self._place = Place(self._link.stage, pgs.kvp.rank())
        self._is_first_of_tp = pgs.tp.rank() == 0
        # In a layout of several, tokens are sampled elsewhere too; the front tells every rank all it needs.
        self.samples_for_itself = pgs.tp.size() == pgs.pp.size() == pgs.kvp.size() == 1
        self._rotary = Rotary(config)
        self._staging = Staging(device)
        self._sampler = Sampler(config.vocab_size, device)
        self._requests = TokenStore(config.vocab_size)
        self._announced: deque[_Announced] = deque()

    @property
    def num_announced(self) -> int:
        """Steps this rank knows of and has not computed."""
        return len(self._announced)

    @property
    def kvp_rank(self) -> int:
        """Its index among the kvp ranks."""
        return self._place.kvp

    @property
    def receives(self) -> bool:
        """Whether there is a stage before this one."""
        return self._place.stage > 0

    @property
    def answers(self) -> bool:
        """Whether the front hears of this rank's steps: one rank of each tensor-parallel group speaks for it."""
        return self._is_first_of_tp

    def run(self, step: Step) -> StepDone:
        """Announce and compute one step."""
        self.announce(step)
        return self.compute()

    def announce(self, step: Step) -> None:
        """Take note of a step: what it tells of requests at once, what it computes when its turn comes.

        That is safe while earlier steps wait: the front releases no request that a step in flight has a part in,
        and samples no second token of one.
        """
        started_s = time.monotonic()
        self._requests.release(step.released)
        self._requests.add(step.new_requests)
        for request_id, token_id in step.sampled:
            self._requests[request_id].append(token_id)
        failed: list[tuple[str, str]] = []
        chunks: list[tuple[Chunk, StoredRequest]] = []
        for chunk in step.chunks:
            request = self._requests[chunk.request_id]
            if request.fault is None:
                chunks.append((chunk, request))
            else:  # every rank finds the same fault in it, so all of them leave it out
                failed.append((chunk.request_id, request.fault))
        plan = stage_plan(step.batch_id, [chunk for chunk, _ in chunks], self._place, self._link.num_stages)
        self._announced.append(
            _Announced(
                step=step,
                chunks=tuple(chunks),
                failed=tuple(failed),
                plan=plan,
                arriving=None if plan.receives_from is None else self._link.post_receive(plan.num_tokens),
                duration_s=time.monotonic() - started_s,
            )
        )

    @torch.inference_mode()
    def compute(self) -> StepDone:
        """Compute the step announced first. A fault of one request fails that request alone."""
        work = self._announced.popleft()
        plan = work.plan
        hidden_T1C = None if work.arriving is None else work.arriving.wait()
        started_s = time.monotonic()
        failed = list(work.failed)
        tokens: list[SampledToken] = []
        prompt: list[PromptLogprobs] = []
        if work.chunks:
            append_extents(work.chunks, block_size=self._block_size, backend=self._backend, shards=self._shards)
            host = host_step(work.chunks, plan=plan, shards=self._shards)
            logits_RV = None if self.graphs is None else self.graphs.run(host)
            if logits_RV is not None:
                tokens = self._sample(logits_RV, host.sampling_requests, failed)
                return self._done(work, started_s, tokens, prompt, failed)
            tensors = step_tensors(
                host,
                work.chunks,
                plan=plan,
                backend=self._backend,
                kv_layers=self._kv_layers,
                rotary=self._rotary,
                shards=self._shards,
                staging=self._staging,
                before_layer=self.before_layer,
            )
            if hidden_T1C is not None:
                self.model.set_input_tensor(hidden_T1C)
            output = self.model(
                tensors.token_ids_1T, None, None, inference_context=tensors.batch, runtime_gather_output=True
            )
            if plan.sends_to is not None:
                self._link.send(output)
            else:
                tokens, prompt = self._results(output[0], tensors, failed)
        return self._done(work, started_s, tokens, prompt, failed)

    def _done(
        self,
        work: _Announced,
        started_s: float,
        tokens: Sequence[SampledToken],
        prompt: Sequence[PromptLogprobs],
        failed: Sequence[tuple[str, str]],
    ) -> StepDone:
        is_last_stage = self._place.stage == self._link.num_stages - 1
        return StepDone(
            batch_id=work.step.batch_id,
            rank=self._rank,
            duration_s=work.duration_s + time.monotonic() - started_s,
            tokens=tuple(tokens),
            prompt_logprobs=tuple(prompt),
            failed=tuple(failed) if is_last_stage else (),
        )

    def _results(
        self, logits_RV: Tensor, tensors: StepTensors, failed: list[tuple[str, str]]
    ) -> tuple[list[SampledToken], list[PromptLogprobs]]:
        """What the last stage has found out. All ranks of a tensor-parallel group take part in the output layer."""
        prompt: list[PromptLogprobs] = []
        if tensors.prompt_rows:
            assert tensors.batch.hidden is not None
            prompt = self._prompt_logprobs(tensors.batch.hidden, tensors.prompt_rows)
        if not self._is_first_of_tp:
            return [], []
        return self._sample(logits_RV, tensors.sampling_requests, failed), prompt

    def _sample(
        self, logits_RV: Tensor, requests: Sequence[StoredRequest], failed: list[tuple[str, str]]
    ) -> list[SampledToken]:
        """One token per request; requests with unusable logits go to `failed`."""
        rows = [
            SamplingRow(
                sampling=request.sampling,
                prompt_ids=request.prompt_ids,
                output_ids=request.output_ids,
                seed=request.sampling.seed or 0,
                num_output_tokens=len(request.output_ids),
            )
            for request in requests
        ]
        tokens: list[SampledToken] = []
        for request, sampled in zip(requests, self._sampler.sample(logits_RV, rows), strict=True):
            if sampled is None:
                failed.append((request.request_id, "the model's output is not a number for this request"))
                continue
            if self.samples_for_itself:
                request.append(sampled.token_id)
            is_stop = sampled.token_id in request.stop_token_ids
            tokens.append(SampledToken(request.request_id, sampled.token_id, is_stop, sampled.logprobs))
        return tokens

    def _prompt_logprobs(self, hidden_PC: Tensor, prompt_rows: Sequence[PromptRows]) -> list[PromptLogprobs]:
        """The output layer once more, over the rows that predict prompt tokens."""
        model = self.model
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        slice_rows = max(1, _PROMPT_SLICE_LOGITS // self._config.vocab_size)
        found: list[PromptLogprobs] = []
        first_row = 0
        for rows in prompt_rows:
            num_top = rows.request.sampling.num_prompt_logprobs or 0
            logprobs: list[TokenLogprobs] = []
            for done in range(0, rows.num_tokens, slice_rows):
                count = min(slice_rows, rows.num_tokens - done)
                hidden_R1C = hidden_PC[first_row + done : first_row + done + count].unsqueeze(1)
                logits_R1V, _ = model.output_layer(hidden_R1C, weight=weight, runtime_gather_output=True)
                next_ids = torch.tensor(rows.request.tokens(rows.first_position + done, count))
                logprobs += prompt_logprobs(logits_R1V[:, 0, : self._config.vocab_size], next_ids, num_top)
            found.append(PromptLogprobs(rows.request.request_id, rows.first_position, tuple(logprobs)))
            first_row += rows.num_tokens
        return found
