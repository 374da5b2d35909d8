"""Checksums of what every operation of the model gives for each token of one request, to find where bits part."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_medha.worker.rank import Rank

_SEPARATOR = "|"


class _StepRows:
    """Where the tokens of a request lie in the step being computed."""

    num_tokens = 0
    positions: tuple[tuple[int, int], ...] = ()  # row of the step, position in the request

    def note_step(self, rank: Rank, request_id: str) -> None:
        """Of the step that is computed next."""
        work = rank._announced[0]
        found, row = [], 0
        for index in (work.plan or rank._plan(work.chunks)).order:
            chunk, _ = work.chunks[index]
            if chunk.request_id == request_id:
                found += [(row + offset, chunk.start + offset) for offset in range(chunk.num_tokens)]
            row += chunk.num_tokens
        self.positions, self.num_tokens = tuple(found), row


def record_operations(rank: Rank, notes: dict[str, float], request_id: str) -> None:
    """Have the rank note a checksum by operation, width and position, in the order of the operations.

    It takes no short way from then on: what computes a decode as a whole has no operations to look at.
    """
    from torch import Tensor

    rank.run_ahead = lambda: False  # type: ignore[method-assign]
    rank._plain_decodes = None
    rows = _StepRows()
    compute = rank.compute

    def compute_noted() -> Any:
        rows.note_step(rank, request_id)
        return compute()

    def note(name: str, module: Any, args: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if isinstance(values, Tensor):
            _note_rows(name, values, rows, notes)

    rank.compute = compute_noted  # type: ignore[method-assign]
    for name, module in _operations(rank):
        module.register_forward_hook(partial(note, name))


def _operations(rank: Rank) -> list[tuple[str, Any]]:
    """Modules without parts, and those that sum up theirs; layers numbered over all stages."""
    found = []
    for name, module in rank.model.named_modules():
        words = name.split(".")
        if "layers" in words:
            place = words.index("layers") + 1
            if place >= len(words):
                continue
            layer = rank.model.get_submodule(".".join(words[: place + 1]))
            words = [f"layer {layer.layer_number:04d}", *words[place + 1 :]]
        if name and (not any(module.children()) or len(words) == 1):
            found.append((" ".join(words), module))
    return found


def _note_rows(name: str, values: Tensor, rows: _StepRows, notes: dict[str, float]) -> None:
    if rows.num_tokens not in values.shape[:2] or not rows.positions:
        return  # the logits of some tokens, or nothing of this request
    values_TX = values.detach().reshape(rows.num_tokens, -1)
    for row, position in rows.positions:
        checksum = zlib.crc32(values_TX[row].float().numpy().tobytes())
        notes[_SEPARATOR.join((name, str(values_TX.shape[1]), str(position)))] = checksum


def first_difference(found: Mapping[str, float], expected: Mapping[str, float], last_position: int) -> str:
    """The first operation of which a row up to a position differs, and the first position where it does; "" if none."""
    order = {key.rpartition(_SEPARATOR)[0]: index for index, key in reversed(list(enumerate(expected)))}
    parted: dict[str, int] = {}
    for key in found.keys() & expected.keys():
        operation, _, position = key.rpartition(_SEPARATOR)
        if found[key] != expected[key] and int(position) <= last_position:
            parted[operation] = min(int(position), parted.get(operation, last_position))
    if not parted:
        return ""
    first = min(parted, key=lambda operation: order[operation])
    return f"{first.split(_SEPARATOR)[0]} at position {parted[first]}"
