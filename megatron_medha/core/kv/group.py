"""Kinds of KV: layers whose KV has one shape and is seen by queries in the same way form a group."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class KVKind(Enum):
    """What the layers of a group keep of a sequence."""

    FULL = "full"      # keys and values of all tokens
    WINDOW = "window"  # of the last window_tokens
    LATENT = "latent"  # one compressed vector a token (MLA)
    STATE = "state"    # a state of fixed size, of recurrent layers


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share block tables. Operations, tables and segments name a group by its index among all groups."""

    kind: KVKind = KVKind.FULL
    window_tokens: int | None = None  # of WINDOW


GROUPS: tuple[KVGroup, ...] = (KVGroup(),)
"""The groups of every model that is served today."""
