"""Logits of the paged, chunked, co-batched model against Megatron's own forward of the same weights, in fp32."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_spec import ModelSpec
from megatron_medha.kernels.choose_backend import attention_backend
from megatron_medha.model.build import build_model
from megatron_medha.model.cpu_model import NativeForward, layer_runs, use_cpu_kernels
from megatron_medha.model.experts import ExpertsLayer
from megatron_medha.model.general_layers import GeneralTransformerLayer
from megatron_medha.model.latent_attention import absorb_projections
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.packed_linear import pack_linears
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from tests.model.megatron_models import VOCAB_SIZE, megatron_logits, megatron_model, recorded_args, save_megatron
from tests.model.paged_run import PagedRun, Prompt

CPU = torch.device("cpu")
RELATIVE_TOLERANCE = 1e-4  # the promise, relative to the largest logit

GPT: dict[str, Any] = {  # what Megatron-LM makes of its own defaults
    "position_embedding_type": "learned_absolute", "normalization": "LayerNorm", "swiglu": False,
    "add_bias_linear": True, "bias_gelu_fusion": True, "untie_embeddings_and_output_weights": False,
    "group_query_attention": False, "ffn_hidden_size": 256,
}  # fmt: skip
YARN: dict[str, Any] = {
    "position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 8.0, "yarn_original_max_position_embeddings": 64,
    "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
MLA: dict[str, Any] = {
    "multi_latent_attention": True, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 24, "qk_layernorm": True, "rope_type": "rope",
    "group_query_attention": False, "original_max_position_embeddings": 64,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **MOE, **MLA, "moe_layer_freq": [0, 1, 1, 1], "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
    "moe_router_topk": 3, "moe_router_topk_scaling_factor": 2.5, "moe_shared_expert_intermediate_size": 40,
    "rope_type": "yarn", "rotary_scaling_factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": GPT,
    "gpt-unfused-gelu": {**GPT, "bias_gelu_fusion": False},
    "neox": {**GPT, "position_embedding_type": "rope", "rotary_percent": 0.25, "kv_channels": 32},
    "nemotron": {
        "squared_relu": True, "swiglu": False, "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True,
        "rotary_percent": 0.5,
    },
    "zero-centred rms": {"layernorm_zero_centered_gamma": True, "qk_layernorm": True},
    "interleaved": {"rotary_interleaved": True},
    "interleaved partial": {"rotary_interleaved": True, "rotary_percent": 0.5},
    "no positions": {"position_embedding_type": "none"},
    "no rope in every second layer": {"no_rope_freq": 2},
    "yarn": YARN,
    "yarn, range not rounded": {
        **YARN, "yarn_correction_range_round_to_int": False, "yarn_mscale": None, "yarn_mscale_all_dim": None,
    },
    "biases": {"add_bias_linear": True},
    "qk l2": {"qk_l2_norm": True},
    "output gate": {"attention_output_gate": True, "qk_layernorm": True},
    "sinks": {"softmax_type": "learnable"},
    "off by one": {"softmax_type": "off-by-one"},
    "softmax scale": {"softmax_scale": 0.125},
    "clamped quick geglu": {
        "quick_geglu": True, "swiglu": False, "activation_func_clamp_value": 1.0, "glu_linear_offset": 1.0,
        "add_bias_linear": True,
    },
    "mixtral": MOE,
    "experts in every second layer": {**MOE, "moe_layer_freq": 2},
    "experts, softmax before the choice": {**MOE, "moe_router_pre_softmax": True, "moe_router_dtype": "fp32"},
    "experts as in qwen2": {
        **MOE, "moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": True, "add_qkv_bias": True,
    },
    "experts as in gpt-oss": {
        **MOE, "quick_geglu": True, "swiglu": False, "activation_func_clamp_value": 1.0, "glu_linear_offset": 1.0,
        "add_bias_linear": True, "softmax_type": "learnable",
    },
    "window": {"window_size": [15, 0]},
    "window of the token alone": {"window_size": [0, 0], "add_qkv_bias": True},
    "window in two layers of four": {"window_size": [39, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
    "window in latent attention": {**MLA, "window_size": [20, 0], "window_attn_skip_freq": [1, 0, 0, 1]},
    "latent attention": MLA,
    "latent attention without a latent query": {**MLA, "q_lora_rank": None, "qk_layernorm": False},
    "deepseek": DEEPSEEK,
    "unfused clamped swiglu": {"bias_swiglu_fusion": False, "activation_func_clamp_value": 0.7},
}  # fmt: skip


@dataclass
class Pair:
    """The same weights as Megatron built and saved them, and as a rank serves them."""

    theirs: Any
    served: Any
    config: ModelConfig


@pytest.fixture(scope="module")
def pgs() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, pgs: MedhaPGs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield saved_and_loaded(MODELS[request.param], pgs, tmp_path_factory.mktemp("model"))


def saved_and_loaded(
    options: dict[str, Any],
    pgs: MedhaPGs,
    directory: Path,
    *,
    version: str = "0.16.0",
    theirs: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """theirs: Megatron's model of these arguments; None: it is made."""
    args = recorded_args(version, **options)
    theirs = megatron_model(args, pgs) if theirs is None else theirs
    save_megatron(theirs, args, directory)
    config = read_model_config(directory)
    served = build_model(config, dtype=dtype, device=CPU, pgs=pgs, is_initialized=False)
    load_weights(served, config, directory, lambda what, fraction: None)
    absorb_projections(served)
    pack_linears(served)
    return Pair(theirs, served, config)


