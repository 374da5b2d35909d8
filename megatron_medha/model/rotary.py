"""Rotary position embedding: frequencies as Hugging Face's configs mean them, angles per token, and the rotation.

Shapes: T tokens, D numbers of a head that turn (mostly all), F = D / 2 frequencies.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_medha.core.model_spec import RopeScaling
from megatron_medha.models.model_config import ModelConfig

# Up to here angles are rounded to fp32 before their cosine is taken, as transformers and Megatron do. Models are
# trained and compared under that rounding: a random 4-layer model's logits at 4,096 tokens differ from transformers'
# by 6e-4 (relative to the largest) with exact angles, by 1e-5 with rounded ones. The rounding grows with the position,
# to 8e-3 in the cosine at 131,072 and 0.06 at 1M, so beyond this position angles stay exact.
_NUM_ROUNDED_POSITIONS = 8192


class Rotation(NamedTuple):
    """What turns the queries and keys of a batch, the same in every layer but local ones."""

    cos_TD: Tensor
    signed_sin_TD: Tensor  # its first half negated, so that a rolled input needs no sign of its own
    local: Rotation | None = None  # the same in local layers, where these have a base of their own

    def rows(self, rows: slice) -> Rotation:
        """Of some tokens."""
        local = None if self.local is None else self.local.rows(rows)
        return Rotation(self.cos_TD[rows], self.signed_sin_TD[rows], local)


class Rotary:
    """The rotary embedding of one model."""

    def __init__(self, config: ModelConfig) -> None:
        scaling = config.rope_scaling
        self._num_rotated = config.num_rotated
        self._theta = config.rope_theta
        self._scaling = scaling
        dynamic_from = scaling.original_max_context_len or config.max_context_len
        self._dynamic_from = dynamic_from if scaling.kind == "dynamic" else None
        self._frequencies_F = _scaled_frequencies(config.num_rotated, config.rope_theta, scaling)
        self._amplitude = _yarn_amplitude(scaling) if scaling.kind == "yarn" else 1.0
        self._local: Rotary | None = None
        if config.local_rope_theta is not None:
            of_local = dataclasses.replace(
                config, rope_theta=config.local_rope_theta, rope_scaling=RopeScaling(), local_rope_theta=None
            )
            self._local = Rotary(of_local)
        self._on_device: dict[torch.device, Tensor] = {}
        self._consecutive: dict[tuple[int, torch.device], Rotation] = {}

    def at(self, positions_T: Tensor, lengths_T: Tensor | None = None) -> Rotation:
        """Cosines and sines (fp32) at each token's position (int64).

        lengths_T: length of the sequence when the token was computed, prompt tokens counting the whole prompt. Only
        dynamic scaling looks at it; it makes that independent of how the prompt was cut. Default: position + 1.
        """
        local = None if self._local is None else self._local.at(positions_T)
        if not self._is_in_table(positions_T):
            return self._computed(positions_T, lengths_T)._replace(local=local)
        table = self._table
        return Rotation(table.cos_TD[positions_T], table.signed_sin_TD[positions_T], local)

    def _is_in_table(self, positions_T: Tensor) -> bool:
        """Whether angles can be looked up: a decode step on a CPU has a dozen small operations less then."""
        is_fixed = self._dynamic_from is None and positions_T.device.type == "cpu" and positions_T.numel() > 0
        return is_fixed and int(positions_T.max()) < _NUM_ROUNDED_POSITIONS

    def _computed(self, positions_T: Tensor, lengths_T: Tensor | None) -> Rotation:
        if self._dynamic_from is not None and positions_T.numel():
            lengths_T = positions_T + 1 if lengths_T is None else lengths_T
            angles_TF = positions_T.double()[:, None] * self._dynamic_frequencies(lengths_T)
        else:
            frequencies_F = self._frequencies_on(positions_T.device)
            angles_TF = torch.outer(positions_T.double(), frequencies_F)  # exact: 24 bits times 24 bits
        is_rounded_T1 = positions_T[:, None] < _NUM_ROUNDED_POSITIONS
        angles_TF = torch.where(is_rounded_T1, angles_TF.float().double(), angles_TF)
        sin_TF = (torch.sin(angles_TF) * self._amplitude).float()
        cos_TF = (torch.cos(angles_TF) * self._amplitude).float()
        return Rotation(torch.cat((cos_TF, cos_TF), dim=-1), torch.cat((-sin_TF, sin_TF), dim=-1))

    @cached_property
    def _table(self) -> Rotation:
        """Of positions [0, _NUM_ROUNDED_POSITIONS), on the CPU."""
        with torch.inference_mode(False):  # training must be able to use it later
            return self._computed(torch.arange(_NUM_ROUNDED_POSITIONS), None)

    def first_positions(self) -> Rotation | None:
        """Cosines and sines by position, of the first ones, on the CPU; None where they depend on more."""
        return None if self._dynamic_from is not None else self._table

    @property
    def depends_on_lengths(self) -> bool:
        """Whether angles need a look at the lengths on the host, which a CUDA graph cannot take."""
        return self._dynamic_from is not None

    def consecutive(self, num_tokens: int, device: torch.device) -> Rotation:
        """At positions [0, num_tokens), kept: training asks for the same ones at every step."""
        key = (num_tokens, device)
        if key not in self._consecutive:
            self._consecutive.clear()
            # Made outside of inference mode even when first asked for in it: training must be able to use them later.
            with torch.inference_mode(False):
                lengths_T = torch.full((num_tokens,), num_tokens, device=device)
                self._consecutive[key] = self.at(torch.arange(num_tokens, device=device), lengths_T)
        return self._consecutive[key]

    def _frequencies_on(self, device: torch.device) -> Tensor:
        """Copied once: a copy per step would be one more thing the host waits for."""
        if device not in self._on_device:
            self._on_device[device] = self._frequencies_F.to(device)
        return self._on_device[device]

    def _dynamic_frequencies(self, lengths_T: Tensor) -> Tensor:
        """fp64, one row per token, or a single row where all have the model's own length at most."""
        assert self._dynamic_from is not None
        longest = int(lengths_T.max())
        if longest <= self._dynamic_from:
            return self._frequencies_on(lengths_T.device)[None]
        lengths, row_T = torch.unique(lengths_T.clamp(min=self._dynamic_from), return_inverse=True)
        dim, factor = self._num_rotated, self._scaling.factor
        rows = [
            _frequencies(dim, self._theta * (factor * n / self._dynamic_from - (factor - 1)) ** (dim / (dim - 2)))
            for n in lengths.tolist()
        ]
        return torch.stack(rows).to(lengths_T.device)[row_T]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the last dimension of x [T, ..., D] by each token's angles: pairs (i, i + D/2), as in HF's Llama.

    Computed in fp32, returned in x's dtype.
    """
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (x.shape[-1],)
    cos, signed_sin = rotation.cos_TD.view(shape), rotation.signed_sin_TD.view(shape)
    turned = x.roll(x.shape[-1] // 2, -1) * signed_sin
    return turned.addcmul_(x.to(turned.dtype), cos).to(x.dtype)


def _frequencies(dim: int, theta: float) -> Tensor:
    """theta ** (-2i / dim) as fp64 that hold fp32 values.

    Rounded on purpose: the fp32 frequencies are part of the model, it was trained with them, and at long
    positions exact ones differ visibly. Only the product with the position must not be rounded.
    """
    return (1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))).double()


def _scaled_frequencies(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """fp64 [F], holding fp32 values."""
    frequencies_F = _frequencies(dim, theta).float()
    match scaling.kind:
        case "none" | "dynamic":
            pass
        case "linear":
            frequencies_F = frequencies_F / scaling.factor
        case "llama3":
            frequencies_F = _llama3_frequencies(frequencies_F, scaling)
        case "yarn":
            frequencies_F = _yarn_frequencies(dim, theta, scaling)
        case _:
            raise ValueError(f"rope scaling {scaling.kind!r} is not known")
    return frequencies_F.double()


def _llama3_frequencies(frequencies_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (Llama 3.1)."""
    context_len = scaling.original_max_context_len
    wavelength_F = 2 * math.pi / frequencies_F
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend_F = ((context_len / wavelength_F - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend_F) * frequencies_F / scaling.factor + blend_F * frequencies_F


def _yarn_frequencies(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Interpolated and original frequencies, blended along the dimensions (arXiv:2309.00071)."""

    def dimension_with(num_rotations: float) -> float:
        """The (real-valued) dimension that turns this often over the original context."""
        return dim * math.log(scaling.original_max_context_len / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.is_range_rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated_share_F = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    powers_F = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return interpolated_share_F / (scaling.factor * powers_F) + (1 - interpolated_share_F) / powers_F


def _yarn_amplitude(scaling: RopeScaling) -> float:
    """What cosines and sines are multiplied by."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
