"""What int8 and int4 weights cost in accuracy and bring in speed: the same checkpoint in fp32, bf16, int8 and int4.

    python -m experiments.narrow_weights.run checkpoints/smollm2-135m-instruct    # a real model: accuracy and speed
    python -m experiments.narrow_weights.run checkpoints/tiny    # one that was trained here
    python -m experiments.narrow_weights.run                     # random weights of a larger shape, for the speed

Ranks in this process, one after the other for the logits, in turn for the times; medians of rounds. Logits: after
prompts of text (the tiny model's held-out files, else these docs; random tokens without a checkpoint), errors against
fp32. Text: the mean negative log-likelihood of its tokens. Bars: a decode of one request at least 1.5 times (int8) and
2.2 times (int4) faster than in bf16 where weights outweigh the caches.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from experiments.lib.random_llama import save_llama
from megatron_medha.cluster.messages import NewRequest, RankStep, StepDone
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.sampling import Sampling
from megatron_medha.tiny.tiny_corpus import read_stdlib
from megatron_medha.worker.rank import Rank
from megatron_medha.worker.startup.load import load_rank

BARS = {"int8": 1.5, "int4": 2.2}
KINDS = {"fp32": ("float32", "auto"), "bf16": ("bfloat16", "auto"), "int8": ("bfloat16", "int8"),
         "int4": ("bfloat16", "int4")}  # dtype, weights  # fmt: skip
NUM_PROMPTS, PROMPT_TOKENS = 32, 48
CACHES_BYTES = 64 << 20
BLOCKS_EACH = 32  # of 16 tokens: the longest chunk
# Name, requests, tokens of each.
STEPS = (("decode, 1 request", 1, 1), ("decode, 4", 4, 1), ("decode, 8", 8, 1), ("chunk of 64", 1, 64),
         ("chunk of 512", 1, 512))  # fmt: skip


def main() -> None:
    """Logits first, times next; print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: a random Llama, 2 layers of 2,048")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    logging.getLogger("megatron_medha").setLevel(logging.WARNING)
    if args.checkpoint is not None:
        sys.exit(compare(args.checkpoint, args.threads, args.rounds))
    with tempfile.TemporaryDirectory() as directory:
        save_llama(
            Path(directory), hidden_size=2048, ffn_size=8192, num_layers=2, num_heads=32, num_kv_heads=8, head_dim=64,
            vocab_size=8192,
        )  # fmt: skip
        sys.exit(compare(Path(directory), args.threads, args.rounds))


