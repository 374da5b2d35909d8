"""What a cell of a question measures. Each function gets options of `medha simulate` and arguments from the YAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from experiments.lib.recording_runtime import RecordingSimRuntime
from megatron_medha.core.batch import Batch, Chunk
from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.hardware import all_reduce_s, send_s
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.cost.utilisation import attention_flops, batch_bytes, mbu, mfu, prefill_flops
from megatron_medha.core.loop import serve
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking, PrefillTimes
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.sim.baselines.ring_cost import RingCost
from megatron_medha.sim.isolated import IsolatedTimes
from megatron_medha.sim.pipeline import Pipeline
from megatron_medha.sim.simulation import Simulation, SimulationConfig, SimulationHooks
from megatron_medha.sim.system import build_system
from megatron_medha.sim.truth import Truth
from megatron_medha.sim.truth_config import TruthConfig
from megatron_medha.stats.request_stats import RequestStats
from megatron_medha.stats.summary import Summary, percentile

MEMORY_SHARE = 0.9  # of a device, for weights and KV; vLLM's default
Words = tuple[str, ...]
Values = dict[str, Any]


@lru_cache(32)
def composed(words: Words) -> SimulationConfig:
    """`medha simulate` with these options; KV has what one copy of the weights leaves of the devices."""
    options = freeze(compose("simulate", SimulateOptions, words), SimulateOptions)
    config = simulation_config(options)
    tp_spp = config.setup.layout.tp * config.setup.layout.spp
    setup = replace(config.setup, num_blocks=_kv_tokens(config, tp_spp) // config.setup.block_size)
    instances = config.instances
    if instances is not None:
        instances = replace(instances, tokens_per_instance=_kv_tokens(config, instances.config.instance_tp))
    return replace(config, setup=setup, instances=instances)


def _kv_tokens(config: SimulationConfig, num_devices: int) -> int:
    shape, memory_bytes = config.setup.shape, config.setup.hardware.memory_bytes
    assert memory_bytes is not None
    free = num_devices * MEMORY_SHARE * memory_bytes - shape.num_params * shape.bytes_per_element
    return int(free / shape.kv_bytes_per_token)


def stream(words: Words, *, has_bound: bool = False, deadlines: Sequence[str] = ()) -> Values:
    """TTFT, attainment and TPOT of a stream of requests.

    A prompt without its first token counts with the time it has waited when the run ends.
    has_bound: also how much of progress_share's bound every request used. deadlines: options that differ for the
    machine whose times alone set the deadlines.
    """
    config = composed(words)
    simulation = Simulation(config)
    if deadlines:
        simulation.isolated_s = Simulation(composed((*words, *deadlines))).isolated_s
    outcomes: list[RequestStats] = []
    result = simulation.run(SimulationHooks(on_outcome=outcomes.append))
    drain_s = float("inf") if config.max_drain_s is None else config.max_drain_s
    end_s = min(result.end_s, simulation.workload.facts.last_arrival_s + drain_s)
    values = _stream_values(config, outcomes, result.summary, end_s)
    if has_bound:
        ratios = _bound_ratios(config, outcomes)
        values |= {"bound_p50": round(ratios[len(ratios) // 2], 4), "bound_max": round(ratios[-1], 4)}
    return values


def _stream_values(
    config: SimulationConfig, outcomes: Sequence[RequestStats], summary: Summary, end_s: float
) -> Values:
    values: Values = {}
    for group in ("all", "short", "long"):
        names = ("short", "medium", "long") if group == "all" else (group,)
        ttfts_s = sorted(
            outcome.ttft_s if outcome.ttft_s is not None else end_s - outcome.request.arrival_s
            for outcome in outcomes
            if config.classes.of(outcome.request.num_prompt_tokens) in names
        )
        if ttfts_s:
            values[group] = {
                "num_requests": len(ttfts_s),
                **{f"ttft_p{percent}_s": round(percentile(ttfts_s, percent), 4) for percent in (50, 90, 99)},
                "ttft_max_s": round(ttfts_s[-1], 2),
                "attainment": round(summary.attainment(names) or 0.0, 4),
            }
    tpots_s = sorted(outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None)
    values["all"] |= {f"tpot_p{percent}_s": round(percentile(tpots_s, percent), 5) for percent in (50, 90, 99)}
    values["num_without_token"] = sum(outcome.ttft_s is None for outcome in outcomes)
    values["end_s"] = round(end_s, 3)
    return values


def _bound_ratios(config: SimulationConfig, outcomes: Sequence[RequestStats]) -> list[float]:
    """TTFT over its bound of every request, ascending.

    The bound is that of core/scheduling/prefill_packer.py:
    deadline + (own and earlier-due work in half-step chunks + B / 2) / p + (n + 2) B.
    """
    setup = config.setup
    own, cost = setup.config, setup.cluster_cost
    budget_s, most = own.step_budget_s, max(outcome.request.num_prompt_tokens for outcome in outcomes)
    times = PrefillTimes(own.chunk_rule, cost, budget_s, most)
    halves = PrefillTimes(own.chunk_rule, cost, budget_s / 2, most)

    def due_s(outcome: RequestStats) -> float:
        total_s = times.prefill_s(outcome.request.num_prompt_tokens) / setup.layout.spp
        return outcome.request.arrival_s + max(own.deadline_multiplier * total_s, own.min_deadline_s)

    ratios, work_s = [], 0.0
    for count, outcome in enumerate(sorted(outcomes, key=due_s)):
        work_s += halves.prefill_s(outcome.request.num_prompt_tokens)
        bound_s = due_s(outcome) + (work_s + budget_s / 2) / own.progress_share + (count + 2) * budget_s
        assert outcome.first_token_s is not None, f"{outcome.request.request_id} never had a token"
        ratios.append((outcome.first_token_s - outcome.request.arrival_s) / (bound_s - outcome.request.arrival_s))
    return sorted(ratios)


def loads_alone(words: Words) -> Values:
    """TTFT if every prompt of the stream had the machine to itself: no order of them can be faster."""
    simulation = Simulation(composed(words))
    alone_s = sorted(simulation.isolated_s(request.num_prompt_tokens) for request in simulation.workload.requests())
    return {f"ttft_p{percent}_s": _six(percentile(alone_s, percent)) for percent in (50, 90, 99)}


def lone_prefill(words: Words, *, num_tokens: int, chunks: Sequence[int]) -> Values:
    """TTFT of one prompt alone in chunks of the best of these sizes, whether or not its KV fits; its causal MFU."""
    config = composed(words)
    seconds = min(_lone_s(config, num_tokens, size) for size in chunks)
    setup = config.setup
    used = prefill_flops(setup.shape, num_tokens) / (setup.layout.world_size * setup.hardware.flops_per_s) / seconds
    fits = num_tokens < setup.num_blocks * setup.block_size
    return {"ttft_s": _six(seconds), "mfu": _six(used), "fits": fits}


def _lone_s(config: SimulationConfig, num_tokens: int, chunk: int) -> float:
    setup = replace(
        config.setup, config=SchedulerConfig(chunking=Chunking.FIXED, fixed_chunk_tokens=chunk), learns=False,
        num_blocks=2 * num_tokens // config.setup.block_size,
    )  # fmt: skip
    cost, layout = setup.cluster_cost, setup.layout
    times = IsolatedTimes(
        lambda: build_system(setup), Truth(cost, config.setup.shard_tokens, TruthConfig(), seed=0),
        lambda: Pipeline(layout.spp, layout.kvp), num_tokens, cost.engine.request_s,
    )  # fmt: skip
    return times(num_tokens)


def ring_prefill(words: Words, *, num_tokens: int, tp: int, ring: Values) -> Values:
    """TTFT of one prompt in one pass over a ring of instances of tp devices; `ring` says what is not ideal about it.

    hidden_from_tokens: on each device, from how many its transfers hide behind its attention.
    """
    setup = composed(words).setup
    layout = replace(setup.layout, tp=tp, spp=1)
    instance = replace(setup, layout=layout).cluster_cost
    cost = RingCost(instance=instance, shape=setup.shape, hardware=setup.hardware, tp=tp, **ring)
    num_instances = setup.layout.world_size // tp
    seconds = cost.prefill_s(num_instances, num_tokens, float(num_tokens) ** 2, 1)
    # A hop's transfer grows with the tokens of a part, its attention with their square.
    parts = 64
    attention_s = instance.attention_s(0, num_tokens) / parts**2
    tokens = num_tokens // parts
    hidden = tokens * cost.hop_send_s(parts, tokens) / attention_s
    return {"ttft_s": _six(seconds), "hidden_from_tokens": round(hidden)}


def lone_decode(words: Words, *, num_tokens: int) -> Values:
    """One token of one request through all stages of all replicas that share its KV; its MBU."""
    setup = composed(words).setup
    layout, shape = setup.layout, setup.shape
    truth = Truth(setup.cluster_cost, -(-num_tokens // layout.kvp), TruthConfig(), seed=0)
    chunk = Chunk("decode", num_tokens - 1, 1, True, tuple(range(layout.kvp)))
    seconds = Pipeline(layout.spp, layout.kvp).run(0, truth(_batch(chunk)), 0.0)
    weights = shape.num_layers * shape.num_layer_params + shape.num_head_params
    num_bytes = layout.kvp * weights * shape.bytes_per_element + num_tokens * shape.kv_bytes_per_token
    bandwidth = layout.tp * layout.kvp * setup.hardware.memory_bytes_per_s  # a decode is on one stage at a time
    return {"tpot_s": _six(seconds), "mbu": _six(num_bytes / bandwidth / seconds)}


def chunks_and_a_decode(words: Words, *, num_tokens: int, chunk_tokens: int, every: int) -> Values:
    """TTFT of a streamed prompt, and p95 of the time one of its chunks and a decode take through all stages.

    every: so many-th chunk is calculated; times change little from one to the next.
    """
    setup = composed(words).setup
    layout = setup.layout
    shard_tokens = num_tokens // layout.kvp
    truth = Truth(setup.cluster_cost, shard_tokens, TruthConfig(), seed=0)
    traversals_s, slowest_stages_s = [], []
    for start in range(0, num_tokens, every * chunk_tokens):
        ranks = tuple(range(start // shard_tokens + 1))
        decode = Chunk("decode", 1000, 1, True, (ranks[-1],))
        times = truth(_batch(decode, Chunk("long", start, chunk_tokens, False, ranks)))
        traversals_s.append(Pipeline(layout.spp, layout.kvp).run(0, times, 0.0))
        slowest_stages_s.append(max(max(stages) for stages in times.stage_s if stages))
    # Streamed: the last stage is reached once, then a chunk leaves every slowest stage's time.
    ttft_s = every * sum(slowest_stages_s) + traversals_s[-1]
    return {"ttft_s": round(ttft_s, 1), "step_p95_s": round(percentile(sorted(traversals_s), 95), 5)}


class _UntilFirstToken(RecordingSimRuntime):
    """Ends when the long prompt has its first token."""

    def next_event(self):  # type: ignore[no-untyped-def]
        return None if self.records["long"].token_times_s else super().next_event()


def prefill_beside_decodes(words: Words, *, num_tokens: int, num_decodes: int) -> Values:
    """TTFT of a prompt under the scheduler, and the time of its steps, which the others' next tokens wait for."""
    config = composed(words)
    decodes = [
        Request(request_id=f"d{i}", num_prompt_tokens=2000, max_output_tokens=10_000_000, arrival_s=0.0)
        for i in range(num_decodes)
    ]
    long = Request(request_id="long", num_prompt_tokens=num_tokens, max_output_tokens=1, arrival_s=5.0)
    truth = Truth(config.setup.cluster_cost, config.setup.shard_tokens, TruthConfig(), seed=0)
    steps_s: list[float] = []

    def seconds(batch: Batch) -> float:
        taken = sum(truth(batch).stage_s[0])
        if any(chunk.request_id == "long" for chunk in batch.chunks):
            steps_s.append(taken)
        return taken

    world = _UntilFirstToken([*decodes, long], seconds)
    # Decodes never end here, so memory is made large enough for whatever they may write.
    serve(build_system(replace(config.setup, num_blocks=100_000_000 // config.setup.block_size)), world)
    quantiles = {f"step_p{percent}_s": round(percentile(sorted(steps_s), percent), 5) for percent in (50, 95, 100)}
    return {"ttft_s": round(world.records["long"].ttft_s, 2), **quantiles}


def attention_in_chunks(words: Words, *, num_tokens: int, chunk: int) -> Values:
    """Attention alone of a prompt in fixed chunks."""
    cost = composed(words).setup.cluster_cost
    return {"attention_s": _six(sum(load.attention_s for load in _chunk_loads(cost, num_tokens, chunk)))}


def decode_beside_a_chunk(words: Words, *, num_tokens: int, chunk: int) -> Values:
    """A step of the last chunk of a prompt and a decode after 1,000 tokens."""
    cost = composed(words).setup.cluster_cost
    load = StepLoad()
    load.add_chunk(num_tokens - chunk, chunk, cost.attention_s(num_tokens - chunk, chunk))
    load.add_decodes(1, 1000, cost.decode_attention_s(1000))
    return {"step_s": _six(cost.step_s(load))}


def decode_step(words: Words, *, num_tokens: int, batch: int = 1) -> Values:
    """A step of decodes after so many tokens each, spread evenly over the KVP ranks; MBU of a lone one."""
    cost = composed(words).setup.cluster_cost
    kvp = cost.layout.kvp
    seconds = _decode_s(cost, [num_tokens // kvp] * batch) + cost.merge_s(1, kvp)
    num_bytes = batch_bytes(cost.shape, [(num_tokens, 1)], 1, num_replicas=kvp)
    return {"step_s": _six(seconds), "mbu": _six(mbu(num_bytes, cost.hardware, cost.layout.tp * kvp, seconds))}


def chunked_prefill(words: Words, *, num_tokens: int, chunk: int) -> Values:
    """TTFT of a prompt alone: streamed through the stages, and with each chunk waiting for the last stage; its MFU."""
    cost = composed(words).setup.cluster_cost
    streamed_s = _streamed_prefill_s(cost, num_tokens, chunk)
    waiting_s = sum(cost.step_s(load) for load in _chunk_loads(cost, num_tokens, chunk))
    flops = prefill_flops(cost.shape, num_tokens)
    square = flops + attention_flops(cost.shape, 0, num_tokens)  # every query with every key
    used, used_square = (mfu(one, cost.hardware, cost.layout.world_size, streamed_s) for one in (flops, square))
    api_server_s = cost.engine.request_s
    return {
        "streamed_s": _six(streamed_s), "streamed_ttft_s": _six(api_server_s + streamed_s),
        "ttft_s": _six(api_server_s + waiting_s), "tbt_s": _six(_decode_s(cost, [num_tokens])),
        "mfu_causal": _six(used), "mfu_square": _six(used_square),
    }  # fmt: skip


def kv_capacity(words: Words) -> Values:
    """Tokens of KV that all KVP ranks hold beside weights and activations."""
    options = freeze(compose("simulate", SimulateOptions, words), SimulateOptions)
    setup = simulation_config(options).setup
    return {"num_tokens": setup.num_blocks * setup.block_size * setup.layout.kvp}


def layer(words: Words, *, num_tokens: int) -> Values:
    """One layer without attention and all-reduces."""
    cost = composed(words).setup.cluster_cost
    reduce_s = 2 * all_reduce_s(cost.hardware.intra_node, cost.layout.tp, 2 * num_tokens * cost.shape.hidden_size)
    return {"layer_s": _six(cost.layer_s(num_tokens) - reduce_s)}


def collectives(words: Words, *, mib: float) -> Values:
    """An all-reduce over the 8 devices of a node, and a message between nodes."""
    hardware = composed(words).setup.hardware
    num_bytes = mib * (1 << 20)
    reduce_s, message_s = all_reduce_s(hardware.intra_node, 8, num_bytes), send_s(hardware.inter_node, num_bytes)
    return {"all_reduce_s": _six(reduce_s), "send_s": _six(message_s)}


def _batch(*chunks: Chunk) -> Batch:
    return Batch(batch_id=0, chunks=chunks, released=(), created_s=0.0, budget_s=1.0, predicted_s=1.0)


def _chunk_loads(cost: ClusterCost, num_tokens: int, chunk_tokens: int) -> Iterator[StepLoad]:
    for start in range(0, num_tokens, chunk_tokens):
        count = min(chunk_tokens, num_tokens - start)
        load = StepLoad()
        load.add_chunk(start, count, cost.attention_s(start, count))
        yield load


def _streamed_prefill_s(cost: ClusterCost, num_tokens: int, chunk_tokens: int) -> float:
    """The next chunk enters a stage as soon as the last one has left it."""
    spp = cost.layout.spp
    free_s = [0.0] * spp
    for load in _chunk_loads(cost, num_tokens, chunk_tokens):
        arrived_s = 0.0
        for stage in range(spp):
            free_s[stage] = max(free_s[stage], arrived_s) + cost.stage_s(load, stage)
            if stage < spp - 1:
                arrived_s = free_s[stage] + cost.hop_s(load.num_tokens, stage)
    return free_s[-1]


def _decode_s(cost: ClusterCost, contexts: Sequence[int]) -> float:
    load = StepLoad()
    total = sum(contexts) + len(contexts)
    load.add_decodes(len(contexts), total, cost.decode_attention_s(total))
    return cost.step_s(load)


def _six(value: float) -> float:
    """To six digits: more than any table shows."""
    return float(f"{value:.6g}")
