"""Arguments as Megatron-LM's own parsers leave them: each version's are read as it meant them, or refused.

megatron_args/*.json were recorded by running parse_args and validate_args of each version of Megatron-LM with its
ModelOpt arguments. A file holds what differs from the version before; "changes" are what more options changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.core.model_spec import Experts, LatentAttention, RopeScaling
from megatron_medha.models.megatron_args import NEEDED, REQUIREMENTS, config_from_args
from megatron_medha.models.model_config import ModelConfig

RECORDED = sorted((Path(__file__).parent / "megatron_args").glob("*.json"))
LLAMA = ModelConfig(
    name="small", num_layers=4, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=101, max_context_len=256, norm_epsilon=1e-5, rope_theta=10000.0, dtype="bfloat16",
)  # fmt: skip

# What more options make of it; the others leave it as it is.
SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_mha": {"num_kv_heads": 4},
    "epsilon": {"norm_epsilon": 1e-6},
    "interpolation": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "llama3_rope": {
        "rope_theta": 500000.0,
        "rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_max_context_len=8192),
    },
    "qkv_bias": {"has_qkv_bias": True},
    "qk_norm": {"has_qk_norm": True},
    "kv_channels": {"head_dim": 32},
    "tied": {"has_tied_embeddings": True},
    "one_p": {"has_zero_centred_norms": True},
    "percent": {"rotary_dim": 8},
    "interleaved": {"is_rotary_interleaved": True},
    "layernorm": {"has_layer_norms": True},
    "gelu": {"activation": "gelu", "has_gate": False},
    "squared_relu": {"activation": "squared_relu", "has_gate": False},
    "quick_geglu": {"activation": "quick_gelu"},
    "biases": {"has_linear_biases": True},
    "sinks": {"softmax": "sinks"},
    "off_by_one": {"softmax": "off-by-one"},
    "output_gate": {"has_output_gate": True},
    "no_rope_freq": {"no_rope_layers": (False, False, False, True)},
    "qk_l2": {"has_qk_l2_norm": True},
    "gpt": {
        "num_kv_heads": 4, "ffn_hidden_size": 256, "has_layer_norms": True, "has_linear_biases": True,
        "positions": "learned", "activation": "gelu_tanh", "has_gate": False, "has_tied_embeddings": True,
    },
    "learned": {"positions": "learned"},
    "nope": {"positions": "none"},
    "window": {"window": 17},
    "window_skip": {"window": 17, "window_layers": (True, False, True, False)},
    "moe": {"experts": Experts(num_experts=4, num_per_token=2, ffn_hidden_size=96)},
    "mla": {
        "num_kv_heads": 4, "head_dim": 192, "is_rotary_interleaved": True,
        "latent": LatentAttention(q_rank=None, kv_rank=32, nope_dim=128, rope_dim=64, value_dim=128),
    },
    "fp16": {}, "apply_qk_scaling": {}, "softmax_fp32": {}, "seq_parallel_te": {}, "fp8": {}, "residual_fp32": {},
    "init": {}, "mtp": {},
    "tok": {"vocab_size": 128},
}  # fmt: skip
REFUSED = {
    "mup": "use_mup",
    "mup_mults": "use_mup",
    "post_residual": "apply_residual_connection_post_layernorm",
    "clamp": "activation_func_clamp_value",  # with --swiglu, whose fused kernel does not clamp
    "glu_offset": "glu_linear_offset",
    "spec": "spec",
    "hyper": "enable_hyper_connections",
    "linear_attention": "linear_attention_type",
    "mrope": "position_embedding_type",
    "yarn": "yarn_rotary_scaling_factor",
}


class OfMegatron(enum.Enum):
    """Stands for its enums: a reader of checkpoints does not have their classes."""

    VALUE = 1


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"dtype"}:
        return getattr(torch, value["dtype"].removeprefix("torch."))
    return OfMegatron.VALUE if isinstance(value, dict) else value


def recorded() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(version, case, arguments) of every command line that was recorded."""
    base: dict[str, Any] = {}
    for path in RECORDED:
        file = json.loads(path.read_text())
        base = {k: v for k, v in base.items() if k not in file["absent"]} | file["llama"]
        for case, changes in {"llama": {}, **file["changes"]}.items():
            yield file["version"], case, {key: _decoded(value) for key, value in (base | changes).items()}


