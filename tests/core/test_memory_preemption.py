"""Who loses its KV when memory or the ranks are gone, and how it goes on."""

from __future__ import annotations

from scheduler_bench import Bench, request

from megatron_medha.core.batch import Output, Preempted, RanksLost, TokenOut


def test_a_decode_that_needs_a_block_takes_it_from_whoever_has_the_most_relative_slack() -> None:
    bench = Bench(num_blocks=5)
    bench.arrive(request("a", num_tokens=8, num_out=8))
    bench.step()
    bench.now_s = 0.2
    bench.arrive(request("b", num_tokens=7, num_out=5, at_s=0.2))
    outputs: list[Output] = []
    while not any(isinstance(output, Preempted) for output in outputs):
        outputs = bench.step()[1]
    (preempted,) = (output for output in outputs if isinstance(output, Preempted))
    assert preempted.request_id == "b" and preempted.num_tokens_lost >= 7
    rest = bench.run()
    counts = {name: sum(isinstance(o, TokenOut) and o.request_id == name for o in rest) for name in "ab"}
    assert all(counts.values())
    bench.assert_empty()


def test_a_preempted_request_computes_its_known_tokens_again_and_says_nothing_twice() -> None:
    bench = Bench()
    bench.arrive(request("a", num_tokens=10, num_out=5))
    bench.step()
    bench.step()
    bench.handle(RanksLost("test"))
    batch, outputs = bench.step()
    (chunk,) = batch.chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples_token) == (0, 12, True)
    assert outputs == [TokenOut("a", 2, None)]
    assert len(bench.run()) == 2
    bench.assert_empty()


def test_lost_ranks_forget_nothing_they_never_knew() -> None:
    bench = Bench()
    bench.arrive(request("a", num_out=1), request("b"))
    bench.step()
    bench.handle(RanksLost("test"))
    assert bench.schedule().released == ()
