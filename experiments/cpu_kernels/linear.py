"""How near linear layers come to this machine's limits: native ones of each instruction set, and oneDNN's.

    python -m experiments.cpu_kernels.linear
    python -m experiments.cpu_kernels.linear --shapes 6144x1024,1024x3072 --kernels amx,onednn --weights-mib 512

CPU time of one thread, the least of several rounds in which all take their turns, as other programs may run beside.
Limits: the rate of torch's bf16 matrix product, and the rate at which memory is read. Many layers of a shape are
multiplied one after the other, so that weights come from memory as in a model. "-int8": weights in int8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.native_build import usable_targets
from megatron_medha.model.narrow_weights import int8_linear
from megatron_medha.model.packed_linear import OneDnnLinear
from megatron_medha.worker.startup.load import tune_malloc

CHUNK_BAR, BAR_CHUNK = 0.60, 256  # of the matmul rate, for so many tokens
DECODE_BAR = 0.80                 # of the read bandwidth, for one token
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)


def layer_of(kernel: str, weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer of that kernel: onednn, or an instruction set, or one followed by -int8."""
    if kernel == "onednn":
        return OneDnnLinear(weight_OI, None)
    if kernel.endswith("-int8"):
        return int8_linear(weight_OI, None)
    return NativeLinear(weight_OI, None, kernel.upper())


def cpu_s(call: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    started_s = time.thread_time()
    call()
    return time.thread_time() - started_s


@torch.inference_mode()
def main() -> None:
    """Measure in rounds, print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="3072x512,512x1536,6144x1024,1024x3072", help="outputs x inputs")
    parser.add_argument("--kernels", default=",".join((*usable_targets(), "onednn")).lower())
    parser.add_argument("--weights-mib", type=int, default=64, help="of all layers of a shape")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tune_malloc()
    left, right = torch.randn(2, 1024, 1024).bfloat16()
    large = torch.randn(1 << 26)  # 256 MiB
    least: dict[tuple[str, ...], float] = {}

    def turn(key: tuple[str, ...], call: Callable[[], object]) -> None:
        least[key] = min(least.get(key, float("inf")), cpu_s(call))

    kernels, shapes = args.kernels.split(","), args.shapes.split(",")
    for shape in tqdm(shapes, leave=False):
        num_outputs, num_inputs = map(int, shape.split("x"))
        count = max(1, (args.weights_mib << 20) // (2 * num_outputs * num_inputs))
        weight_OI = torch.randn(num_outputs, num_inputs).bfloat16()
        layers = {kernel: [layer_of(kernel, weight_OI) for _ in range(count)] for kernel in kernels}
        for _ in range(args.rounds):
            turn(("matmul",), lambda: left @ right)
            turn(("read",), lambda: large.sum())
            for num_tokens in TOKENS:
                input_TI = torch.randn(num_tokens, num_inputs).bfloat16()
                for kernel, of_kernel in layers.items():
                    turn((shape, str(num_tokens), kernel), lambda x=input_TI, all=of_kernel: [one(x) for one in all])
        for num_tokens in TOKENS:
            for kernel in kernels:
                least[shape, str(num_tokens), kernel] /= count
    matmul_rate, read_rate = 2 * 1024**3 / least[("matmul",)], large.numel() * 4 / least[("read",)]
    print(f"one thread: matmul {matmul_rate / 1e9:.0f} GFLOP/s, read {read_rate / 1e9:.1f} GB/s")
    print(f"{'':24}" + "".join(f"{kernel:>14} us  matmul  read" for kernel in kernels))
    for shape in shapes:
        num_weights = torch.Size(map(int, shape.split("x"))).numel()
        for num_tokens in TOKENS:
            line = f"{shape:>12} {num_tokens:4} tokens"
            for kernel in kernels:
                took_s = least[shape, str(num_tokens), kernel]
                num_bytes = num_weights * (1 if kernel.endswith("int8") else 2)
                flops_share = 2.0 * num_tokens * num_weights / took_s / matmul_rate
                line += f"{took_s * 1e6:14.0f}     {flops_share:6.0%}{num_bytes / took_s / read_rate:6.0%}"
            print(line)
        chunk_rate = 2.0 * BAR_CHUNK * num_weights / least[shape, str(BAR_CHUNK), kernels[0]]
        decode_rate = 2.0 * num_weights / least[shape, "1", kernels[0]]
        for num_tokens, share, bar in (
            (BAR_CHUNK, chunk_rate / matmul_rate, CHUNK_BAR),
            (1, decode_rate / read_rate, DECODE_BAR),
        ):
            verdict = "kept" if share >= bar else "MISSED"
            print(f"  {kernels[0]}: {num_tokens} tokens at {share:.0%} of the limit   bar {bar:.0%}   {verdict}")


if __name__ == "__main__":
    main()
