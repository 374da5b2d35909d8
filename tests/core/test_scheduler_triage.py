"""Triage: what becomes of long prompts that cannot be in time any more, through the scheduler itself."""

from __future__ import annotations

from megatron_medha.core.batch import RanksLost
from tests.core.scheduler_bench import Bench, request


def first_tokens(bench: Bench) -> dict[str, float]:
    """Runs to the end; when each request had its first token."""
    first: dict[str, float] = {}
    while (batch := bench.scheduler.schedule(bench.now_s)) is not None:
        for output in bench.complete(batch):
            first.setdefault(output.request_id, bench.now_s)
    return first


def crowd(**config: object) -> tuple[dict[str, float], dict[str, float]]:
    """Five long prompts at once, of which there is time for two; first tokens and deadlines."""
    bench = Bench(num_blocks=50_000, deadline_multiplier=3.0, slack_margin_steps=0.0, **config)
    bench.arrive(*(request(f"r{index}", num_tokens=8_000, num_out=1) for index in range(5)))
    deadlines = {seq.request_id: seq.deadline_s for seq in bench.scheduler.sequences}
    return first_tokens(bench), deadlines


def num_in_time(**config: object) -> int:
    first, deadlines = crowd(progress_share=0.0, **config)
    assert len(first) == 5
    return sum(first[name] <= deadlines[name] for name in first)


def test_of_a_crowd_some_are_in_time_where_by_slack_alone_they_take_turns_until_all_are_late() -> None:
    assert num_in_time(has_triage=True) > 0
    assert num_in_time(has_triage=False) == 0


def test_a_prompt_with_a_target_that_cannot_be_kept_is_not_put_back_for_it() -> None:
    bench = Bench(num_blocks=50_000, deadline_multiplier=3.0)
    bench.arrive(request("hasty", num_tokens=8_000, num_out=1, ttft_slo_s=0.001), request("b", 8_000, 1))
    first = first_tokens(bench)
    assert first["hasty"] < first["b"]


def test_an_answer_that_has_begun_is_not_put_back_when_it_has_lost_its_kv() -> None:
    bench = Bench(num_blocks=50_000)
    bench.arrive(request("begun", num_tokens=2_000, num_out=50))
    bench.run_until(lambda: bench.sequence("begun").num_output_tokens == 3)
    bench.now_s = 1000.0
    bench.arrive(request("new", num_tokens=2_000, num_out=1, at_s=bench.now_s))
    bench.handle(RanksLost("gone"))
    batch, _ = bench.step()
    assert batch.chunks[0].request_id == "begun"