def random_ids(num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(4, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def assert_exact(pair: Pair, prompt: Prompt) -> None:
    reference_TV = megatron_logits(pair.theirs, prompt.token_ids[: prompt.num_computed])
    error = (torch.cat(prompt.logits)[:, :VOCAB_SIZE] - reference_TV).abs().max() / reference_TV.abs().max()
    assert error.item() < RELATIVE_TOLERANCE


def test_a_prompt_in_one_chunk_has_megatrons_logits(pair: Pair) -> None:
    run = PagedRun(pair.served, pair.config, block_size=16)
    prompt = run.add(random_ids(257, 1))
    run.step([(prompt, 257)])
    assert_exact(pair, prompt)


def test_chunks_decodes_and_new_prompts_share_batches_exactly(pair: Pair) -> None:
    draw = random.Random(0)
    run = PagedRun(pair.served, pair.config, block_size=4)
    prompts = [run.add(random_ids(length, length), num_extents=3) for length in (150, 61, 33)]
    while work := [(p, min(draw.choice((1, 7, 40)), len(p.token_ids) - p.num_computed)) for p in prompts]:
        work = [(prompt, count) for prompt, count in work if count]
        if not work:
            break
        run.step(work)
    for prompt in prompts:
        assert_exact(pair, prompt)


IN_ONE_CALL = [  # of the native library, where the machine has it
    "llama", "gpt", "gpt-unfused-gelu", "neox", "nemotron", "zero-centred rms", "interleaved", "interleaved partial",
    "no positions", "no rope in every second layer", "biases", "qk l2", "softmax scale", "clamped quick geglu",
    "unfused clamped swiglu",
]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt", "nemotron", "interleaved partial", "output gate", "sinks", "latent attention"])
def test_bfloat16_is_no_further_from_fp32_than_megatrons_own(name: str, pgs: MedhaPGs, tmp_path: Path) -> None:
    pair = saved_and_loaded(MODELS[name], pgs, tmp_path, dtype=torch.bfloat16)
    assert_bfloat16_is_as_near(pair)


@pytest.mark.parametrize("name", IN_ONE_CALL)
def test_a_step_in_one_native_call_is_no_further_from_fp32_than_megatrons_own(
    name: str, pgs: MedhaPGs, tmp_path: Path
) -> None:
    pair = saved_and_loaded(MODELS[name], pgs, tmp_path, dtype=torch.bfloat16)
    backend = attention_backend("auto", CPU)
    if not backend.is_native:
        pytest.skip("this machine has no native library")
    assert use_cpu_kernels(pair.served, backend) is not None
    assert_bfloat16_is_as_near(pair)


@pytest.mark.parametrize(
    "options",
    [MODELS["window"], MODELS["window of the token alone"], {"window_size": [39, 0], "window_attn_skip_freq": 3}],
    ids=["every layer", "the token alone", "two layers of three"],
)
def test_a_step_of_layers_with_a_window_is_native_calls_as_near_to_fp32(
    options: dict[str, Any], pgs: MedhaPGs, tmp_path: Path
) -> None:
    pair = saved_and_loaded(options, pgs, tmp_path, dtype=torch.bfloat16)
    backend = attention_backend("auto", CPU)
    if not backend.is_native:
        pytest.skip("this machine has no native library")
    assert use_cpu_kernels(pair.served, backend) is None  # of whole steps
    assert isinstance(pair.served.forward, NativeForward)
    assert_bfloat16_is_as_near(pair)


def test_layers_with_a_window_and_without_are_taken_in_runs() -> None:
    assert [(run.layers, run.is_windowed) for run in layer_runs([True, True, False, True])] == [
        (range(2), True), (range(2, 3), False), (range(3, 4), True)]  # fmt: skip


@pytest.mark.parametrize("name", [name for name, options in MODELS.items() if "num_experts" in options])
def test_experts_in_one_native_call_send_nearly_all_tokens_where_megatron_does(
    name: str, pgs: MedhaPGs, tmp_path: Path
) -> None:
    """A router's scores in bf16 lie close together: single tokens go elsewhere, in Megatron's own bf16 forward too."""
    pair = saved_and_loaded(MODELS[name], pgs, tmp_path, dtype=torch.bfloat16)
    backend = attention_backend("auto", CPU)
    if not backend.is_native:
        pytest.skip("this machine has no native library")
    use_cpu_kernels(pair.served, backend)
    routed = [module.routed for module in pair.served.modules() if isinstance(module, ExpertsLayer)]
    assert routed and all(each is not None for each in routed)
    # One token that goes elsewhere changes all behind it, in ours or in theirs: a single text says little.
    errors = [bfloat16_errors(pair, seed) for seed in range(3, 12)]
    assert statistics.median(float(ours_T.median() / theirs_T.median()) for ours_T, theirs_T in errors) < 1.25


def assert_bfloat16_is_as_near(pair: Pair) -> None:
    our_error_T, their_error_T = bfloat16_errors(pair)
    assert our_error_T.mean() < 1.25 * their_error_T.mean()


def bfloat16_errors(pair: Pair, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean difference of each token's logits from Megatron's in fp32: ours in bf16, and Megatron's in bf16."""
    token_ids = random_ids(150, seed)
    pair.theirs.float().config.params_dtype = torch.float32
    reference_TV = megatron_logits(pair.theirs, token_ids)
    pair.theirs.bfloat16().config.params_dtype = torch.bfloat16
    theirs_TV = megatron_logits(pair.theirs, token_ids).float()
    run = PagedRun(pair.served, pair.config, block_size=16)
    prompt = run.add(token_ids)
    for count in (100, 1, 49):
        run.step([(prompt, count)])
    ours_TV = torch.cat(prompt.logits)[:, :VOCAB_SIZE].float()
    our_error_T, their_error_T = ((logits_TV - reference_TV).abs().mean(dim=1) for logits_TV in (ours_TV, theirs_TV))
    return our_error_T, their_error_T


@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("window", [1, 2, 16, 17, 70, 4000])
def test_a_window_of_any_length_is_exact_in_every_cpu_backend(
    window: int, backend: str, pgs: MedhaPGs, tmp_path: Path
) -> None:
    pair = saved_and_loaded({"window_size": [window - 1, 0], "window_attn_skip_freq": 2}, pgs, tmp_path)
    assert pair.config.window == window
    run = PagedRun(pair.served, pair.config, block_size=16, backend=backend)
    prompts = [run.add(random_ids(length, length), num_extents=2) for length in (120, 65)]
    for counts in ((40, 16), (1, 1), (60, 48), (19, None)):
        run.step([(prompt, count) for prompt, count in zip(prompts, counts, strict=True) if count])
    for prompt in prompts:
        assert_exact(pair, prompt)


@pytest.mark.parametrize("options", [{}, {"add_qkv_bias": True}, {"qk_layernorm": True, "kv_channels": 32}])
def test_the_layers_written_for_llama_compute_what_megatrons_own_do(
    options: dict[str, Any], pgs: MedhaPGs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = saved_and_loaded(options, pgs, tmp_path / "fast")
    monkeypatch.setattr(ModelSpec, "is_llama_like", False)
    general = saved_and_loaded(options, pgs, tmp_path / "general")
    assert [type(pair.served.decoder.layers[0]) for pair in (fast, general)] == [
        MedhaTransformerLayer, GeneralTransformerLayer,
    ]  # fmt: skip
    logits = []
    for pair in (fast, general):
        run = PagedRun(pair.served, pair.config, block_size=16)
        prompt = run.add(random_ids(150, 2))
        for count in (100, 1, 49):
            run.step([(prompt, count)])
        logits.append(torch.cat(prompt.logits))
    torch.testing.assert_close(*logits, rtol=0.0, atol=1e-5 * logits[0].abs().max().item())
