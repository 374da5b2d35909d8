"""What a decode costs with routed experts, beside dense models that read as many weights: whole steps in one call.

    python -m experiments.cpu_kernels.experts
    python -m experiments.cpu_kernels.experts --hidden 2048 --experts 128 --ffn 768 --layers 2 --int8

Random bf16 weights, random tokens at a short context. For each batch a dense model whose MLP is as wide as all experts
that the batch is expected to hit: of 64 experts 8 by one token, 42 by 8 tokens. All models take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from megatron_medha.kernels.attention.backend import QueryRange
from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.linear.native_decoder import (
    DecoderSizes,
    EmbeddingWeights,
    LayerWeights,
    MlpWeights,
    NativeDecoder,
    OutputWeights,
)
from megatron_medha.kernels.linear.native_experts import NativeExperts, RoutedExpert, RouterOptions
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.native_pointwise import NativeActivation, NativeNorm
from megatron_medha.kernels.native_build import native_target
from megatron_medha.model.narrow_weights import int8_linear

BAR = 1.3  # of the dense model's time
BATCHES = (1, 8, 32)
KV_HEADS, GROUP, HEAD_DIM, VOCABULARY = 4, 2, 64, 512
CONTEXT, BLOCK_SIZE = 128, 16


class Model:
    """A decoder with random weights, dense or with experts, and KV of its own."""

    def __init__(self, args: argparse.Namespace, *, dense_ffn: int | None) -> None:
        self._hidden, self._is_int8 = args.hidden, args.int8
        self._backend = NativeAttention()
        mlp = (lambda: {"mlp": self._mlp(dense_ffn)}) if dense_ffn else (lambda: self._experts(args))
        layers = [self._layer(mlp()) for _ in range(args.layers)]
        sizes = DecoderSizes(
            hidden_size=args.hidden, num_kv_heads=KV_HEADS, queries_per_kv_head=GROUP, head_dim=HEAD_DIM,
            num_rotated=HEAD_DIM, scale=HEAD_DIM**-0.5,
        )  # fmt: skip
        embedding = EmbeddingWeights(torch.randn(VOCABULARY, args.hidden).bfloat16())
        output = OutputWeights(self._norm(), self._linear(VOCABULARY, args.hidden))
        self._decoder = NativeDecoder(sizes, layers, embedding, output)
        blocks = max(BATCHES) * CONTEXT // BLOCK_SIZE
        self._kv = [
            self._backend.allocate(blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.bfloat16) for _ in layers
        ]
        for layer in self._kv:
            for pool in layer:
                pool.normal_()

    def decode(self, batch: int) -> Callable[[], None]:
        """A step of so many decodes of random tokens, ready to run."""
        ranges = []
        for row in range(batch):
            table = SlotTable(BLOCK_SIZE)
            table.append([(row * CONTEXT // BLOCK_SIZE, CONTEXT // BLOCK_SIZE)])
            ranges.append(QueryRange(row, 1, CONTEXT - 1, table))
        plan = self._backend.plan(ranges)
        hidden_TC = torch.empty(batch, self._hidden, dtype=torch.bfloat16)
        angles = torch.rand(batch, HEAD_DIM), torch.rand(batch, HEAD_DIM)
        token_ids_T, rows = torch.randint(0, VOCABULARY, (batch,)), torch.arange(batch)

        def run() -> None:
            self._decoder.run(
                hidden_TC, plan, self._kv, angles, token_ids_T=token_ids_T, logit_rows_R=rows
            )

        return run

    def _norm(self) -> NativeNorm:
        return NativeNorm(torch.ones(self._hidden), 1e-5)

    def _linear(self, num_outputs: int, num_inputs: int) -> NativeLinear:
        weight_OI = (torch.randn(num_outputs, num_inputs) * num_inputs**-0.5).bfloat16()
        return int8_linear(weight_OI, None) if self._is_int8 else NativeLinear(weight_OI, None)

    def _mlp(self, ffn_size: int) -> MlpWeights:
        up, down = self._linear(2 * ffn_size, self._hidden), self._linear(self._hidden, ffn_size)
        return MlpWeights(up, down, NativeActivation())

    def _experts(self, args: argparse.Namespace) -> dict[str, None | NativeExperts]:
        parts = [
            RoutedExpert(self._linear(2 * args.ffn, self._hidden), self._linear(self._hidden, args.ffn))
            for _ in range(args.experts)
        ]
        router = NativeLinear(torch.randn(args.experts, self._hidden).bfloat16(), None)
        options = RouterOptions(num_chosen=args.chosen)
        return {"mlp": None, "experts": NativeExperts(router, options, parts, NativeActivation())}

    def _layer(self, mlp: dict[str, MlpWeights | NativeExperts | None]) -> LayerWeights:
        width = KV_HEADS * GROUP * HEAD_DIM
        qkv = self._linear(width + 2 * KV_HEADS * HEAD_DIM, self._hidden)
        proj = self._linear(self._hidden, width)
        return LayerWeights(
            attention_norm=self._norm(), mlp_norm=self._norm(), q_norm=None, k_norm=None, qkv=qkv, proj=proj, **mlp
        )


@torch.inference_mode()
def main() -> None:
    """Time all models in rounds, print the table and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=384, help="width of an expert")
    parser.add_argument("--int8", action="store_true", help="weights of the linear layers in int8")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice, one a core")
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hit = {batch: args.experts * (1 - (1 - args.chosen / args.experts) ** batch) for batch in BATCHES}
    models = {"experts": Model(args, dense_ffn=None)}
    models |= {f"dense {batch}": Model(args, dense_ffn=round(hit[batch] * args.ffn)) for batch in BATCHES}
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in tqdm(range(args.rounds), leave=False):
        for batch in BATCHES:
            for name in ("experts", f"dense {batch}"):
                run = models[name].decode(batch)
                started_s = time.perf_counter()
                run()
                seconds.setdefault((name, batch), []).append(time.perf_counter() - started_s)
    print(
        f"{native_target()}, {torch.get_num_threads()} threads, {args.layers} layers of {args.hidden}, "
        f"{args.chosen} of {args.experts} experts of {args.ffn}, {'int8' if args.int8 else 'bf16'} weights"
    )
    for batch in BATCHES:
        routed_s, dense_s = (statistics.median(seconds[name, batch]) for name in ("experts", f"dense {batch}"))
        ratio = routed_s / dense_s
        print(
            f"  batch {batch:2}: {routed_s * 1e3:7.3f} ms, a dense model of the {hit[batch]:.0f} experts hit "
            f"{dense_s * 1e3:7.3f} ms: {ratio:.2f}   bar {BAR}   {'kept' if ratio <= BAR else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