BY_VERSION: dict[str, dict[str, dict[str, Any]]] = {}
for _version, _case, _args in recorded():
    BY_VERSION.setdefault(_version, {})[_case] = _args
NEWEST = BY_VERSION["main"]["llama"]


def read(args: dict[str, Any]) -> ModelConfig:
    return config_from_args(
        argparse.Namespace(**args), Path("common.pt"), name="small", dtype="bfloat16", num_embedding_rows=128,
        num_tokenizer_ids=None, stop_token_ids=(),
    )  # fmt: skip


def test_every_command_line_recorded_has_an_expectation():
    assert {case for cases in BY_VERSION.values() for case in cases} == set(SERVED) | set(REFUSED)
    assert len(BY_VERSION) == 18


@pytest.mark.parametrize("version", BY_VERSION)
def test_arguments_of_every_version_of_megatron_are_read_as_it_meant_them(version: str):
    for case, args in BY_VERSION[version].items():
        if case not in SERVED:
            continue
        changes = dict(SERVED[case])
        if case == "llama3_rope" and "rope_scaling_factor" not in args:  # core 0.10 had no choice but 8
            changes["rope_scaling"] = dataclasses.replace(changes["rope_scaling"], factor=8.0)
        if case != "tok" and "null_tokenizer_eod_id" in args:  # its end token is one of the vocabulary since 0.18
            changes["vocab_size"] = 100
        assert read(args) == dataclasses.replace(LLAMA, **changes), case


@pytest.mark.parametrize("version", BY_VERSION)
def test_what_would_change_the_answer_is_refused_for_every_version_of_megatron(version: str):
    for case, args in BY_VERSION[version].items():
        if case in REFUSED:
            with pytest.raises(CheckpointError, match=rf"common\.pt: args\.({REFUSED[case]})( is missing|=)"):
                read(args)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"moe_latent_size": 32}, "moe_latent_size"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type"),
        ({"moe_router_load_balancing_type": ["aux_loss", "quantile"]}, "moe_router_load_balancing_type"),
        ({"moe_router_score_function": "sqrtsoftplus"}, "moe_router_score_function"),
        ({"moe_n_hash_layers": 2}, "moe_n_hash_layers"),
        ({"moe_router_of_a_later_version": 1}, "moe_router_of_a_later_version"),
        ({"moe_router_topk": 9}, "moe_router_topk"),
        ({"moe_layer_freq": [1, 0]}, "moe_layer_freq"),
    ],
)  # fmt: skip
def test_what_changes_a_mixture_of_experts_is_refused_where_there_is_one(changes: dict[str, Any], key: str):
    assert read(NEWEST | changes) == read(NEWEST)
    with pytest.raises(CheckpointError, match=rf"args\.{key}="):
        read(BY_VERSION["main"]["moe"] | changes)


@pytest.mark.parametrize("value", [[16, 16], [-1, 0], [16], "16", 16, [16.0, 0]])
def test_a_window_that_is_none_of_the_last_tokens_is_refused(value: Any):
    with pytest.raises(CheckpointError, match=r"args\.window_size="):
        read(NEWEST | {"window_size": value})


def test_a_window_as_long_as_the_context_is_none():
    assert read(NEWEST | {"window_size": [NEWEST["max_position_embeddings"] - 1, 0]}) == read(NEWEST)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rotary_scaling_factor": 40.0, "mscale": 1.0, "mscale_all_dim": None}, "rotary_scaling_factor"),
        ({"rope_type": "llama3"}, "rope_type"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"qk_pos_emb_head_dim": 7}, "qk_pos_emb_head_dim"),
    ],
)  # fmt: skip
def test_latent_attention_that_is_not_whole_is_refused_by_name(changes: dict[str, Any], key: str):
    with pytest.raises(CheckpointError, match=rf"args\.{key}"):
        read(BY_VERSION["main"]["mla"] | changes)


def test_experts_of_no_layer_are_none():
    assert read(BY_VERSION["main"]["moe"] | {"moe_layer_freq": [0, 0, 0, 0]}) == read(NEWEST)


