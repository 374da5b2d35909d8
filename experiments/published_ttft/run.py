"""The cost model against published measurements: layers, collectives, and a whole prefill of vLLM on 16 A100.

    python -m experiments.published_ttft.run

Three tables. Single layers and collectives as profiled (Vidur's medians): what the constants of conf/hardware were
fitted to. Standalone TTFT of vLLM (Llama-3 8B, TP8 PP2, chunks of 512, 16 A100) from 1K to 1M tokens: each within 15%.
And what the same constants say of other settings, for which nothing is published here. Writes published_ttft.png and
results.json next to this file (or into --out); ends with 1 where a bar is missed.

Do the chunks of one prompt fill both stages? In vLLM of that time a request belongs to one of two virtual engines, and
each waits for its step to leave the last stage. The figures say the same: after little context a chunk takes as long
(35 ms) as a decode without CUDA graphs (32 ms), which has to pass both stages; streamed, it would take half.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from experiments.lib import options
from experiments.lib.prefill import decode_s, prefill_s, streamed_prefill_s
from megatron_medha.core.cost.cluster_cost import ClusterCost
from megatron_medha.core.cost.hardware import all_reduce_s, send_s
from megatron_medha.core.layout import ParallelLayout

BAR = 0.15
KIB = 1024
CHUNK = 512
# Prompt tokens / 1,024: seconds to the first token, and milliseconds between the 16 tokens after it.
TTFT = {
    1: (0.084, 7.7), 4: (0.300, 7.4), 8: (0.557, 10.2), 16: (1.11, 32), 32: (2.34, 34), 64: (4.74, 36),
    128: (11.6, 38), 256: (35.7, 53), 512: (130, 95), 768: (288, 139), 1024: (501, 182),
}  # fmt: skip
# Milliseconds of all products, norms and sums of one layer cut 8 ways.
TOKENS = (8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LAYERS = (
    ("a100_x8", "llama3_8b", (0.078, 0.073, 0.074, 0.105, 0.136, 0.203, 0.345, 0.650, 1.35)),
    ("a100_x8", "llama3_70b", (0.182, 0.186, 0.194, 0.236, 0.383, 0.651, 1.18, 2.30, 4.41)),
    ("h100_x8", "llama3_70b", (0.105, 0.116, 0.112, 0.125, 0.144, 0.221, 0.408, 0.797, 1.52)),
)
LAYER_BAR = {"a100_x8": 0.10, "h100_x8": 0.08}
# Milliseconds by MiB.
ALL_REDUCE = {"a100_x8": {0.5: 0.03, 1: 0.064, 4: 0.10, 16: 0.27}, "h100_x8": {1: 0.035, 4: 0.05, 16: 0.115}}
SEND = {"a100_x8": {1: 0.17, 4: 0.56, 16: 2.2}, "h100_x8": {1: 0.054, 4: 0.13, 16: 0.48}}


def main() -> int:
    """Print all tables, write plot and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory for plot and results")
    args = parser.parse_args()
    layers_hold = print_layers()
    print_collectives()
    rows, ttft_holds = print_ttft()
    print_other_settings()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, args.out / "published_ttft.png")
    return 0 if layers_hold and ttft_holds else 1


def vllm(chip: str, **degrees: int) -> ClusterCost:
    """vLLM of 2024 with Llama-3 8B on nodes of this chip."""
    return ClusterCost(
        shape=options.model_shape("llama3_8b_1m"),
        hardware=options.hardware(f"{chip}_x16"),
        engine=options.engine("vllm_v0"),
        layout=ParallelLayout(**degrees),
    )


def print_layers() -> bool:
    """Layers by tokens, error of the model over the profile."""
    print("One layer cut 8 ways without attention and all-reduce, ms as profiled and error of the model")
    print(f"{'tokens':22}" + "".join(f"{count:>13}" for count in TOKENS))
    holds = True
    for hardware_name, model, measured_ms in LAYERS:
        hardware = options.hardware(hardware_name)
        shape = options.model_shape(model)
        cost = ClusterCost(
            shape=shape, hardware=hardware, engine=options.engine("medha"), layout=ParallelLayout(tp=8)
        )
        cells = []
        for num_tokens, one_ms in zip(TOKENS, measured_ms, strict=True):
            reduce_s = 2 * all_reduce_s(hardware.intra_node, 8, 2 * num_tokens * shape.hidden_size)
            error = 1e3 * (cost.layer_s(num_tokens) - reduce_s) / one_ms - 1
            holds &= abs(error) <= LAYER_BAR[hardware_name]
            cells.append(f"{one_ms:6.3f} {error:+6.1%}")
        print(f"{hardware_name} {model:14}" + "".join(f"{cell:>13}" for cell in cells))
    bars = ", ".join(f"{name} {bar:.0%}" for name, bar in LAYER_BAR.items())
    print(f"bar (what the constants were fitted to): {bars}: {'held' if holds else 'MISSED'}\n")
    return holds


