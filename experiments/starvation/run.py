"""In overload, does every admitted request have its first token within the bound of progress_share?

    python -m experiments.starvation.run              # 10 simulated minutes at 1.75 requests/s, then until all are done

Llama-3 8B on 16 A100, 5% long prompts: more work than the machine can do. The bound is the one of prefill_packer.py:
deadline + (own and earlier-due prefill work in half-step chunks + B / 2) / p + (n + 2) B.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.headline.systems import LAYOUT, cluster
from experiments.lib.paper import Cluster, Results, measure, scheduler
from megatron_medha.core.scheduling.chunking import PrefillTimes
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.stats.outcome import Outcome, Slo
from megatron_medha.workload.workload import WorkloadConfig

HERE = Path(__file__).parent
SCHEDULERS = ("lars", "lars_no_triage", "srpt")  # options of conf/scheduler
QPS = 1.75


def margins(on: Cluster, config: SchedulerConfig, outcomes: list[Outcome]) -> list[float]:
    """First-token time over its bound, both from arrival, of every request, ascending."""
    cost, budget_s = on.cost(LAYOUT), config.step_budget_s
    most = max(outcome.request.num_prompt_tokens for outcome in outcomes)
    times = PrefillTimes(config.chunk_rule, cost, budget_s, most)
    halves = PrefillTimes(config.chunk_rule, cost, budget_s / 2, most)

    def due_s(outcome: Outcome) -> float:
        total_s = times.prefill_s(outcome.request.num_prompt_tokens) / LAYOUT.spp
        return outcome.request.arrival_s + max(config.deadline_multiplier * total_s, config.min_deadline_s)

    ratios, work_s = [], 0.0
    for count, outcome in enumerate(sorted(outcomes, key=due_s)):
        work_s += halves.prefill_s(outcome.request.num_prompt_tokens)
        bound_s = due_s(outcome) + (work_s + budget_s / 2) / config.progress_share + (count + 2) * budget_s
        assert outcome.first_token_s is not None, f"{outcome.request.request_id} never had a token"
        ratios.append((outcome.first_token_s - outcome.request.arrival_s) / (bound_s - outcome.request.arrival_s))
    return sorted(ratios)


def main() -> int:
    """Run, print; 1 if a request broke its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="simulated minutes of arrivals (default 10)")
    arguments = parser.parse_args()
    on = cluster()
    isolated_s = on.isolated(LAYOUT, 1_000_000)
    results = Results(HERE / "results.json", {"qps": QPS, "minutes": arguments.minutes, "long_share": 0.0488})
    print("| scheduler | requests | all done after, s | longest TTFT, s | p50 of TTFT / bound | most |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for name in SCHEDULERS:
        config = scheduler(name)
        workload = WorkloadConfig(qps=QPS, duration_s=60.0 * arguments.minutes)
        measured = measure(
            on.scheduler(config, LAYOUT), workload, 42, isolated_s, Slo(), runs_on=(LAYOUT, on.truth(LAYOUT)),
            front_s=on.engine.request_s, drain_s=1e9, label=name,
        )  # fmt: skip
        ratios = margins(on, config, measured.outcomes)
        longest_s = max(outcome.ttft_s or 0.0 for outcome in measured.outcomes)
        values = {"num_requests": len(ratios), "end_s": round(measured.end_s, 1), "longest_ttft_s": round(longest_s, 1),
                  "ratio_p50": round(ratios[len(ratios) // 2], 4), "ratio_max": round(ratios[-1], 4)}
        results.put(name, values)
        print("| " + " | ".join([name, *(str(value) for value in values.values())]) + " |", flush=True)
        worst = max(worst, ratios[-1])
    print(f"every first token within its bound: {'met' if worst <= 1.0 else 'BROKEN'}")
    return 0 if worst <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
