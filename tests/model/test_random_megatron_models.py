"""Random combinations of traits, built and saved by Megatron, served exactly or refused with a reason that holds.

MEDHA_RANDOM_MODELS=300 makes it a sweep.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medha.core.errors import UnsupportedModelError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.models.megatron_args import config_from_args
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from tests.model.megatron_models import VOCAB_SIZE, megatron_logits, megatron_model, recorded_args
from tests.model.paged_run import PagedRun
from tests.model.test_megatron_exactness import RELATIVE_TOLERANCE, random_ids, saved_and_loaded

NUM_MODELS = int(os.environ.get("MEDHA_RANDOM_MODELS", "12"))


@pytest.fixture(scope="module")
def pgs() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=torch.device("cpu"))
    return build_groups(ParallelLayout())


def random_options(rng: random.Random) -> dict[str, Any]:
    """Megatron-LM's arguments of a random model."""
    options: dict[str, Any] = {
        "num_layers": rng.choice((1, 2, 4)), "hidden_size": rng.choice((32, 64, 96)),
        "kv_channels": rng.choice((16, 24, 32)),
        "num_attention_heads": 4, "num_query_groups": rng.choice((1, 2, 4)), "group_query_attention": True,
        "ffn_hidden_size": rng.choice((48, 96, 128)), "normalization": rng.choice(("RMSNorm", "LayerNorm")),
        "layernorm_zero_centered_gamma": rng.random() < 0.2, "add_bias_linear": rng.random() < 0.3,
        "add_qkv_bias": rng.random() < 0.3, "untie_embeddings_and_output_weights": rng.random() < 0.6,
        "position_embedding_type": rng.choice(("rope", "rope", "rope", "learned_absolute", "none")),
        "rotary_percent": rng.choice((1.0, 1.0, 0.5, 0.25)), "rotary_base": rng.choice((10000, 500000)),
        "rotary_interleaved": rng.random() < 0.2, "bias_gelu_fusion": rng.random() < 0.5,
        "bias_swiglu_fusion": rng.random() < 0.5, "layernorm_epsilon": rng.choice((1e-5, 1e-6)),
        "attention_output_gate": rng.random() < 0.15,
        "softmax_type": rng.choice(("vanilla", "vanilla", "vanilla", "learnable", "off-by-one")),
        "qk_layernorm": rng.random() < 0.3,
    }  # fmt: skip
    options["swiglu"] = options["squared_relu"] = options["quick_geglu"] = False
    if (activation := rng.choice(("swiglu", "swiglu", "squared_relu", "quick_geglu", "gelu"))) != "gelu":
        options[activation] = True
    options["bias_gelu_fusion"] &= options["add_bias_linear"]
    if activation in ("swiglu", "quick_geglu") and rng.random() < 0.3:
        options |= {"activation_func_clamp_value": rng.choice((None, 1.0)), "glu_linear_offset": rng.choice((0.0, 1.0))}
    if rng.random() < 0.15:
        options["qk_l2_norm"], options["qk_layernorm"] = True, False
    if options["position_embedding_type"] == "rope" and rng.random() < 0.2 and options["num_layers"] > 1:
        options["no_rope_freq"] = 2
    if rng.random() < 0.2:
        options |= {"use_rope_scaling": True, "rope_scaling_factor": 4.0}
    if rng.random() < 0.2:
        options |= {"window_size": [rng.randint(0, 50), 0], "window_attn_skip_freq": rng.choice((None, 2))}
    if rng.random() < 0.4:
        options |= random_experts(rng, options)
    if rng.random() < 0.25:
        options |= random_latent(rng)
    return options


