"""What the cost model says where Medha's paper states a figure: attention by chunk size, KVP, SPP, MFU, MBU, memory.

    python -m experiments.published_facts.run

Everything here has the cluster to itself; no scheduler takes part. H100 in nodes of 8, tp 8 inside a node. Ends with 1
where a bar is missed. Of the constants two are fitted to the paper and say nothing about the rows they come from:
attention_efficiency (chunks of 2,048) and stage_entry_s (decodes at 8 stages). Writes results.json next to this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.lib import options
from experiments.lib.prefill import chunk_loads, decode_s, streamed_prefill_s
from megatron_medha.core.cost.capacity import Reserve, num_kv_blocks
from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.step_cost import StepLoad
from megatron_medha.core.cost.utilisation import attention_flops, batch_bytes, mbu, mfu, prefill_flops
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout

HERE = Path(__file__).parent
M = 1 << 20
TP = 8


class Row(NamedTuple):
    """One figure of the paper and ours."""

    what: str
    published: str
    ours: float
    unit: str
    low: float | None = None   # the bar; None: shown only
    high: float | None = None
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether ours is within the bar."""
        return (self.low is None or self.low <= self.ours) and (self.high is None or self.ours <= self.high)


def main() -> int:
    """Print all sections."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sections: tuple[tuple[str, Callable[[], Iterator[Row]]], ...] = (
        ("Attention of 1M tokens in chunks, Llama-3 70B, 8 H100", chunk_sizes),
        ("A decode beside a chunk of 512 after 1M tokens, Llama-3 8B, 8 H100", interference),
        ("Decodes over KVP ranks, 4 stages", kvp_decodes),
        ("Decodes over stages, 2M tokens", spp_decodes),
        ("Prefill over stages (SPP), chunks of 2,048", spp_prefills),
        ("Memory", memory),
    )
    holds = True
    ours: dict[str, dict[str, float]] = {}
    for title, rows in sections:
        print(title)
        model = ""
        for row in rows():
            # An indented row goes with the one above it.
            model = model if row.what.startswith(" ") else row.what
            name = f"{model}, {row.what.strip()}" if row.what.startswith(" ") else row.what
            ours.setdefault(title, {})[name] = round(row.ours, 4)
            bar = "" if row.low is None and row.high is None else "held" if row.holds else "MISSED"
            holds &= row.holds
            print(f"  {row.what:47}{row.published:>16}{row.ours:>9.4g} {row.unit:4}{bar:7}{row.why}".rstrip())
        print()
    (HERE / "results.json").write_text(json.dumps(ours, indent=1) + "\n")
    return 0 if holds else 1


def medha(model: str, engine: str = "medha", **degrees: int) -> ClusterCost:
    """Medha's engine (or another) on 128 H100."""
    return ClusterCost(
        shape=options.model_shape(model),
        hardware=options.hardware("h100_x128"),
        engine=options.engine(engine),
        layout=ParallelLayout(tp=TP, **degrees),
    )


def chunk_sizes() -> Iterator[Row]:
    """Figure 3b; the paper names the first and the last size, those between are read from the order of the bars."""
    cost = medha("llama3_70b_1m")
    minutes = {
        chunk: sum(load.attention_s for load in chunk_loads(cost, M, chunk)) / 60 for chunk in (32, 64, 128, 512, 2048)
    }
    for (chunk, ours), published in zip(minutes.items(), (9.17, 8.60, 8.38, 8.39, 8.31), strict=True):
        why = "attention_efficiency is fitted to this one" if chunk == 2048 else ""
        yield Row(f"chunks of {chunk}", f"{published} min", ours, "min", 0.97 * published, 1.03 * published, why)
    yield Row("32 against 2,048", "+11%", 100 * (minutes[32] / minutes[2048] - 1), "%", 8, 14)


def interference() -> Iterator[Row]:
    """Section 2.6; which engine is not said, its attention has to be of the kind that does not split keys."""
    for engine, published, low, high, why in (
        ("vllm_v0", "~250 ms", 200, 320, "keys not split among processors"),
        ("medha", "", None, None, "keys split"),
    ):
        cost = medha("llama3_8b_1m", engine)
        load = StepLoad()
        load.add_chunk(M - 512, 512, cost.attention_s(M - 512, 512))
        load.add_decodes(1, 1000, cost.decode_attention_s(1000))
        yield Row(f"engine={engine}", published, 1e3 * cost.step_s(load), "ms", low, high, why)


