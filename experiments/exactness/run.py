"""Is what the server answers what the model says? Every layer of ours against transformers' own forward.

    python -m experiments.exactness.run

For Llama, Qwen2 and Qwen3 shapes with random fp32 weights: a checkpoint is saved by transformers and served by
`medha serve`, with several step budgets, chunk rules and block sizes. All prompts (1 to 4,096 tokens) are sent
at once, so they are chunked, preempted and computed beside one another. Compared with one plain forward of
each prompt and its answer: the log-probability of every prompt token and every answered token (an error in
a log-probability is at least that of a logit), and the 64 greedy tokens themselves. A greedy token may
differ only where transformers' own two best logits are closer than the tolerance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers

from experiments.lib.random_llama import save_word_tokenizer
from experiments.lib.server_process import serving

RELATIVE_TOLERANCE = 1e-4
NUM_OUTPUT_TOKENS = 64
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 100, 500, 1024, 2500, 4096)
FAMILIES: dict[str, dict[str, Any]] = {"Llama": {}, "Qwen2": {"num_key_value_heads": 1}, "Qwen3": {"head_dim": 64}}
SETTINGS = {
    "adaptive chunks, blocks of 16": ["scheduler.step_budget_s=0.01"],
    "fixed chunks of 96, blocks of 8": [
        "scheduler=vllm_chunk_512", "scheduler.fixed_chunk_tokens=96", "model.block_size=8",
    ],
    "whole prompts, blocks of 64": ["scheduler=whole_prompt", "model.block_size=64"],
}


def make_checkpoint(family: str, directory: Path) -> Any:
    """A random model of the family, saved; initializer_range 0.2 gives logits with spread."""
    torch.manual_seed(0)
    options = {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "tie_word_embeddings": False, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, **FAMILIES[family],
    }
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)  # made as zeros, which would hide a bias that is not applied
    model.save_pretrained(directory)
    return model


def ask(port: int, prompt: list[int]) -> dict[str, Any]:
    """Greedy continuation with the log-probabilities of prompt and answer."""
    body = {
        "prompt": prompt, "max_tokens": NUM_OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "echo": True,
        "logprobs": 1, "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
    return choice


async def ask_all(port: int, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """All at the same moment."""
    return list(await asyncio.gather(*(asyncio.to_thread(ask, port, prompt) for prompt in prompts)))


def compare(model: Any, prompt: list[int], choice: dict[str, Any]) -> tuple[float, int]:
    """The largest error of a log-probability, relative to the largest logit; and greedy tokens that differ."""
    logprobs = choice["logprobs"]["token_logprobs"]
    answer = choice["token_ids"][-NUM_OUTPUT_TOKENS:]
    ids = torch.tensor(prompt + answer)
    with torch.inference_mode():
        logits_TV = model(ids[None]).logits[0].double()
    expected_T = torch.log_softmax(logits_TV, -1)[:-1].gather(1, ids[1:, None])[:, 0]
    scale = logits_TV.abs().max()
    error = ((torch.tensor(logprobs[1:], dtype=torch.float64) - expected_T).abs().max() / scale).item()
    num_wrong = 0
    for position in range(len(prompt) - 1, len(ids) - 1):
        best_two = logits_TV[position].topk(2).values
        is_best = ids[position + 1] == logits_TV[position].argmax()
        num_wrong += not is_best and (best_two[0] - best_two[1]) > RELATIVE_TOLERANCE * scale
    return error, num_wrong


def main() -> None:
    """All families under all settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append")
    args = parser.parse_args()
    is_exact = True
    print(f"{'family':<8}{'setting':<34}{'prompts':>8}{'largest relative error':>24}{'greedy tokens wrong':>21}")
    for family in args.family or FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            model = make_checkpoint(family, directory)
            save_word_tokenizer(directory, model.config.vocab_size)
            rng = random.Random(1)
            prompts = [[rng.randrange(4, model.config.vocab_size) for _ in range(n)] for n in LENGTHS]
            for setting, overrides in SETTINGS.items():
                with serving(f"checkpoint={directory}", "model.kv_memory_gib=1", *overrides) as port:
                    choices = asyncio.run(ask_all(port, prompts))
                found = [compare(model, p, c) for p, c in zip(prompts, choices, strict=True)]
                error, num_wrong = max(e for e, _ in found), sum(n for _, n in found)
                is_exact &= error < RELATIVE_TOLERANCE and not num_wrong
                print(f"{family:<8}{setting:<34}{len(prompts):>8}{error:>24.1e}"
                      f"{num_wrong:>15} of {len(prompts) * NUM_OUTPUT_TOKENS}", flush=True)
    print(f"bar: error below {RELATIVE_TOLERANCE:.0e}, no token wrong   {'kept' if is_exact else 'MISSED'}")
    sys.exit(0 if is_exact else 1)


if __name__ == "__main__":
    main()
