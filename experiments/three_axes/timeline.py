"""What do four ranks, two stages of two kvp ranks, do with one long prompt and some short ones? A trace of a real run.

    python -m experiments.three_axes.timeline --trace trace.json    # a minute; https://ui.perfetto.dev reads it
    python -m experiments.three_axes.timeline --draw trace.json     # the picture of one again

`medha serve parallel.spp=2 parallel.kvp=2 tracking.timeline=FILE` runs a random Llama; a client sends it a long prompt
and, while that streams, short ones. The picture shows a part of the trace: above, what each stage of each kvp rank
computed when, a colour for the long prompt's every other chunk; below, the tokens of the long prompt each kvp rank
holds KV of. The second rank joins when the first rank's shard is full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from experiments.exactness.run import save_tokenizer
from experiments.lib.http_stream import Streamed, complete
from experiments.lib.plain_model import save_plain_model
from experiments.lib.server_process import serving

MODEL = {"hidden_size": 256, "ffn_size": 688, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
VOCAB_SIZE = 1024
COLOURS = {"even": "#0072b2", "odd": "#56b4e9", "short": "#e69f00"}

Event = dict[str, Any]


async def load(port: int, long_tokens: int, num_shorts: int) -> None:
    """The long prompt, and short ones one after another until it has its first tokens."""
    rng = random.Random(0)

    def prompt(num_tokens: int) -> list[int]:
        return [rng.randrange(4, VOCAB_SIZE) for _ in range(num_tokens)]

    for _ in range(20):  # the cost model learns the machine from traffic
        check(await complete(port, prompt(1024), 4))
    long = asyncio.create_task(complete(port, prompt(long_tokens), 12))
    for _ in range(num_shorts):
        await asyncio.sleep(rng.uniform(0.1, 0.5))
        check(await complete(port, prompt(rng.randint(64, 256)), 6))
    check(await long)


def check(result: Streamed) -> Streamed:
    """A request that failed ends the experiment."""
    if result.error is not None:
        raise SystemExit(f"a request of {result.num_prompt_tokens} tokens failed: {result.error}")
    return result


def record(trace: Path, long_tokens: int, num_shorts: int) -> None:
    """Serve, send, stop; the trace is complete then."""
    with tempfile.TemporaryDirectory() as name:
        save_plain_model(Path(name), vocab_size=VOCAB_SIZE, **MODEL)
        save_tokenizer(Path(name), VOCAB_SIZE)
        shard_tokens = long_tokens // 2 + 64  # of both, with room for the output; blocks are of 16
        with serving(
            f"checkpoint={name}", "parallel.spp=2", "parallel.kvp=2", f"parallel.max_tokens_per_shard={shard_tokens}",
            "model.kv_memory_gib=0.5", "model.num_threads=1", "log_level=warning", "scheduler.step_budget_s=0.25",
            f"tracking.timeline={trace}",
        ) as port:  # fmt: skip
            asyncio.run(load(port, long_tokens, num_shorts))


def steps_of(events: list[Event]) -> tuple[str, list[Event]]:
    """The request with the longest prompt, and the steps on ranks from its first to its last."""
    requests = [event for event in events if event["ph"] == "b" and event["name"].endswith(" prefill")]
    long_id = max(requests, key=lambda event: event["args"]["prompt_tokens"])["id"]
    steps = [event for event in events if event["ph"] == "X"]
    ours = [step for step in steps if chunk_of(step, long_id) is not None]
    start_us, end_us = min(step["ts"] for step in ours), max(step["ts"] + step["dur"] for step in ours)
    return long_id, [step for step in steps if start_us <= step["ts"] < end_us + 0.02 * (end_us - start_us)]


def chunk_of(step: Event, request_id: str) -> Event | None:
    """The part a request's prompt has in a step."""
    return next((chunk for chunk in step["args"]["chunks"] if chunk["request"] == request_id), None)