def random_experts(rng: random.Random, options: dict[str, Any]) -> dict[str, Any]:
    """Of a mixture of experts; some are none that Megatron builds."""
    sigmoid = rng.random() < 0.5
    experts: dict[str, Any] = {
        "num_experts": rng.choice((4, 8)), "moe_router_topk": rng.choice((1, 2, 3)),
        "moe_ffn_hidden_size": rng.choice((32, 48)),
        "moe_router_pre_softmax": rng.random() < 0.5, "bias_gelu_fusion": False,
        "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "moe_router_enable_expert_bias": sigmoid and rng.random() < 0.7,
        "moe_layer_freq": rng.choice((1, 1, 2, [rng.randint(0, 1) for _ in range(options["num_layers"])])),
        "moe_router_topk_scaling_factor": rng.choice((None, 2.5)), "moe_router_dtype": rng.choice((None, "fp32")),
    }  # fmt: skip
    if not options["add_bias_linear"] and rng.random() < 0.4:
        experts |= {"moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": rng.random() < 0.5}
    if rng.random() < 0.3:
        experts |= {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk": 2}
    return experts


def random_latent(rng: random.Random) -> dict[str, Any]:
    """Of multi-latent attention."""
    return {
        "multi_latent_attention": True, "q_lora_rank": rng.choice((None, 32)), "kv_lora_rank": rng.choice((16, 32)),
        "qk_head_dim": rng.choice((8, 16)), "qk_pos_emb_head_dim": rng.choice((8, 16)),
        "v_head_dim": rng.choice((8, 24)), "group_query_attention": False, "rope_type": rng.choice(("rope", "yarn")),
        "original_max_position_embeddings": 64,
        "rotary_scaling_factor": rng.choice((1.0, 8.0)), "mscale": 1.0, "mscale_all_dim": rng.choice((0.0, 1.0)),
        "position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_interleaved": False,
        "softmax_type": "vanilla",
        "attention_output_gate": False, "qk_l2_norm": False, "no_rope_freq": None, "use_rope_scaling": False,
    }  # fmt: skip


def built_from(args: argparse.Namespace, pgs: MedhaPGs) -> None:
    config = config_from_args(
        args, Path("common.pt"), name="random", dtype="float32", num_embedding_rows=VOCAB_SIZE, num_tokenizer_ids=None,
        stop_token_ids=(),
    )  # fmt: skip
    build_model(config, dtype=torch.float32, device=torch.device("cpu"), pgs=pgs)


@pytest.mark.parametrize("seed", range(NUM_MODELS))
def test_a_random_model_of_megatron_is_served_exactly_or_refused(seed: int, pgs: MedhaPGs, tmp_path: Path) -> None:
    rng = random.Random(seed)
    options = random_options(rng)
    version = rng.choice(("0.14.0", "0.16.0", "main"))
    if version == "0.14.0":
        options["norm_epsilon"], options["apply_layernorm_1p"] = (
            options.pop("layernorm_epsilon"), options.pop("layernorm_zero_centered_gamma"),
        )  # fmt: skip
    args = recorded_args(version, **options)
    try:
        theirs = megatron_model(args, pgs)
    except (AssertionError, ValueError):
        if options.get("moe_layer_freq") != [0] * options["num_layers"]:  # its checks look at experts of no layer too
            with pytest.raises(UnsupportedModelError):
                built_from(args, pgs)
        return
    try:
        pair = saved_and_loaded(options, pgs, tmp_path, version=version, theirs=theirs)
    except UnsupportedModelError as error:
        assert "fused kernel computes without it" in str(error)
        return
    run = PagedRun(pair.served, pair.config, block_size=rng.choice((4, 16)))
    prompts = [run.add(random_ids(length, length), num_extents=2) for length in (70, 33)]
    while unfinished := [prompt for prompt in prompts if prompt.num_computed < len(prompt.token_ids)]:
        run.step([(each, min(rng.choice((1, 9, 40)), len(each.token_ids) - each.num_computed)) for each in unfinished])
    for prompt in prompts:
        expected_TV = megatron_logits(theirs, prompt.token_ids)
        error = (torch.cat(prompt.logits)[:, :VOCAB_SIZE] - expected_TV).abs().max() / expected_TV.abs().max()
        assert error.item() < RELATIVE_TOLERANCE, (version, options)
