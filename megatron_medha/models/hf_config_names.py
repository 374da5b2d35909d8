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
    architectures attention_bias dtype head_dim hidden_act hidden_size intermediate_size is_causal layer_types
    max_position_embeddings max_window_layers mlp_bias model_type num_attention_heads num_hidden_layers
    num_key_value_heads original_max_position_embeddings partial_rotary_factor quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype use_sliding_window vocab_size
""")

# Training, bookkeeping, how attention is computed, lengths that nothing depends on, labels of other tasks, and how text
# is sampled (generation_config.json is where that is read). pretraining_tp cuts sums into parts.
_HARMLESS = _names("""
    attention_dropout attn_implementation attn_pdrop author auto_map bad_words_ids base_model base_model_name
    base_model_name_or_path batch_size begin_suppress_tokens bf16 cache_implementation chat_template
    chunk_size_feed_forward comment context_length created_at dataset datasets date description diversity_penalty
    do_sample dropout early_stopping embd_pdrop encoder_no_repeat_ngram_size experiment
    experts_implementation exponential_decay_length_penalty finetuned_from finetuning_task fp16 fp32
    hidden_dropout id2label init_device init_method init_std initializer_factor initializer_range is_decoder
    is_llama_config keys_to_ignore_at_inference label2id language languages learning_rate length_penalty license
    max_length max_new_tokens max_seq_len max_seq_length max_sequence_length min_length min_new_tokens model_card
    model_max_length model_name n_ctx n_positions name name_or_path neftune_noise_alpha neuron no_repeat_ngram_size
    notes num_beam_groups num_beams num_labels num_return_sequences optimizer output_attentions output_hidden_states
    output_scores peft_type pipeline_parallel_degree prefix pretraining_tp problem_type recompute_granularity
    remove_invalid_values renormalize_logits repetition_penalty resid_pdrop residual_dropout return_dict
    return_dict_in_generate revision seed seq_len seq_length suppress_tokens tags task_specific_params temperature
    tensor_parallel_degree tf_legacy_loss tie_last_hidden_states top_k top_p torchscript tp_size transformers.js_config
    type_vocab_size typical_p unsloth_fixed use_bfloat16 use_cache use_flash_attention use_flash_attention_2
    use_flash_attn use_return_dict version weight_decay
""")
# Groups by how a name begins or ends: private notes, the fine-tuning that made the weights, tools and their versions.
_HARMLESS_PREFIXES = tuple(_names("""
    _ deepspeed dpo_ ds_ eval_ fsdp gradient_ grpo_ lora_ loss_ lr_ merge_ mergekit neuron_ num_train_ sft_ summary_
    tokenizer train unsloth_ wandb
"""))
_HARMLESS_SUFFIXES = tuple(_names("_dropout _dropout_prob _loss _token_id _token_ids _version"))

# Values of fields that say again what other fields do.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "activation": ("silu", "swiglu"), "no_bias": (True,), "rotary_pct": (1.0,)
}  # fmt: skip


def is_harmless_field(name: str, value: Any) -> bool:
    """Whether this field leaves the logits alone."""
    is_named = name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES) or name.endswith(_HARMLESS_SUFFIXES)
    is_token = name.endswith("_token") and isinstance(value, str)  # use_cls_token is a switch
    return is_named or is_token or value in _HARMLESS_VALUES.get(name, ())
