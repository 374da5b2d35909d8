"""Which of Megatron-LM's arguments change what a trained model computes, and which never do. Reading them is elsewhere.

Recorded from Megatron-LM's own parser, core 0.5 to 0.19 and its main and dev branches of August 2026. An argument that
is named nowhere here and is set refuses its checkpoint: it may well change the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Requirement(NamedTuple):
    """Values of an argument under which a model is of the Llama family."""

    name: str
    is_fine: Callable[[Any], bool]
    reason: str  # why other values are refused


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _is_unset(value: Any) -> bool:
    return not value


# Arguments that megatron_args.py turns into a ModelConfig, or that say how others are to be read.
READ = _names("""
    add_qkv_bias ffn_hidden_size group_query_attention hidden_size kv_channels layernorm_epsilon
    max_position_embeddings norm_epsilon null_tokenizer_eod_id num_attention_heads num_layers num_query_groups
    qk_layernorm rope_scaling_factor rotary_base rotary_seq_len_interpolation_factor
    tokenizer_type untie_embeddings_and_output_weights use_rope_scaling vocab_size
""")

# Saved by every version of the parser, with defaults that differ from what most models use: never assumed.
NEEDED = _names("""
    add_bias_linear ffn_hidden_size group_query_attention hidden_size kv_channels max_position_embeddings normalization
    num_attention_heads num_layers position_embedding_type rotary_percent swiglu untie_embeddings_and_output_weights
""")

# Arguments that must not be set, by the reason.
_UNSET = {
    "the MLP must be gated SiLU (--swiglu)": "squared_relu quick_geglu",
    "linear layers must have no bias (--disable-bias-linear)": "add_bias_linear",
    "norm weights are not zero-centred here": "apply_layernorm_1p layernorm_zero_centered_gamma",
    "rotary pairs are the two halves of a head here": "rotary_interleaved",
    "every layer must have the same rotary base": "rotary_base_per_layer",
    "mixtures of experts are not served yet": "num_experts",
    "only grouped-query attention is": "multi_latent_attention experimental_attention_variant",
    "every layer must have softmax attention": "linear_attention_type linear_attention_freq",
    "only plain grouped-query attention is": "attention_output_gate head_wise_attn_gate",
    "q and k are normalised by RMSNorm or not at all here": "qk_l2_norm export_qk_l2_norm",
    "every layer must have rotary positions": "no_rope_freq",
    "the residual must bypass the norms": "apply_residual_connection_post_layernorm",
    "layers must all be alike": "heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json",
    "every layer must have attention":
        "is_hybrid_model hybrid_attention_ratio hybrid_mlp_ratio hybrid_override_pattern hybrid_layer_pattern",
    "the MLP's gate must be plain": "glu_linear_offset",
    "muP multiplies embeddings, attention scores and logits": "use_mup",
    "there must be one residual stream": "enable_mhc_connections enable_hyper_connections",
    "models that retrieve are not served": "retro_add_retriever",
    "only language models are served": "vision_pretraining",
    "gpt-oss is not served yet": "enable_gpt_oss",
    "models that ModelOpt has quantised or pruned are not served": "modelopt_enabled",
}

REQUIREMENTS = (
    Requirement("position_embedding_type", lambda v: v == "rope", "positions must be rotary (rope)"),
    Requirement("normalization", lambda v: v == "RMSNorm", "norms must be RMSNorm"),
    Requirement("swiglu", lambda v: v is True, "the MLP must be gated SiLU (--swiglu)"),
    Requirement("rotary_percent", lambda v: v == 1.0, "rotary positions turn whole heads here"),
    Requirement("window_size", lambda v: v is None, "every layer must see the whole context"),
    Requirement("softmax_type", lambda v: v in (None, "vanilla"), "the attention's softmax must be plain"),
    Requirement("activation_func_clamp_value", lambda v: v is None, "the MLP's activation must be plain SiLU"),
    Requirement("spec", lambda v: v is None, "layers of the training script's own are not known here"),
    *(Requirement(name, _is_unset, reason) for reason, names in _UNSET.items() for name in names.split()),
)

# Groups of arguments by the start of their names: training, checkpoints, logging, Megatron's own inference server.
# moe_ is here because num_experts, without which it means nothing, is refused above.
_HARMLESS_PREFIXES = tuple(_names("""
    adam_ async_ckpt_ ckpt_ data_path ddp_ deepspeed dist_ckpt_ eval_ fault_injector_ flight_recorder_ fsdp_ ft_ grpo_
    inference_ inprocess_ langrl_ log_ logits_load_ logits_save_ lr_ megatron_fsdp_ moe_ muon_ non_persistent_
    one_logger_ otel_ pytorch_profiler_ rl_ straggler_ tensorboard_ tp_comm_ wandb_ zero_
