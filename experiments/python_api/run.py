"""Is `LLM.generate` as fast as the server, and are its tokens the same? 1,000 prompts at once, both ways in turn.

    python -m experiments.python_api.run checkpoints/tiny      # 4 minutes or so; on an idle machine

Each way has an engine of its own in every round, and a few prompts before the clock runs. Over HTTP, one client has all
requests open at once, on as many connections. Half of the prompts are greedy, half are sampled with seeds.

Bars: every token the same; output tokens a second, median of the rounds, at least those over HTTP.
Finished rounds are kept in --out and not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import aiohttp

from experiments.lib.results_file import ResultsFile, verdict
from experiments.lib.server_process import serving
from megatron_medha import LLM, SamplingParams

NUM_PROMPTS = 1000
NUM_WARM_UP = 16
OUTPUT_TOKENS = 32
OPTIONS = {"model.kv_memory_gib": 1}
_WORDS = ["def", "return", "import", "for", "in", "class", "self", "value", "index", "None", "(", ")", ":", "="]


def prompts(number: int, seed: int) -> list[str]:
    """Texts of 10 to 80 words that look like code."""
    draw = Random(seed)
    return [f"# {place}\n" + " ".join(draw.choices(_WORDS, k=draw.randint(10, 80))) for place in range(number)]


def parameters(place: int) -> dict[str, Any]:
    """Of the request at this place: greedy, or sampled."""
    sampled: dict[str, Any] = {"temperature": 0.0} if place % 2 == 0 else {"temperature": 0.8, "seed": place}
    return {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True, **sampled}


def by_python(checkpoint: Path, texts: list[str], warm_up: list[str]) -> dict[str, Any]:
    """Seconds and token ids of LLM.generate."""
    with LLM(checkpoint, **OPTIONS) as llm:
        llm.generate(warm_up, SamplingParams(**parameters(0)), use_tqdm=False)
        params = [SamplingParams(**parameters(place)) for place in range(len(texts))]
        began_s = time.perf_counter()
        outputs = llm.generate(texts, params, use_tqdm=False)
        return {"seconds": time.perf_counter() - began_s, "ids": [one.outputs[0].token_ids for one in outputs]}


def by_http(checkpoint: Path, texts: list[str], warm_up: list[str]) -> dict[str, Any]:
    """Seconds and token ids of as many requests to `medha serve`."""

    async def ask(session: aiohttp.ClientSession, text: str, params: dict[str, Any]) -> list[int]:
        body = {"prompt": text, "return_token_ids": True, **params}
        async with session.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            ids: list[int] = (await response.json())["choices"][0]["token_ids"]
            return ids

    async def run(port: int) -> dict[str, Any]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", connector=connector, timeout=aiohttp.ClientTimeout(None)
        ) as session:
            await asyncio.gather(*(ask(session, text, parameters(0)) for text in warm_up))
            began_s = time.perf_counter()
            ids = await asyncio.gather(*(ask(session, text, parameters(at)) for at, text in enumerate(texts)))
            return {"seconds": time.perf_counter() - began_s, "ids": ids}

    words = [f"{key}={value}" for key, value in OPTIONS.items()]
    with serving(f"checkpoint={checkpoint}", "log_level=warning", *words) as port:
        return asyncio.run(run(port))


def main() -> None:
    """Run what is missing, and print figures beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("experiments/python_api/results.json"))
    given = parser.parse_args()
    texts, warm_up = prompts(given.prompts, 1), prompts(NUM_WARM_UP, 2)
    results = ResultsFile(given.out, {"prompts": given.prompts, "output_tokens": OUTPUT_TOKENS})

    def one_round() -> dict[str, Any]:
        http, python = by_http(given.checkpoint, texts, warm_up), by_python(given.checkpoint, texts, warm_up)
        pairs = zip(http["ids"], python["ids"], strict=True)
        return {
            "http_s": http["seconds"],
            "python_s": python["seconds"],
            "num_different": sum(one != other for one, other in pairs),
            "num_tokens": sum(map(len, python["ids"])),
        }

    cells = [results.cell(f"round {number}", one_round) for number in range(given.rounds)]
    rates = {way: [cell["num_tokens"] / cell[f"{way}_s"] for cell in cells] for way in ("http", "python")}
    for way, values in rates.items():
        print(f"{way}: output tokens/s {', '.join(f'{value:,.0f}' for value in values)}")
    num_different = sum(cell["num_different"] for cell in cells)
    verdict("outputs with other tokens", f"{num_different} of {given.prompts * given.rounds}", "0", num_different == 0)
    ratio = median(rates["python"]) / median(rates["http"])
    verdict("LLM.generate's throughput over the server's, medians", f"{ratio:.2f}", "1", ratio >= 1)


if __name__ == "__main__":
    main()
