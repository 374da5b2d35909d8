"""Keys of granules that outputs fill: those of the whole sequence, whatever happens to its ranks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from clients import TIMEOUT_S
from fake_cluster import StartCluster, assert_all_are_answered, mixed_load
from fake_rank import continuation

from megatron_medha.core.batch import Batch, Completed, Event, Output
from megatron_medha.core.kv.prefix_keys import GranuleKeys, root_key
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling

ROOT, GRANULE_TOKENS = root_key(b"secret"), 16


class FilledKeys:
    """An Observer of the keys that completed batches bring."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}

    def handled(self, event: Event, outputs: Sequence[Output], now_s: float) -> None:
        if isinstance(event, Completed):
            for request_id, keys in event.filled_keys:
                self.keys[request_id] = self.keys.get(request_id, b"") + keys

    def scheduled(self, batch: Batch, now_s: float) -> None:
        """Nothing is of interest."""


def test_a_sequence_has_the_keys_of_all_its_tokens_though_it_was_preempted_and_its_ranks_were_lost(
    start: StartCluster,
) -> None:
    filled = FilledKeys()
    # Little memory: decodes are preempted.
    cluster = start(ParallelLayout(spp=2), num_blocks=60, watchers=(lambda scheduler: filled,))
    load = mixed_load(3, 40)
    prompt_keys: dict[str, bytes] = {}
    for name, (prompt, num_outputs) in load.items():
        keys = GranuleKeys(ROOT, GRANULE_TOKENS)
        prompt_keys[name] = keys.extend(array("i", prompt))
        request = Request(
            request_id=name, num_prompt_tokens=len(prompt), max_output_tokens=num_outputs,
            arrival_s=cluster.engine.now_s(),
        )
        sampling = Sampling(max_output_tokens=num_outputs, temperature=0.0, seed=1)
        cluster.engine.submit(request, array("i", prompt), sampling, keys)
    cluster.client.wait_for_tokens(sum(num_outputs for _, num_outputs in load.values()) // 2)
    cluster.kill(1)
    assert_all_are_answered(cluster.client, load)
    cluster.engine.stop(TIMEOUT_S)  # behind the last event
    for name, (prompt, num_outputs) in load.items():
        whole = array("i", [*prompt, *continuation(prompt, num_outputs)])
        expected = GranuleKeys(ROOT, GRANULE_TOKENS).extend(whole)
        assert prompt_keys[name] + filled.keys.get(name, b"") == expected
    assert cluster.engine.status.num_failures == 1


def test_without_keys_nothing_is_said_of_granules(start: StartCluster) -> None:
    filled = FilledKeys()
    cluster = start(ParallelLayout(), watchers=(lambda scheduler: filled,))
    cluster.client.send("a", [1] * 10, 40)
    cluster.client.wait("a")
    assert not filled.keys
