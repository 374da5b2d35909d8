"""One rank's work: a Step in, a StepDone out. Sockets and processes are elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.cluster.messages import PromptLogprobs, SampledToken, Step, StepDone
from megatron_medha.core.batch import Chunk
from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.kernels.backends import AttentionBackend, LayerKV
from megatron_medha.model.model_config import ModelConfig
from megatron_medha.model.rotary import Rotary
from megatron_medha.model.sampler import Sampler, SamplingRow, prompt_logprobs
from megatron_medha.worker.batch_tensors import PromptRows, append_extents, step_tensors
from megatron_medha.worker.token_store import StoredRequest, TokenStore

# Logits of a whole chunk may not fit in memory (8192 x 152K fp32 is 5 GB); prompt logprobs go through in slices.
_PROMPT_SLICE_LOGITS = 1 << 24


class Rank:
    """Model, KV memory and live requests of one rank."""

    def __init__(
        self,
        *,
        rank: int,
        model: GPTModel,
        config: ModelConfig,
        backend: AttentionBackend,
        kv_layers: Sequence[LayerKV],
        block_size: int,
        device: torch.device,
    ) -> None:
        self._rank = rank
        self._model = model
        self._config = config
        self._backend = backend
        self._kv_layers = kv_layers
        self._block_size = block_size
        self._rotary = Rotary(config)
        self._sampler = Sampler(config.vocab_size, device)
        self._requests = TokenStore(config.vocab_size)

    @torch.inference_mode()
    def run(self, step: Step) -> StepDone:
        """Compute one batch. A fault of one request fails that request alone; duration_s is left to the caller."""
        self._requests.release(step.released)
        self._requests.add(step.new_requests)
        failed: list[tuple[str, str]] = []
        chunks: list[tuple[Chunk, StoredRequest]] = []
        for chunk in step.chunks:
            request = self._requests[chunk.request_id]
            if request.fault is None:
                chunks.append((chunk, request))
            else:
                failed.append((chunk.request_id, request.fault))
        tokens: list[SampledToken] = []
        prompt: list[PromptLogprobs] = []
        if chunks:
            append_extents(chunks, block_size=self._block_size, backend=self._backend)
            tensors = step_tensors(
                chunks, backend=self._backend, kv_layers=self._kv_layers, rotary=self._rotary
            )
            logits_1RV = self._model(
                tensors.token_ids_1T, None, None, inference_context=tensors.batch, runtime_gather_output=True
            )
            tokens = self._sample(logits_1RV[0], tensors.sampling_requests, failed)
            if tensors.prompt_rows:
                assert tensors.batch.hidden is not None
                prompt = self._prompt_logprobs(tensors.batch.hidden, tensors.prompt_rows)
        return StepDone(
            batch_id=step.batch_id,
            rank=self._rank,
            duration_s=0.0,
            tokens=tuple(tokens),
            prompt_logprobs=tuple(prompt),
            failed=tuple(failed),
        )

    def _sample(
        self, logits_RV: Tensor, requests: Sequence[StoredRequest], failed: list[tuple[str, str]]
    ) -> list[SampledToken]:
        """One token per request, appended to its store; requests with unusable logits go to `failed`."""
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
                request.fault = "the model's output is not a number for this request"
                failed.append((request.request_id, request.fault))
                continue
            request.append(sampled.token_id)
            is_stop = sampled.token_id in request.stop_token_ids
            tokens.append(SampledToken(request.request_id, sampled.token_id, is_stop, sampled.logprobs))
        return tokens

    def _prompt_logprobs(self, hidden_PC: Tensor, prompt_rows: Sequence[PromptRows]) -> list[PromptLogprobs]:
        """The output layer once more, over the rows that predict prompt tokens."""
        model = self._model
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
