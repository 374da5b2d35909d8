"""What one rank answers to steps: tokens, log-probabilities, faults of single requests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from megatron_medha.cluster.messages import RankStep
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import KVOp, append_op, copy_op
from megatron_medha.kernels.native_build import use_target
from megatron_medha.worker.startup.device import context_len_of, dtype_of, local_device_index
from megatron_medha.worker.startup.load import load_rank

CPU = torch.device("cpu")


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 512, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def transformers_greedy(theirs: tuple[Any, Path], token_ids: list[int], num_outputs: int) -> list[int]:
    with torch.inference_mode():
        out = theirs[0].generate(
            torch.tensor([token_ids]), max_new_tokens=num_outputs, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(token_ids) :].tolist()


@pytest.mark.parametrize(("num_tokens", "chunk"), [(1, 1), (50, 50), (200, 33)])
def test_greedy_output_is_transformers_over_64_tokens(
    front: Any, theirs: tuple[Any, Path], num_tokens: int, chunk: int
) -> None:
    token_ids = prompt(num_tokens)
    assert front.generate("a", token_ids, 64, chunk=chunk) == transformers_greedy(theirs, token_ids, 64)


def test_requests_in_one_batch_get_what_they_get_alone(front: Any, theirs: tuple[Any, Path]) -> None:
    long, short = prompt(120, 1), prompt(20, 2)
    front.step([front.first("short", 20, room=40, samples=True)], [front.new("short", short)])
    outputs = [
        front.step(
            [front.first("long", 50, room=140), Chunk("short", 20, 1, True)],
            [front.new("long", long)],
        ),
        front.step([Chunk("short", 21, 1, True), Chunk("long", 50, 70, True)]),
        front.step([Chunk("long", 120, 1, True), Chunk("short", 22, 1, True)]),
    ]
    said = [(token.request_id, token.token_id) for done in outputs for token in done.tokens]
    short_alone, long_alone = transformers_greedy(theirs, short, 4), transformers_greedy(theirs, long, 2)
    assert [token for request_id, token in said if request_id == "short"] == short_alone[1:]
    assert [token for request_id, token in said if request_id == "long"] == long_alone


def test_a_chunk_in_the_middle_of_a_prompt_samples_nothing(front: Any) -> None:
    done = front.step([front.first("a", 10, room=40)], [front.new("a", prompt(30))])
    assert done.tokens == () and done.prompt_logprobs == () and done.failed == ()


def test_a_sequence_that_lost_its_kv_continues_with_the_same_tokens(front: Any, theirs: tuple[Any, Path]) -> None:
    token_ids = prompt(40)
    expected = transformers_greedy(theirs, token_ids, 8)
    front.step([front.first("a", 40, room=64, samples=True)], [front.new("a", token_ids)])
    outputs = [front.step([Chunk("a", 40 + i, 1, True)]).tokens[0].token_id for i in range(4)]
    # Preempted: 45 known tokens are computed again, in other blocks, in two chunks; the last one samples the next.
    front.step([front.first("a", 30, room=64)])
    outputs.append(front.step([Chunk("a", 30, 15, True)]).tokens[0].token_id)
    outputs.append(front.step([Chunk("a", 45, 1, True)]).tokens[0].token_id)
    assert outputs == expected[1:7]


def test_a_restarted_rank_continues_from_prompt_and_output_so_far(front: Any, theirs: tuple[Any, Path]) -> None:
    token_ids = prompt(40)
    expected = transformers_greedy(theirs, token_ids, 8)
    known = [*token_ids, *expected[:5]]
    done = front.step(
        [front.first("a", 45, room=64, samples=True)], [front.new("a", known, num_prompt_tokens=40)]
    )
    assert done.tokens[0].token_id == expected[5]


def test_sampled_tokens_follow_the_seed_whoever_shares_the_batch(front: Any) -> None:
    sampling = {"temperature": 1.0, "seed": 7, "top_k": 50}
    alone = front.generate("a", prompt(30), 10, **sampling)
    front.step([front.first("noise", 20, room=60, samples=True)], [front.new("noise", prompt(20, 5))])
    front.step(
        [front.first("b", 30, room=60, samples=True), Chunk("noise", 20, 1, True)],
        [front.new("b", prompt(30), **sampling)],
    )
    shared = [
        front.step([Chunk("noise", 21 + i, 1, True), Chunk("b", 30 + i, 1, True)]).tokens[1].token_id
        for i in range(9)
    ]
    assert shared == alone[1:]


def test_a_stop_token_is_marked(front: Any, theirs: tuple[Any, Path]) -> None:
    token_ids = prompt(25)
    first, second = transformers_greedy(theirs, token_ids, 2)
    done = front.step(
        [front.first("a", 25, room=32, samples=True)], [front.new("a", token_ids, stop_token_ids=(second,))]
    )
    assert (done.tokens[0].token_id, done.tokens[0].is_stop) == (first, first == second)
    done = front.step([Chunk("a", 25, 1, True)])
    assert (done.tokens[0].token_id, done.tokens[0].is_stop) == (second, True)


def test_output_logprobs_are_those_of_the_models_distribution(front: Any, theirs: tuple[Any, Path]) -> None:
    token_ids = prompt(25)
    done = front.step([front.first("a", 25, room=32, samples=True)], [front.new("a", token_ids, num_logprobs=3)])
    with torch.inference_mode():
        expected_V = theirs[0](torch.tensor([token_ids])).logits[0, -1].log_softmax(-1)
    found = done.tokens[0].logprobs
    best = expected_V.topk(3)
    assert found is not None and found.rank == 1
    assert found.logprob == pytest.approx(expected_V.max().item(), abs=1e-3)
    assert [token_id for token_id, _ in found.top] == best.indices.tolist()
    assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("cuts", [[30], [1, 2, 30], [13, 29, 30], [29, 30]])
def test_prompt_logprobs_cover_every_position_after_the_first_whatever_the_chunks(
    front: Any, theirs: tuple[Any, Path], cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_medha.worker.prompt_rows._SLICE_LOGITS", 5 * 512)  # slices of five rows
    token_ids = prompt(30)
    other = front.new("other", prompt(12), num_prompt_logprobs=0)
    found: dict[int, Any] = {}
    start = 0
    for end in cuts:
        chunks = [Chunk("a", start, end - start, end == 30)]
        if start == 0:
            chunks = [
                front.first("other", 12, room=32),
                front.first("a", end, room=32, samples=end == 30),
            ]
        new = [other, front.new("a", token_ids, num_prompt_logprobs=2)] if start == 0 else ()
        for message in front.step(chunks, new).prompt_logprobs:
            if message.request_id == "a":
                found |= {message.first_position + i: entry for i, entry in enumerate(message.logprobs)}
        start = end
    assert sorted(found) == list(range(1, 30))
    with torch.inference_mode():
        expected_TV = theirs[0](torch.tensor([token_ids])).logits[0].log_softmax(-1)
    for position, entry in found.items():
        row_V = expected_TV[position - 1]
        assert entry.token_id == token_ids[position]
        assert entry.logprob == pytest.approx(row_V[token_ids[position]].item(), abs=1e-3)
        assert [token_id for token_id, _ in entry.top] == row_V.topk(2).indices.tolist()


@pytest.mark.parametrize("bad_id", [-1, 512, 2**31 - 1])
def test_a_token_outside_the_vocabulary_fails_its_request_alone(
    front: Any, theirs: tuple[Any, Path], bad_id: int
) -> None:
    done = front.step(
        [front.first("bad", 3, room=32, samples=True), front.first("good", 25, room=32, samples=True)],
        [front.new("bad", [5, bad_id, 6]), front.new("good", prompt(25))],
    )
    assert [request_id for request_id, _ in done.failed] == ["bad"]
    assert str(bad_id) in done.failed[0][1]
    assert [(token.request_id, token.token_id) for token in done.tokens] == [
        ("good", transformers_greedy(theirs, prompt(25), 1)[0])
    ]


def test_outputs_that_are_not_numbers_fail_their_request_alone(front: Any, theirs: tuple[Any, Path]) -> None:
    for name in ("bad", "good"):
        front.step([front.first(name, 25, room=32, samples=True)], [front.new(name, prompt(25))])
    front.rank._kv_layers[0].k[:, 0] = torch.nan  # of "bad", which came first, in every layout
    done = front.step([Chunk("bad", 25, 1, True), Chunk("good", 25, 1, True)])
    assert [request_id for request_id, _ in done.failed] == ["bad"]
    assert [token.token_id for token in done.tokens] == transformers_greedy(theirs, prompt(25), 2)[1:]
    # The front ends the one; the rank lives on.
    done = front.step([Chunk("good", 26, 1, True)], released=["bad"])
    assert done.failed == () and len(done.tokens) == 1


def test_released_requests_are_forgotten_and_their_ids_may_return(front: Any, theirs: tuple[Any, Path]) -> None:
    front.generate("a", prompt(20), 3)
    assert len(front.rank._requests) == 0
    token_ids = prompt(33, 9)
    done = front.step(
        [front.first("a", 33, room=64, samples=True)], [front.new("a", token_ids)], released=["a", "never-seen"]
    )
    assert done.tokens[0].token_id == transformers_greedy(theirs, token_ids, 1)[0]


def test_a_batch_without_chunks_only_releases(front: Any) -> None:
    front.step([front.first("a", 5, room=16)], [front.new("a", prompt(5))])
    done = front.step(released=["a"])
    assert done.tokens == () and len(front.rank._requests) == 0


def test_a_chunk_of_a_request_never_announced_is_a_bug(front: Any) -> None:
    with pytest.raises(AssertionError, match="never announced"):
        front.step([front.first("ghost", 5, room=16)])


def test_output_grows_past_every_buffer(front: Any) -> None:
    assert len(front.generate("a", prompt(3), 600)) == 600


def test_the_kv_memory_asked_for_is_counted_in_blocks_of_all_layers(front: Any, rank_config: RankConfig) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4  # K and V, layers, kv heads, head dim, block size, fp32
    assert front.ready.num_blocks == (8 << 20) // block_bytes
    assert front.ready.shape.bytes_per_element == 4
    assert front.ready.shape.kv_bytes_per_token * 16 == block_bytes
    assert front.ready.stop_token_ids == (2,)
    assert front.ready.device.startswith("cpu, 1 threads, float32")
    assert "onednn linear layers" in front.ready.device


def test_a_rank_names_the_instruction_set_of_the_kernels_it_uses(rank_config: RankConfig) -> None:
    model = dataclasses.replace(rank_config.model, dtype="bfloat16", instruction_set="avx2")
    try:
        _, ready = load_rank(msgspec.structs.replace(rank_config, model=model), lambda what, fraction: None)
    finally:
        use_target("auto")
    assert "native avx2 attention" in ready.device and "native avx2 linear layers" in ready.device


def test_memory_for_less_than_a_block_is_refused_with_the_way_out(rank_config: RankConfig) -> None:
    with pytest.raises(ConfigError, match="kv_memory_bytes=100 holds no block of 16 tokens; one takes 8192 bytes"):
        load_rank(msgspec.structs.replace(rank_config, kv_memory_bytes=100), lambda what, fraction: None)


def test_a_pool_of_a_single_block_is_enough_to_start(rank_config: RankConfig) -> None:
    _, ready = load_rank(msgspec.structs.replace(rank_config, kv_memory_bytes=8192), lambda what, fraction: None)
    assert ready.num_blocks == 1


def test_shards_as_short_as_the_warm_up_are_long_enough_to_start(rank_config: RankConfig) -> None:
    config = msgspec.structs.replace(rank_config, max_tokens_per_shard=64)
    _, ready = load_rank(config, lambda what, fraction: None)
    assert ready.shard_tokens == 64


def test_bfloat16_runs_and_reports_itself(rank_config: RankConfig) -> None:
    model = dataclasses.replace(rank_config.model, dtype="bfloat16")
    rank, ready = load_rank(msgspec.structs.replace(rank_config, model=model), lambda what, fraction: None)
    assert ready.shape.bytes_per_element == 2
    assert "bfloat16" in ready.device


def test_a_context_longer_than_the_checkpoints_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_context_len=9000 must lie between 1 and the checkpoint's own 4096"):
        context_len_of(9000, 4096)


def test_every_rank_takes_the_gpu_its_launcher_gives_it() -> None:
    assert local_device_index({}, 4) == 0
    assert local_device_index({"LOCAL_RANK": "3"}, 4) == 3
    assert local_device_index({"SLURM_LOCALID": "2"}, 4) == 2
    # srun --gpus-per-task=1 shows each rank its own device only.
    assert local_device_index({"SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "2"}, 1) == 0
    with pytest.raises(ConfigError, match="LOCAL_RANK=4: this machine shows 4 CUDA devices"):
        local_device_index({"LOCAL_RANK": "4"}, 4)


def test_the_dtype_is_the_checkpoints_own_unless_asked_otherwise() -> None:
    assert dtype_of("auto", "float32", CPU) == torch.float32
    assert dtype_of("auto", "bfloat16", CPU) == torch.bfloat16
    assert dtype_of("auto", "float16", CPU) == torch.bfloat16
    assert dtype_of("float32", "bfloat16", CPU) == torch.float32


def test_on_a_gpu_a_float32_checkpoint_runs_in_bfloat16_and_nobody_gets_float32() -> None:
    cuda = torch.device("cuda")
    assert dtype_of("auto", "float32", cuda) == dtype_of("bfloat16", "float32", cuda) == torch.bfloat16
    with pytest.raises(ConfigError, match="model.dtype=float32: .* use auto, bfloat16 or model.device=cpu"):
        dtype_of("float32", "bfloat16", cuda)


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_prompt_begins_behind_blocks_that_another_has_computed(front: Any, is_copied: bool) -> None:
    shared, rest = prompt(32, 1), prompt(9, 2)
    expected = front.generate("alone", [*shared, *rest], 6)
    front.step([front.first("a", 32, room=32, samples=True)], [front.new("a", shared)])
    (extent,) = front.kv_ops_sent[-1].extents
    if is_copied:
        own = front.append("b", 2)
        front.kv_ops.append(copy_op("b", 0, [extent], own))
    else:
        front.kv_ops.append(append_op("b", 0, [extent]))
    front.append("b", 1)
    done = front.step([Chunk("b", 32, 9, True)], [front.new("b", [*shared, *rest])], ["a"])
    said = [done.tokens[0].token_id]
    said += [front.step([Chunk("b", 41 + i, 1, True)]).tokens[0].token_id for i in range(5)]
    assert said == expected


def test_tables_are_those_of_the_batch_a_rank_computes_not_of_one_that_is_announced(front: Any) -> None:
    expected = front.generate("alone", prompt(40), 2)
    chunk, new = front.first("a", 40, room=40, samples=True), front.new("a", prompt(40))
    front.rank.announce(RankStep(1, (chunk,), (new,), kv_ops=tuple(front.kv_ops)))
    front.kv_ops.clear()
    again = front.first("a", 41, room=48, samples=True)
    front.rank.announce(RankStep(2, (again,), kv_ops=tuple(front.kv_ops)))
    said = [front.rank.compute().tokens[0].token_id for _ in range(2)]
    assert said == expected


END = (8 << 20) // 8192  # blocks of the pool


@pytest.mark.parametrize(
    "op",
    [
        append_op("a", 0, [Extent(END - 1, 2)]),
        append_op("a", 0, [Extent(0, 2), Extent(END, 1)]),
        append_op("a", 0, [Extent(-1, 2)]),
        append_op("a", 0, [Extent(1 << 62, 1)]),
        append_op("a", 1, [Extent(0, 2)]),
        append_op("a", 0, [Extent(0, 2)], group=1),
        copy_op("a", 0, [Extent(0, 1)], [Extent(END, 1)]),
        copy_op("a", 0, [Extent(-1, 1)], [Extent(0, 1)]),
        copy_op("a", 0, [Extent(0, 2)], [Extent(5, 1)]),
    ],
)
def test_an_operation_on_blocks_that_a_rank_does_not_have_ends_it_before_anything_is_written(
    front: Any, op: KVOp
) -> None:
    assert front.ready.num_blocks == END
    before = [values.clone() for layer in front.rank._kv_layers for values in layer]
    front.append("a", 2)
    front.kv_ops.append(op)
    with pytest.raises(AssertionError, match="(append|copy) for a: "):
        front.step([Chunk("a", 0, 20, True)], [front.new("a", prompt(20))])
    after = [values for layer in front.rank._kv_layers for values in layer]
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(before, after))


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk("a", -4, 4, False), Chunk("a", 0, 0, False), Chunk("a", 8, -4, False), Chunk("a", 0, 20, True, (1,)),
        Chunk("a", 0, 20, True, (1, 0)),
    ],
)
def test_a_chunk_that_is_not_within_its_shard_ends_the_rank(front: Any, chunk: Chunk) -> None:
    front.append("a", 2)
    with pytest.raises((AssertionError, ValueError)):
        front.step([chunk], [front.new("a", prompt(20))])


def test_a_chunk_beyond_its_blocks_ends_the_rank(front: Any) -> None:
    front.append("a", 1)
    with pytest.raises(AssertionError, match="16 slots"):
        front.step([Chunk("a", 0, 20, True)], [front.new("a", prompt(20))])


def test_a_token_that_another_rank_has_sampled_is_of_the_vocabulary(front: Any) -> None:
    front.step([front.first("a", 5, room=16)], [front.new("a", prompt(10))])
    with pytest.raises(AssertionError, match="a: token id 512"):
        front.rank.run(RankStep(2, (), sampled=(("a", 512),)))
