"""Bringing a rank up: what its first tokens show."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_medha.cluster.messages import RankStep, StepDone
from megatron_medha.core.errors import CheckpointError
from megatron_medha.worker.startup.load import warm_up


def test_a_model_whose_first_tokens_are_no_numbers_ends_the_start_with_the_reason():
    steps: list[RankStep] = []

    def run(step: RankStep) -> StepDone:
        steps.append(step)
        return StepDone(step.batch_id, 0, 0.0, failed=(("warm-up", "the logits are not finite"),))

    shards = SimpleNamespace(shard_tokens=128)
    rank = SimpleNamespace(run=run, kvp_rank=0, shards=shards, samples_for_itself=True)
    with pytest.raises(CheckpointError, match="first tokens: the logits are not finite"):
        warm_up(rank, max_tokens=128, block_size=16)
    assert len(steps) == 1
