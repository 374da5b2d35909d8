"""The tile sizes the attention kernel is compiled with: those to be measured, and those in use.

None of this has run on a GPU yet. What is known is from compiling for sm_90, and tests/kernels/test_triton_compiled.py
asserts on it: tiles of 64 and 128 rows use wgmma and none of these spills; 128 x 128 does (88 bytes per thread). The
load of the block table takes a level of the pipeline, so that with num_stages 3 and 4 the next keys are asked for only
when a block's scores are done, and nothing is in flight while it is computed; with 5 one block is. The compiler waits
for each score product where it stands: while one program is in its softmax only another one on the same multiprocessor
keeps the tensor cores busy, which is why 64 x 64 at two programs each stands before 128 x 64 at one. The latter reads
half as much from L2 for each product.
"""

from __future__ import annotations

from megatron_medha.kernels.triton.triton_attention import TileConfig

# For chunks: the first is used until a measurement says otherwise. The last has no tensor maps.
PREFILL_TILES = (
    TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=5, has_tma=True, programs_per_sm=2),
    TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=5, has_tma=True),
    TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=3, has_tma=True, programs_per_sm=2),
    TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=3),
)

# For single tokens: rows are the query group, filled up to what the tensor cores take.
DECODE_TILES = (
    TileConfig(
        block_m=16, block_n=64, num_warps=4, num_stages=5, has_tma=True, programs_per_sm=2, max_registers=240
    ),
    TileConfig(
        block_m=16, block_n=64, num_warps=4, num_stages=7, has_tma=True, programs_per_sm=2, max_registers=240
    ),
    TileConfig(block_m=16, block_n=128, num_warps=4, num_stages=5, has_tma=True),
    TileConfig(block_m=16, block_n=64, num_warps=4, num_stages=5, programs_per_sm=2),
)

# Triton's interpreter on a CPU: small, so that short sequences have several tiles and parts.
INTERPRETED_TILE = TileConfig(block_m=32, block_n=16, num_warps=4, num_stages=1)
