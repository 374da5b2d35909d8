"""Every layout of real ranks against the plain forward: each token and logit, under random chunks, shards, preemptions.

MEDHA_WALKS=20 makes it a sweep of some 10,000 steps: see docs/parallelism.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_medha.bits.rank_processes import RankProcesses
from megatron_medha.core.batch import Arrived
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from tests.parallel.walk import LAYOUTS, VOCAB_SIZE, Case, Reference, Walk, random_case, walk

SEEDS = range(int(os.environ.get("MEDHA_WALKS", "2")))  # random walks of each layout


def case_of(layout: ParallelLayout, lengths: list[tuple[int, int]], *, shard_tokens: int, chunk: int) -> Case:
    """Requests of (prompt, output) tokens that arrive together, in chunks of a fixed size."""
    requests = tuple(
        Request(request_id=f"r{i}", num_prompt_tokens=prompt, max_output_tokens=output, arrival_s=0.0)
        for i, (prompt, output) in enumerate(lengths)
    )
    return Case(
        layout=layout,
        scheduler=SchedulerConfig(
            chunking=Chunking.FIXED, fixed_chunk_tokens=chunk, tile_tokens=1, watermark=0.0, progress_share=0.0
        ),
        block_size=4,
        num_blocks=100,
        shard_tokens=shard_tokens,
        requests=requests,
        sampling={r.request_id: Sampling(max_output_tokens=r.max_output_tokens, temperature=0.0) for r in requests},
        prompts={
            r.request_id: [(7 * i + 3 * j) % VOCAB_SIZE for j in range(r.num_prompt_tokens)]
            for i, r in enumerate(requests)
        },
        aborted={},
        seed=0,
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_mixes_have_the_logits_and_tokens_of_the_plain_forward(
    name: str, ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    for seed in SEEDS:
        walk(random_case(LAYOUTS[name], seed, num_requests=6), ranks, *model)


@pytest.mark.parametrize("kvp", [2, 4])
def test_a_request_grows_over_every_kvp_rank_while_it_prefills_and_while_it_decodes(
    kvp: int, ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    # Prompt on all ranks but the last, which only its output reaches; a short request beside it.
    shard = 16
    lengths = [(shard * (kvp - 1) - 3, 12), (5, 6)]
    outcome = walk(case_of(ParallelLayout(kvp=kvp), lengths, shard_tokens=shard, chunk=6), ranks, *model)
    assert outcome.most_kvp_ranks == kvp


def test_several_requests_on_several_kvp_ranks_share_batches(
    ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    lengths = [(40, 8), (40, 8), (20, 8), (7, 8)]
    outcome = walk(case_of(ParallelLayout(kvp=3), lengths, shard_tokens=16, chunk=24), ranks, *model)
    assert outcome.most_kvp_ranks == 3
    assert outcome.num_shared_chunks > outcome.num_batches  # more than one in many of them


def test_the_chunks_of_one_prompt_stream_through_the_stages(
    ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    outcome = walk(case_of(ParallelLayout(spp=2), [(120, 1)], shard_tokens=400, chunk=8), ranks, *model)
    assert outcome.num_batches == 15
    assert outcome.num_streamed == 14  # every one but the first enters while the one before is in stage 1


def test_ranks_take_another_layout_while_answers_of_earlier_stages_are_still_unread(
    ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    # A front that has all it wants of a batch, its last stage's answer, does not wait for the other stages' word.
    case = case_of(ParallelLayout(spp=2), [(8, 1)], shard_tokens=400, chunk=8)
    unfinished = Walk(case, ranks, model[0])
    unfinished.handle(Arrived(case.requests[0]))
    batch = unfinished.scheduler.schedule(0.0)
    assert batch is not None
    unfinished.submit(batch)
    walk(case_of(ParallelLayout(), [(8, 1)], shard_tokens=400, chunk=8), ranks, *model)
