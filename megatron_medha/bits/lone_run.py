"""The lone run of a sequence, its whole prompt in one step on one rank, and what differs from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron_medha.bits.play import Place, Play, Told
from megatron_medha.bits.random_schedule import BLOCK_SIZE, RandomSchedule, Turn
from megatron_medha.bits.rank_processes import Prepare
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.sampling import Sampling, TokenLogprobs
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig

_NUM_TOP = 20
_APART_S = 1e6  # of virtual time: a turn has long ended when the next one comes


class BitDifference(NamedTuple):
    """The first log-probability of a request that has other bits than in its lone run."""

    request_id: str
    position: int  # of the token in prompt and output
    found: TokenLogprobs
    expected: TokenLogprobs


def lone_run(
    sequences: Mapping[str, Sequence[int]],
    place: Place,
    kv: KVConfig,
    prepare: Prepare | None = None,
    *,
    num_top: int = _NUM_TOP,
    least_tokens: int = 0,
) -> Play:
    """Every sequence on one rank, one after another, each as the whole prompt of one step. kv: of the other run.

    least_tokens: that there is KV for, so that ranks that stay loaded need not be loaded again for a longer sequence.
    """
    turns = tuple(
        Turn(
            request_id, None, tuple(token_ids),
            Sampling(max_output_tokens=1, temperature=0.0, num_logprobs=num_top, num_prompt_logprobs=num_top),
            index * _APART_S, is_cached=False,
        )
        for index, (request_id, token_ids) in enumerate(sequences.items())
    )  # fmt: skip
    most_tokens = max(least_tokens, 1 + max(map(len, sequences.values())))
    shard_tokens = -(-most_tokens // BLOCK_SIZE) * BLOCK_SIZE
    scheduler = SchedulerConfig(
        policy="fcfs", chunking=Chunking.WHOLE, max_batch_tokens=max(64, most_tokens), max_num_sequences=1,
        watermark=0.0,
    )  # fmt: skip
    case = RandomSchedule(turns, scheduler, kv, shard_tokens // BLOCK_SIZE + 1, shard_tokens, most_tokens, 0)
    return Play(case, place, has_cache=False, prepare=prepare).run()


def sequences_of(play: Play) -> dict[str, list[int]]:
    """Prompt and output of every request that has had a token or a log-probability."""
    return {name: told.prompt + told.tokens for name, told in play.told.items() if told.tokens or told.prompt_logprobs}


def told_positions(told: Told) -> Iterator[tuple[int, TokenLogprobs]]:
    """Position in prompt and output, and what was said of it."""
    yield from sorted(told.prompt_logprobs.items())
    yield from enumerate(told.logprobs, len(told.prompt))


def differences(play: Play, lone: Play) -> tuple[int, int, list[BitDifference]]:
    """Positions compared and those that differ, and the first one of each request that has one."""
    num_positions = num_other = 0
    first: dict[str, BitDifference] = {}
    for request_id in sequences_of(play):
        expected_by_position = lone.told[request_id].prompt_logprobs
        for position, found in told_positions(play.told[request_id]):
            expected = expected_by_position[position]
            num_positions += 1
            if found != expected._replace(top=expected.top[: len(found.top)]):
                num_other += 1
                first.setdefault(request_id, BitDifference(request_id, position, found, expected))
    return num_positions, num_other, list(first.values())