def kvp_decodes() -> Iterator[Row]:
    """Figures 7a, 16 and 19."""
    for model, length, published in (
        ("llama3_8b_1m", 4, ("<= 25 ms", "", "")),
        ("llama3_8b_1m", 10, ("<= 60 ms", "~33 ms (30 / s)", "")),
        ("llama3_70b_1m", 4, ("", "", "")),
        ("llama3_70b_1m", 10, ("", "", "")),
    ):
        steps_s = []
        for kvp, stated in zip((1, 2, 4), published, strict=True):
            cost = medha(model, spp=4, kvp=kvp)
            step_s = decode_s(cost, [length * M // kvp]) + cost.merge_s(1, kvp)
            steps_s.append(step_s)
            num_bytes = batch_bytes(cost.shape, [(length * M, 1)], 1, num_replicas=kvp)
            used = mbu(num_bytes, cost.hardware, TP * kvp, step_s)  # a decode is on one stage at a time
            bar = (28, 38) if (model, length, kvp) == ("llama3_8b_1m", 10, 2) else (None, None)
            yield Row(f"{model} {length}M kvp={kvp}", stated, 1e3 * step_s, "ms", *bar, f"MBU {used:.0%}")
        if (model, length) == ("llama3_8b_1m", 10):
            yield Row("  kvp=2 against kvp=1", "-40%", 100 * (steps_s[1] / steps_s[0] - 1), "%", -47, -33)
    yield Row("highest MBU", "92%", 100 * used_most(), "%", 80, 95, "at most memory_efficiency, 90%")


def used_most() -> float:
    """MBU of the best case above: 70B, 10M tokens, one KVP rank."""
    cost = medha("llama3_70b_1m", spp=4)
    return mbu(batch_bytes(cost.shape, [(10 * M, 1)], 1), cost.hardware, TP, decode_s(cost, [10 * M]))


def spp_decodes() -> Iterator[Row]:
    """Figure 18."""
    for model, published, low, high in (
        ("llama3_8b_1m", "15 to 20 ms", 15, 20),
        ("llama3_70b_1m", "> 20 ms", 20, None),
    ):
        one_s, eight_s = (decode_s(medha(model, spp=spp), [2 * M]) for spp in (1, 8))
        yield Row(f"{model} spp=1", published, 1e3 * one_s, "ms", low, high)
        is_fitted = model == "llama3_8b_1m"
        why = "stage_entry_s is fitted to this" if is_fitted else ""
        yield Row("  spp=8 against spp=1", "+16%" if is_fitted else "", 100 * (eight_s / one_s - 1), "%", why=why)


def spp_prefills() -> Iterator[Row]:
    """Figures 15 and 17."""
    for model, length, efficiency in (("llama3_8b_1m", 1, {16: "> 70%"}), ("llama3_70b_1m", 1, {8: "85%"})):
        alone_s = streamed_prefill_s(medha(model), length * M, 2048)
        for spp in (1, 4, 8, 16):
            cost = medha(model, spp=spp)
            seconds = streamed_prefill_s(cost, length * M, 2048)
            flops = prefill_flops(cost.shape, length * M)
            square = flops + attention_flops(cost.shape, 0, length * M)
            causal, counted_square = (mfu(one, cost.hardware, TP * spp, seconds) for one in (flops, square))
            yield Row(f"{model} {length}M on {TP * spp} H100", "", seconds, "s")
            if spp > 1:
                yield Row("  SPP efficiency", efficiency.get(spp, ""), 100 * alone_s / seconds / spp, "%", 70, 100)
            yield Row("  MFU, causal", "", 100 * causal, "%")
            is_stated = model == "llama3_70b_1m" and spp > 1
            # At most 15% above what is stated. Its own attention times (8.31 minutes on 8 H100) allow 36% counted
            # causally, so it counts every query with every key. Chunks of 2,048 keep no step budget; its own did.
            yield Row(
                "  MFU, every query with every key", "50 to 60%" if is_stated else "", 100 * counted_square, "%",
                *((50, 69) if is_stated else (None, None)),
            )  # fmt: skip


def memory() -> Iterator[Row]:
    """The largest context by layout; figure 17 has cells that do not fit, unreadable which."""
    hardware = options.hardware("h100_x128")
    reserve = Reserve()
    for model, degrees in (
        ("llama3_8b_1m", {"tp": 8}),
        ("llama3_8b_1m", {"tp": 8, "spp": 4, "kvp": 4}),
        ("llama3_70b_1m", {"tp": 8}),
        ("llama3_70b_1m", {"tp": 8, "spp": 8}),
        ("llama3_70b_1m", {"tp": 8, "spp": 16}),
        ("llama3_405b", {"tp": 8, "spp": 2}),
        ("qwen3_235b_a22b", {"tp": 4, "spp": 2}),
    ):
        layout = ParallelLayout(**degrees)
        num_blocks = num_kv_blocks(options.model_shape(model), hardware, layout, reserve)
        tokens = num_blocks * reserve.block_size * layout.kvp
        name = " ".join(f"{axis}={degree}" for axis, degree in degrees.items())
        yield Row(f"{model} {name}: tokens of KV", "", tokens / M, "M")
    try:
        num_kv_blocks(
            options.model_shape("llama3_70b_1m"), hardware, ParallelLayout(tp=8), reserve, num_tokens=4 * M
        )
    except ConfigError as error:
        print(f"  4M tokens of 70B on 8 H100: {error}")


if __name__ == "__main__":
    sys.exit(main())
