"""Prompts with common prefixes on real ranks of every layout: with hits or without, what comes out is the same.

On one device, and over stages, the same to the last bit of every logit.
"""

from __future__ import annotations

import os
import random
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_medha.bits.rank_processes import RankProcesses
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from tests.parallel.walk import KEY_ROOT, LAYOUTS, VOCAB_SIZE, Case, Outcome, Reference, Walk

SEEDS = range(int(os.environ.get("MEDHA_WALKS", "1")))
GRANULE = 16


def shared_case(layout: ParallelLayout, seed: int, num_requests: int = 10) -> Case:
    """Turns that continue one another, others that begin alike, and too little memory for all of it."""
    rng = random.Random(f"shared/{layout}/{seed}")
    stems = [[rng.randrange(4, VOCAB_SIZE) for _ in range(rng.choice((40, 70, 100)))] for _ in range(2)]
    requests, prompts, sampling = [], {}, {}
    for index in range(num_requests):
        name = f"r{index}"
        stem = rng.choice(stems)
        prompts[name] = [*stem, *(rng.randrange(4, VOCAB_SIZE) for _ in range(rng.choice((0, 1, 9, 30))))]
        if rng.random() < 0.5:
            stems[stems.index(stem)] = prompts[name][:110]
        num_outputs = rng.choice((1, 20, 40))
        scored = rng.random() < 0.15
        requests.append(
            Request(
                request_id=name, num_prompt_tokens=len(prompts[name]), max_output_tokens=num_outputs,
                arrival_s=0.03 * index, reads_cache=not scored,
                prefix_keys=GranuleKeys(KEY_ROOT, GRANULE).extend(array("i", prompts[name])),
            )  # fmt: skip
        )
        sampling[name] = Sampling(
            max_output_tokens=num_outputs, temperature=0.0, num_prompt_logprobs=0 if scored else None
        )
    shard_tokens = GRANULE * -(-192 // (GRANULE * layout.kvp)) if layout.kvp > 1 else 320
    config = SchedulerConfig(
        step_budget_s=rng.choice((2e-3, 0.01)), tile_tokens=rng.choice((1, 8)), max_num_sequences=8, watermark=0.0
    )
    return Case(
        layout=layout, scheduler=config, block_size=GRANULE, num_blocks=22 if layout.kvp == 1 else 14,
        shard_tokens=shard_tokens, requests=tuple(requests), sampling=sampling, prompts=prompts, aborted={}, seed=seed,
        kv=KVConfig(granule_tokens=GRANULE),
    )  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_hits_change_no_token_and_on_one_device_no_bit(
    name: str, ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    layout, total = LAYOUTS[name], Outcome()
    for seed in SEEDS:
        case = shared_case(layout, seed)
        with_hits = Walk(case, ranks, model[0])
        total.add(with_hits.run())
        with_hits.check(model[1])
        total.num_cached_tokens += with_hits.outcome.num_cached_tokens
        if layout.kvp > 1 or layout.tp > 1:
            continue
        without = Walk(replace(case, kv=NO_PREFIX_CACHE), ranks, model[0])
        without.run()
        for request in case.requests:
            one, other = (walk.clients[request.request_id] for walk in (with_hits, without))
            assert one.tokens == other.tokens
            assert all(np.array_equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    assert total.num_cached_tokens > 0


def test_a_preempted_request_resumes_behind_what_it_had_published(
    ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    num_resumed = 0
    for seed in range(4):
        case = shared_case(ParallelLayout(), seed)
        long = tuple(replace(request, max_output_tokens=90) for request in case.requests)
        sampling = {name: replace(one, max_output_tokens=90) for name, one in case.sampling.items()}
        walk = Walk(replace(case, requests=long, sampling=sampling), ranks, model[0])
        walk.run()
        walk.check(model[1])
        num_resumed += walk.outcome.num_resumed_behind
    assert num_resumed > 0


def test_a_turn_begins_behind_the_output_of_the_turn_before(
    ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    case = shared_case(ParallelLayout(spp=2), 0)
    first = replace(case.requests[0], max_output_tokens=40)
    sampling = Sampling(max_output_tokens=40, temperature=0.0)
    one = replace(case, requests=(first,), prompts={"r0": case.prompts["r0"]}, sampling={"r0": sampling})
    walk = Walk(one, ranks, model[0])
    walk.run()
    history = [*case.prompts["r0"], *walk.clients["r0"].tokens]
    turn = [*history, 5, 6, 7]
    keys = GranuleKeys(KEY_ROOT, GRANULE).extend(array("i", turn))
    second = replace(first, request_id="r1", num_prompt_tokens=len(turn), priority=1, prefix_keys=keys)
    both = replace(
        one, requests=(first, second), prompts={"r0": case.prompts["r0"], "r1": turn},
        sampling={"r0": sampling, "r1": sampling}, scheduler=replace(one.scheduler, max_num_sequences=1),
    )  # fmt: skip
    walk = Walk(both, ranks, model[0])
    walk.run()
    walk.check(model[1])
    # Of the last output token no KV was computed.
    assert walk.outcome.num_cached_tokens == (len(history) - 1) // GRANULE * GRANULE > len(case.prompts["r0"])