"""))

# Whatever their value: training, data, logging, layout and precision; or a detail of a feature whose own switch is
# refused above (multi-latent and linear attention, experts, Mamba, muP, hyper-connections, windows, YaRN).
_HARMLESS = _names("""
    _is_global_batch_size_explicitly_specified account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split accumulate_allreduce_grads_in_fp32 activation_offload_fraction
    add_position_embedding adlr_autoresume adlr_autoresume_interval align_grad_reduce align_param_gather
    allow_ambiguous_pad_tokens allow_transformer_engine app_tag_run_name app_tag_run_version apply_dsa_kernel_fusion
    apply_query_key_layer_scaling apply_rope_fusion apply_wd_to_qk_layernorm async_save async_strategy
    async_tensor_model_parallel_allreduce attention_backend attention_dropout attention_softmax_in_fp32
    auto_detect_ckpt_format barrier_with_L1_time batch_invariant_backend batch_invariant_mode bert_binary_head
    bert_embedder_type bert_load bf16 bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion
    biencoder_projection_dim biencoder_shared_query_context_model blendable_index_path block_data_path
    cache_mla_latents calc_ft_timeouts calculate_per_token_loss chat_template check_for_large_grads
    check_for_nan_in_loss_and_grad check_for_spiky_loss check_weight_hash_across_dp_replicas_interval
    chunked_optimizer_state_offload class_token_present classes_fraction clip_grad clone_scatter_output_in_embedding
    config_logger_dir consumed_train_bins consumed_train_samples consumed_valid_samples context_parallel_size
    cp_comm_type cp_partition_mode cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers
    create_all_gather_group create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion
    csa_compress_ratios csa_compress_rotary_base csa_dense_mode csa_window_size cuda_graph_dynamic_microbatches
    cuda_graph_impl cuda_graph_modules cuda_graph_scope cuda_graph_warmup_steps curr_iteration data_args_path
    data_cache_path data_parallel_random_init data_parallel_sharding_strategy data_parallel_size
    data_per_class_fraction data_sharding dataloader_defer_npy_index_mmap dataloader_fast_cache_load
    dataloader_inter_document_masking dataloader_type decode_only_cuda_graphs decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers decoder_num_layers decoder_seq_length decoupled_lr decoupled_min_lr
    decrease_batch_size_if_needed defer_embedding_wgrad_compute delay_grad_reduce delay_offload_until_cuda_graph
    delay_param_gather delay_wgrad_compute delta_offload_bytes_across_pp_ranks dense_grouped_gemm
    deprecated_use_mcore_models deterministic_mode dino_bottleneck_size dino_freeze_last_layer dino_head_hidden_size
    dino_local_crops_number dino_local_img_size dino_norm_last_layer dino_teacher_temp dino_warmup_teacher_temp
    dino_warmup_teacher_temp_epochs disable_bf16_reduced_precision_matmul disable_chunked_prefill
    disable_grad_buffers_cpu_backup disable_jit_fuser disable_mamba_mem_eff_path disable_msc_deprecated
    disable_param_buffers_cpu_backup disable_straggler_on_startup disable_symmetric_registration
    distrib_optim_fully_reshardable_mem_efficient distribute_saved_activations distributed_backend
    distributed_timeout_minutes distributed_timeout_seconds_after_init do_test do_train do_valid
    dsa_indexer_head_dim dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff
    dsa_indexer_n_heads dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
    dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_use_sparse_loss
    dsa_kernel_backend dump_param_to_param_group_map dynamic_context_parallel embedding_init_method_std
    embedding_path empty_unused_memory_level enable_chunked_prefill enable_cuda_graph enable_experimental
    enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc enable_one_logger
    encoder_num_layers encoder_pipeline_model_parallel_size encoder_seq_length encoder_tensor_model_parallel_size
    end_weight_decay eod_mask_loss ep_overlap_early_attn_memory_release error_injection_rate error_injection_type
    evidence_data_path exit_duration_in_mins exit_interval exit_on_missing_checkpoint exit_signal
    exit_signal_handler exit_signal_handler_for_dataloader exit_signal_handler_for_training exp_avg_dtype
    exp_avg_sq_dtype expert_gtp_weight_remat_size expert_model_parallel_size
    expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size export_default_te_spec
    export_draft_vocab_size export_eagle_algorithm export_force_local_attention export_freeze_mtp export_kd_cfg
    export_kd_finalize export_kd_teacher_ckpt_format export_kd_teacher_load export_kd_teacher_model_config
    export_kv_cache_quant export_legacy_megatron export_model_type export_moe_apply_probs_on_input
    export_num_eagle_layers export_num_medusa_heads export_num_mtp export_offline_model export_quant_cfg
    export_real_quant_cfg export_te_mcore_model external_cuda_graph fake_process_group fallback_to_eager_attn
    fim_data fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token fim_prefix_token fim_rate
    fim_split_sample fim_spm_rate fim_suffix_token fine_grained_activation_offloading
    fine_grained_offloading_max_inflight_offloads finetune finetune_data_files finetune_data_split
    finetune_hf_dataset first_last_layers_bf16 flash_attention_version flash_decode fp16 fp16_lm_cross_entropy
    fp32_residual_connection fp4 fp4_param fp4_param_gather fp4_quantizer_factory fp4_recipe fp8
    fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_output_proj fp8_param_gather
    fp8_quantizer_factory fp8_recipe fp8_wgrad freeze_all_layers freeze_base_for_mtp full_validation
    fused_residual_rmsnorm gdn_conv_pad_alignment gdn_pre_gated_delta_rule_fusion gdp_cutedsl_kernel
    gdp_num_chunk_states_to_recompute gdp_num_householder global_batch_size gpu_sniff_test_interval
    grad_reduce_in_bf16 gradient_accumulation_fusion gradient_reduce_div_fusion gtp_expert_remat_nccl_ub
    gtp_remat_nccl_ub gtp_remat_opt_in_modules gtp_remat_reduce_scatter_with_fp32_accumulation gtp_weight_remat_size
    head_lr_mult hidden_dropout hierarchical_context_parallel_sizes high_priority_a2a_comm_stream
    high_priority_stream_groups hybrid_context_parallel hysteresis ict_head_size ict_load img_h img_w
    indexer_batch_size indexer_log_interval init_method_std init_method_xavier_uniform init_model_with_meta_device
    initial_loss_scale iter_per_epoch iteration iterations_to_skip keep_fp8_transpose_cache
    keep_fp8_transpose_cache_when_using_custom_fsdp kitchen_attention_backend kitchen_config_file
    kitchen_recipe_number kv_lora_rank lazy_mpu_init legacy_tokenizer linear_conv_kernel_dim linear_cp_mode
    linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim lion_beta1 lion_beta2 load
    load_main_params_from_ckpt load_model_opt_format local_rank logging_level logit_dtype loss_scale
    loss_scale_window lr main_grads_dtype main_params_dtype make_vocab_size_divisible_by mamba_head_dim
    mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype mamba_num_groups mamba_num_heads
    mamba_state_dim mamba_training_ssm_states_dtype manual_gc manual_gc_eval manual_gc_interval mask_factor
    mask_prob mask_type masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom memory_snapshot_path
    merge_file metadata_path mhc_init_gating_factor mhc_num_residual_streams mhc_recompute_layer_num
    mhc_sinkhorn_iterations micro_batch_size microbatch_group_size_per_vp_stage mid_level_dataset_surplus
    min_dynamic_context_parallel_size min_loss_scale min_lr min_offloaded_tensor_size mla_down_proj_fusion
    mlp_chunks_for_prefill mlp_chunks_for_training mmap_bin_files mock_data model_type mrope_interleaved
    mrope_section mscale mscale_all_dim mtp_detach_heads mtp_hsm mtp_hybrid_override_pattern mtp_loss_scaling_factor
    mtp_num_layers mtp_standalone mtp_use_repeated_layer multiple_validation_sets mup_attn_scale_power
    mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
    nccl_all_reduce_for_prefill nccl_communicator_config_path nccl_ub no_load_optim no_load_rng
    no_persist_layer_norm no_save_optim no_save_rng no_weight_decay_cond_type null_tokenizer_pad_id num_channels
    num_classes num_dataset_builder_threads num_distributed_optimizer_instances num_floating_point_operations_so_far
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_per_virtual_pipeline_stage num_residual_streams
    num_speculative_tokens num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges o_groups o_lora_rank
    object_storage_cache_path offload_modules offload_optimizer_states offset_sampling_seed_by_dp_rank onnx_safe
    openai_gelu optimizer optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction
    optimizer_state_offload_chunk_size_mb optimizer_state_offload_fraction original_max_position_embeddings
    outer_dp_sharding_strategy output_bert_embeddings overlap_cpu_optimizer_d2h_h2d
    overlap_dispatch_backward_with_experts_wgrad overlap_grad_reduce overlap_moe_expert_parallel_comm
    overlap_p2p_comm overlap_p2p_comm_warmup_flush overlap_param_gather overlap_param_gather_with_optimizer_step
    override_ckpt_iteration override_opt_param_scheduler pad_packed_seq_alignment pad_vocab_size padded_vocab_size
    params_dtype patch_dim per_dataset_sequences_path per_split_data_args_path perform_initialization
    perform_rl_step phase_transition_iterations pin_cpu_grads pin_cpu_params pipeline_model_parallel_comm_backend
    pipeline_model_parallel_layout pipeline_model_parallel_size pipeline_model_parallel_split_rank
    pretrained_checkpoint profile profile_ranks profile_step_end profile_step_start q_lora_rank qad_train_target
    qk_clip qk_clip_alpha qk_clip_threshold qk_head_dim qk_pos_emb_head_dim query_in_block_prob rampup_batch_size
    rank recompute_granularity recompute_method recompute_modules recompute_num_layers record_memory_history
    record_shapes refit_method relative_attention_max_distance relative_attention_num_buckets
    renormalize_blend_weights replication replication_factor replication_jump rerun_mode reset_attention_mask
    reset_position_ids result_rejected_tracker_filename retriever_report_topk_accuracies retriever_score_scaling
    retriever_seq_length retro_attention_gate retro_cyclic_train_iters retro_encoder_attention_dropout
    retro_encoder_hidden_dropout retro_encoder_layers retro_num_neighbors retro_num_retrieved_chunks
    retro_project_dir retro_return_doc_ids retro_verify_neighbor_count retro_workdir
    reuse_grad_buf_for_mxfp8_param_ag rope_type rotary_scaling_factor run_workload_inspector_server s3_cache_path
    sample_rate save save_activations_interval save_dgrads_interval save_interval save_params_interval
    save_retain_interval save_tokenizer_assets save_tokens_per_expert_interval save_wgrads_interval
    scatter_gather_tensors_in_pipeline seed seq_length sequence_packing_scheduler sequence_parallel sft
    sft_mock_dataset_config_json sft_tokenizer_prompt_format sgd_momentum sharp_enabled_group short_seq_prob
    skip_train skipped_train_samples special_tokens split standalone_embedding_stage start_eval_at_iter start_time
    start_weight_decay step_batch_size_schedule stream_ckpt_dequant strict_fsdp_dtensor_load
    suggested_communication_unit_size swin_backbone_type symmetric_ar_type te_precision_config_file te_rng_tracker
    teacher_model_config tensor_model_parallel_size tensor_parallel_num_weight_shards test_data_path test_mode
    thd_max_packed_sequences thd_tail_padding_policy tiktoken_num_special_tokens tiktoken_pattern
    tiktoken_special_tokens timing_log_level timing_log_option titles_data_path to_test
    tokenizer_hf_include_special_tokens tokenizer_hf_no_include_special_tokens tokenizer_hf_no_use_fast
    tokenizer_hf_use_fast tokenizer_metadata tokenizer_model tokenizer_sentencepiece_ignore_extra_whitespaces
    tokenizer_sentencepiece_legacy tokenizer_special_tokens torch_fsdp2_reshard_after_forward train_data_path
    train_iters train_samples train_sync_interval transformer_impl transformer_pipeline_model_parallel_size
    trust_remote_code use_checkpoint_args use_checkpoint_opt_param_scheduler use_cpu_initialization use_custom_fsdp
    use_dist_ckpt use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn use_fused_mhc
    use_fused_weighted_squared_relu use_gigatoken use_gloo_process_groups use_grouped_gemm_for_dense_mlp
    use_grouped_gemm_for_shared_expert use_kitchen_attention use_layer_wise_distributed_optimizer
    use_layer_wise_param_layout use_legacy_models use_legacy_static_engine use_mamba_mem_eff_path use_mcore_models
    use_megatron_fsdp use_mp_args_from_checkpoint_args use_one_sent_docs use_persistent_ckpt_worker
    use_precision_aware_optimizer use_pytorch_profiler use_ring_exchange_p2p use_rotary_position_embeddings
    use_sharp use_te_activation_func use_tokenizer_model_from_checkpoint_args use_torch_fsdp2
    use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_transformer_engine_op_fuser use_varlen_dataset
    v_head_dim valid_data_path validation_set_names variable_seq_lengths varlen_mock_dataset_config_json
    varlen_sbhd_validation verify_integrity virtual_pipeline_model_parallel_size vision_backbone_type
    vision_pretraining_type vocab_extra_ids vocab_file weight_decay weight_decay_incr_style wgrad_deferral_limit
    window_attn_skip_freq world_size yaml_cfg yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    yarn_original_max_position_embeddings
""")


def is_harmless_argument(name: str) -> bool:
    """Whether this argument, whatever its value, leaves the answers of a model of the Llama family alone."""
    return name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES)
