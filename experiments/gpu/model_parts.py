"""The parts of the GPU check that run a whole model of Llama-3 8B's shape, with random weights, through worker.Rank."""

from __future__ import annotations

import math
import time
import zlib
from array import array
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from experiments.gpu.in_process import Engine, Outcome
from experiments.gpu.measure import Check, Row, fill_with_random_kv
from experiments.lib.quantile import quantile
from megatron_medha.cluster.messages import NewRequest, RankReady, RankStep, StepDone
from megatron_medha.core.batch import Chunk
from megatron_medha.core.cost.fitted_cost import fit
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.kv.block_pool import Extent, num_blocks_for
from megatron_medha.core.kv.ops import KVOp, append_op
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling
from megatron_medha.kernels.choose_backend import attention_backend
from megatron_medha.kernels.kv.paged_kv import E4M3
from megatron_medha.model.build import build_model, transformer_engine_works
from megatron_medha.model.fp8 import quantise_linears
from megatron_medha.model.packed_linear import pack_linears
from megatron_medha.model.rotary import Rotary
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import build_groups, init_distributed
from megatron_medha.worker.cuda_graphs import step_graphs
from megatron_medha.worker.kv_cache import allocate_kv
from megatron_medha.worker.rank import Rank
from megatron_medha.worker.startup.step_grid import grid, measure

LLAMA3_8B = ModelConfig(
    name="llama3_8b", num_layers=32, hidden_size=4096, ffn_hidden_size=14_336, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=128_256, max_context_len=1 << 21, norm_epsilon=1e-5, rope_theta=5e5, dtype="bfloat16",
)  # fmt: skip
TINY = ModelConfig(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=128, max_context_len=1 << 21, norm_epsilon=1e-5, rope_theta=5e5, dtype="bfloat16",
)  # fmt: skip
SMALL = ModelConfig(
    name="small", num_layers=4, hidden_size=1024, ffn_hidden_size=2048, num_heads=8, num_kv_heads=2, head_dim=128,
    vocab_size=4096, max_context_len=4096, norm_epsilon=1e-5, rope_theta=5e5,
)  # fmt: skip
_CHUNK = 4096  # of a prefill alone: the whole budget of a large step
_NUM_SAMPLED_DEPTHS = 9
_OTHER_BYTES = 24 << 30  # weights in bf16 take 15 GiB, the rest is activations, graphs, libraries


