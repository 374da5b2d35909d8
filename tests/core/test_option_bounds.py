"""What an option is if nobody sets it, which values it may have, and what is said of the others."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf, nextafter
from typing import Any

import pytest

from megatron_medha.core.batch import Chunk, Completed, FinishReason
from megatron_medha.core.cost.capacity import MemoryBudget
from megatron_medha.core.cost.engine_costs import EngineCosts
from megatron_medha.core.cost.hardware import Hardware, Link
from megatron_medha.core.cost.step_sizes import NO_STEP_SIZES
from megatron_medha.core.errors import ConfigError, check_member, check_range
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.ports import EnginePhase, EngineStatus, TokenDelivery
from megatron_medha.core.request import Rejection, Request
from megatron_medha.core.sampling import Sampling, TokenLogprobs
from megatron_medha.core.scheduling.chunking import Chunking, ChunkRule
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

HARDWARE = Hardware(name="device", flops_per_s=1e12, memory_bytes_per_s=1e11)
ENGINE = EngineCosts(name="ours", step_s=0.0, sequence_s=0.0, stage_entry_s=0.0, layer_launch_s=0.0, request_s=0.0)
SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=4,
    vocab_size=10, max_context_len=100,
)  # fmt: skip

SCHEDULER_BOUNDS: dict[str, tuple[float, float]] = {
    "step_budget_s": (1e-4, 3600.0),
    "fixed_chunk_tokens": (1, 1 << 30),
    "deadline_multiplier": (0.0, 1e6),
    "min_deadline_s": (1e-6, 1e9),
    "slack_margin_steps": (0.0, 1e6),
    "max_relative_slack": (0.0, 0.99),
    "max_banked_steps": (0.0, 1e3),
    "progress_share": (0.0, 1.0),
    "max_skips": (0, 1 << 30),
    "watermark": (0.0, 0.5),
    "max_chunk_tokens": (1, 1 << 30),
    # Within what a step holds: 2**30 tokens here.
    "tile_tokens": (1, 1 << 20),
    "max_num_sequences": (1, 1 << 20),
}
HARDWARE_BOUNDS: dict[str, tuple[float, float]] = {
    "flops_per_s": (1e3, 1e21),
    "memory_bytes_per_s": (1e3, 1e21),
    "fp8_flops_per_s": (1e3, 1e21),
    "memory_bytes": (1e3, 1e21),
    "num_sms": (1, 1 << 20),
    "linear_efficiency": (0.001, 1.0),
    "attention_efficiency": (0.001, 1.0),
    "lone_tile_efficiency": (0.001, 1.0),
    "memory_efficiency": (0.001, 1.0),
    "kernel_overhead_s": (0.0, 10.0),
    "step_overhead_s": (0.0, 10.0),
    "layer_overhead_s": (0.0, 10.0),
    "chunk_overhead_s": (0.0, 10.0),
    "num_devices": (1, 1 << 24),
    "devices_per_node": (1, 1 << 24),
}
LINK_BOUNDS: dict[str, tuple[float, float]] = {"bytes_per_s": (1e3, 1e21), "latency_s": (0.0, 10.0)}
ENGINE_COSTS = ("step_s", "sequence_s", "stage_entry_s", "layer_launch_s", "request_s")


def outside(low: float, high: float) -> tuple[float, float]:
    """The nearest values that are not allowed."""
    if isinstance(low, int):
        return low - 1, high + 1
    return nextafter(low, -inf), nextafter(high, inf)


def defaults(cls: Any) -> dict[str, Any]:
    made = {each.name: each.default for each in fields(cls)}
    return {name: value for name, value in made.items() if not repr(value).startswith("<dataclasses._MISSING")}


@pytest.mark.parametrize("key", SCHEDULER_BOUNDS)
def test_a_scheduler_option_may_have_both_its_bounds_and_nothing_beyond(key: str) -> None:
    wide = SchedulerConfig(max_batch_tokens=1 << 30)
    low, high = SCHEDULER_BOUNDS[key]
    for value in (low, high):
        assert getattr(replace(wide, **{key: value}), key) == value
    for value in outside(low, high):
        with pytest.raises(ConfigError) as error:
            replace(wide, **{key: value})
        assert str(error.value) == f"scheduler.{key}={value:.10g}: must be between {low:.10g} and {high:.10g}"


def test_a_step_holds_at_least_a_token_and_no_more_than_a_billion() -> None:
    least = SchedulerConfig(max_batch_tokens=1, tile_tokens=1, max_num_sequences=1)
    for value in (0, (1 << 30) + 1):
        with pytest.raises(ConfigError) as error:
            replace(least, max_batch_tokens=value)
        assert str(error.value) == f"scheduler.max_batch_tokens={value}: must be between 1 and {1 << 30}"


@pytest.mark.parametrize("key", ["tile_tokens", "max_num_sequences"])
def test_a_step_holds_a_tile_and_a_token_of_each_sequence(key: str) -> None:
    fits = SchedulerConfig(max_batch_tokens=8, tile_tokens=8, max_num_sequences=8)
    with pytest.raises(ConfigError) as error:
        replace(fits, **{key: 9})
    assert str(error.value) == f"scheduler.{key}=9 must not exceed scheduler.max_batch_tokens=8"


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as error:
        SchedulerConfig(policy="fifo")
    assert str(error.value) == (
        "scheduler.policy=fifo is unknown; choose one of fcfs, sjf, srpt, edf, lrs, lars, hrrn, "
        "or name a function of your own as package.module:function"
    )


def test_the_scheduler_is_the_papers_if_nothing_is_set() -> None:
    assert defaults(SchedulerConfig) == {
        "policy": "lars", "is_preemptive": True, "chunking": Chunking.ADAPTIVE, "step_budget_s": 0.05,
        "tile_tokens": 32, "fixed_chunk_tokens": 512, "max_batch_tokens": 8192, "max_num_sequences": 256,
        "max_chunk_tokens": None, "deadline_multiplier": 1.5, "min_deadline_s": 0.5, "has_triage": True,
        "slack_margin_steps": 8.0, "has_space_sharing": True, "max_relative_slack": 0.4, "max_banked_steps": 1.0,
        "progress_share": 0.1, "max_skips": 10, "watermark": 0.01, "interruptible": "auto",
    }  # fmt: skip


def test_a_chunk_obeys_the_schedulers_bounds_and_a_whole_step_where_none_is_set() -> None:
    config = SchedulerConfig(tile_tokens=4, max_batch_tokens=400, fixed_chunk_tokens=16, max_num_sequences=8)
    rule = ChunkRule(
        chunking=Chunking.ADAPTIVE, tile_tokens=4, max_tokens=400, fixed_tokens=16, max_chunk_tokens=400
    )
    assert config.chunk_rule == rule
    assert replace(config, max_chunk_tokens=7).chunk_rule == replace(rule, max_chunk_tokens=7)
    assert defaults(ChunkRule) == {"max_chunk_tokens": 1 << 60, "step_sizes": NO_STEP_SIZES}


@pytest.mark.parametrize("key", HARDWARE_BOUNDS)
def test_a_figure_of_the_hardware_may_have_both_its_bounds_and_nothing_beyond(key: str) -> None:
    low, high = HARDWARE_BOUNDS[key]
    for value in (low, high):
        assert getattr(replace(HARDWARE, **{key: value}), key) == value
    for value in (*outside(low, high), float("nan")):
        with pytest.raises(ConfigError) as error:
            replace(HARDWARE, **{key: value})
        assert str(error.value) == f"hardware.{key}={value:.10g}: must be between {low:.10g} and {high:.10g}"


@pytest.mark.parametrize("link", ["intra_node", "inter_node"])
@pytest.mark.parametrize("key", LINK_BOUNDS)
def test_a_figure_of_a_link_may_have_both_its_bounds_and_nothing_beyond(link: str, key: str) -> None:
    low, high = LINK_BOUNDS[key]
    for value in (low, high):
        assert getattr(getattr(replace(HARDWARE, **{link: Link(**{key: value})}), link), key) == value
    for value in outside(low, high):
        with pytest.raises(ConfigError) as error:
            replace(HARDWARE, **{link: Link(**{key: value})})
        assert str(error.value) == f"hardware.{link}.{key}={value:.10g}: must be between {low:.10g} and {high:.10g}"


def test_hardware_that_names_its_speed_alone_is_one_device_with_efficiencies_and_overheads_of_a_first_guess() -> None:
    assert defaults(Link) == {"bytes_per_s": 1e10, "latency_s": 1e-4}
    assert defaults(Hardware) == {
        "fp8_flops_per_s": None, "memory_bytes": None, "num_sms": 1, "linear_efficiency": 0.7,
        "attention_efficiency": 0.5, "lone_tile_efficiency": 0.5, "memory_efficiency": 0.8, "kernel_overhead_s": 0.0,
        "step_overhead_s": 2e-3, "layer_overhead_s": 2e-5, "chunk_overhead_s": 2e-5, "num_devices": 1,
        "devices_per_node": 1, "intra_node": Link(), "inter_node": Link(),
    }  # fmt: skip


@pytest.mark.parametrize("key", ENGINE_COSTS)
def test_a_cost_of_an_engine_may_have_both_its_bounds_and_nothing_beyond(key: str) -> None:
    for value in (0.0, 10.0):
        assert getattr(replace(ENGINE, **{key: value}), key) == value
    for value in (*outside(0.0, 10.0), float("nan")):
        with pytest.raises(ConfigError) as error:
            replace(ENGINE, **{key: value})
        assert str(error.value) == f"engine.{key}={value:.10g}: must be between 0 and 10"


@pytest.mark.parametrize(("key", "least"), [("graph_max_context", 0), ("attention_tile_rows", 1)])
def test_a_limit_of_an_engine_may_be_its_least_or_none(key: str, least: int) -> None:
    assert defaults(EngineCosts) == {"graph_max_context": 0, "fills_graphs": False, "attention_tile_rows": None}
    for value in (least, least + 1, None):
        assert getattr(replace(ENGINE, **{key: value}), key) == value
    with pytest.raises(ConfigError) as error:
        replace(ENGINE, **{key: least - 1})
    assert str(error.value) == f"engine.{key}={least - 1}: must be at least {least}, or null"


def test_kv_may_have_all_of_a_device_but_not_nothing() -> None:
    assert defaults(MemoryBudget) == {
        "block_size": 16, "utilisation": 0.9, "max_batch_tokens": 8192, "max_num_sequences": 256
    }
    assert MemoryBudget(block_size=1, utilisation=1.0, max_batch_tokens=1, max_num_sequences=1).utilisation == 1.0
    for utilisation in (0.0, nextafter(1.0, inf)):
        with pytest.raises(ConfigError) as error:
            MemoryBudget(utilisation=utilisation)
        assert str(error.value) == f"memory.utilisation={utilisation:g}: must be above 0 and at most 1"
    for key in ("block_size", "max_batch_tokens", "max_num_sequences"):
        with pytest.raises(ConfigError) as error:
            MemoryBudget(**{key: 0})  # type: ignore[arg-type]
        assert str(error.value) == f"memory.{key}=0: must be at least 1"


@pytest.mark.parametrize("axis", ["tp", "spp", "kvp", "dp"])
def test_a_layout_is_one_rank_unless_a_degree_is_given_and_no_degree_is_below_one(axis: str) -> None:
    assert ParallelLayout().world_size == 1
    assert ParallelLayout(**{axis: 3}).world_size == 3
    with pytest.raises(ConfigError) as error:
        ParallelLayout(**{axis: 0})
    assert str(error.value) == f"parallel.{axis}=0 must be at least 1"


def test_a_token_goes_to_one_expert_at_least_and_to_all_at_most() -> None:
    assert defaults(ModelShape) == {
        "bytes_per_element": 2, "kv_bytes_per_element": None, "has_tied_embeddings": False, "num_experts": 1,
        "num_experts_per_token": 1, "shared_ffn_hidden_size": 0, "num_dense_layers": 0, "dense_ffn_hidden_size": 0,
        "num_mlp_matrices": 3, "num_learned_positions": 0, "num_vector_params": 0, "latent_dim": 0,
        "num_latent_params": 0,
    }  # fmt: skip
    assert replace(SHAPE, num_experts=2, num_experts_per_token=2).num_experts_per_token == 2
    for picked in (0, 3):
        with pytest.raises(ConfigError) as error:
            replace(SHAPE, num_experts=2, num_experts_per_token=picked)
        assert str(error.value) == (
            f"model.shape.num_experts_per_token={picked} must be between 1 and model.shape.num_experts=2"
        )


def test_a_request_that_names_its_lengths_alone_asks_for_nothing_special() -> None:
    assert defaults(Request) == {
        "ttft_slo_s": None, "tpot_slo_s": None, "priority": 0, "deadline_multiplier": None, "min_deadline_s": None,
        "slo_class": "", "prefix_keys": b"", "reads_cache": True, "session_id": "", "ends_session": False,
        "num_session_tokens": None,
    }  # fmt: skip
    assert defaults(Sampling) == {
        "min_output_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": (),
        "stop_token_ids": (), "grammar": None, "num_logprobs": None, "num_prompt_logprobs": None,
    }  # fmt: skip
    assert defaults(Rejection) == {"retry_after_s": None, "predicted_ttft_s": None}
    assert Sampling(max_output_tokens=1, temperature=0.0).is_greedy
    assert not Sampling(max_output_tokens=1, temperature=nextafter(0.0, 1.0)).is_greedy
    assert TokenLogprobs(1, 0.5, 2).top == ()


def test_a_chunk_is_of_the_first_rank_unless_it_says_so() -> None:
    assert Chunk("a", 0, 1, True).kvp_ranks == (0,)
    assert (Completed(0, 1.0).stopped, Completed(0, 1.0).failed) == ((), ())


def test_a_word_that_is_not_known_is_refused_with_those_that_are() -> None:
    check_member("server.tool", "a", ("a", "b"))
    with pytest.raises(ConfigError) as error:
        check_member("server.tool", "c", ("a", "b"))
    assert str(error.value) == "server.tool=c: not known; use one of a, b"


def test_a_number_may_be_both_ends_of_its_range_or_none_and_must_be_finite() -> None:
    for value in (1.0, 2.0, None):
        check_range("server.limit", value, 1.0, 2.0)
    check_range("server.limit", 1e300, 1.0, inf)
    for value in (0.999, 2.001, float("nan")):
        with pytest.raises(ConfigError) as error:
            check_range("server.limit", value, 1.0, 2.0)
        assert str(error.value) == f"server.limit={value:.10g}: must be between 1 and 2"
    with pytest.raises(ConfigError):
        check_range("server.limit", inf, 1.0, inf)


def test_words_of_options_and_of_the_api_stay() -> None:
    assert [each.value for each in Chunking] == ["adaptive", "fixed", "whole"]
    assert [each.value for each in FinishReason] == ["stop", "length"]
    assert defaults(EngineStatus) == {"detail": "", "fraction": 0.0, "num_failures": 0, "num_recoveries": 0}
    assert defaults(TokenDelivery) == {
        "finish_reason": None, "logprobs": None, "prompt_logprobs": None, "num_cached_tokens": 0
    }
    assert [each.value for each in EnginePhase] == ["loading", "ready", "recovering", "failed", "stopped"]
