"""The models that servers are compared with, and what each needs: context, memory for KV, llama.cpp's slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.lib.random_llama import save_served_llama, save_small_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Random weights of one shape; speed does not depend on the values."""

    name: str
    save: Callable[[Path], None]     # as a Hugging Face directory
    max_context_len: int             # of ours and of vLLM, which reserves KV for one request of it
    kv_gib: int                      # of ours and of vLLM
    llama_slots: int                 # requests at a time; each has a context of its own
    llama_slot_tokens: int
    lengths: tuple[int, ...]         # of lone prompts


_MODELS = (
    Model(
        name="28m", save=save_small_model, max_context_len=65536, kv_gib=3, llama_slots=16, llama_slot_tokens=40960,
        lengths=(256, 1024, 8192, 16384, 32768),
    ),
    # SmolLM2-135M: 23 KB of KV a token; its context ends at 8,192, the output's token included.
    Model(
        name="135m",
        save=partial(
            save_served_llama, hidden_size=576, ffn_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
            vocab_size=49152, is_tied=True,
        ),
        max_context_len=8192, kv_gib=3, llama_slots=16, llama_slot_tokens=8192, lengths=(1024, 4096, 8128),
    ),
    # Qwen3-0.6B without its vocabulary: 112 KiB of KV a token, so fewer slots.
    Model(
        name="440m",
        save=partial(
            save_served_llama, hidden_size=1024, ffn_size=3072, num_layers=28, num_heads=16, num_kv_heads=8,
            head_dim=128,
        ),
        max_context_len=8448, kv_gib=4, llama_slots=8, llama_slot_tokens=8448, lengths=(1024, 4096, 8192),
    ),
    # Qwen3-1.7B without its vocabulary: 1.4 billion parameters, 3 GB of weights, the same KV.
    Model(
        name="1.4b",
        save=partial(
            save_served_llama, hidden_size=2048, ffn_size=6144, num_layers=28, num_heads=16, num_kv_heads=8,
            head_dim=128,
        ),
        max_context_len=8448, kv_gib=4, llama_slots=8, llama_slot_tokens=8448, lengths=(1024, 4096, 8192),
    ),
)  # fmt: skip
MODELS = {model.name: model for model in _MODELS}
SMALL = MODELS["28m"]