class OneRank:
    """A rank with random weights and random KV, over which requests begin at any depth."""

    def __init__(
        self, check: Check, config: ModelConfig, num_tokens: int, *, dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype | None = None, fp8: str = "none", has_graphs: bool = False,
        device: torch.device | None = None, are_weights_portable: bool = False, backend: str | None = None,
    ) -> None:  # fmt: skip
        """num_tokens: KV for so many. are_weights_portable: the same on every device, made on the CPU."""
        self.check, self.config = check, config
        self.device = device or check.device
        init_distributed(ParallelLayout(), 0, device=self.device)
        pgs = build_groups(ParallelLayout())
        model = build_model(config, dtype=dtype, device=self.device, pgs=pgs, is_initialized=False, fp8=fp8)
        _randomise(model, torch.device("cpu") if are_weights_portable else self.device)
        model.requires_grad_(False)
        quantise_linears(model, fp8, transformer_engine_works(self.device))
        pack_linears(model)
        # The CPU's own results come from the backend that needs no compiler.
        is_reference = self.device.type == "cpu" and are_weights_portable and dtype == torch.float32
        name = backend or ("aten" if is_reference else "auto")
        attention = attention_backend(name, self.device, group=config.num_heads // config.num_kv_heads)
        self.block_size = attention.block_size
        self.num_blocks = num_blocks_for(num_tokens, self.block_size) + 64
        kv_layers = allocate_kv(
            attention, self.num_blocks, block_size=self.block_size, num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=kv_dtype or dtype,
        )  # fmt: skip
        for layer in kv_layers:
            fill_with_random_kv(layer)
        self.num_kv_bytes = sum(values.numel() * values.itemsize for layer in kv_layers for values in layer)
        self.rank = Rank(
            rank=0, model=model, config=config, backend=attention, kv_layers=kv_layers, num_blocks=self.num_blocks,
            block_size=self.block_size, shard_tokens=self.num_blocks * self.block_size, device=self.device, pgs=pgs,
        )  # fmt: skip
        self._num_steps = 0
        if has_graphs and self.device.type == "cuda":
            self.rank.graphs = step_graphs(model, attention, kv_layers, Rotary(config), self.device, pgs)

    def step(
        self,
        *chunks: Chunk,
        new: tuple[NewRequest, ...] = (),
        released: tuple[str, ...] = (),
        kv_ops: tuple[KVOp, ...] = (),
    ) -> float:
        """Seconds until the step is answered: the rank waits for all of it, not for decodes it has launched ahead."""
        started_s = time.perf_counter()
        self._run(chunks, new, released, kv_ops)
        return time.perf_counter() - started_s

    def sampled(self, chunk: Chunk) -> int:
        """The token after a chunk of one request."""
        (token,) = self._run((chunk,)).tokens
        return token.token_id

    def _run(self, chunks: tuple[Chunk, ...], *rest: Any) -> StepDone:
        self._num_steps += 1
        new, released, kv_ops = rest or ((), (), ())
        return self.rank.run(RankStep(self._num_steps, chunks, new, released, kv_ops=kv_ops))

    def begin(self, request_id: str, num_tokens: int) -> None:
        """Announce a request with all its blocks; its first token alone is computed."""
        ids = array("i", [(7 * i + 3) % self.config.vocab_size for i in range(num_tokens)]).tobytes()
        sampling = Sampling(max_output_tokens=1 << 20, temperature=0.0)
        extent = Extent(0, num_blocks_for(num_tokens + 64, self.block_size))
        self.step(
            Chunk(request_id, 0, 1, False),
            new=(NewRequest(request_id, ids, num_tokens, sampling),),
            kv_ops=(append_op(request_id, 0, (extent,)),),
        )


def fitting(check: Check, config: ModelConfig, num_tokens: int, bytes_per_element: int) -> int:
    """So many tokens, halved until their KV fits; the rows say how many. An H200 holds all that is asked for."""
    if check.is_cuda:
        room_bytes = torch.cuda.get_device_properties(check.device).total_memory - _OTHER_BYTES
        while num_tokens * config.shape(bytes_per_element).kv_bytes_per_token > room_bytes:
            num_tokens //= 2
    return num_tokens


def _randomise(model: torch.nn.Module, device: torch.device) -> None:
    """Small random matrices made on `device`, norms of 1: activations stay finite over 32 layers."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
            continue
        # Matrices have the same names in Megatron's and in Transformer Engine's layers.
        generator = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))
        parameter.data.copy_(torch.randn(parameter.shape, device=device, generator=generator).mul_(0.02))


def same_as_cpu(check: Check) -> None:
    """A small model of the 8B's head shape on the device against the CPU in fp32: logits after chunks and decodes."""
    reference = cache(partial(_last_logits, check, torch.device("cpu"), torch.float32, "none"))
    variants = {"bf16": "none", "FP8 linear layers": "tensorwise"}
    if transformer_engine_works(check.device):
        variants["FP8 linear layers, blockwise"] = "blockwise"
    for name, fp8 in variants.items():
        check.case(name, 60, partial(_same_row, check, reference, name, fp8))


def _same_row(check: Check, reference: Callable[[], torch.Tensor], name: str, fp8: str) -> None:
    expected, found = reference(), _last_logits(check, check.device, torch.bfloat16, fp8)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    bar = 0.03 if fp8 == "none" else None  # bf16 through the layers; that of FP8 is stated, not judged
    check.add(Row(f"logits against the CPU's in fp32: {name}", error, "of max", bar, True))


def _last_logits(check: Check, device: torch.device, dtype: torch.dtype, fp8: str) -> torch.Tensor:
    config = TINY if check.is_tiny else SMALL
    world = OneRank(check, config, 2048, dtype=dtype, fp8=fp8, device=device, are_weights_portable=True)
    found: list[torch.Tensor] = []
    world.rank.model.register_forward_hook(lambda model, args, output: found.append(output[0]))
    num_tokens = 60 if check.is_tiny else 700
    world.begin("a", num_tokens)
    first = num_tokens // 2
    world.step(Chunk("a", 1, first - 1, False))
    world.step(Chunk("a", first, num_tokens - first, True))
    return found[-1].float().cpu()


def prefill(check: Check) -> None:
    """A whole prompt of 128K, and 512K from measured chunks at several depths: causal MFU against the bf16 rate."""
    config = TINY if check.is_tiny else LLAMA3_8B
    whole, sampled = (96, 192) if check.is_tiny else (131_072, fitting(check, config, 524_288, 2))
    chunk = 32 if check.is_tiny else _CHUNK
    world = cache(lambda: OneRank(check, config, sampled + 64))
    check.case(f"{whole} as a whole", 60, lambda: _whole_prefill(check, world(), whole, chunk))
    check.case(f"{sampled} from depths", 60, lambda: _sampled_prefill(check, world(), sampled, chunk))


def _whole_prefill(check: Check, world: OneRank, whole: int, chunk: int) -> None:
    world.begin("whole", whole)
    pieces = [Chunk("whole", start, min(chunk, whole - start), False) for start in range(1, whole, chunk)]
    total_s = sum(world.step(piece) for piece in pieces)
    check.note("prefill_128k_s", total_s)
    check.add(Row(f"prefill of {whole}: TTFT", total_s, "s"))
    mfu = _flops(world.config.shape(2), whole) / total_s / check.facts.get("matmul_flops_per_s", math.nan)
    check.add(Row(f"prefill of {whole}: causal MFU", mfu, "", 0.6))
    world.step(released=("whole",))


def _sampled_prefill(check: Check, world: OneRank, sampled: int, chunk: int) -> None:
    world.begin("sampled", sampled)
    depths = [1 + i * (sampled - 1 - chunk) // (_NUM_SAMPLED_DEPTHS - 1) for i in range(_NUM_SAMPLED_DEPTHS)]
    times = [min(world.step(Chunk("sampled", depth, chunk, False)) for _ in range(2)) for depth in depths]
    # Chunk time grows linearly with depth, so the trapezoid of samples is the sum over all chunks.
    mean_s = sum((a + b) / 2 for a, b in zip(times, times[1:], strict=False)) / (len(times) - 1)
    total_s = mean_s * sampled / chunk
    note = f" from {len(times)} depths"
    check.add(Row(f"prefill of {sampled}: TTFT", total_s, "s", note=note))
    mfu = _flops(world.config.shape(2), sampled) / total_s / check.facts.get("matmul_flops_per_s", math.nan)
    check.add(Row(f"prefill of {sampled}: causal MFU", mfu, "", 0.6, note=note))


def _flops(shape: Any, num_tokens: int) -> float:
    """Causal: 2 P N + 2 N^2 h d L, P the layers' weights."""
    attention = 2.0 * num_tokens**2 * shape.num_heads * shape.head_dim * shape.num_layers
    return 2.0 * shape.num_layers * shape.num_layer_params * num_tokens + attention


def tpot(check: Check) -> None:
    """Decode of one sequence at 128K: against reading weights and KV once at copy bandwidth."""
    config, context = (TINY, 60) if check.is_tiny else (LLAMA3_8B, 131_072)
    world = cache(lambda: OneRank(check, config, context + 256, has_graphs=True))
    ways = ["ahead", "graphs alone", "eager"] if check.is_cuda else ["eager"]
    for way in ways:  # the first loads the model
        check.case(way, 90, lambda way=way: _tpot_row(check, world(), context, way))


def _tpot_row(check: Check, world: OneRank, context: int, way: str) -> None:
    rank, shape = world.rank, world.config.shape(2)
    graphs, launch_ahead = rank.graphs, rank._launch_ahead
    if way != "ahead":  # each step's launch and look at the tokens then lie between two steps of the device
        rank._launch_ahead = lambda work, underway: None  # type: ignore[method-assign]
    if way == "eager":
        rank.graphs = None
    else:
        assert graphs is not None, "no graphs; the log says why"
    try:
        _decodes(world, f"first-{way}", context, 4)
        seconds = _decodes(world, way, context, 8 if check.is_tiny else 60)
    finally:
        rank.graphs, rank._launch_ahead = graphs, launch_ahead  # type: ignore[method-assign]
    num_weights = shape.num_layers * shape.num_layer_params + shape.num_head_params
    num_bytes = 2 * num_weights + context * shape.kv_bytes_per_token
    floor_s = num_bytes / check.facts.get("copy_bytes_per_s", math.nan)
    what = f"decode at {context}, {way}: TPOT"
    check.add(Row(what, 1e3 * seconds, "ms", note=f" floor {1e3 * floor_s:.2f} ms"))
    bar = 1.25 if way == "ahead" else None
    check.add(Row(f"{what}, against the floor", seconds / floor_s, "x", bar, True))


def _decodes(world: OneRank, request_id: str, context: int, count: int) -> float:
    """Median seconds of a token, host work included, after `context` tokens of KV that nobody has computed."""
    world.begin(request_id, context)
    world.step(Chunk(request_id, context - 1, 1, True))
    times = [world.step(Chunk(request_id, context + i, 1, True)) for i in range(count)]
    world.step(released=(request_id,))
    return quantile(times, 0.5)


def million(check: Check) -> None:
    """A 1M-token context with e4m3 KV on the one GPU: runs, TTFT from sampled depths, TPOT; FP8 KV halves memory."""
    config, context = (TINY, 100) if check.is_tiny else (LLAMA3_8B, 1_048_576)
    context = fitting(check, config, context, 1)
    kv_dtype = E4M3 if check.is_cuda else None
    world = cache(lambda: OneRank(check, config, context + 128, kv_dtype=kv_dtype, has_graphs=True))
    check.case("KV memory", 90, lambda: _million_memory(check, world(), context))
    check.case("decode", 30, lambda: _million_decode(check, world(), context))
    check.case("prefill", 60, lambda: _million_prefill(check, world(), context))


def _million_memory(check: Check, world: OneRank, context: int) -> None:
    kv_bytes = world.num_kv_bytes / (world.num_blocks * world.block_size) * context
    check.add(Row(f"KV of {context} tokens", kv_bytes / 2**30, "GiB"))
    bf16_bytes = world.config.shape(2).kv_bytes_per_token * world.num_blocks * world.block_size
    share = world.num_kv_bytes / bf16_bytes
    bar = 0.505 if check.is_cuda else None  # a scale per block and head comes on top
    check.add(Row("all KV memory, scales too, against bf16's", share, "x", bar, True))


def _million_prefill(check: Check, world: OneRank, context: int) -> None:
    chunk = 32 if check.is_tiny else _CHUNK
    world.begin("long", context)
    times = [world.step(Chunk("long", 1 + i * (context - 1 - chunk) // 4, chunk, False)) for i in range(5)]
    mean_s = sum((a + b) / 2 for a, b in zip(times, times[1:], strict=False)) / (len(times) - 1)
    floor_s = _flops(world.config.shape(2), context) / check.facts.get("matmul_flops_per_s", math.nan)
    note = f" from 5 depths; all FLOPs at the matmul rate: {floor_s:.0f} s"
    check.add(Row(f"prefill of {context}, FP8 KV: TTFT", mean_s * context / chunk, "s", note=note))
    world.step(released=("long",))


def _million_decode(check: Check, world: OneRank, context: int) -> None:
    seconds = _decodes(world, "decoding", context - 64 if check.is_cuda else context - 8, 4 if check.is_tiny else 30)
    kv_bytes = world.num_kv_bytes / (world.num_blocks * world.block_size) * context
    floor_s = kv_bytes / check.facts.get("copy_bytes_per_s", math.nan)
    note = f" reading KV alone: {1e3 * floor_s:.2f} ms"
    check.add(Row(f"decode at {context}, FP8 KV: TPOT", 1e3 * seconds, "ms", note=note))


class Convoy:
    """Short requests beside the end of a long prefill: one engine, whose runs follow one another."""

    def __init__(self, check: Check, long_tokens: int) -> None:
        self.check, self.long_tokens = check, long_tokens
        # The last 16K tokens there take some 10 s; from the start it would be minutes, alone and again beside others.
        self.window_tokens, self.idle_s = (200, 2.0) if check.is_tiny else (16_384, 8.0)
        config = TINY if check.is_tiny else LLAMA3_8B
        self.world = OneRank(check, config, long_tokens + (1 << 13 if check.is_tiny else 1 << 15), has_graphs=True)
        hardware = Hardware(
            name="measured",
            flops_per_s=check.facts.get("matmul_flops_per_s", 1e11),
            memory_bytes_per_s=check.facts.get("copy_bytes_per_s", 1e10),
        )
        self.engine = Engine(self.world, hardware, max_chunk_tokens=64 if check.is_tiny else None)  # several chunks
        self.shorts = {"short_tokens": 12, "shorts_per_s": 2.0} if check.is_tiny else {
            "short_tokens": 256, "shorts_per_s": 16.0
        }  # fmt: skip
        self.outcomes: dict[str, Outcome] = {}
        self.note = f" its last {self.window_tokens} tokens, over random KV"

    def idle(self) -> None:
        """Short requests alone."""
        self.engine.run(**self.shorts, seconds=0.25 * self.idle_s)  # kernels that no graph has launched are compiled
        idle = self.outcomes["idle"] = self.engine.run(**self.shorts, seconds=self.idle_s)
        p99_s = quantile(idle.short_ttft_s, 0.99)
        self.check.add(Row("short TTFT p99 idle", 1e3 * p99_s, "ms", note=f" of {len(idle.short_ttft_s)}"))

    def alone(self) -> None:
        """The long one alone."""
        long_from = self.long_tokens - self.window_tokens
        self.outcomes["alone"] = self.engine.run(
            short_tokens=0, shorts_per_s=0.0, long_tokens=self.long_tokens, long_from=long_from
        )
        what = f"a prefill of {self.long_tokens} alone"
        self.check.add(Row(what, self.outcomes["alone"].long_s, "s", note=self.note))

    def beside(self) -> None:
        """Both."""
        idle, alone = self.outcomes["idle"], self.outcomes["alone"]
        long_from = self.long_tokens - self.window_tokens
        mixed = self.engine.run(**self.shorts, long_tokens=self.long_tokens, long_from=long_from)
        budget_s, what = self.engine.config.step_budget_s, f"a prefill of {self.long_tokens}"
        idle_p99_s, mixed_p99_s = quantile(idle.short_ttft_s, 0.99), quantile(mixed.short_ttft_s, 0.99)
        bar_ms = 1e3 * (2 * idle_p99_s + budget_s)
        note = f" of {len(mixed.short_ttft_s)};{self.note}"
        self.check.add(Row(f"short TTFT p99 beside {what}", 1e3 * mixed_p99_s, "ms", bar_ms, True, note))
        shorts_s = quantile(idle.short_ttft_s, 0.5) * len(mixed.short_ttft_s)
        note = f"{self.note}; short ones' work {shorts_s:.2f} s"
        bar_s = 1.05 * alone.long_s + shorts_s
        self.check.add(Row(f"{what} beside short ones", mixed.long_s, "s", bar_s, True, note))
        _cost_rows(self.check, [idle, alone, mixed], budget_s)


def convoy(check: Check) -> None:
    """Short requests beside the end of a 512K prefill, the real scheduler over the real rank, in this process."""
    long_tokens = 400 if check.is_tiny else fitting(check, LLAMA3_8B, 524_288, 2)
    made = cache(lambda: Convoy(check, long_tokens))
    # Each needs the one before, of the same process.
    check.case("idle", 90, lambda: made().idle())
    check.case("alone", 60, lambda: made().alone())
    check.case("beside", 90, lambda: made().beside())


def _cost_rows(check: Check, outcomes: list[Outcome], budget_s: float) -> None:
    """outcomes: of one engine, in their order; it has learnt from one to the next."""
    steps = [step for outcome in outcomes for step in outcome.steps]
    learnt = [abs(1 - predicted / actual) for predicted, actual, _ in steps[500:]]
    if not learnt:
        check.add(Row(f"cost model: only {len(steps)} steps, 500 are needed", math.nan, ""))
        return
    note = f" of {len(learnt)}"
    check.add(Row("cost model after 500 steps: error p50", quantile(learnt, 0.5), "rel"))
    check.add(Row("cost model after 500 steps: error p95", quantile(learnt, 0.95), "rel", 0.05, True, note))
    mixed = [(predicted, actual) for predicted, actual, is_mixed in outcomes[-1].steps if is_mixed]
    if mixed:
        errors = [abs(1 - predicted / actual) for predicted, actual in mixed]
        check.add(Row("cost model, mixed steps: error p95", quantile(errors, 0.95), "rel", note=f" of {len(mixed)}"))
        kept = sum(actual <= 1.05 * budget_s for _, actual in mixed) / len(mixed)
        check.add(Row("mixed steps at most 5% over their budget", kept, "", 0.99, note=f" of {len(mixed)}"))


def profile(check: Check) -> None:
    """A grid of steps, the fit, its error."""
    check.case("a grid of steps", 150, partial(_profile, check))


def _profile(check: Check) -> None:
    """What `medha profile` does after loading: a grid of steps, the fit, its error on steps held out of it."""
    config, seconds = (TINY, 2.0) if check.is_tiny else (LLAMA3_8B, 30.0)
    world = OneRank(check, config, 2048 if check.is_tiny else 300_000, has_graphs=True)
    ready = RankReady(0, config.shape(2), world.num_blocks, world.block_size, (), "")
    points = grid(world.num_blocks * world.block_size, config.max_context_len)
    started_s = time.perf_counter()
    steps = measure(world.rank, ready, points, seconds=seconds, note=lambda count: None)
    fitted = fit(steps, shape=ready.shape, chip=str(world.device), dtype="bfloat16")
    took_s = time.perf_counter() - started_s
    note = f" {len(steps)} of {len(points)} kinds of step"
    check.add(Row("profile: time without loading", took_s, "s", 180.0, True, note))
    check.add(Row("profile: error p50 of steps held out", fitted.error_p50, "rel"))
    check.add(Row("profile: error p95 of steps held out", fitted.error_p95, "rel"))
