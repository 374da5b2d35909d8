"""Small GGUF files, written by the `gguf` package as llama.cpp's converters write them, from models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
KINDS = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    path: Path, model: Any, *, quantised: str = "F32", more: dict[str, Any] | None = None, tokenizer: bool = True,
    is_stacked: bool = True,
) -> None:
    """That model. quantised: ggml's name of how matrices are stored. more: further fields of the architecture.

    is_stacked: False writes experts one by one, as in early files.
    """
    import gguf

    config = model.config
    kind = KINDS.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    for key, value in (more or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{kind}.{key}", value)
    if config.model_type in KINDS:
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if config.model_type != "mixtral":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if config.model_type == "qwen2_moe":
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if rope["rope_type"] == "llama3":
        own = model.model.rotary_emb.inv_freq
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / own).float().numpy())
    if tokenizer:
        write_byte_tokenizer(writer)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for key, tensor in _in_llama_cpp(state, is_stacked).items():
        if kind == "llama" and (".q_proj." in key or ".k_proj." in key):
            tensor = in_pairs(tensor, head_dim)
        values = tensor.float().numpy()
        if key.endswith("shared_expert_gate.weight"):
            values = values[0]
        to = gguf.GGMLQuantizationType[quantised if values.ndim > 1 else "F32"]
        if to.name == "F32":
            writer.add_tensor(name_of(key), values)
        elif to.name == "F16":
            writer.add_tensor(name_of(key), values.astype(np.float16))
        else:
            writer.add_tensor(name_of(key), gguf.quants.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_llama_cpp(state: dict[str, torch.Tensor], is_stacked: bool) -> dict[str, torch.Tensor]:
    """With the gates and the up projections of experts apart."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, experts: torch.Tensor) -> None:
        if is_stacked:
            found[f"{name}.exps"] = experts
        else:
            found.update({f"{name}.{number}.exp": expert for number, expert in enumerate(experts)})

    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".")
        if kind == "gate_up_proj":
            for name, part in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                add(f"{stem}.{name}", part)
        elif kind == "down_proj" and stem.endswith(".experts"):
            add(f"{stem}.down", tensor)
        else:
            found[key] = tensor
    return found


def write_byte_tokenizer(writer: Any) -> None:
    """GPT-2's alphabet, two merges, an end token."""
    from megatron_medha.text.text_slices import CHAR_OF_BYTE

    tokens = [*CHAR_OF_BYTE, "th", "the", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(258)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}<|end|>{% endfor %}")


def in_pairs(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head so that numbers that turn together are neighbours, as llama.cpp's converter permutes them."""
    heads = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def name_of(key: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, kind = key.rpartition(".")
    if kind == "exps":
        return f"blk.{stem.split('.')[2]}.ffn_{stem.rpartition('.')[2]}_exps.weight"
    if kind == "exp":
        stem, _, number = stem.rpartition(".")
        return f"blk.{stem.split('.')[2]}.ffn_{stem.rpartition('.')[2]}.{number}.weight"
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.{kind}"
