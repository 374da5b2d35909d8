"""How far are the logits of Megatron's usual layers from the server's, by kind of layer?

    python -m experiments.one_bit_pattern.usual_layers

The models are those that the tests hold against Megatron's own forward pass: four layers, random weights, a prompt of
257 tokens in one step, one thread. Printed: the share of logits with other bits, and the largest difference over the
largest logit; in bfloat16 the usual layers are the same ones with their weights in bfloat16.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.cpu_model import use_cpu_kernels
from megatron_medha.parallel.groups import build_groups
from megatron_medha.tiny.new_checkpoint import one_rank
from tests.model.megatron_models import VOCAB_SIZE, megatron_logits
from tests.model.paged_run import PagedRun
from tests.model.test_megatron_exactness import MODELS, random_ids, saved_and_loaded

KINDS: Mapping[str, str] = {  # in docs/bits.md, by the tests' names
    "llama": "Llama-like", "mixtral": "experts", "experts as in qwen2": "experts, shared one with a gate",
    "latent attention": "latent attention", "deepseek": "latent attention and experts (DeepSeek)",
    "sinks": "attention sinks", "window": "window", "gpt": "LayerNorm, GELU, biases, learned positions",
    "zero-centred rms": "zero-centred norms", "interleaved": "interleaved rotary", "qk l2": "L2 norm of q and k",
    "output gate": "attention output gate", "softmax scale": "softmax scale", "neox": "partial rotary",
    "experts as in gpt-oss": "experts with clamped gates, sinks (gpt-oss)",
}  # fmt: skip
NUM_TOKENS = 257


def main() -> None:
    """All kinds, in both dtypes."""
    print(f"{'kind':46}" + "".join(f"{dtype:>11} differ{'largest':>10}" for dtype in ("float32", "bfloat16")))
    with one_rank():
        torch.set_num_threads(1)
        for name, kind in KINDS.items():
            cells = [compared(name, dtype) for dtype in (torch.float32, torch.bfloat16)]
            print(f"{kind:46}" + "".join(f"{share:18.2%}{largest:10.1e}" for share, largest in cells), flush=True)


@torch.inference_mode()
def compared(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Share of logits with other bits, and the largest difference over the largest logit."""
    with tempfile.TemporaryDirectory() as directory:
        pair = saved_and_loaded(MODELS[name], build_groups(ParallelLayout()), Path(directory), dtype=dtype)
        theirs = copy.copy(pair.theirs).to(dtype)
        run = PagedRun(pair.served, pair.config, block_size=16)
        use_cpu_kernels(pair.served, run.backend)
        prompt = run.add(random_ids(NUM_TOKENS, 1))
        run.step([(prompt, NUM_TOKENS)])
        expected_TV = megatron_logits(theirs, prompt.token_ids[:NUM_TOKENS]).float()
        found_TV = torch.cat(prompt.logits)[:, :VOCAB_SIZE].float()
        error = (found_TV - expected_TV).abs().max() / expected_TV.abs().max()
        return float((found_TV != expected_TV).float().mean()), float(error)


if __name__ == "__main__":
    main()
