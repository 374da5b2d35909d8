"""How long batches really take in a simulated world: a cost model that is the truth, with bias and noise if wanted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import exp
from random import Random

from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.cost.utilisation import matmul_flops
from megatron_medha.core.kv.shards import context_in
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.sim.pipeline import StepTimes
from megatron_medha.sim.truth_config import TruthConfig

_NUM_TOKEN_COUNTS = 1 << 14  # of steps, whose hops are remembered


@dataclass(slots=True)
class ComputedWork:
    """What all batches so far had to compute, whatever it took. Queries that several KVP ranks repeat count once."""

    num_batches: int = 0
    num_tokens: int = 0
    num_sampled: int = 0
    num_params_read: float = 0.0  # parameters read, summed over batches and KVP ranks
    num_pairs: float = 0.0         # of queries and keys, causal
    num_keys_read: int = 0         # by chunks and decodes, each once per layer

    def add(self, chunk: Chunk) -> None:
        """Count one more chunk, of a batch that is counted elsewhere."""
        self.num_tokens += chunk.num_tokens
        self.num_sampled += chunk.samples_token
        self.num_pairs += chunk.num_tokens * (chunk.start + 0.5 * (chunk.num_tokens + 1))
        self.num_keys_read += chunk.start + chunk.num_tokens

    def flops(self, shape: ModelShape) -> float:
        """Model FLOPs."""
        attention = 4.0 * self.num_pairs * shape.cached_dim * shape.num_heads * shape.num_layers
        return matmul_flops(shape, self.num_tokens, self.num_sampled) + attention

    def num_bytes(self, shape: ModelShape) -> float:
        """Bytes of weights read, and of KV read and written."""
        num_kv = (self.num_keys_read + self.num_tokens) * shape.kv_bytes_per_token
        return self.num_params_read * shape.bytes_per_element + num_kv


class Truth:
    """Maps batches to the seconds they take on every stage, and adds up the work that was in them."""

    def __init__(self, cost: ClusterCost, shard_tokens: int, config: TruthConfig, seed: int) -> None:
        self._cost = cost
        self._spp = cost.layout.spp
        self._num_stage_layers = [cost.shape.num_stage_layers(stage, self._spp) for stage in range(self._spp)]
        self._kvp = cost.layout.kvp
        self._shard_tokens = shard_tokens
        self._config = config
        self._is_exact = config == TruthConfig()
        self._draw = Random(f"truth {seed}")
        self._by_tokens = lru_cache(_NUM_TOKEN_COUNTS)(self._tokens_facts)
        self.work = ComputedWork()

    def __call__(self, batch: Batch) -> StepTimes:
        """The seconds of a batch."""
        self.work.num_batches += 1
        if self._kvp == 1:
            load = self._on_one_rank(batch)
            hops_s, num_params = self._by_tokens(load.num_tokens)
            self.work.num_params_read += num_params
            return StepTimes((self._stages_s(load),), hops_s)
        loads, tied = self._on_ranks(batch)
        for load in loads:
            if load.num_tokens:
                self.work.num_params_read += self._by_tokens(load.num_tokens)[1]
        return StepTimes(
            tuple([self._stages_s(load) if load.num_sequences else () for load in loads]),
            self._by_tokens(max([load.num_tokens for load in loads]))[0],
            tied,
        )

    def _on_one_rank(self, batch: Batch) -> StepLoad:
        load = StepLoad()
        num_decodes = decode_context = num_sampled = 0
        for _, start, count, samples_token, _ in batch.chunks:
            num_sampled += samples_token
            if count == 1 and start:
                num_decodes += 1
                decode_context += start
            else:
                load.add_chunk(start, count, self._cost.attention_s(start, count))
        if num_decodes:
            decode_context += num_decodes
            load.add_decodes(num_decodes, decode_context, self._cost.decode_attention_s(decode_context))
        work = self.work
        work.num_tokens += load.num_tokens
        work.num_sampled += num_sampled
        work.num_pairs += load.chunk_pairs + decode_context
        work.num_keys_read += load.chunk_context + decode_context
        return load

    def _on_ranks(self, batch: Batch) -> tuple[list[StepLoad], tuple[tuple[int, ...], ...]]:
        loads = [StepLoad() for _ in range(self._kvp)]
        tied: set[tuple[int, ...]] = set()
        for chunk in batch.chunks:
            self.work.add(chunk)
            if len(chunk.kvp_ranks) > 1:
                tied.add(chunk.kvp_ranks)
            merge_s = self._cost.merge_s(chunk.num_tokens, len(chunk.kvp_ranks))
            for index, rank in enumerate(chunk.kvp_ranks):
                context = context_in(index, chunk.start, self._shard_tokens)
                if chunk.num_tokens == 1 and chunk.start:
                    attention_s = self._cost.decode_attention_s(context + 1) + merge_s
                    loads[rank].add_decodes(1, context + 1, attention_s)
                else:
                    attention_s = self._cost.attention_s(context, chunk.num_tokens) + merge_s
                    loads[rank].add_chunk(context, chunk.num_tokens, attention_s)
        return loads, _merged(tied)

    def _tokens_facts(self, num_tokens: int) -> tuple[tuple[float, ...], float]:
        """Seconds of every hop, and parameters read by one KVP rank, for a step of so many tokens."""
        shape = self._cost.shape
        return (
            tuple([self._cost.hop_s(num_tokens, stage) for stage in range(self._spp - 1)]),
            shape.num_layers * shape.num_touched_layer_params(num_tokens) + shape.num_head_params,
        )

    def _stages_s(self, load: StepLoad) -> tuple[float, ...]:
        if self._is_exact:
            return self._cost.stages_s(load)
        config = self._config
        layer_attention_s = load.attention_s / self._cost.shape.num_layers
        attention_s = [count * layer_attention_s for count in self._num_stage_layers]
        factor = 1.0
        if config.noise:  # of mean 1, so that noise alone is no bias
            factor = exp(self._draw.gauss(0.0, config.noise) - 0.5 * config.noise**2)
        return tuple(
            factor
            * (
                config.linear_bias * (stage_s - stage_attention_s)
                + config.attention_bias * stage_attention_s
            )
            for stage_s, stage_attention_s in zip(self._cost.stages_s(load), attention_s, strict=True)
        )


def _merged(tied: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Groups that share a rank are one group: what waits for one of them waits for all."""
    groups: list[set[int]] = []
    for ranks in sorted(tied):
        joined = set(ranks)
        apart = []
        for group in groups:
            if group & joined:
                joined |= group
            else:
                apart.append(group)
        groups = [*apart, joined]
    return tuple(tuple(sorted(group)) for group in groups)
