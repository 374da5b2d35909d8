"""The systems of the headline experiment: ours, its ablations, and every baseline, by name."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.lib.paper import LLAMA3_8B, Cluster, Instances, engine, hardware, scheduler
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.ports import Decisions
from megatron_medha.sim.truth import Truth

LAYOUT = ParallelLayout(tp=8, spp=2)

# Options of conf/scheduler, all on tp 8 x spp 2, and how the tables call them.
CONFIGURATIONS = {
    "lars": "LARS (ours, default)",
    "lars_no_margin": "LARS without slack_margin_steps and triage (the paper's to the letter)",
    "lars_no_triage": "LARS without triage",
    "lars_no_progress": "LARS without progress_share",
    "lars_no_sharing": "LARS without space sharing",
    "medha_fcfs": "Medha-FCFS",
    "medha_edf": "Medha-EDF",
    "medha_lrs": "Medha-LRS",
    "medha_srpt": "Medha-SRPT",
    "hrrn": "HRRN",
    "ssjf": "SSJF, mean answer",
    "ssjf_noisy": "SSJF, noisy predictor",
    "ssjf_oracle": "SSJF, oracle",
    "qlm": "QLM-like",
    "reserved_pool": "vLLM 2048, a quarter of each step reserved",
    "vllm_long_threshold": "vLLM, 4 partial prefills, 1 long",
    "vllm_v1_threshold": "vLLM V1, threshold 512",
    "vllm_chunk_2048": "vLLM / Sarathi, chunk 2048",
    "vllm_chunk_512": "vLLM / Sarathi, chunk 512",
    "whole_prompt": "whole prompts, FCFS",
}
# Options of conf/system, on 8 instances of tp 2.
INSTANCES = {
    "loongserve_blocking": "LoongServe-like, nothing beside a prefill",
    "loongserve": "LoongServe-like, fills idle instances",
    "loongserve_eager": "LoongServe-like, fills decoding ones too (ours)",
    "loongserve_reserved": "LoongServe-like, 2 of 8 for < 8192 tokens",
    "static_cp": "static context parallelism",
}
TITLES = {**CONFIGURATIONS, **INSTANCES}
# Names that are no option of conf/scheduler: an option and what differs from it.
_WORDS = {"lars_no_margin": ("lars", "scheduler.slack_margin_steps=0", "scheduler.has_triage=false")}


@dataclass(frozen=True, slots=True)
class System:
    """Decisions that have seen nothing, and where they run."""

    decisions: Decisions
    runs_on: tuple[ParallelLayout, Truth] | None


def cluster() -> Cluster:
    """Llama-3 8B on two DGX A100."""
    return Cluster(shape=LLAMA3_8B, hardware=hardware("a100_x16", 16), engine=engine())


def build(name: str, on: Cluster) -> System:
    """A system by name."""
    if name in CONFIGURATIONS:
        return System(on.scheduler(scheduler(*_WORDS.get(name, (name,))), LAYOUT), (LAYOUT, on.truth(LAYOUT)))
    return System(Instances(cluster=on, tp=2).system(name), None)
