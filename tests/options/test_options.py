"""What conf/ offers, and what becomes of it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import megatron_medha
from megatron_medha.cli.chat import ChatConfig
from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.cluster.launch_config import LaunchConfig
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.options.compose import compose, freeze, option_names
from megatron_medha.options.serve_options import (
    ParallelOptions,
    ServeConfig,
    ServeOptions,
    TrackingConfig,
)
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.slo import SloConfig
from megatron_medha.sim.baselines.baseline_config import BaselineConfig
from megatron_medha.system import machine

Configure = Callable[..., ServeConfig]

BASELINES = ("ssjf", "ssjf_noisy", "ssjf_oracle", "qlm", "vllm_long_threshold", "reserved_pool")
PACKAGE = Path(megatron_medha.__file__).parent


def test_without_overrides_every_component_gets_its_own_defaults(configure: Configure) -> None:
    config = configure()
    assert config.scheduler == SchedulerConfig()
    assert config.options.server == ServerConfig()
    assert config.options.tracking == TrackingConfig()
    assert isinstance(config.world, RankConfig)
    assert config.world.layout == ParallelLayout()


@pytest.mark.parametrize(
    ("group", "option", "component"),
    [
        ("scheduler", "lars", SchedulerConfig),
        ("server", "local", ServerConfig),
        ("slo_classes", "default", SloConfig),
        ("kv", "prefix_cache", KVConfig),
        ("model", "auto", ModelOptions),
        ("parallel", "single", ParallelOptions),
        ("launch", "local", LaunchConfig),
        ("recovery", "restart", RecoveryConfig),
        ("tracking", "none", TrackingConfig),
    ],
)
def test_the_default_option_shows_every_key_with_the_default_of_the_class(
    group: str, option: str, component: type
) -> None:
    shown = _read(f"{group}/{option}")
    assert shown == {field.name: _plain(field.default) for field in dataclasses.fields(component)}


def test_the_options_of_chat_are_those_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDHA_API_KEY", raising=False)
    assert freeze(compose("chat", ChatConfig, []), ChatConfig) == ChatConfig()


@pytest.mark.parametrize(
    ("name", "module", "class_name", "key", "directory"),
    [
        ("train_tiny", "tiny_training", "TrainTinyConfig", "directory", "checkpoints/tiny"),
        ("fetch_model", "first_model", "FetchConfig", "out", "checkpoints/smollm2-135m-instruct"),
    ],
)
def test_the_options_of_what_makes_a_checkpoint_are_those_of_its_class(
    name: str, module: str, class_name: str, key: str, directory: str
) -> None:
    # Read from the source, because importing it imports torch.
    tree = ast.parse((PACKAGE / "tiny" / f"{module}.py").read_text())
    [config] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    defaults = {
        item.target.id: ast.literal_eval(item.value)
        for item in config.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None
    }
    shown = _read(name)
    assert shown.pop(key) == directory
    assert shown == defaults


@pytest.mark.parametrize("option", [name for name in option_names("scheduler") if name not in BASELINES])
def test_every_scheduler_option_but_baselines_serves(configure: Configure, option: str) -> None:
    config = configure(f"scheduler={option}").scheduler
    if option in POLICIES:
        assert config == SchedulerConfig(policy=option, has_triage=option == "lars")


def test_the_medha_ablations_change_the_policy_and_drop_what_is_ours(configure: Configure) -> None:
    for policy in ("fcfs", "edf", "lrs", "srpt"):
        config = configure(f"scheduler=medha_{policy}").scheduler
        assert config == SchedulerConfig(
            policy=policy, has_space_sharing=False, progress_share=0.0, has_triage=False
        )
    assert configure("scheduler=medha_lars").scheduler == SchedulerConfig(
        policy="lars", slack_margin_steps=0.0, progress_share=0.0, has_triage=False
    )


@pytest.mark.parametrize("option", BASELINES)
def test_a_baseline_is_for_simulations(configure: Configure, option: str) -> None:
    with pytest.raises(ConfigError, match=r"^scheduler\.\w+=.*: a baseline, for comparisons under medha simulate"):
        configure(f"scheduler={option}")


def test_a_baseline_system_neither_shares_steps_nor_promises_progress() -> None:
    for option in (*BASELINES, "vllm_v1_threshold"):
        options = freeze(compose("simulate", SimulateOptions, [f"scheduler={option}"]), SimulateOptions)
        config = options.scheduler.reduced
        assert isinstance(config, BaselineConfig) == (option in BASELINES)
        assert config.is_preemptive == (option == "qlm")  # which evicts
        assert not config.has_space_sharing and not config.progress_share and not config.has_triage
        assert (config.chunking, config.fixed_chunk_tokens) == (Chunking.FIXED, 2048)


def test_the_vllm_options_are_first_come_first_served_with_a_token_budget(configure: Configure) -> None:
    for num_tokens in (512, 2048):
        config = configure(f"scheduler=vllm_chunk_{num_tokens}").scheduler
        assert (config.policy, config.chunking, config.fixed_chunk_tokens) == ("fcfs", Chunking.FIXED, num_tokens)
        assert not config.is_preemptive
        assert not config.has_space_sharing


def test_whole_prompts_are_not_cut_before_the_context_ends(configure: Configure) -> None:
    config = configure("scheduler=whole_prompt").scheduler
    assert (config.policy, config.chunking, config.is_preemptive) == ("fcfs", Chunking.WHOLE, False)
    assert config.max_batch_tokens >= 131_072


@pytest.mark.parametrize("option", option_names("hardware"))
def test_every_hardware_option_has_a_name_and_positive_speeds(configure: Configure, option: str) -> None:
    hardware = configure(f"hardware={option}").options.hardware
    assert hardware.name
    assert hardware.flops_per_s > 1e9
    assert hardware.memory_bytes_per_s > 1e9


def test_without_a_name_the_hardware_is_this_machine(configure: Configure) -> None:
    hardware = configure().options.hardware
    assert hardware.flops_per_s == machine.cpu_flops_per_s()
    assert hardware.memory_bytes_per_s == machine.memory_bytes_per_s()


def test_a_tracking_option_names_its_files(configure: Configure) -> None:
    tracking = configure("tracking=jsonl").options.tracking
    assert tracking.decision_log == Path("outputs/decisions.jsonl")
    assert tracking.metrics_log == Path("outputs/metrics.jsonl")


def test_the_public_server_takes_its_key_from_the_environment(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDHA_API_KEY", "secret")
    server = configure("server=public").options.server
    assert (server.host, server.api_key) == ("0.0.0.0", "secret")


def test_overrides_reach_the_rank(configure: Configure, checkpoint: Path) -> None:
    config = configure(
        "model.dtype=bfloat16", "model.block_size=32", "model.kv_memory_gib=0.5", "model.max_context_len=1000",
        "scheduler.max_batch_tokens=4096", "model.num_threads=1",
    )  # fmt: skip
    assert config.world == RankConfig(
        server_endpoint="",
        checkpoint=str(checkpoint),
        max_batch_tokens=4096,
        model=ModelOptions(
            device="cpu", dtype="bfloat16", block_size=32, kv_memory_gib=0.5, max_context_len=1000, num_threads=1
        ),
        kv_memory_bytes=2**29,
        kv=KVConfig(),
    )


def test_without_a_number_kv_gets_a_share_of_what_is_free_beside_the_weights(
    configure: Configure, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "weights").write_bytes(bytes(1000))
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 1_000_000 + machine.directory_bytes(checkpoint))
    world = configure("model.kv_memory_share=0.25").world
    assert isinstance(world, RankConfig)
    assert world.kv_memory_bytes == 250_000


def test_a_simulated_model_needs_no_checkpoint(configure: Configure, checkpoint: Path) -> None:
    config = configure("checkpoint=null", "runtime=sim", "model=llama3_8b", f"tokenizer={checkpoint}")
    assert isinstance(config.world, SchedulerSetup)
    # 128 KiB of KV per token: 32 layers x 2 x 8 heads x 128 x 2 bytes.
    assert config.world.num_blocks == 48 * 2**30 // (131_072 * 16)


def test_a_simulated_replica_may_have_many_ranks(configure: Configure, checkpoint: Path) -> None:
    layout = ("parallel.tp=8", "parallel.spp=2", "parallel.kvp=2")
    config = configure("runtime=sim", "model=llama3_8b", "hardware=a100", *layout, f"tokenizer={checkpoint}")
    assert isinstance(config.world, SchedulerSetup)
    # Each rank holds half of the layers and one of eight KV heads; the two kvp ranks share 131,072 tokens evenly.
    assert config.world.num_blocks == 16 * (48 * 2**30 // (131_072 * 16))
    assert (config.world.hardware.num_devices, config.world.max_tokens_per_shard) == (32, 65_536)


def test_who_shares_cached_prefixes_depends_on_the_address_unless_it_is_set(configure: Configure) -> None:
    def is_by_key(*words: str) -> bool:
        options = configure(*words).options
        return options.kv.is_by_key(options.server)

    public = ("server.host=0.0.0.0", "server.api_key=k")
    assert not is_by_key() and is_by_key(*public)
    assert is_by_key("kv.isolation=key") and not is_by_key(*public, "kv.isolation=none")
    with pytest.raises(ConfigError, match=r"^kv\.isolation=all: not known; use one of auto, none, key$"):
        configure("kv.isolation=all")


def test_the_prefix_cache_is_an_option_of_every_scheduler_that_runs(configure: Configure) -> None:
    words = ("kv.prefix_cache=false", "kv.eviction=lru", "kv.session_share=0.1")
    expected = KVConfig(prefix_cache=False, eviction="lru", session_share=0.1)
    assert configure(*words).world.kv == configure("runtime=sim", "model=llama3_8b", *words).world.kv == expected
    options = freeze(compose("simulate", SimulateOptions, words), SimulateOptions)
    assert simulation_config(options).setup.kv == expected
    with pytest.raises(ConfigError, match=r"kv\.isolation"):
        compose("simulate", SimulateOptions, ["kv.isolation=none"])


def test_a_simulated_context_can_be_shortened(configure: Configure) -> None:
    config = configure("runtime=sim", "model=llama3_8b", "model.max_context_len=4096")
    assert isinstance(config.world, SchedulerSetup)
    assert config.world.shape.max_context_len == 4096


def test_options_of_the_users_own_are_found(configure: Configure, tmp_path: Path) -> None:
    own = _folder(tmp_path / "own" / "scheduler")
    (own / "mine.yaml").write_text("defaults:\n  - lars\n\nstep_budget_s: 0.02\n")
    assert configure("scheduler=mine", config_dir=own.parent).scheduler == SchedulerConfig(step_budget_s=0.02)


def test_a_list_of_names_becomes_a_tuple(configure: Configure) -> None:
    assert configure("server.served_model_names=[a,b]").options.server.served_model_names == ("a", "b")


def test_every_key_of_every_default_option_has_a_comment_or_a_plain_name() -> None:
    for group, option in [
        ("model", "auto"), ("parallel", "single"), ("scheduler", "lars"), ("server", "local"), ("tracking", "none"),
        ("launch", "local"), ("recovery", "restart"),
    ]:  # fmt: skip
        lines = (_conf() / group / f"{option}.yaml").read_text().splitlines()
        assert lines[0].startswith("# ")
        assert all("#" in line for line in lines if line), group


def test_composing_twice_gives_the_same(checkpoint: Path) -> None:
    first = compose("serve", ServeOptions, [f"checkpoint={checkpoint}"])
    assert compose("serve", ServeOptions, [f"checkpoint={checkpoint}"]) == first


def _conf() -> Path:
    import megatron_medha.conf

    [directory] = megatron_medha.conf.__path__
    return Path(directory)


def _read(name: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(_conf() / f"{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "defaults"}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_ranks_of_one_machine_share_its_cores_and_memory(configure: Configure) -> None:
    alone = configure().world
    config = configure("parallel.spp=2", "parallel.kvp=2", "parallel.dp=2", "parallel.max_tokens_per_shard=4096")
    assert isinstance(alone, RankConfig) and isinstance(config.world, RankConfig)
    assert config.options.parallel.dp == 2
    assert config.world.layout == ParallelLayout(spp=2, kvp=2)
    assert config.world.max_tokens_per_shard == 4096
    assert config.world.model.num_threads == max(1, machine.num_usable_cores() // 8) and alone.model.num_threads is None
    assert config.world.kv_memory_bytes < alone.kv_memory_bytes / 4
