"""The parts of the GPU check by name, in the order they are worth running in. No torch here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

PARTS = {
    "rates": "the chip's own rates of bf16 products and copies, which others are shares of",
    "compile": "every kernel variant, compiled by several processes at once",
    "smoke": "a small model: logits, a graph, a step launched ahead, sampling, e4m3 KV",
    "correctness": "every kernel and every tile against plain attention in fp64",
    "tpot": "decode of one sequence at 128K, with graphs, ahead, and without",
    "attention": "chunks over 128K, all tiles, against raw flash kernels",
    "decode": "single tokens over 8K to 256K, all tiles",
    "linear": "FP8 linear layers by torch and by Transformer Engine",
    "same_as_cpu": "logits of FP8 linear layers against the CPU's",
    "prefill": "128K as a whole, 512K from measured depths",
    "more": "attention and decode at the other lengths",
    "million": "1M tokens of e4m3 KV",
    "convoy": "short requests beside the end of a 512K prefill",
    "profile": "what `medha profile` does after loading",
}
_KERNEL_PARTS = ("rates", "compile", "correctness", "attention", "decode", "linear", "more")


def run_part(name: str, check: Any) -> None:
    """All cases of a part."""
    module = "kernel_parts" if name in _KERNEL_PARTS else "smoke_part" if name == "smoke" else "model_parts"
    getattr(import_module(f"experiments.gpu.{module}"), name)(check)
