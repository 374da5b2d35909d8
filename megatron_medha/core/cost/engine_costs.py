"""What a serving engine adds to the machine it runs on: host time, how it launches, how its attention is tiled."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.cost.step_sizes import GRAPH_SIZES, NO_STEP_SIZES, StepSizes
from megatron_medha.core.errors import ConfigError, check_ranges
from megatron_medha.core.layout import ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCosts:
    """The part of a step's time that another engine on the same cluster would not have.

    A step takes step_s of the host before the device has work; then the host launches layer after layer while the
    device computes, and the slower of the two counts. Raises ConfigError for a value out of range.
    """

    name: str
    step_s: float                        # scheduling, inputs, messages, sampling: the device waits
    sequence_s: float                    # the same per sequence in the step
    stage_entry_s: float                 # the same on each further pipeline stage: receiving, inputs
    layer_launch_s: float                # host time to launch one layer's kernels, one by one
    request_s: float                     # once per request, before its first token and outside of all steps: HTTP, text
    graph_max_context: int | None = 0    # steps of decodes with at most this mean context cost the host nothing to
                                         # launch (CUDA graphs); None: all of them, 0: none
    fills_graphs: bool = False           # steps are filled up to the sizes of this engine's own CUDA graphs
                                         # (core/cost/step_sizes.py), and then cost the host nothing to launch
    attention_tile_rows: int | None = None  # a chunk's queries, per head, in tiles that each read all its keys;
                                            # None: tiles are also split by keys, so that they fill any device

    def __post_init__(self) -> None:
        check_ranges(
            "engine", self, 0.0, 10.0, "step_s", "sequence_s", "stage_entry_s", "layer_launch_s", "request_s"
        )
        if self.graph_max_context is not None and self.graph_max_context < 0:
            raise ConfigError(f"engine.graph_max_context={self.graph_max_context}: must be at least 0, or null")
        if self.attention_tile_rows is not None and self.attention_tile_rows < 1:
            raise ConfigError(f"engine.attention_tile_rows={self.attention_tile_rows}: must be at least 1, or null")

    def step_sizes(self, layout: ParallelLayout) -> StepSizes:
        """What steps are filled up to; stages and kvp ranks have no graphs."""
        return GRAPH_SIZES if self.fills_graphs and layout.spp * layout.kvp == 1 else NO_STEP_SIZES
