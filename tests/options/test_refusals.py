"""Whatever is wrong with a configuration is said in one line: key and value, what is wrong, the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.option_errors import check_http_url
from megatron_medha.options.serve_options import ServeConfig

Refusal = Callable[..., str]


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("scheduler.polcy=fcfs", "did you mean scheduler.policy?"),
        ("schedler=fcfs", "did you mean scheduler?"),
        ("port=8001", "did you mean server.port?"),
        ("server.step_budget_s=1", "did you mean scheduler.step_budget_s?"),
        ("parallel.pp=2", "did you mean parallel.spp?"),
        ("workload.qps=1", "unknown key"),
        ("scheduler.policy.x=3", "must be text"),
        ("model.shape.colour=blue", "set the outer key first"),
        ("model.shape.num_heads=31", "(model.shape is null); set the outer key first"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(refusal: Refusal, override: str, way_out: str) -> None:
    message = refusal(override)
    assert override.partition("=")[0].removesuffix(".x") in message
    assert way_out in message


def test_keys_given_to_an_outer_one_that_is_null_must_be_all_it_has(refusal: Refusal) -> None:
    sizes = "num_layers: 2, hidden_size: 8, ffn_hidden_size: 16, num_kv_heads: 1, head_dim: 8, vocab_size: 9"
    message = refusal("model.shape={name: mine, " + sizes + ", max_context_len: 64}")
    assert message == "model.shape.num_heads is missing; give it as model.shape.num_heads=VALUE"


def test_a_key_that_is_far_from_all_others_is_refused_with_those_of_its_group(refusal: Refusal) -> None:
    assert "scheduler has policy, is_preemptive" in refusal("scheduler.zzzzzz=1")


def test_a_plus_sign_does_not_smuggle_in_an_unknown_key(refusal: Refusal) -> None:
    assert refusal("+scheduler.foo=1").startswith("scheduler.foo=1: unknown key")
    assert refusal("+foo=1").startswith("foo=1: unknown key")


def test_an_unknown_option_of_a_group_is_refused_with_the_nearest_one_and_all_of_them(refusal: Refusal) -> None:
    message = refusal("scheduler=lasr")
    assert message.startswith("scheduler=lasr: unknown option; did you mean lars?")
    assert "vllm_chunk_512" in message


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("server.port=abc", "a whole number"),
        ("server.port=80.5", "a whole number"),
        ("server.port=", "a whole number"),
        ("scheduler.step_budget_s=soon", "a number"),
        ("scheduler.step_budget_s=null", "a number"),
        ("scheduler.has_space_sharing=maybe", "true or false"),
        ("scheduler.interruptible=maybe", "true or false or auto"),
        ("server.served_model_names=gpt", "a list, like [a,b]"),
        ("scheduler.policy=[lars]", "text"),
        ("model.kv_memory_gib=auto", "a number or null"),
    ],
)
def test_a_wrong_type_is_refused_with_the_right_one(refusal: Refusal, override: str, kind: str) -> None:
    message = refusal(override)
    assert message.startswith(f"{override}: ")
    assert message.endswith(f"it must be {kind}")


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("runtime=simm", "one of ranks, sim"),
        ("scheduler.chunking=adaptve", "one of adaptive, fixed, whole"),
        ("scheduler.policy=lasr", "choose one of fcfs"),
        ("model.device=tpu", "use one of auto, cpu"),
        ("model.dtype=int8", "use one of auto, float32, bfloat16"),
        ("log_level=loud", "use one of debug, info"),
        ("model.attention_backend=magic", "use one of auto, native, aten"),
        ("model.fp8=delayed", "use one of none, tensorwise, blockwise"),
        ("model.weight_dtype=int3", "use one of auto, int8, int4"),
        ("model.linear_backend=mkl", "use one of auto, native, onednn"),
        ("model.instruction_set=sse", "use one of auto, amx, avx512_bf16, avx512, avx2"),
        ("model.virtual_tp=3", "use one of auto, 1, 2, 4, 8"),
    ],
)
def test_a_value_outside_a_closed_set_is_refused_with_the_set(refusal: Refusal, override: str, allowed: str) -> None:
    message = refusal(override)
    assert message.startswith(override)
    assert allowed in message


@pytest.mark.parametrize(
    "override",
    [
        "scheduler.step_budget_s=0",
        "scheduler.step_budget_s=-1",
        "scheduler.step_budget_s=nan",
        "server.port=70000",
        "server.port=-1",
        "model.block_size=0",
        "model.kv_memory_gib=0",
        "model.kv_memory_gib=nan",
        "model.kv_memory_share=1.5",
        "model.max_context_len=0",
        "model.num_threads=0",
        "hardware.flops_per_s=0",
        "hardware.flops_per_s=inf",
        "hardware.memory_efficiency=2",
        "hardware.step_overhead_s=-1",
        "parallel.tp=0",
        "parallel.max_tokens_per_shard=0",
        "recovery.heartbeat_timeout_s=0.5",
        "recovery.max_failures=0",
        "tracking.interval_s=0",
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(refusal: Refusal, override: str) -> None:
    message = refusal(override)
    assert message.startswith(override.partition("=")[0] + "=")
    assert any(words in message for words in ("between", "must be 0", "at least"))


def test_a_tile_larger_than_a_batch_is_refused(refusal: Refusal) -> None:
    message = refusal("scheduler.tile_tokens=256", "scheduler.max_batch_tokens=128")
    assert message == "scheduler.tile_tokens=256 must not exceed scheduler.max_batch_tokens=128"


def test_gpus_of_kv_parallel_ranks_need_to_be_told_how_long_a_shard_is(
    refusal: Refusal, configure: Callable[..., ServeConfig]
) -> None:
    message = refusal("parallel.kvp=2", "model.device=cuda")
    assert message.startswith("parallel.max_tokens_per_shard=null: parallel.kvp=2")
    world = configure("parallel.kvp=2", "model.device=cuda", "model.kv_memory_gib=4").world
    assert isinstance(world, RankConfig) and world.max_tokens_per_shard is None


def test_a_shard_is_made_of_whole_blocks(refusal: Refusal) -> None:
    message = refusal("parallel.kvp=2", "parallel.max_tokens_per_shard=100", "kv.prefix_cache=false")
    assert message == "parallel.max_tokens_per_shard=100 must be a multiple of model.block_size=16"


def test_a_shard_is_made_of_whole_granules_of_the_prefix_cache(refusal: Refusal) -> None:
    message = refusal("parallel.kvp=2", "parallel.max_tokens_per_shard=1008", "kv.granule_tokens=64")
    assert message == (
        "parallel.max_tokens_per_shard=1008 must be a multiple of the prefix cache's granule of 64 tokens; use 1024, "
        "or kv.prefix_cache=false"
    )
    message = refusal("kv.granule_tokens=100")
    assert message == "kv.granule_tokens=100 must be a multiple of the block size, 16 tokens"


def test_ranks_that_share_this_machine_share_its_memory(refusal: Refusal) -> None:
    assert "on each of 4 ranks" in refusal("parallel.tp=2", "parallel.dp=2", "model.kv_memory_gib=900000")


def test_a_simulated_replica_fits_its_hardware(refusal: Refusal) -> None:
    simulated = ("runtime=sim", "model=llama3_8b", "hardware=h100_x8")
    assert "take a larger cluster" in refusal(*simulated, "parallel.tp=8", "parallel.spp=2")
    assert "must be a multiple of" in refusal(*simulated, "parallel.kvp=2", "parallel.max_tokens_per_shard=1001")
    assert "too small for one block" in refusal(*simulated, "parallel.tp=8", "model.kv_memory_gib=1e-5")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("launch=attach",), "model.kv_memory_gib=null"),
        (("launch=attach", "launch.key_file=null"), "launch.key_file=null: connections between machines"),
        (("launch=attach", "launch.address=null"), "launch.address=null: ranks that attach need one"),
        (("launch=attach", "launch.address=udp://x:1"), "launch.address=udp://x:1: must be tcp://HOST:PORT"),
        (("launch=attach", "launch.address=tcp://x:70000"), "launch.address=tcp://x:70000: must be tcp://HOST:PORT"),
        (("launch.address=tcp://x:1",), "launch.address=tcp://x:1: ranks of this machine need none"),
        (("launch.attach_timeout_s=0",), "launch.attach_timeout_s=0: must be between"),
    ],
)
def test_ranks_that_attach_need_an_address_keys_and_a_size(
    refusal: Refusal, overrides: tuple[str, ...], words: str
) -> None:
    assert words in refusal(*overrides)


def test_float16_is_refused_with_the_reason(refusal: Refusal) -> None:
    assert "use bfloat16" in refusal("model.dtype=float16")


@pytest.mark.parametrize("override", ["model.attention_backend=triton", "model.kv_dtype=fp8_e4m3"])
def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(refusal: Refusal, override: str) -> None:
    assert refusal("model.device=cpu", override) == f"{override}: needs model.device=cuda; use auto"


@pytest.mark.parametrize("override", ["model.linear_backend=onednn", "model.instruction_set=avx2"])
def test_what_only_a_cpu_can_do_is_refused_on_a_gpu(refusal: Refusal, override: str) -> None:
    assert refusal("model.device=cuda", override) == f"{override}: needs model.device=cpu; use auto"


def test_slices_are_refused_on_a_gpu(refusal: Refusal) -> None:
    assert refusal("model.device=cuda", "model.virtual_tp=4") == "model.virtual_tp=4: needs model.device=cpu; use 1"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("override", ["model.device=cuda", "model.fp8=tensorwise"])
def test_narrow_weights_are_refused_where_there_is_another_way(refusal: Refusal, override: str, dtype: str) -> None:
    assert refusal(override, f"model.weight_dtype={dtype}").startswith(f"model.weight_dtype={dtype}: ")


def test_more_kv_memory_than_is_free_is_refused(refusal: Refusal) -> None:
    assert "GiB are free" in refusal("model.kv_memory_gib=900000")


def test_kv_memory_that_is_too_small_for_one_block_is_refused(refusal: Refusal, checkpoint: Path) -> None:
    message = refusal("runtime=sim", "model=llama3_8b", f"tokenizer={checkpoint}", "model.kv_memory_gib=0.001")
    assert "too small for one block of 16 tokens" in message


def test_a_missing_checkpoint_is_refused_with_the_command_that_makes_one(refusal: Refusal) -> None:
    assert "medha train-tiny" in refusal("checkpoint=null")
    assert refusal("checkpoint=").startswith("checkpoint=: expected a path, got an empty text")


def test_a_checkpoint_that_is_no_directory_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "no such directory" in refusal(f"checkpoint={tmp_path}/nowhere")
    assert "a file, neither a directory nor *.gguf" in refusal(f"checkpoint={tmp_path}/file")


def test_a_checkpoint_without_a_tokenizer_is_refused_with_the_key_to_set(refusal: Refusal, tmp_path: Path) -> None:
    assert "tokenizer=DIR names a directory that has one" in refusal(f"checkpoint={tmp_path}")
    assert refusal(f"tokenizer={tmp_path}").startswith(f"tokenizer={tmp_path}: no tokenizer there")


def test_sizes_of_a_simulated_model_are_refused_beside_a_checkpoint(refusal: Refusal) -> None:
    assert "runtime=sim" in refusal("model=llama3_8b")


def test_a_simulation_without_sizes_is_refused(refusal: Refusal) -> None:
    assert "use model=llama3_8b" in refusal("runtime=sim")


def test_a_simulation_without_kv_memory_is_refused(refusal: Refusal) -> None:
    assert "give GiB" in refusal("runtime=sim", "model=llama3_8b", "model.kv_memory_gib=null")


def test_a_word_without_an_equals_sign_is_refused(refusal: Refusal) -> None:
    assert refusal("scheduler").startswith("scheduler: not of the form key=value")


def test_a_value_that_cannot_be_parsed_is_refused_with_quotes_around_it(refusal: Refusal) -> None:
    assert """'checkpoint="a=b"'""" in refusal("checkpoint=a=b")


def test_several_values_for_one_key_are_refused(refusal: Refusal) -> None:
    assert "only one can be" in refusal("scheduler=lars,fcfs")


def test_leaving_out_a_group_is_refused(refusal: Refusal) -> None:
    assert "nothing can be left out" in refusal("~scheduler")
    assert "scheduler is one of" in refusal("scheduler=null")


def test_settings_of_hydra_itself_are_refused_rather_than_ignored(refusal: Refusal) -> None:
    assert "change nothing here" in refusal("hydra.run.dir=elsewhere")


def test_an_api_key_that_is_not_in_the_environment_is_refused(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDHA_API_KEY", raising=False)
    message = refusal("server=public")
    assert message.startswith("server.api_key: ")
    assert "MEDHA_API_KEY" in message


def test_a_tracking_file_that_is_a_directory_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    assert "name a file" in refusal(f"tracking.decision_log={tmp_path}")


@pytest.mark.parametrize("key", ["metrics_log", "timeline"])
def test_two_logs_in_one_file_are_refused(refusal: Refusal, tmp_path: Path, key: str) -> None:
    file = tmp_path / "log"
    assert "name another" in refusal(f"tracking.decision_log={file}", f"tracking.{key}={file}")


def test_a_timeline_without_ranks_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    simulated = ("runtime=sim", "model=llama3_8b", "hardware=h100", "checkpoint=null", f"tokenizer={tmp_path}")
    assert "medha simulate" in refusal(*simulated, "tracking.timeline=trace.json")


def test_an_option_of_the_users_own_that_is_not_utf8_is_named(refusal: Refusal, tmp_path: Path) -> None:
    group = tmp_path / "own" / "scheduler"
    group.mkdir(parents=True)
    (group / "mine.yaml").write_bytes(b"\xff\xfe")
    assert "scheduler/mine.yaml is not UTF-8" in refusal("scheduler=mine", config_dir=tmp_path / "own")


def test_a_folder_of_own_options_must_exist(refusal: Refusal, tmp_path: Path) -> None:
    assert "no such directory" in refusal(config_dir=tmp_path / "nowhere")


def test_a_folder_of_own_options_must_not_be_one_with_a_keys_name_in_it(refusal: Refusal, tmp_path: Path) -> None:
    _folder(tmp_path / "own" / "checkpoint")
    assert "its folder checkpoint has the name of a key" in refusal(config_dir=tmp_path / "own")


def test_an_own_option_must_not_hide_behind_one_of_ours(refusal: Refusal, tmp_path: Path) -> None:
    own = _folder(tmp_path / "own" / "scheduler")
    (own / "lars.yaml").write_text("policy: fcfs\n")
    assert "rename it" in refusal(config_dir=own.parent)


def test_a_wrong_key_in_an_own_option_is_refused_with_its_file(refusal: Refusal, tmp_path: Path) -> None:
    own = _folder(tmp_path / "own" / "scheduler")
    (own / "mine.yaml").write_text("defaults:\n  - lars\n\npolcy: fcfs\n")
    message = refusal("scheduler=mine", config_dir=own.parent)
    assert message.startswith("scheduler.polcy (in scheduler/mine.yaml)")
    assert "did you mean scheduler.policy?" in message


def test_an_own_option_that_is_not_yaml_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    own = _folder(tmp_path / "own" / "scheduler")
    (own / "mine.yaml").write_text("policy: [\n")
    assert "not YAML" in refusal("scheduler=mine", config_dir=own.parent)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://host:0", "http://host:x", "http://[::1"])
def test_what_is_no_address_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url=.* must look like http://127.0.0.1:8000"):
        check_http_url("url", url)


@pytest.mark.parametrize("url", ["http://host", "https://host:8443/base", "http://[::1]:8000"])
def test_an_address_of_a_server_is_taken(url: str) -> None:
    check_http_url("url", url)
