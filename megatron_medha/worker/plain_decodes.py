"""The short way for a step of decodes alone, on a rank that has the whole model in one native call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.linear.native_decoder import NativeDecoder
from megatron_medha.model.native_decoder_model import whole_decoder
from megatron_medha.model.rotary import Rotary, Rotation
from megatron_medha.worker.run_ahead import StepWork


def plain_decodes(
    model: GPTModel, backend: AttentionBackend, kv_layers: Sequence[LayerKV], rotary: Rotary
) -> PlainDecodes | None:
    """The short way where there is one: a whole native model, native KV, angles that depend on positions alone."""
    decoder = whole_decoder(model)
    if decoder is None or not isinstance(backend, NativeAttention):
        return None
    angles = rotary.first_positions()
    return None if angles is None else PlainDecodes(decoder, kv_layers, angles)


class PlainDecodes:
    """Logits of decodes without any tensor built for them: a list of numbers goes to the library.

    The way of all other steps, through plans, packed batches and the model's modules, takes half a millisecond of a
    step of seven: a step reads all weights, so whatever Python it touches comes from memory.
    """

    def __init__(self, decoder: NativeDecoder, kv_layers: Sequence[LayerKV], angles: Rotation) -> None:
        """angles: by position."""
        self._decoder, self._kv_layers, self._angles = decoder, kv_layers, angles
        self._num_positions = len(angles.cos_TD)

    def logits(self, decodes: StepWork) -> Tensor | None:
        """[R, V], a row a decode, until the next call.

        None where there are others than decodes, each of the token its request has sampled last, or where a position is
        beyond the angles kept.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        for row, (chunk, request) in enumerate(decodes):
            position, table = chunk.start, request.slot_table
            is_last = position + 1 == request.num_tokens > request.num_prompt_tokens
            if not (is_last and chunk.samples_token) or position >= self._num_positions:
                return None
            assert table is not None, f"{request.request_id}: a decode at {position} without blocks"
            token_ids.append(request.output_ids[-1])
            positions.append(position)
            slots.append(table.slot(position))
            rows += (row, 1, position + 1, 1, table.runs_address, table.num_runs)
        num_rows = len(token_ids)
        numbers = array("q", [*token_ids, *positions, *slots, *rows, *range(num_rows)])
        return self._decoder.decode(numbers, num_rows, self._kv_layers, self._angles)
