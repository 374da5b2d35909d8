"""A whole rank over the Triton kernels, interpreted. Run by test_triton_rank.py, in a process of its own."""

from __future__ import annotations

import dataclasses

from megatron_medha.kernels.triton.triton_interpreter import use_interpreter

use_interpreter()

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import msgspec  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from megatron_medha.cluster.messages import RankStep, StepDone  # noqa: E402
from megatron_medha.cluster.rank_config import RankConfig  # noqa: E402
from megatron_medha.core.batch import Chunk  # noqa: E402
from megatron_medha.core.cost.step_sizes import GRAPH_SIZES  # noqa: E402
from megatron_medha.core.layout import ParallelLayout  # noqa: E402
from megatron_medha.kernels.kv import block_tables  # noqa: E402
from megatron_medha.parallel.groups import build_groups  # noqa: E402
from megatron_medha.worker.cuda_graphs import GraphShape, StepGraphs, graph_shapes, step_graphs  # noqa: E402
from megatron_medha.worker.startup.load import load_rank  # noqa: E402
from tests.kernels import fake_flash3  # noqa: E402
from tests.models.test_hf_families import save_model  # noqa: E402
from tests.worker.conftest import Front  # noqa: E402


def prompt(num_tokens: int, seed: int) -> list[int]:
    return torch.randint(4, 100, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def on_triton(config: RankConfig, kv_dtype: str = "auto") -> RankConfig:
    model = dataclasses.replace(config.model, attention_backend="triton", kv_dtype=kv_dtype)
    return msgspec.structs.replace(config, model=model)


def tokens_of(config: RankConfig, front: Front | None = None) -> tuple[list[int], str]:
    """Two requests in mixed batches: a prompt in chunks beside one that decodes."""
    front = front or Front(*load_rank(config, lambda what, fraction: None))
    done = [
        front.step([front.first("short", 9, room=16, samples=True)], [front.new("short", prompt(9, 1))]),
        front.step([front.first("long", 20, room=48), Chunk("short", 9, 1, True)], [front.new("long", prompt(37, 2))]),
        front.step([Chunk("short", 10, 1, True), Chunk("long", 20, 17, True)]),
        front.step([Chunk("long", 37, 1, True), Chunk("short", 11, 1, True)]),
    ]
    return [token.token_id for step in done for token in step.tokens], front.ready.device


def test_a_rank_over_the_triton_kernels_says_what_one_over_the_cpus_says(
    rank_config: RankConfig, theirs: tuple[Any, Path]
) -> None:
    config = msgspec.structs.replace(rank_config, kv_memory_bytes=1 << 20)
    expected, _ = tokens_of(config)
    found, device = tokens_of(on_triton(config))
    assert "triton attention" in device
    assert found == expected
    # e4m3 KV moves logits by some percent; that it runs and says so is what is looked at here.
    found, device = tokens_of(on_triton(config, "fp8_e4m3"))
    assert "KV in float8_e4m3fn" in device
    assert len(found) == len(expected)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_kv_memory_of_the_triton_kernels_can_be_cleared_for_a_profile(rank_config: RankConfig, kv_dtype: str) -> None:
    config = on_triton(msgspec.structs.replace(rank_config, kv_memory_bytes=1 << 20), kv_dtype)
    rank, _ = load_rank(config, lambda what, fraction: None)
    rank.clear_kv()
    assert all(not tensor.float().any() for layer in rank._kv_layers for tensor in layer)


def test_steps_replayed_over_static_buffers_say_what_eager_steps_say(rank_config: RankConfig) -> None:
    config = msgspec.structs.replace(rank_config, kv_memory_bytes=1 << 20)
    expected, _ = tokens_of(config)
    replays = []

    def by_hand(work: Any, is_run_before: bool) -> Any:
        output = work()

        def replay() -> None:
            replays.append(output.shape[0])
            output.copy_(work())

        return replay, output

    rank, ready = load_rank(on_triton(config), lambda what, fraction: None)
    rank.graphs = StepGraphs(
        rank.model, rank._backend, rank._kv_layers, rank._rotary, torch.device("cpu"),
        shapes=[GraphShape(2, 2, False), GraphShape(24, 3, True)], new_capture=lambda: by_hand,
    )  # fmt: skip
    found, _ = tokens_of(config, Front(rank, ready))
    assert found == expected
    # Rows of logits: 3 where there is a chunk, 2 of decodes; these are all launched ahead: "short" after the first
    # step, both after the third and the fourth.
    assert replays == [3, 2, 3, 3, 2, 2]


FAMILIES = {
    "windows and sinks": ("gpt_oss", {
        "head_dim": 16, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"]}),
    "windows and capped scores": ("gemma2", {
        "head_dim": 24, "sliding_window": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "latent vectors": ("deepseek_v3", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "pad_token_id": 0, "n_group": 2,
        "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 48, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 24, "first_k_dense_replace": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_other_families_say_on_triton_what_they_say_on_the_cpu_by_graphs_too(
    name: str, rank_config: RankConfig, tmp_path: Path
) -> None:
    save_model(tmp_path, FAMILIES[name][0], {"num_hidden_layers": 2, **FAMILIES[name][1]})
    config = msgspec.structs.replace(rank_config, checkpoint=str(tmp_path), kv_memory_bytes=1 << 20)
    expected, _ = tokens_of(config)
    rank, ready = load_rank(on_triton(config), lambda what, fraction: None)
    num_replayed = 0

    def by_hand(work: Any, is_run_before: bool) -> Any:
        output = work()

        def replay() -> None:
            nonlocal num_replayed
            num_replayed += 1
            output.copy_(work())

        return replay, output

    shapes = [GraphShape(24, 3, True)]
    rank.graphs = StepGraphs(
        rank.model, rank._backend, rank._kv_layers, rank._rotary, torch.device("cpu"), shapes=shapes,
        new_capture=lambda: by_hand, window=rank._config.window,
    )  # fmt: skip
    found, _ = tokens_of(config, Front(rank, ready))
    assert found == expected
    assert num_replayed >= 4


def test_flash_attention_3_says_in_graphs_what_it_says_eagerly(rank_config: RankConfig) -> None:
    fake_flash3.install()
    model = dataclasses.replace(rank_config.model, attention_backend="flash_attn_3", dtype="bfloat16")
    config = msgspec.structs.replace(rank_config, kv_memory_bytes=1 << 20, model=model)
    expected, device = tokens_of(config)
    assert "flash_attn_3 attention" in device
    replays: list[int] = []

    def by_hand(work: Any, is_run_before: bool) -> Any:
        output = work()

        def replay() -> None:
            replays.append(output.shape[0])
            output.copy_(work())

        return replay, output

    rank, ready = load_rank(config, lambda what, fraction: None)
    rank.graphs = StepGraphs(
        rank.model, rank._backend, rank._kv_layers, rank._rotary, torch.device("cpu"),
        shapes=[GraphShape(2, 2, False), GraphShape(24, 3, True)], new_capture=lambda: by_hand,
    )  # fmt: skip
    found, _ = tokens_of(config, Front(rank, ready))
    assert found == expected
    assert replays == [3, 2, 3, 3, 2, 2]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 33, 64, 65, 130, 200, 256, 257, 400, 512, 513])
def test_the_scheduler_is_told_the_size_of_the_graph_that_a_step_will_run_in(num_tokens: int) -> None:
    graphs = StepGraphs.__new__(StepGraphs)
    graphs._shapes = sorted(graph_shapes())
    for num_sequences in {1, 2, 31, 32, 33, 64, 255, 256, 257, num_tokens - 1, num_tokens}:
        if not 0 < num_sequences <= num_tokens:
            continue
        ranges = [SimpleNamespace(num_rows=1)] * (num_sequences - 1)
        ranges.append(SimpleNamespace(num_rows=num_tokens - num_sequences + 1))
        shape = graphs.shape_for(SimpleNamespace(token_ids_T=range(num_tokens), ranges=ranges))  # type: ignore[arg-type]
        found = None if shape is None else shape.num_tokens
        assert found == GRAPH_SIZES.fitting(num_tokens, num_sequences), (num_tokens, num_sequences)


def test_no_graph_is_replayed_over_block_tables_that_grew_since_it_was_captured(
    rank_config: RankConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_tables, "_MIN_FIRST_ROWS", 1)
    monkeypatch.setattr(block_tables, "_FIRST_BYTES", 0)
    config = on_triton(msgspec.structs.replace(rank_config, kv_memory_bytes=1 << 20))
    rank, ready = load_rank(config, lambda what, fraction: None)
    captured_over: list[int] = []  # one entry for each time that all graphs were captured
    replayed_over: list[tuple[int, int]] = []

    def new_capture() -> Any:
        generation = rank._backend.tables.generation
        captured_over.append(generation)

        def capture(work: Any, is_run_before: bool) -> Any:
            return lambda: replayed_over.append((generation, rank._backend.tables.generation)), work()

        return capture

    rank.graphs = StepGraphs(
        rank.model, rank._backend, rank._kv_layers, rank._rotary, torch.device("cpu"),
        shapes=[GraphShape(24, 3, True)], new_capture=new_capture,
    )  # fmt: skip
    tokens_of(config, Front(rank, ready))
    assert captured_over == [0, 1]  # the second request needs a second row
    assert len(replayed_over) == 6  # the four steps but for the last, which was launched ahead, as were three decodes
    assert all(then == now for then, now in replayed_over)


class Recorded:
    """A rank, and the steps it has run with what it answered."""

    def __init__(self, rank: Any) -> None:
        self.rank = rank
        self.steps: list[RankStep] = []
        self.answers: list[StepDone] = []

    def run(self, step: RankStep) -> StepDone:
        self.steps.append(step)
        self.answers.append(self.rank.run(step))
        return self.answers[-1]


def test_tensor_parallel_ranks_replay_graphs_and_launch_ahead_with_tokens_that_stay_on_the_devices(
    rank_config: RankConfig, tmp_path: Path
) -> None:
    config = on_triton(msgspec.structs.replace(rank_config, kv_memory_bytes=1 << 20))
    rank, ready = load_rank(config, lambda what, fraction: None)
    alone = Recorded(rank)
    front = Front(alone, ready)
    asked = {"temperature": 1.0, "seed": 5, "top_p": 0.9}
    front.step([front.first("short", 9, room=16, samples=True)], [front.new("short", prompt(9, 1), **asked)])
    front.step(
        [front.first("long", 20, room=48), Chunk("short", 9, 1, True)], [front.new("long", prompt(37, 2), **asked)]
    )
    front.step([Chunk("short", 10, 1, True), Chunk("long", 20, 17, True)])
    front.step([Chunk("long", 37, 1, True), Chunk("short", 11, 1, True)])
    front.step([Chunk("long", 38, 1, True)], released=["short"])
    expected = [[token.token_id for token in done.tokens] for done in alone.answers]
    steps = alone.steps[:1]
    for step, before in zip(alone.steps[1:], alone.answers, strict=False):
        told = tuple((t.request_id, t.token_id) for t in before.tokens if t.request_id not in step.released)
        steps.append(msgspec.structs.replace(step, sampled=told))
    for index in range(2):
        one = msgspec.structs.replace(
            config, rank=index, layout=ParallelLayout(tp=2), init_method=f"file://{tmp_path}/meet"
        )
        (tmp_path / f"config-{index}").write_bytes(msgspec.json.encode(one))
    (tmp_path / "steps").write_bytes(msgspec.msgpack.encode(steps))
    # Not forked: this process has joined a group already.
    command = [sys.executable, "-m", "tests.worker.triton_rank_cases", str(tmp_path)]
    partners = [subprocess.Popen([*command, str(index)], cwd=Path(__file__).parents[2]) for index in range(2)]
    assert [partner.wait(timeout=120) for partner in partners] == [0, 0]
    (first, replays), (second, partners_replays) = (json.loads((tmp_path / str(i)).read_text()) for i in range(2))
    assert first == expected
    assert second == [[]] * len(steps)  # the other rank reports nothing, and waits for nothing
    # Rows of logits: 3 where there is a chunk, 2 of decodes, which are launched ahead.
    assert replays == partners_replays == [3, 2, 3, 3, 2, 2, 2], (replays, partners_replays)


def run_one_of_two(directory: Path, index: str) -> None:
    """One rank of tp=2 over the steps in the directory; what it answers, and its graphs' rows, to a file."""
    config = msgspec.json.decode((directory / f"config-{index}").read_bytes(), type=RankConfig)
    steps = msgspec.msgpack.decode((directory / "steps").read_bytes(), type=list[RankStep])
    rank, _ = load_rank(config, lambda what, fraction: None)
    replays: list[int] = []

    def captured(work: Any, is_run_before: bool) -> Any:
        output = work()

        def replay() -> None:
            replays.append(output.shape[0])
            output.copy_(work())

        return replay, output

    rank.graphs = step_graphs(
        rank.model, rank._backend, rank._kv_layers, rank._rotary, torch.device("cpu"), build_groups(config.layout),
        new_capture=lambda tp: lambda: captured, shapes=[GraphShape(2, 2, False), GraphShape(24, 3, True)],
    )  # fmt: skip
    tokens = [[token.token_id for token in rank.run(step).tokens] for step in steps]
    (directory / index).write_text(json.dumps([tokens, replays]))


if __name__ == "__main__":
    run_one_of_two(Path(sys.argv[1]), sys.argv[2])