def test_a_model_of_deepseek_v3s_sizes_has_671_billion_parameters():
    config = dataclasses.replace(
        LLAMA, num_layers=61, hidden_size=7168, ffn_hidden_size=18432, num_heads=128, num_kv_heads=128, head_dim=192,
        vocab_size=129280,
        latent=LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        experts=Experts(
            num_experts=256, num_per_token=8, ffn_hidden_size=2048, shared_ffn_hidden_size=2048,
            layers=(False,) * 3 + (True,) * 58,
        ),
    )  # fmt: skip
    shape = config.shape(bytes_per_element=2)
    assert shape.num_params == pytest.approx(671e9, rel=2e-3)
    assert shape.num_active_params == pytest.approx(37e9, rel=2e-2)
    assert shape.kv_bytes_per_token == 2 * 61 * 576 * 2  # the latent vector and the key's part with a position, twice


def test_all_reasons_are_given_at_once():
    with pytest.raises(UnsupportedModelError) as caught:
        read(BY_VERSION["main"]["mup"] | {"rotary_base_per_layer": [1, 2], "logit_scale": 0.5, "spec": ["m", "s"]})
    for key in ("use_mup", "rotary_base_per_layer", "logit_scale", "spec"):
        assert f"args.{key}=" in str(caught.value)


@pytest.mark.parametrize(
    "unknown",
    [
        {"logit_scale": 0.5}, {"attn_logit_softcapping": 30.0}, {"embedding_multiplier": 12}, {"no_such": True},
        {"layer_scales": [1.0, 2.0]}, {"my_attention": "linear"}, {"my_layer": OfMegatron.VALUE},
        {"mask": torch.zeros(2)},
    ],
)  # fmt: skip
def test_an_argument_that_is_set_and_unknown_is_refused(unknown: dict[str, Any]):
    with pytest.raises(UnsupportedModelError, match=f"args.{next(iter(unknown))}=.*not known"):
        read(NEWEST | unknown)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_argument_that_is_off_is_passed_over(value: Any):
    assert read(NEWEST | {"no_such": value}) == read(NEWEST)


def test_an_argument_that_is_a_tensor_is_refused_or_harmless():
    for key in {*NEWEST, *(requirement.name for requirement in REQUIREMENTS)}:
        try:
            found = read(NEWEST | {key: torch.ones(3)})
        except CheckpointError as error:
            assert f"args.{key}" in str(error)
        else:
            assert found == read(NEWEST), key


@pytest.mark.parametrize("key", ["rotary_base", "layernorm_epsilon"])
def test_a_number_that_no_float_holds_is_named(key: str):
    with pytest.raises(CheckpointError, match=rf"args\.{key}=1000.* must be a positive number"):
        read(NEWEST | {key: 10**400})


@pytest.mark.parametrize("key", [*sorted(NEEDED), "layernorm_epsilon", "layernorm_zero_centered_gamma", "rotary_base"])
def test_an_argument_that_is_needed_and_absent_is_named(key: str):
    with pytest.raises(CheckpointError, match=rf"args\.{key}|since core 0.16|args.{key} is missing"):
        read({k: v for k, v in NEWEST.items() if k != key})


@pytest.mark.parametrize(
    ("old", "new", "values"),
    [
        ("norm_epsilon", "layernorm_epsilon", (1e-5, 1e-6)),
        ("apply_layernorm_1p", "layernorm_zero_centered_gamma", (True, False)),
        ("apply_layernorm_1p", "layernorm_zero_centered_gamma", (False, True)),
    ],
)
def test_two_names_of_one_argument_must_agree(old: str, new: str, values: tuple[Any, Any]):
    with pytest.raises(CheckpointError, match=rf"args\.{old}={values[0]}.* args\.{new}={values[1]}"):
        read(NEWEST | {old: values[0], new: values[1]})


@pytest.mark.parametrize("value", [1e-5, None])
def test_the_older_name_of_an_argument_may_stand_beside_the_newer(value: float | None):
    assert read(NEWEST | {"norm_epsilon": value}) == read(NEWEST)