def compare(checkpoint: Path, threads: int, rounds: int) -> int:
    """Print what was found; 1 if a bar is missed."""
    ranks: dict[str, Rank] = {}
    logits: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    for kind, (dtype, weight_dtype) in KINDS.items():
        config = RankConfig(
            server_endpoint="inproc://nobody", checkpoint=str(checkpoint), kv_memory_bytes=2 << 30,
            model=ModelOptions(device="cpu", dtype=dtype, weight_dtype=weight_dtype, num_threads=threads),
        )  # fmt: skip
        rank, ready = load_rank(config, lambda what, fraction: None)
        assert ready.num_blocks >= NUM_PROMPTS * BLOCKS_EACH, "less memory for KV than the prompts need"
        prompts = held_out(ready.shape.vocab_size, checkpoint)
        logits[kind], losses[kind] = logits_after(rank, prompts)
        if kind != "fp32":
            ranks[kind] = rank
    num_weights = sum(
        module.input_size * module.output_size  # whichever kernel was faster at start
        for module in ranks["bf16"].model.modules()
        if hasattr(getattr(module, "forward", None), "multiply")
    )
    sizes = [num_weights * bits / 8 / 2**20 for bits in (16, 8, 4.5)]
    print(f"{num_weights / 1e6:.1f} M weights of linear layers, MiB: {sizes[0]:.0f} in bf16, {sizes[1]:.0f} in int8, "
          f"{sizes[2]:.0f} in int4 (there the output layer is int8)\n")  # fmt: skip
    print("| against fp32 | largest logit error | of the largest logit | mean | same best token | text, nats a token |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, found in logits.items():
        error = (found - logits["fp32"]).abs()
        scale = logits["fp32"].abs().max()
        same = (found.argmax(1) == logits["fp32"].argmax(1)).float().mean()
        print(f"| {kind} | {error.max():.3f} | {error.max() / scale:.2%} | {error.mean() / scale:.3%} | {same:.0%} | "
              f"{losses[kind]:.4f} |")  # fmt: skip
    seconds = timed(ranks, rounds)
    print(f"\n| {threads} threads, ms | bf16 | int8 | int4 | faster by, int8 | int4 |\n|{' --- |' * 6}")
    for name, _, _ in STEPS:
        bf16_s, *narrow_s = (seconds[kind, name] for kind in ("bf16", *BARS))
        cells = [f"{1e3 * bf16_s:.2f}", *(f"{1e3 * one_s:.2f}" for one_s in narrow_s)]
        print(f"| {name} | {' | '.join([*cells, *(f'{bf16_s / one_s:.2f}' for one_s in narrow_s)])} |")
    if 2 * num_weights < CACHES_BYTES:
        print("\nThe weights fit into a processor's caches: the bars are not for this model")
        return 0
    is_missed, name = False, STEPS[0][0]
    for kind, bar in BARS.items():
        gain = seconds["bf16", name] / seconds[kind, name]
        print(f"{name}, {kind}: faster by {gain:.2f}   bar {bar:g}   {'kept' if gain >= bar else 'MISSED'}")
        is_missed |= gain < bar
    return int(is_missed)


def held_out(vocab_size: int, checkpoint: Path) -> list[list[int]]:
    """Prompts of the tiny model's held-out text, of these docs in another model's tokens, or of random tokens."""
    if checkpoint.name == "tiny":
        ids = read_stdlib(0).held_out_ids.tolist()
    elif (checkpoint / "tokenizer.json").exists():
        pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        ids = tokenizer.encode("\n".join(page.read_text() for page in pages)).ids
    else:
        torch.manual_seed(0)
        return torch.randint(3, vocab_size, (NUM_PROMPTS, PROMPT_TOKENS)).tolist()
    gap = (len(ids) - PROMPT_TOKENS) // NUM_PROMPTS
    return [ids[i * gap : i * gap + PROMPT_TOKENS] for i in range(NUM_PROMPTS)]


def logits_after(rank: Rank, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """Logits [prompts, V] behind each prompt, and the mean loss of the tokens in them."""
    found: list[Tensor] = []
    hook = rank.model.register_forward_hook(lambda model, args, output: found.append(output[0].float().clone()))
    names = [f"p{i}" for i in range(len(prompts))]
    done = run(rank, names, [len(prompt) for prompt in prompts], prompts)
    hook.remove()
    run(rank, [], [], released=names)
    loss = -statistics.fmean(one.logprob for part in done.prompt_logprobs for one in part.logprobs)
    return found[0], loss


def timed(ranks: dict[str, Rank], rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of each step on each rank, in turn."""
    times: dict[tuple[str, str], list[float]] = {}
    with tqdm(total=rounds * len(STEPS), leave=False) as bar:
        for name, count, num_tokens in STEPS:
            requests = [f"{name}-{i}" for i in range(count)]
            for rank in ranks.values():
                run(rank, requests, [256] * count, [[5] * 512] * count, has_logprobs=False)
            for _ in range(rounds):
                for kind, rank in ranks.items():
                    started_s = time.perf_counter()
                    # Always over the same positions: what is measured is one step, not a request that grows.
                    run(rank, requests, [num_tokens] * count, start=256 if num_tokens == 1 else 0)
                    times.setdefault((kind, name), []).append(time.perf_counter() - started_s)
                bar.update()
            for rank in ranks.values():
                run(rank, [], [], released=requests)
    return {key: statistics.median(values) for key, values in times.items()}


def run(
    rank: Rank,
    names: Sequence[str],
    counts: Sequence[int],
    prompts: Sequence[Sequence[int]] = (),
    *,
    start: int = 0,
    released: Sequence[str] = (),
    has_logprobs: bool = True,
) -> StepDone:
    """One step: the next tokens of each request from `start` on; with prompts the requests are new ones."""
    sampling = Sampling(max_output_tokens=1, temperature=0.0, num_prompt_logprobs=1 if has_logprobs else None)
    new = tuple(
        NewRequest(name, array("i", prompt).tobytes(), len(prompt), sampling)
        for name, prompt in zip(names, prompts, strict=bool(prompts))
    ) if prompts else ()  # fmt: skip
    chunks = tuple(
        Chunk(name, start, count, bool(new) and start + count == len(prompts[i]))
        for i, (name, count) in enumerate(zip(names, counts, strict=True))
    )
    begin = tuple(append_op(name, 0, (Extent(i * BLOCKS_EACH, BLOCKS_EACH),)) for i, name in enumerate(names))
    return rank.run(RankStep(1, chunks, new, tuple(released), kv_ops=begin if new else ()))


if __name__ == "__main__":
    main()
