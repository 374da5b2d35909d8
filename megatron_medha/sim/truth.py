"""How long batches really take in a simulated world: a cost model that is the truth, with bias and noise if wanted."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite
from random import Random

from megatron_medha.core.batch import Batch
from megatron_medha.core.cost import CostModel, StepLoad, step_s
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.sim.pipeline import StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthConfig:
    """How the world differs from what the cost model says; by default not at all."""

    linear_bias: float = 1.0     # factor on everything but attention
    attention_bias: float = 1.0  # factor on attention
    noise: float = 0.0           # standard deviation of the logarithm of a factor on each step and KVP rank

    def __post_init__(self) -> None:
        for key, low, high in (("linear_bias", 1e-3, 1e3), ("attention_bias", 1e-3, 1e3), ("noise", 0.0, 2.0)):
            value = getattr(self, key)
            if not (low <= value <= high and isfinite(value)):
                raise ConfigError(f"truth.{key}={value:g}: must be between {low:g} and {high:g}")


@dataclass(slots=True)
class Work:
    """What all batches so far had to compute, whatever it took. Model FLOPs are causal: 2 * weights * tokens, and
    4 * head_dim * heads per query-key pair and layer. Queries that several KVP ranks repeat count once.
    """

    num_batches: int = 0
    num_tokens: int = 0
    num_sampled: int = 0
    num_weight_reads: int = 0  # of all weights of one KVP rank's copy of the model
    num_pairs: float = 0.0     # of queries and keys
    num_keys_read: int = 0     # by chunks and decodes, each once per layer

    def flops(self, shape: ModelShape) -> float:
        """Model FLOPs."""
        linear = 2.0 * (self.num_tokens * shape.num_layers * shape.num_layer_params)
        head = 2.0 * self.num_sampled * shape.num_head_params
        return linear + head + 4.0 * self.num_pairs * shape.head_dim * shape.num_heads * shape.num_layers

    def num_bytes(self, shape: ModelShape) -> float:
        """Bytes of weights read, and of KV read and written."""
        weights = (shape.num_layers * shape.num_layer_params + shape.num_head_params) * shape.bytes_per_element
        return self.num_weight_reads * weights + (self.num_keys_read + self.num_tokens) * shape.kv_bytes_per_token


class Truth:
    """Maps batches to the seconds they take, and adds up the work that was in them."""

    def __init__(
        self, cost: CostModel, layout: ParallelLayout, shard_tokens: int, config: TruthConfig, seed: int
    ) -> None:
        self._cost = cost
        self._kvp = layout.kvp
        self._shard_tokens = shard_tokens
        self._config = config
        self._draw = Random(f"truth {seed}")
        self.work = Work()

    def __call__(self, batch: Batch) -> StepTimes:
        """The seconds of a batch on every KVP rank."""
        self.work.num_batches += 1
        return self._on_one_rank(batch) if self._kvp == 1 else self._on_ranks(batch)

    def _on_one_rank(self, batch: Batch) -> StepTimes:
        num_tokens = num_decodes = decode_context = num_sampled = num_keys = 0
        pairs = attention_s = 0.0
        for _, start, count, samples_token, _, _ in batch.chunks:
            num_sampled += samples_token
            if count == 1 and start:
                num_decodes += 1
                decode_context += start
            else:
                num_tokens += count
                pairs += count * (start + 0.5 * (count + 1))
                num_keys += start + count
                attention_s += self._cost.attention_s(start, count)
        decode_context += num_decodes
        num_tokens += num_decodes
        if num_decodes:
            attention_s += self._cost.decode_attention_s(decode_context)
        work = self.work
        work.num_tokens += num_tokens
        work.num_sampled += num_sampled
        work.num_weight_reads += 1
        work.num_pairs += pairs + decode_context
        work.num_keys_read += num_keys + decode_context
        return StepTimes((self._seconds(self._cost.linear_s(num_tokens, len(batch.chunks)), attention_s),))

    def _on_ranks(self, batch: Batch) -> StepTimes:
        loads = [StepLoad() for _ in range(self._kvp)]
        contexts = [0] * self._kvp  # of decodes
        tied: set[tuple[int, ...]] = set()
        work = self.work
        for chunk in batch.chunks:
            work.num_tokens += chunk.num_tokens
            work.num_sampled += chunk.samples_token
            work.num_pairs += chunk.num_tokens * (chunk.start + 0.5 * (chunk.num_tokens + 1))
            work.num_keys_read += chunk.start + chunk.num_tokens
            if len(chunk.kvp_ranks) > 1:
                tied.add(chunk.kvp_ranks)
            last = len(chunk.kvp_ranks) - 1
            for index, rank in enumerate(chunk.kvp_ranks):
                context = chunk.start - index * self._shard_tokens if index == last else self._shard_tokens
                if chunk.num_tokens == 1 and chunk.start:
                    contexts[rank] += context + 1
                    loads[rank].add_decodes(1, context + 1, 0.0)
                else:
                    attention_s = self._cost.attention_s(context, chunk.num_tokens)
                    loads[rank].add_chunk(context, chunk.num_tokens, attention_s)
        for context, load in zip(contexts, loads, strict=True):
            load.attention_s += self._cost.decode_attention_s(context) if context else 0.0
        work.num_weight_reads += sum(load.num_sequences > 0 for load in loads)
        return StepTimes(
            tuple(
                self._seconds(step_s(self._cost, load) - load.attention_s, load.attention_s)
                if load.num_sequences
                else 0.0
                for load in loads
            ),
            _merged(tied),
        )

    def _seconds(self, linear_s: float, attention_s: float) -> float:
        config = self._config
        seconds = linear_s * config.linear_bias + attention_s * config.attention_bias
        if config.noise:  # of mean 1, so that noise alone is no bias
            seconds *= exp(self._draw.gauss(0.0, config.noise) - 0.5 * config.noise**2)
        return seconds


def _merged(tied: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Groups that share a rank are one group: whoever waits for one of them waits for all."""
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
