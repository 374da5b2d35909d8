"""How long a step takes on a cluster: kernels, collectives, pipeline hops and the host."""

from __future__ import annotations

from functools import lru_cache

from megatron_medha.core.cost.capacity import check_devices
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware, all_gather_s, send_s
from megatron_medha.core.cost.kernel_costs import ACTIVATION_BYTES, AttentionKernels, LinearKernels
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.cost.step_sizes import NO_STEP_SIZES, StepSizes
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

_NUM_STEPS = 1 << 17   # (tokens, sequences) remembered: all that an hour of the paper's mix asks for
_NUM_LAYERS = 1 << 14  # token counts of one layer


class ClusterCost:
    """A CostModel of one replica: `layout` of `shape` on `hardware`, run by `engine`. It does not learn.

    linear_s + attention_s (+ merge_s for what spans several KVP ranks) is what a scheduler adds up. step_s and stage_s
    are the truth of a simulated world: the host launches while the device computes, so launches are hidden in a step
    that has enough attention, and they know steps that are launched as one graph.

    Contexts are those of one KVP rank's shard; the step of several ranks takes as long as the slowest.
    It prices more layouts than this engine serves (capacity.py: check_layout): ranks that repeat a KV head, stages
    that differ by a layer. Raises ConfigError for those that no engine has, or that need more devices than there are.
    """

    def __init__(
        self,
        *,
        shape: ModelShape,
        hardware: Hardware,
        engine: EngineCosts,
        layout: ParallelLayout,
        step_sizes: StepSizes = NO_STEP_SIZES,
    ) -> None:
        _check_cut(shape, layout)
        check_devices(hardware, layout)
        self.shape, self.hardware, self.engine, self.layout = shape, hardware, engine, layout
        self._step_sizes = step_sizes
        self._linear = LinearKernels(shape, hardware, layout.tp)
        self._attention = AttentionKernels(shape, hardware, layout.tp, engine.attention_tile_rows)
        self._num_layers = shape.num_layers
        self._stage_layers = [shape.num_stage_layers(stage, layout.spp) for stage in range(layout.spp)]
        self._launch_s = shape.num_layers * engine.layer_launch_s
        self._hops = [self._hop(stage) for stage in range(layout.spp - 1)]
        self._between_fixed_s = sum([fixed_s + engine.stage_entry_s for fixed_s, _ in self._hops])
        self._between_token_s = sum([token_s for _, token_s in self._hops])
        # A simulation asks for the same few steps a million times: each is worked out once.
        self.linear_s = lru_cache(_NUM_STEPS)(self.linear_s)  # type: ignore[method-assign]
        self.layer_s = lru_cache(_NUM_LAYERS)(self.layer_s)  # type: ignore[method-assign]
        self.attention_s, self.decode_attention_s = self._attention.chunk_s, self._attention.decode_s

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel. Launching counts where it takes longer than the products and the step fits no graph."""
        size = self._step_sizes.fitting(num_tokens, num_sequences)
        device_s = self._num_layers * self.layer_s(size or num_tokens) + self.head_s(num_sequences)
        between_s = self._between_fixed_s + num_tokens * self._between_token_s
        return self.host_s(num_sequences) + max(device_s, 0.0 if size else self._launch_s) + between_s

    def merge_s(self, num_tokens: int, num_ranks: int) -> float:
        """Gathering and merging the partial attention of a chunk over `num_ranks` KVP ranks, over all layers.

        Every rank gets the others' output (2 bytes) and log-sum-exp (4 bytes) per query, head and layer.
        """
        if num_ranks == 1:
            return 0.0
        link = self.hardware.link(num_ranks * self.layout.tp)
        num_heads = self.shape.num_heads // self.layout.tp
        num_bytes = num_tokens * num_heads * (self.shape.cached_dim * ACTIVATION_BYTES + 4)
        return self.shape.num_layers * all_gather_s(link, num_ranks, num_bytes)

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """A table of constants does not learn."""

    @property
    def revision(self) -> int:
        """Never changes."""
        return 0

    def layer_s(self, num_tokens: int) -> float:
        """One layer on the device without attention, its two all-reduces over tp included."""
        return self._linear.layer_s(num_tokens)

    def head_s(self, num_sequences: int) -> float:
        """The output head on the device, one row per sequence."""
        return self._linear.head_s(num_sequences)

    def host_s(self, num_sequences: int) -> float:
        """What the host does before the first stage's device has work."""
        return self.engine.step_s + num_sequences * self.engine.sequence_s

    def hop_s(self, num_tokens: int, stage: int) -> float:
        """Hidden states from `stage` to the next one; each tp rank sends its share, the receivers gather."""
        fixed_s, token_s = self._hops[stage]
        return fixed_s + num_tokens * token_s

    def switch_s(self, num_tokens: int) -> float:
        """What a stage loses by holding a step of so many tokens and going on with it later.

        Activations are written and read once (residual and hidden states, and the widest product of a layer), the
        weights of one layer are read once more, and a layer is launched again.
        """
        shape, hardware, tp = self.shape, self.hardware, self.layout.tp
        per_token = (2 * shape.hidden_size + shape.ffn_hidden_size / tp) * ACTIVATION_BYTES
        weights = shape.num_touched_layer_params(num_tokens) / tp * shape.bytes_per_element
        moved_s = (2 * num_tokens * per_token + weights) / (hardware.memory_bytes_per_s * hardware.memory_efficiency)
        return self.engine.layer_launch_s + moved_s

    def stage_s(self, load: StepLoad, stage: int) -> float:
        """Seconds for which a step occupies a stage; the host's part counts for the first one, the head for the last.

        Hidden states travel beside the next step's work: hop_s delays this step, but occupies no stage.
        """
        return self.stages_s(load)[stage]

    def stages_s(self, load: StepLoad) -> tuple[float, ...]:
        """stage_s of every stage."""
        num_sequences = load.num_sequences
        size = self._step_sizes.fitting(load.num_tokens, num_sequences)
        layer_s = self.layer_s(size or load.num_tokens) + load.attention_s / self._num_layers
        is_graph = size is not None or self._is_graph(load)
        before_s = self.host_s(num_sequences)
        seconds: list[float] = []
        for layers in self._stage_layers:
            device_s = layers * layer_s
            if len(seconds) == len(self._stage_layers) - 1:
                device_s += self.head_s(num_sequences)
            if not is_graph:
                device_s = max(device_s, layers * self.engine.layer_launch_s)
            seconds.append(device_s + before_s)
            before_s = self.engine.stage_entry_s
        return tuple(seconds)

    def step_s(self, load: StepLoad) -> float:
        """Seconds of a step that has all stages to itself."""
        hops_s = sum([self.hop_s(load.num_tokens, stage) for stage in range(self.layout.spp - 1)])
        return sum(self.stages_s(load)) + hops_s

    def _is_graph(self, load: StepLoad) -> bool:
        longest = self.engine.graph_max_context
        return not load.chunk_context and (longest is None or load.decode_context <= longest * load.num_sequences)

    def _hop(self, stage: int) -> tuple[float, float]:
        tp, hardware = self.layout.tp, self.hardware
        ranks_per_stage = tp * self.layout.kvp
        first, last = stage * ranks_per_stage, (stage + 2) * ranks_per_stage - 1
        is_inside = first // hardware.devices_per_node == last // hardware.devices_per_node
        link = hardware.intra_node if is_inside else hardware.inter_node
        share_bytes = self.shape.hidden_size * ACTIVATION_BYTES / tp
        fixed_s = send_s(link, 0.0) + all_gather_s(hardware.link(tp), tp, 0.0)
        total_s = send_s(link, share_bytes) + all_gather_s(hardware.link(tp), tp, share_bytes)
        return fixed_s, total_s - fixed_s


def _check_cut(shape: ModelShape, layout: ParallelLayout) -> None:
    if shape.num_heads % layout.tp:
        raise ConfigError(f"parallel.tp={layout.tp} must divide model.num_heads={shape.num_heads} of {shape.name}")
    if max(layout.tp, shape.num_kv_heads) % min(layout.tp, shape.num_kv_heads):
        raise ConfigError(
            f"parallel.tp={layout.tp} must divide, or be a multiple of, model.num_kv_heads={shape.num_kv_heads} "
            f"of {shape.name}"
        )
    if layout.spp > shape.num_layers:
        raise ConfigError(
            f"parallel.spp={layout.spp} must not exceed model.num_layers={shape.num_layers} of {shape.name}"
        )