def draw(trace: Path, picture: Path) -> None:
    """Lanes above, a close look at them in the middle, shards below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    events = json.loads(trace.read_text())["traceEvents"]
    long_id, steps = steps_of(events)
    zero_us = min(step["ts"] for step in steps)
    lanes = sorted({(step["pid"], step["tid"]) for step in steps})
    chunks = sorted({chunk["start"] for step in steps if (chunk := chunk_of(step, long_id)) is not None})
    shared_us = min(
        step["ts"] for step in steps if (chunk := chunk_of(step, long_id)) and len(chunk["kvp_ranks"]) > 1
    )  # fmt: skip
    joined_s = (shared_us - zero_us) / 1e6
    end_s = max(step["ts"] + step["dur"] - zero_us for step in steps) / 1e6

    figure, (whole, close, shards) = pyplot.subplots(3, 1, figsize=(11, 8), height_ratios=(3, 3, 2))
    width_s = 0.08 * end_s
    window = (joined_s - 0.55 * width_s, joined_s + 0.45 * width_s)
    for axes, is_close in ((whole, False), (close, True)):
        for step in steps:
            lane = lanes.index((step["pid"], step["tid"]))
            start_s, duration_s = (step["ts"] - zero_us) / 1e6, step["dur"] / 1e6
            chunk = chunk_of(step, long_id)
            if chunk is None:
                colour = COLOURS["short"]
            else:
                colour = COLOURS["odd" if chunks.index(chunk["start"]) % 2 else "even"]
            axes.barh(lane, duration_s, 0.8, start_s, color=colour, edgecolor="white", linewidth=0.4 if is_close else 0)
            others = [one for one in step["args"]["chunks"] if one["request"] != long_id]
            if chunk is not None and (others or step["args"]["num_decodes"]):
                axes.barh(lane - 0.33, duration_s, 0.14, start_s, color=COLOURS["short"])
            middle_s = start_s + duration_s / 2
            if is_close and chunk is not None and window[0] < middle_s < window[1] and duration_s > width_s / 40:
                axes.text(middle_s, lane + 0.05, str(chunks.index(chunk["start"]) + 1), ha="center", va="center",
                          color="white", fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(lanes)), [f"kvp {kvp}, stage {stage}" for kvp, stage in lanes])
        axes.invert_yaxis()
        axes.axvline(joined_s, color="#333333", linestyle=":", linewidth=1)
    whole.set_title("One long prompt and short ones on spp=2, kvp=2: what each rank computed when", loc="left")
    whole.axvspan(*window, color="#000000", alpha=0.07, linewidth=0)
    whole.legend(
        handles=[Patch(color=COLOURS["even"], label="the long prompt's chunks"), Patch(color=COLOURS["odd"]),
                 Patch(color=COLOURS["short"], label="short prompts, decodes (a strip: in the same step)")],
        loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    close.set_title("The shaded part: chunks, by number, go from stage to stage; then the second kvp rank joins",
                    loc="left")  # fmt: skip

    times_s, held = [0.0], [[0], [0]]
    for step in sorted(steps, key=lambda step: step["ts"] + step["dur"]):
        chunk = chunk_of(step, long_id)
        if chunk is not None and not step["tid"] and chunk["kvp_ranks"][-1] == step["pid"]:
            times_s.append((step["ts"] + step["dur"] - zero_us) / 1e6)
            for kvp, tokens in enumerate(held):
                tokens.append(tokens[-1] + chunk["tokens"] * (kvp == step["pid"]))
    shards.stackplot(times_s, held, step="post", colors=("#009e73", "#cc79a7"), labels=("kvp 0", "kvp 1"), alpha=0.8)
    shards.axvline(joined_s, color="#333333", linestyle=":", linewidth=1)
    shards.set_title("Tokens of the long prompt that each kvp rank's first stage holds KV of", loc="left")
    shards.set_xlabel("seconds")
    shards.legend(loc="upper left", frameon=False)
    for axes in (whole, shards):
        axes.set_xlim(0, end_s)
    close.set_xlim(*window)
    shards.set_ylabel("tokens")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=Path("trace.json"), help="to write (default: trace.json)")
    parser.add_argument("--draw", type=Path, metavar="TRACE", help="only draw this one")
    parser.add_argument("--picture", type=Path, default=Path("docs/three_axes.png"))
    parser.add_argument("--tokens", type=int, default=16384, help="of the long prompt (default: 16384)")
    parser.add_argument("--shorts", type=int, default=8, help="short prompts (default: 8)")
    args = parser.parse_args()
    trace = args.draw or args.trace
    if args.draw is None:
        record(trace.resolve(), args.tokens, args.shorts)
    draw(trace, args.picture)
    print(f"{trace}: {trace.stat().st_size:,} bytes; {args.picture}: {args.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
