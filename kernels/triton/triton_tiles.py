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

import torch

from megatron_medha.kernels.triton.triton_attention import TileConfig

# For chunks. Each is tried when a rank is loaded (worker/startup/attention_trials.py); the first is used where nothing
# is. The last has no tensor maps.
PREFILL_TILES = (
    TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=5, has_tma=True, reads_runs=True, programs_per_sm=2),
    TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=5, has_tma=True, reads_runs=True),
    TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=5, reads_runs=True),
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

# Head dims over 256, which are latent vectors that all query heads share (MLA: 576); values are not read there, as they
# are the keys. Many query heads come in 32 rows, few in 16. With the 64 rows that wgmma wants, whatever the warps and
# stages, 700 to 1,500 bytes a thread are spilled: the sums of 64 rows of 576 are more than half of all registers.
WIDE_TILES = (
    TileConfig(block_m=32, block_n=32, num_warps=8, num_stages=5),
    TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=5, programs_per_sm=2),
)


# In e4m3, 32 rows spill 40 bytes a thread.
WIDE_E4M3_TILE = TileConfig(block_m=16, block_n=32, num_warps=8, num_stages=5)

# Chunks of head dims over 128, which spill up to 330 bytes a thread with the tiles above; and single tokens, of which
# one program fits at 256.
LARGE_TILES = (
    TileConfig(block_m=64, block_n=32, num_warps=8, num_stages=5, has_tma=True),
    TileConfig(block_m=16, block_n=64, num_warps=4, num_stages=5, has_tma=True),
)


def wide_tiles(head_dim: int, group: int, *, is_quantised: bool) -> tuple[TileConfig, TileConfig] | None:
    """Of chunks and of single tokens; None where a head dim takes the others."""
    if head_dim <= 128:
        return None
    if head_dim <= 256:
        return LARGE_TILES
    if is_quantised:
        return WIDE_E4M3_TILE, WIDE_E4M3_TILE
    many, few = WIDE_TILES
    return many, many if group > few.block_m else few


# Triton's interpreter on a CPU: small, so that short sequences have several tiles and parts.
INTERPRETED_TILE = TileConfig(block_m=32, block_n=16, num_warps=4, num_stages=1, reads_runs=True)


def tiles_to_try(device: torch.device) -> tuple[tuple[TileConfig, ...], tuple[TileConfig, ...]]:
    """For chunks and for single tokens, the first of each being that which is used unmeasured."""
    return (PREFILL_TILES, DECODE_TILES) if device.type == "cuda" else ((INTERPRETED_TILE,), (INTERPRETED_TILE,))


def tiles_called(names: str, device: torch.device) -> tuple[tuple[TileConfig, ...], tuple[TileConfig, ...]]:
    """The pair that is called "PREFILL,DECODE", as `TritonAttention.tiles` says. Raises ValueError for others."""
    tiles, parts = tiles_to_try(device), names.split(",")
    found = [[tile for tile in known if tile.name == name] for known, name in zip(tiles, parts, strict=False)]
    if len(parts) != 2 or not all(found):
        of_chunks, of_decodes = (", ".join(tile.name for tile in known) for known in tiles)
        raise ValueError(f"must be auto or PREFILL,DECODE; of chunks: {of_chunks}; of single tokens: {of_decodes}")
    return (found[0][0],), (found[1][0],)
