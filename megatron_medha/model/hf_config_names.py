"""Fields of Hugging Face configs that leave the logits of the served families alone, and the defaults of the others.

A field that is set, and neither read by hf_config.py nor named here, refuses its checkpoint: it may change the answer.
"""

from __future__ import annotations

from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What transformers 5 takes for a field that config.json does not have; null is another matter. Sizes are left out:
# no checkpoint means those of the class, and one without them is damaged.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28,
        "head_dim": 128,
    },
}  # fmt: skip

READ = _names("""
    architectures attention_bias dtype head_dim hidden_act hidden_size intermediate_size layer_types
    max_position_embeddings max_window_layers mlp_bias model_type num_attention_heads num_hidden_layers
    num_key_value_heads original_max_position_embeddings partial_rotary_factor quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype use_sliding_window vocab_size
""")

# Training, bookkeeping, how attention is computed, lengths that nothing depends on, labels of other tasks, and how text
# is sampled (generation_config.json is where that is read). pretraining_tp cuts sums into parts.
_HARMLESS = _names("""
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path attention_dropout attn_implementation
    attn_pdrop auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward diversity_penalty do_sample
    dropout early_stopping embd_pdrop encoder_no_repeat_ngram_size experts_implementation
    exponential_decay_length_penalty finetuning_task gradient_checkpointing hidden_dropout id2label
    initializer_range is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length
    max_sequence_length min_length model_max_length name_or_path neftune_noise_alpha no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores
    prefix pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop residual_dropout
    return_dict return_dict_in_generate suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_last_hidden_states tokenizer_class tokenizer_model_max_length tokenizer_padding_side top_k top_p torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_flash_attention_2 use_return_dict
""")


# Fields of converted models that say again what other fields do.
_HARMLESS_VALUES = {"activation": ("silu", "swiglu")}


def is_harmless(name: str, value: Any) -> bool:
    """Whether this field leaves the logits alone."""
    return name in _HARMLESS or name.endswith("_token_id") or value in _HARMLESS_VALUES.get(name, ())
