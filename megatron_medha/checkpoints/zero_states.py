"""The fp32 master weights in the state files of DeepSpeed's ZeRO engine, put together from the ranks' pieces.

Stages 1 and 2 keep a flat vector for each parameter group, cut into one piece for each rank. Stage 3 cuts every
parameter by itself and joins the pieces of a rank. Read here rather than by DeepSpeed's zero_to_fp32, which
copies whole groups and trusts the files.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import shown
from megatron_medha.safe_files.pickle_machine import PickleError
from megatron_medha.safe_files.safe_pickle import load_torch_file, size_of

MODEL_STATES, OPTIM_STATES = "*_model_states.pt", "*_optim_states.pt"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor that lies in pieces, one after the other, perhaps with padding at the end."""

    shape: torch.Size
    parts: tuple[Tensor, ...]

    def joined(self) -> Tensor:
        """The tensor itself; a copy unless it is in one piece."""
        flat = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        return flat[: _numel(self.shape)].view(self.shape)


def read_model_states(step: Path) -> tuple[Mapping[str, Any], Path]:
    """What rank 0 saved beside its part of the optimizer (shapes, names, the script's arguments), and where."""
    path = _in_order_of_ranks(step, MODEL_STATES)[0]
    return _model_states(path), path


def parameter_shapes(states: Mapping[str, Any], path: Path) -> dict[str, torch.Size]:
    """The shapes of all parameters, trained or frozen, by name without "module."."""
    try:
        groups = [*states["param_shapes"], states.get("frozen_param_shapes") or {}]
        return {name.removeprefix("module."): size_of(shape) for group in groups for name, shape in group.items()}
    except (AttributeError, TypeError, PickleError) as error:
        raise CheckpointError(f"{path}: param_shapes cannot be read: {error}") from error


def read_master_weights(step: Path) -> dict[str, Pieces]:
    """All parameters and buffers by name. Raises CheckpointError naming the file or the step at fault."""
    model_paths, optim_paths = (_in_order_of_ranks(step, pattern) for pattern in (MODEL_STATES, OPTIM_STATES))
    try:
        optimizers = [_optimizer_state(path) for path in optim_paths]
        stage, num_ranks = optimizers[0]["zero_stage"], optimizers[0]["partition_count"]
        num_ranks = max(num_ranks) if isinstance(num_ranks, list) else num_ranks
        if num_ranks != len(optim_paths):
            raise CheckpointError(f"{step}: Expected {num_ranks} of {OPTIM_STATES}, but found {len(optim_paths)}")
        if stage not in (1, 2, 3):
            raise CheckpointError(f"{optim_paths[0]}: zero_stage={shown(stage)} cannot be read; stages 1 to 3 can")
        states = [_model_states(path) for path in (model_paths if stage == 3 else model_paths[:1])]
        found = dict(_buffers(states[0]))
        found |= _frozen(states)
        if stage == 3:
            found |= _of_stage_3(states[0]["param_shapes"], [optimizer["fp32_flat_groups"] for optimizer in optimizers])
        else:
            found |= _of_stage_2(states[0]["param_shapes"], optimizers)
        for name, source in (states[0].get("shared_params") or {}).items():
            if source in found:
                found[name] = found[source]
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, PickleError) as error:
        raise CheckpointError(f"{step}: cannot be put together, damaged or incomplete: {error!r}") from error
    return {name.removeprefix("module."): pieces for name, pieces in found.items()}


def _model_states(path: Path) -> Mapping[str, Any]:
    states = load_torch_file(path)
    if not isinstance(states, dict) or not isinstance(states.get("param_shapes"), list):
        raise CheckpointError(f"{path}: holds no param_shapes; not one of ZeRO's model states")
    _check_extent(path, (states.get("frozen_param_fragments") or {}).values())
    return states


def _optimizer_state(path: Path) -> Mapping[str, Any]:
    states = load_torch_file(path)
    state = states.get("optimizer_state_dict") if isinstance(states, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state:
        raise CheckpointError(f"{path}: holds no zero_stage; not one of ZeRO's optimizer states")
    _check_extent(path, state.get("fp32_flat_groups") or state.get("single_partition_of_fp32_groups") or [])
    return state


def _check_extent(path: Path, tensors: Any) -> None:
    """A tensor named again and again would make a model larger than the file."""
    if sum(tensor.nbytes for tensor in tensors) > path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors are larger than the file, damaged")


def _buffers(states: Mapping[str, Any]) -> Iterator[tuple[str, Pieces]]:
    names = set(states.get("buffer_names") or ())
    for name, tensor in states.get("module", {}).items():
        if name in names:
            yield name, Pieces(tensor.shape, (tensor.reshape(-1),))


def _frozen(states: Sequence[Mapping[str, Any]]) -> dict[str, Pieces]:
    """Parameters that were not trained; in stage 3 every rank has a piece of each."""
    shapes = states[0].get("frozen_param_shapes") or {}
    return {
        name: _pieces(name, shape, [state["frozen_param_fragments"][name].reshape(-1) for state in states])
        for name, shape in shapes.items()
    }


def _of_stage_2(groups: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]) -> dict[str, Pieces]:
    found = {}
    partitions = [optimizer["single_partition_of_fp32_groups"] for optimizer in optimizers]
    paddings = optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        vector = _Vector([partition[number] for partition in partitions])
        place = 0
        for index, (name, shape) in enumerate(shapes.items()):
            numel = _numel(shape)
            found[name] = _pieces(name, shape, vector.between(place, place + numel))
            place += numel + (paddings[number][index] if paddings is not None else 0)
        # Each rank's piece is as long as the others', so the end of the vector is padding.
        if vector.numel - place >= 2 * len(optimizers) or place > vector.numel:
            raise ValueError(f"group {number} has {vector.numel} elements, its parameters {place}")
    return found


def _of_stage_3(groups: Sequence[Mapping[str, Any]], flat_groups: Sequence[Sequence[Tensor]]) -> dict[str, Pieces]:
    vectors = [_Vector(of_rank) for of_rank in flat_groups]
    found = {}
    place = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        share = -(-_numel(shape) // len(vectors))
        parts = [part for vector in vectors for part in vector.between(place, place + share)]
        found[name] = _pieces(name, shape, parts)
        place += share
    if any(vector.numel != place for vector in vectors):
        raise ValueError(f"ranks have {[vector.numel for vector in vectors][:8]} elements, the parameters {place}")
    return found


class _Vector:
    """Tensors of one dimension, seen as one."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = [part.reshape(-1) for part in parts]
        self._stops = list(accumulate(len(part) for part in self._parts))
        self.numel = self._stops[-1] if self._stops else 0

    def between(self, start: int, stop: int) -> list[Tensor]:
        """The elements [start, stop), as views."""
        found = []
        for index in range(bisect_right(self._stops, start), len(self._parts)):
            first = self._stops[index] - len(self._parts[index])
            if first >= stop:
                break
            found.append(self._parts[index][max(start - first, 0) : stop - first])
        return found


def _pieces(name: str, shape: Sequence[int], parts: Sequence[Tensor]) -> Pieces:
    num_there = sum(len(part) for part in parts)
    if num_there < _numel(shape) or not parts:
        raise ValueError(f"tensor {name} has {num_there} of its {_numel(shape)} elements")
    return Pieces(size_of(shape), tuple(parts))


def _numel(shape: Sequence[int]) -> int:
    return prod(size_of(shape))


def _in_order_of_ranks(step: Path, pattern: str) -> list[Path]:
    """The files of that kind, those of rank 2 before those of rank 10."""
    return sorted(step.glob(pattern), key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])
