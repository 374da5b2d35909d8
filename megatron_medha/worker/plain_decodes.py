"""The short way for a step of decodes alone, on a rank that has the whole model in one native call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from megatron_medha.kernels.attention.backend import LayerKV
from megatron_medha.kernels.linear.native_decoder import NativeDecoder
from megatron_medha.model.rotary import Rotation
from megatron_medha.worker.run_ahead import StepWork


class PlainDecodes:
    """Logits of decodes without any tensor built for them: a list of numbers goes to the library.

    The way of all other steps, through plans, packed batches and the model's modules, takes half a millisecond of a
    step of seven: a step reads all weights, so whatever Python it touches comes from memory.
    """

    def __init__(
        self, decoder: NativeDecoder, kv_layers: Sequence[LayerKV], angles: Rotation, partition_tokens: int
    ) -> None:
        """angles: by position. partition_tokens: see AttentionBackend."""
        self._decoder, self._kv_layers, self._angles = decoder, kv_layers, angles[:2]
        self._partition_tokens = partition_tokens
        self._num_positions = len(angles.cos_TD)

    def takes(self, work: StepWork) -> bool:
        """Whether all are decodes of the token that their request has sampled last, at positions that have angles."""
        return all(
            chunk.samples_token
            and chunk.start + 1 == request.num_tokens > request.num_prompt_tokens
            and chunk.start < self._num_positions
            for chunk, request in work
        )

    def logits(self, decodes: StepWork) -> Tensor:
        """[R, V], a row a decode, until the next call."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        whole = (0, self._partition_tokens, 0, 0, 0)  # keys from the first one on, and no nodes
        for row, (chunk, request) in enumerate(decodes):
            position, table = chunk.start, request.slot_table
            assert table is not None, f"{request.request_id}: a decode at {position} without blocks"
            token_ids.append(request.output_ids[-1])
            positions.append(position)
            slots.append(table.slot(position))
            rows += (row, 1, position + 1, 1, table.runs_address, table.num_runs, *whole)
        num_rows = len(token_ids)
        numbers = array("q", [*token_ids, *positions, *slots, *rows, *range(num_rows)])
        return self._decoder.decode(numbers, num_rows, self._kv_layers, self._angles)
