"""How long a step takes on a cluster: kernels, collectives, pipeline hops and the host."""

from __future__ import annotations

from math import ceil, sqrt

from megatron_medha.core.cost import StepLoad
from megatron_medha.core.engine_costs import EngineCosts
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.hardware import Hardware, all_gather_s, all_reduce_s, send_s
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

_DENSE_KERNELS = 10  # of a layer besides attention: 4 products, 2 norms, rotation, activation, 2 sums
_MOE_KERNELS = 14    # a router, a choice, a gather and a weighted sum more
_ACTIVATION_BYTES = 2  # 16-bit activations, whatever the weights are


class ClusterCost:
    """A CostModel of one replica: `layout` of `shape` on `hardware`, run by `engine`. It does not learn.

    Matrix products: sqrt(compute^2 + memory^2), the two terms of the roofline joined smoothly, because products of
    100 to 500 tokens, where both are of a size, reach neither limit. (Against measured layers, 8 to 4,096 tokens,
    Llama 8B and 70B cut 8 ways, it stays within 10% on A100 and 7% on H100; a sharp maximum is off by up to 30%.)
    Attention of a chunk: the same join of FLOPs and of reading K and V; for 32 queries per chunk instead of 2,048 it
    gives 1.12 where 1.10 was published (Llama 70B, 1M tokens, 8 H100), for 64 1.03 where 1.035 was.

    linear_s + attention_s is what the scheduler adds up; step_s and stage_s are the truth of a simulated world: the
    host launches while the device computes, so launches are hidden in a step that has enough attention.

    Raises ConfigError if the layout does not divide the model or needs more devices than there are.
    """

    def __init__(
        self, *, shape: ModelShape, hardware: Hardware, engine: EngineCosts, layout: ParallelLayout
    ) -> None:
        _check_layout(shape, hardware, layout)
        self.shape, self.hardware, self.engine, self.layout = shape, hardware, engine, layout
        tp, layers, hidden = layout.tp, shape.num_layers, shape.hidden_size
        peak = hardware.matmul_flops_per_s(shape.bytes_per_element)
        self._matmul_flops_per_s = peak * hardware.linear_efficiency
        self._memory_bytes_per_s = hardware.memory_bytes_per_s * hardware.memory_efficiency
        self._layer_token_s = 2 * shape.num_active_layer_params / tp / self._matmul_flops_per_s
        self._param_read_s = shape.bytes_per_element / tp / self._memory_bytes_per_s
        # Read and written besides weights: two norms (2 tensors each) and two sums (3 each) of the hidden state,
        # which every tp rank does in full; gate, up and their product; rotation of the queries (2, in and out).
        widths = 10 * hidden + (3 * shape.ffn_hidden_size * shape.num_experts_per_token) / tp
        widths += 4 * shape.num_heads * shape.head_dim / tp
        if shape.num_experts > 1:
            widths += 4 * hidden * shape.num_experts_per_token  # tokens to their experts and back
        self._pointwise_token_s = widths * _ACTIVATION_BYTES / self._memory_bytes_per_s
        num_kernels = _MOE_KERNELS if shape.num_experts > 1 else _DENSE_KERNELS
        self._layer_fixed_s = num_kernels * hardware.kernel_overhead_s
        link = hardware.link(tp)
        self._reduce_fixed_s = 2 * all_reduce_s(link, tp, 0.0)
        self._reduce_token_s = 2 * all_reduce_s(link, tp, hidden * _ACTIVATION_BYTES) - self._reduce_fixed_s
        self._head_row_s = 2 * shape.num_head_params / tp / self._matmul_flops_per_s
        self._head_read_s = shape.num_head_params * self._param_read_s + hardware.kernel_overhead_s
        # A rank holds num_kv_heads / tp of them, but never less than one: further ranks repeat it.
        kv_ranks = min(tp, shape.num_kv_heads)
        self._key_read_s = shape.kv_bytes_per_token / kv_ranks / self._memory_bytes_per_s
        # Scores and values are multiplied in 16 bits even when KV is stored in 8.
        pair_flops = 4 * shape.head_dim * shape.num_heads * layers / tp
        self._pair_s = pair_flops / (hardware.flops_per_s * hardware.attention_efficiency)
        self._tile_rows = engine.attention_tile_rows
        if self._tile_rows is not None:
            tile_flops = 4 * self._tile_rows * shape.head_dim * layers  # per key
            self._tile_key_s = tile_flops / (hardware.flops_per_s / hardware.num_sms * hardware.lone_tile_efficiency)
        self._heads_per_rank = shape.num_heads // tp
        self._stage_launch_s = layers / layout.spp * engine.layer_launch_s
        self._hops = [self._hop(stage) for stage in range(layout.spp - 1)]

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel. Launching counts where it takes longer than the products."""
        device_s = self.shape.num_layers * self.layer_s(num_tokens) + self.head_s(num_sequences)
        launch_s = self.shape.num_layers * self.engine.layer_launch_s
        return self.host_s(num_sequences) + max(device_s, launch_s) + self.hops_s(num_tokens)

    def attention_s(self, start: int, num_tokens: int) -> float:
        """See CostModel."""
        num_keys = start + 0.5 * (num_tokens + 1)  # that a query attends to, on average
        if self._tile_rows is None:
            compute_s = num_tokens * num_keys * self._pair_s
        else:
            num_tiles = -(-num_tokens // self._tile_rows) * self._heads_per_rank
            waves = ceil(num_tiles / self.hardware.num_sms)
            compute_s = max(waves * num_keys * self._tile_key_s, num_tokens * num_keys * self._pair_s)
        read_s = (start + num_tokens) * self._key_read_s
        return sqrt(compute_s * compute_s + read_s * read_s)

    def decode_attention_s(self, context: int) -> float:
        """See CostModel. One query per key is bound by memory on every machine."""
        return context * self._key_read_s

    def merge_s(self, num_tokens: int, num_ranks: int) -> float:
        """Gathering and merging the partial attention of a chunk over `num_ranks` KVP ranks, over all layers.

        Every rank gets the others' output (2 bytes) and log-sum-exp (4 bytes) per query, head and layer.
        """
        if num_ranks == 1:
            return 0.0
        link = self.hardware.link(num_ranks * self.layout.tp)
        num_bytes = num_tokens * self._heads_per_rank * (self.shape.head_dim * _ACTIVATION_BYTES + 4)
        return self.shape.num_layers * all_gather_s(link, num_ranks, num_bytes)

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """A table of constants does not learn."""

    @property
    def revision(self) -> int:
        """Never changes."""
        return 0

    def layer_s(self, num_tokens: int) -> float:
        """One layer on the device without attention, its two all-reduces over tp included."""
        compute_s = num_tokens * self._layer_token_s
        read_s = self.shape.num_touched_layer_params(num_tokens) * self._param_read_s
        return (
            sqrt(compute_s * compute_s + read_s * read_s)
            + num_tokens * (self._pointwise_token_s + self._reduce_token_s)
            + self._layer_fixed_s
            + self._reduce_fixed_s
        )

    def head_s(self, num_sequences: int) -> float:
        """The output head for one row per sequence."""
        compute_s = num_sequences * self._head_row_s
        return sqrt(compute_s * compute_s + self._head_read_s * self._head_read_s)

    def host_s(self, num_sequences: int) -> float:
        """What the host does while the device waits."""
        return self.engine.step_s + num_sequences * self.engine.sequence_s

    def hop_s(self, num_tokens: int, stage: int) -> float:
        """Hidden states from `stage` to the next one; each tp rank sends its share, the receivers gather."""
        fixed_s, token_s = self._hops[stage]
        return fixed_s + num_tokens * token_s

    def hops_s(self, num_tokens: int) -> float:
        """Hidden states through all stages."""
        return sum([self.hop_s(num_tokens, stage) for stage in range(self.layout.spp - 1)])

    def stage_s(self, load: StepLoad, stage: int) -> float:
        """Seconds for which a step occupies a stage; the host's part counts for the first one, the head for the last.

        Hidden states travel beside the next step's work: hop_s delays this step, but occupies no stage.
        """
        layers = self.shape.num_layers / self.layout.spp
        device_s = layers * self.layer_s(load.num_tokens) + load.attention_s / self.layout.spp
        if stage == self.layout.spp - 1:
            device_s += self.head_s(load.num_sequences)
        if not self._is_graph(load):
            device_s = max(device_s, self._stage_launch_s)
        return device_s + (self.host_s(load.num_sequences) if stage == 0 else 0.0)

    def step_s(self, load: StepLoad) -> float:
        """Seconds of a step that has all stages to itself."""
        stages = range(self.layout.spp)
        return sum([self.stage_s(load, stage) for stage in stages]) + self.hops_s(load.num_tokens)

    def _is_graph(self, load: StepLoad) -> bool:
        longest = self.engine.graph_max_context
        return not load.chunk_context and (longest is None or load.decode_context <= longest * load.num_sequences)

    def _hop(self, stage: int) -> tuple[float, float]:
        tp, hardware = self.layout.tp, self.hardware
        ranks_per_stage = tp * self.layout.kvp
        first, last = stage * ranks_per_stage, (stage + 2) * ranks_per_stage - 1
        is_inside = first // hardware.devices_per_node == last // hardware.devices_per_node
        link = hardware.intra_node if is_inside else hardware.inter_node
        share_bytes = self.shape.hidden_size * _ACTIVATION_BYTES / tp
        fixed_s = send_s(link, 0.0) + all_gather_s(hardware.link(tp), tp, 0.0)
        total_s = send_s(link, share_bytes) + all_gather_s(hardware.link(tp), tp, share_bytes)
        return fixed_s, total_s - fixed_s


def _check_layout(shape: ModelShape, hardware: Hardware, layout: ParallelLayout) -> None:
    for axis, degree, key, count in (
        ("tp", layout.tp, "num_heads", shape.num_heads),
        ("spp", layout.spp, "num_layers", shape.num_layers),
    ):
        if count % degree:
            raise ConfigError(f"parallel.{axis}={degree} must divide model.shape.{key}={count} of {shape.name}")
    if max(layout.tp, shape.num_kv_heads) % min(layout.tp, shape.num_kv_heads):
        raise ConfigError(
            f"parallel.tp={layout.tp} must divide, or be a multiple of, "
            f"model.shape.num_kv_heads={shape.num_kv_heads} of {shape.name}"
        )
    if layout.world_size > hardware.num_devices:
        raise ConfigError(
            f"hardware.num_devices={hardware.num_devices}: tp={layout.tp} x spp={layout.spp} x kvp={layout.kvp} x "
            f"dp={layout.dp} needs {layout.world_size}; give a larger cluster or smaller degrees"
        )
