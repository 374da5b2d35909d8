"""A random Llama of a given shape as a Hugging Face directory: for timings, where what it says does not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def save_plain_model(
    directory: Path,
    *,
    hidden_size: int,
    ffn_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    vocab_size: int = 1024,
) -> None:
    """Weights in fp32, small enough that nothing overflows at any depth or length."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden_size,
        "intermediate_size": ffn_size, "num_hidden_layers": num_layers, "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads, "head_dim": head_dim, "vocab_size": vocab_size, "hidden_act": "silu",
        "max_position_embeddings": 1 << 20, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "torch_dtype": "float32",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocab_size, hidden_size), "lm_head.weight": (vocab_size, hidden_size)}
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        shapes[f"{name}.self_attn.q_proj.weight"] = (num_heads * head_dim, hidden_size)
        shapes[f"{name}.self_attn.k_proj.weight"] = (num_kv_heads * head_dim, hidden_size)
        shapes[f"{name}.self_attn.v_proj.weight"] = (num_kv_heads * head_dim, hidden_size)
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden_size, num_heads * head_dim)
        shapes[f"{name}.mlp.gate_proj.weight"] = (ffn_size, hidden_size)
        shapes[f"{name}.mlp.up_proj.weight"] = (ffn_size, hidden_size)
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden_size, ffn_size)
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    norms = ["model.norm.weight"]
    for layer in range(num_layers):
        norms += [f"model.layers.{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    tensors |= {name: torch.ones(hidden_size) for name in norms}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def save_word_tokenizer(directory: Path, vocab_size: int) -> None:
    """A tokenizer is asked for, though only ids are sent: one word per id."""
    tokens = {f"t{i}": i for i in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"}
    content: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text("{}")