def print_collectives() -> None:
    """All-reduce and messages by size."""
    print("Collectives, ms as profiled and error of the model (latency + bytes / bandwidth, fitted)")
    for hardware_name in ALL_REDUCE:
        hardware = options.hardware(hardware_name)
        reduce_cells = [
            f"{mib:g} MiB {one_ms:g} {1e3 * all_reduce_s(hardware.intra_node, 8, mib * KIB * KIB) / one_ms - 1:+.0%}"
            for mib, one_ms in ALL_REDUCE[hardware_name].items()
        ]
        send_cells = [
            f"{mib:g} MiB {one_ms:g} {1e3 * send_s(hardware.inter_node, mib * KIB * KIB) / one_ms - 1:+.0%}"
            for mib, one_ms in SEND[hardware_name].items()
        ]
        print(f"{hardware_name} all-reduce over 8: {', '.join(reduce_cells)}")
        print(f"{hardware_name} between nodes:     {', '.join(send_cells)}")
    print()


def print_ttft() -> tuple[list[dict[str, float]], bool]:
    """TTFT by length; the rows, and whether all are within the bar."""
    cost = vllm("a100", tp=8, spp=2)
    print(f"vLLM, Llama-3 8B, TP8 PP2, chunk {CHUNK}, 16 A100: standalone TTFT (bar: within {BAR:.0%}), then TBT")
    print(
        f"{'tokens':>8}{'published s':>13}{'ours s':>9}{'error':>8}{'streamed s':>12}{'error':>8}"
        f"{'TBT ms':>10}{'ours ms':>9}"
    )
    rows = []
    for kib_tokens, (published_s, tbt_ms) in TTFT.items():
        num_tokens = kib_tokens * KIB
        ours_s = cost.engine.request_s + prefill_s(cost, num_tokens, CHUNK)
        streamed_s = cost.engine.request_s + streamed_prefill_s(cost, num_tokens, CHUNK)
        ours_tbt_ms = 1e3 * decode_s(cost, [num_tokens])
        rows.append(
            {
                "tokens": num_tokens, "published_s": published_s, "ours_s": ours_s, "error": ours_s / published_s - 1,
                "streamed_s": streamed_s, "published_tbt_ms": tbt_ms, "ours_tbt_ms": ours_tbt_ms,
            }
        )  # fmt: skip
        print(
            f"{kib_tokens:>7}K{published_s:13.3f}{ours_s:9.3f}{ours_s / published_s - 1:+8.1%}"
            f"{streamed_s:12.3f}{streamed_s / published_s - 1:+8.1%}{tbt_ms:10.1f}{ours_tbt_ms:9.1f}"
        )
    worst = max(abs(row["error"]) for row in rows)
    verdict = "held" if worst <= BAR else "MISSED"
    print(f"largest error {worst:.1%}: {verdict}; 'streamed': had no chunk waited for the last stage (see --help)")
    print(
        "TBT: CUDA graphs end at 8,192 tokens, hence the step there. From 256K tokens on the published figure is\n"
        "10 ms + 0.17 ms per 1,024 tokens, 20 times what reading KV takes. Chunks after the same context show no such\n"
        "term on top, so it belongs to decodes alone: a kernel that does not split keys, or the ids and the text of\n"
        "the prompt handled with every token. The figures do not tell which, nor what a batch of them takes.\n"
    )
    return rows, worst <= BAR


def print_other_settings() -> None:
    """What the constants say of settings nobody has published here."""
    settings = (
        ("TP8 PP2 chunk 512", vllm("a100", tp=8, spp=2), 512),
        ("TP8 PP2 chunk 2048", vllm("a100", tp=8, spp=2), 2048),
        ("TP8 chunk 512", vllm("a100", tp=8), 512),
        ("TP8 chunk 2048", vllm("a100", tp=8), 2048),
        ("TP8 chunk 8192", vllm("a100", tp=8), 8192),
    )
    lengths = (1, 4, 16, 64, 256, 1024)
    print("The same constants, other settings of vLLM on A100: standalone TTFT, s (nothing fitted to these)")
    print(f"{'':20}" + "".join(f"{length:>9}K" for length in lengths))
    for name, cost, chunk in settings:
        seconds = [cost.engine.request_s + prefill_s(cost, length * KIB, chunk) for length in lengths]
        print(f"{name:20}" + "".join(f"{one_s:10.2f}" for one_s in seconds))
    batches = (1, 8, 32, 128, 256)
    print("A step of decodes after 2,048 tokens each, ms")
    print(f"{'':20}" + "".join(f"{count:>10}" for count in batches))
    for name, cost, _ in settings[::2]:
        steps_s = [decode_s(cost, [2 * KIB] * count) for count in batches]
        print(f"{name.partition(' chunk')[0]:20}" + "".join(f"{1e3 * step_s:10.1f}" for step_s in steps_s))


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Published and ours over length, error below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=[3, 1], layout="constrained"
    )
    tokens = [row["tokens"] for row in rows]
    upper.plot(tokens, [row["published_s"] for row in rows], "o", label="published")
    upper.plot(tokens, [row["ours_s"] for row in rows], "-", label="cost model")
    upper.plot(tokens, [row["streamed_s"] for row in rows], ":", label="if chunks were streamed through the stages")
    upper.set(xscale="log", yscale="log", ylabel="TTFT (s)")
    upper.set_title("vLLM TP8 PP2 chunk 512, Llama-3 8B, 16 A100, one request at a time")
    upper.legend()
    lower.axhspan(-100 * BAR, 100 * BAR, alpha=0.15)
    lower.plot(tokens, [100 * row["error"] for row in rows], "o-")
    lower.set(xlabel="prompt tokens", ylabel="error (%)", ylim=(-25, 25))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
