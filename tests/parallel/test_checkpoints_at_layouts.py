"""Checkpoints of every kind at every layout: each rank reads its own part, and together they are the model."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_medha.bits.rank_processes import RankProcesses, leave_group
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from tests.parallel.walk import LAYOUTS, Reference, random_case, save_model, walk

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "biases of queries, keys and values": ("Qwen2", {}),
    "norms of queries and keys": ("Qwen3", {"head_dim": 16}),
    "fused tensors": ("Phi3", {}),
    "neighbours turn together": ("Ernie4_5", {"head_dim": 16}),
    "multiplied weights": ("Granite", {
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.2,
    }),
    "stored the other way round": ("GPT2", {"num_key_value_heads": 8, "n_inner": 96}),
    "layers without rotary positions": ("SmolLM3", {}),
    "zero-centred norms and a gated GELU": ("Gemma", {"head_dim": 16}),
    "no gate": ("Nemotron", {}),
    "experts": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "experts beside one behind a gate": ("Qwen2Moe", {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32,
    }),
    "experts in groups after a dense layer": ("Glm4Moe", {
        "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "n_group": 4, "topk_group": 2,
        "head_dim": 16,
    }),
    "latent attention and experts in groups": ("DeepseekV3", {
        "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "n_group": 4, "topk_group": 2,
        "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "first_k_dense_replace": 1,
    }),
    "latent attention and experts of the best groups": ("DeepseekV2", {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_group": 4, "topk_group": 2,
        "topk_method": "group_limited_greedy", "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 48,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
    }),
    "norms of outputs and of all heads": ("Olmo2", {}),
    "capped scores": ("Gemma2", {
        "head_dim": 24, "sliding_window": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0,
        "attn_implementation": "eager",
    }),
    "two rotary bases": ("Gemma3Text", {
        "head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attn_implementation": "eager",
    }),
}


def config_of(directory: Path, layout: ParallelLayout) -> RankConfig:
    return RankConfig(
        layout=layout, server_endpoint="", checkpoint=str(directory), model=ModelOptions(device="cpu"),
        kv_memory_bytes=1 << 20,
    )


@pytest.mark.parametrize("layout", ["tp=1 spp=1 kvp=2", "tp=2 spp=1 kvp=2"])
def test_experts_are_the_same_model_over_kvp_ranks(layout: str, ranks: RankProcesses, tmp_path: Path) -> None:
    reference = save_model(tmp_path, "Mixtral", num_local_experts=8, num_experts_per_tok=3)
    outcome = walk(random_case(LAYOUTS[layout], 3, num_requests=3), ranks, tmp_path, reference)
    assert outcome.most_kvp_ranks == 2


@pytest.mark.parametrize(
    "family",
    ["latent attention and experts of the best groups", "norms of outputs and of all heads", "capped scores",
     "two rotary bases"],
)  # fmt: skip
def test_a_hugging_face_directory_is_the_same_model_over_kvp_ranks(
    family: str, ranks: RankProcesses, tmp_path: Path
) -> None:
    name, options = FAMILIES[family]
    reference = save_model(tmp_path, name, **options)
    outcome = walk(random_case(LAYOUTS["tp=1 spp=1 kvp=2"], 3, num_requests=3), ranks, tmp_path, reference)
    assert outcome.most_kvp_ranks == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_directory_is_the_same_model_at_tp_2_spp_2(
    family: str, ranks: RankProcesses, tmp_path: Path
) -> None:
    name, options = FAMILIES[family]
    reference = save_model(tmp_path, name, **options)
    walk(random_case(LAYOUTS["tp=2 spp=2 kvp=1"], 1, num_requests=3), ranks, tmp_path, reference)


@pytest.mark.parametrize(("saved_at", "loaded_at"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (1, 4))])
def test_a_megatron_checkpoint_saved_at_one_layout_is_the_same_model_at_another(
    saved_at: tuple[int, int],
    loaded_at: tuple[int, int],
    ranks: RankProcesses,
    model: tuple[Path, Reference],
    tmp_path: Path,
) -> None:
    directory, reference = model
    walk_converted(saved_at, loaded_at, ranks, directory, reference, tmp_path / "megatron")


@pytest.mark.parametrize(("saved_at", "loaded_at"), [((1, 2), (1, 1)), ((1, 1), (2, 2))])
def test_a_megatron_checkpoint_with_tied_embeddings_is_the_same_model_at_another_layout(
    saved_at: tuple[int, int], loaded_at: tuple[int, int], ranks: RankProcesses, tmp_path: Path
) -> None:
    reference = save_model(tmp_path / "tied", tie_word_embeddings=True)
    walk_converted(saved_at, loaded_at, ranks, tmp_path / "tied", reference, tmp_path / "megatron")


def walk_converted(
    saved_at: tuple[int, int],
    loaded_at: tuple[int, int],
    ranks: RankProcesses,
    directory: Path,
    reference: Reference,
    target: Path,
) -> None:
    saving, loading = (ParallelLayout(tp=tp, spp=spp) for tp, spp in (saved_at, loaded_at))
    ranks.unload()
    # The directory to write to travels in a field that loading weights has no use for.
    ranks.call(convert, RankConfig(
        layout=saving, server_endpoint=str(target), checkpoint=str(directory), model=ModelOptions(device="cpu"),
        kv_memory_bytes=0,
    ))  # fmt: skip
    walk(random_case(loading, 2, num_requests=3), ranks, target, reference)


def convert(config: RankConfig, connection: Connection) -> None:
    """In a rank: read a Hugging Face directory, write a Megatron checkpoint, both by parts."""
    import torch

    from megatron_medha.checkpoints.detect import load_weights, read_model_config
    from megatron_medha.checkpoints.megatron_checkpoint import save_megatron_checkpoint
    from megatron_medha.model.build import build_model
    from megatron_medha.parallel.groups import build_groups, init_distributed

    multiprocessing.current_process()._config["daemon"] = False  # Megatron writes in processes of its own
    leave_group()
    device = torch.device("cpu")
    init_distributed(config.layout, config.rank, device=device, init_method=config.init_method)
    model_config = read_model_config(config.checkpoint)
    model = build_model(
        model_config, dtype=torch.float32, device=device, pgs=build_groups(config.layout), is_initialized=False
    )
    load_weights(model, model_config, config.checkpoint, lambda what, fraction: None)
    save_megatron_checkpoint(model, model_config, Path(config.server_endpoint), 1)
    connection.send("saved")


def bytes_read(config: RankConfig, connection: Connection) -> None:
    """In a rank: how many bytes of weights are read from the files, tensor by tensor."""
    import torch

    from megatron_medha.checkpoints import placements
    from megatron_medha.checkpoints.detect import load_weights, read_model_config
    from megatron_medha.model.build import build_model
    from megatron_medha.parallel.groups import build_groups, init_distributed

    leave_group()
    device = torch.device("cpu")
    init_distributed(config.layout, config.rank, device=device, init_method=config.init_method)
    model_config = read_model_config(config.checkpoint)
    model = build_model(
        model_config, dtype=torch.float32, device=device, pgs=build_groups(config.layout), is_initialized=False
    )
    num_bytes = 0
    copy = placements.Fill.copy

    def counted(fill: placements.Fill, stored: torch.Tensor) -> bool:
        nonlocal num_bytes
        num_bytes += stored.nbytes
        return copy(fill, stored)

    placements.Fill.copy = counted
    try:
        load_weights(model, model_config, config.checkpoint, lambda what, fraction: None)
    finally:
        placements.Fill.copy = copy
    connection.send((num_bytes, sum(parameter.nbytes for parameter in model.parameters())))


def test_a_rank_reads_no_more_than_its_own_weights(ranks: RankProcesses, model: tuple[Path, Reference]) -> None:
    ranks.unload()
    for num_read, num_held in ranks.call(bytes_read, config_of(model[0], ParallelLayout(tp=2, spp=2))):
        assert 0.95 * num_held < num_read <= num_held  # less by the rows that fill the vocabulary up


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(tp=4), r"parallel.tp=4 must divide model.num_kv_heads=2 .* tp=2 and its divisors"),
        (ParallelLayout(tp=3), r"parallel.tp=3 must divide model.num_heads=8, "),
        (ParallelLayout(spp=3), r"parallel.spp=3 must divide model.num_layers=4 "),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused_with_the_numbers(
    layout: ParallelLayout, message: str, ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    with pytest.raises(ConfigError, match=message):
        ranks.load(config_of(model[0], layout))
