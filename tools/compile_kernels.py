"""Compiles every Triton kernel, no GPU needed, and prints what each takes.

    python tools/compile_kernels.py                   # the default tiles and every kernel, for sm_90 (Hopper)
    python tools/compile_kernels.py --all             # all tiles of kernels/triton/triton_tiles.py, minutes
    python tools/compile_kernels.py --capability 100  # for sm_100 (Blackwell)
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_medha.kernels.triton.triton_attention import TileConfig, attention_kernel, split_dim
from megatron_medha.kernels.triton.triton_merge import merge_kernel
from megatron_medha.kernels.triton.triton_nucleus import nucleus_cut_kernel
from megatron_medha.kernels.triton.triton_tiles import (
    DECODE_TILES,
    LARGE_TILES,
    PREFILL_TILES,
    WIDE_E4M3_TILE,
    WIDE_TILES,
)
from megatron_medha.kernels.triton.triton_widen import widen_kernel
from megatron_medha.kernels.triton.triton_write import rotate_and_write_kernel, write_quantised_kernel

_GROUP, _HEAD_DIM, _PAGE = 4, 128, 128  # Llama-3 8B, blocks as the triton backend makes them
_POINTERS = {
    **dict.fromkeys(("lse", "part_out", "part_lse", "sinks", "cos", "signed_sin", "k_scale", "v_scale"), "*fp32"),
    **dict.fromkeys(("block_tables", "items", "merges", "pieces"), "*i32"),
    "slots": "*i64",
    **dict.fromkeys(("logits", "cuts"), "*fp32"),
    "masses": "*fp64",
}


def main() -> int:
    """Compile, print, and fail with the compiler's error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every tile, not only those in use")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10 (default 90)")
    arguments = parser.parse_args()
    reports = []
    for report in reports_of(arguments.all, arguments.capability):
        reports.append(report)
        if not arguments.json:
            print(", ".join(f"{key}={value}" for key, value in report.items()), flush=True)
    if arguments.json:
        print(json.dumps(reports))
    return 0


def reports_of(compiles_all: bool, capability: int) -> Iterator[dict[str, Any]]:
    """What each kernel takes."""
    def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int) -> dict[str, Any]:
        return _compile(kernel, types, constants, num_warps, capability)

    for tiles in (PREFILL_TILES, DECODE_TILES):
        for tile in tiles if compiles_all else tiles[:1]:
            yield _attention(tile, "bf16", capability)
            yield _attention(tile, "fp8e4nv", capability)
        for kv_type in ("bf16", "fp8e4nv") if compiles_all else ("bf16",):
            yield _attention(tiles[0], kv_type, capability, IS_WINDOWED=True, HAS_SINKS=True)  # gpt-oss
            yield _attention(tiles[0], kv_type, capability, IS_WINDOWED=True, IS_CAPPED=True)  # gemma 2
    for kv_type in ("bf16", "fp8e4nv") if compiles_all else ("bf16",):
        yield _attention(LARGE_TILES[0], kv_type, capability, head_dim=256, IS_WINDOWED=True, IS_CAPPED=True)
        yield _attention(LARGE_TILES[1], kv_type, capability, head_dim=256)
    for tile, group in zip(WIDE_TILES, (32, 16), strict=True):
        yield _attention(tile, "bf16", capability, head_dim=576, group=group, ARE_VALUES_KEYS=True)
    if compiles_all:
        yield _attention(WIDE_E4M3_TILE, "fp8e4nv", capability, head_dim=576, group=16, ARE_VALUES_KEYS=True)
    constants = {"GROUP": _GROUP, "DIM": _HEAD_DIM, "WIDTH": _HEAD_DIM, "BLOCK_M": 64, "PARTS": 32, "HAS_LSE": True}
    yield {"kernel": "merge", "block_m": 0, "has_tma": False, **compiled(merge_kernel, {"out": "*bf16"}, constants, 4)}
    data = dict.fromkeys(("q", "k", "v", "q_out", "k_pool", "v_pool"), "*bf16")
    constants = {
        "GROUP": _GROUP, "HEAD_DIM": _HEAD_DIM, "WIDTH": _HEAD_DIM, "PAGE": _PAGE, "TOKENS": 8, "ROWS": 32,
        "ROTATES": True, "WRITES": True, "WRITES_VALUES": True,
    }  # fmt: skip
    yield {
        "kernel": "rotate_and_write", "block_m": 0, "has_tma": False,
        **compiled(rotate_and_write_kernel, data, constants, 4),
    }  # fmt: skip
    data = {"k": "*bf16", "v": "*bf16", "k_pool": "*fp8e4nv", "v_pool": "*fp8e4nv"}
    constants = {
        "HEAD_DIM": _HEAD_DIM, "WIDTH": _HEAD_DIM, "PAGE": _PAGE, "ROTATES": True, "WRITES_VALUES": True
    }  # fmt: skip
    yield {
        "kernel": "write_quantised", "block_m": 0, "has_tma": False,
        **compiled(write_quantised_kernel, data, constants, 8),
    }  # fmt: skip
    data = {"k_pool": "*fp8e4nv", "v_pool": "*fp8e4nv", "table": "*i32", "k_out": "*bf16", "v_out": "*bf16"}
    constants = {"HEAD_DIM": _HEAD_DIM, "PAGE": _PAGE}
    yield {"kernel": "widen", "block_m": 0, "has_tma": False, **compiled(widen_kernel, data, constants, 8)}
    yield {
        "kernel": "nucleus_cut", "block_m": 0, "has_tma": False, **compiled(nucleus_cut_kernel, {}, {"BLOCK": 4096}, 8)
    }  # fmt: skip


def _attention(
    tile: TileConfig, kv_type: str, capability: int, head_dim: int = _HEAD_DIM, group: int = _GROUP, **variant: bool
) -> dict[str, Any]:
    """variant: constants of the kernel that are not False."""
    block_n, is_quantised, dims = min(tile.block_n, _PAGE), kv_type == "fp8e4nv", split_dim(head_dim)

    def pool(width: int) -> str:
        return f"tensordesc<{kv_type}[{block_n},{width}]>" if tile.has_tma else f"*{kv_type}"

    names = ("IS_WINDOWED", "IS_CAPPED", "ARE_VALUES_KEYS", "HAS_SINKS", "HAS_LSE")
    constants = {
        "GROUP": group, "DIM": head_dim, "HEAD_DIM": dims.main, "TAIL": dims.tail, "PAGE": _PAGE,
        "BLOCK_M": tile.block_m, "BLOCK_N": block_n, "NUM_STAGES": tile.num_stages, "SPLITS": 1,
        "IS_QUANTISED": is_quantised, "HAS_TMA": tile.has_tma, **dict.fromkeys(names, False), **variant,
        "HAS_RUNS": tile.reads_runs and not variant.get("IS_WINDOWED", False),
        "lse": None, **({} if is_quantised else {"k_scale": None, "v_scale": None}),
        **({} if variant.get("HAS_SINKS") else {"sinks": None}),
        **({} if dims.tail else {"keys_tail": None, "values_tail": None}),
    }  # fmt: skip
    types = {
        "q": "*bf16", "out": "*bf16", "keys": pool(dims.main), "values": pool(dims.main),
        "keys_tail": pool(dims.tail), "values_tail": pool(dims.tail), "scale_log2": "fp32", "cap_log2": "fp32",
    }  # fmt: skip
    return {
        "kernel": "attention", "kv": kv_type, "head_dim": head_dim, "variant": "+".join(sorted(variant)) or "plain",
        "block_m": tile.block_m, "block_n": block_n, "num_warps": tile.num_warps,
        "num_stages": tile.num_stages, "has_tma": tile.has_tma, "programs_per_sm": tile.programs_per_sm,
        **_compile(attention_kernel, types, constants, tile.num_warps, capability, tile.max_registers),
    }  # fmt: skip


def _compile(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    capability: int,
    max_registers: int | None = None,
) -> dict[str, Any]:
    known = {**_POINTERS, **types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, "i32") for name in kernel.arg_names}
    # Pointers are aligned as torch aligns them; strides and counts are left unknown, as the worst case.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    options = {"num_warps": num_warps, "maxnreg": max_registers}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [str(tools / "cuobjdump"), "-sass", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found.group(1)),
        "stack_bytes": int(found.group(2)),
        "shared_bytes": compiled.metadata.shared,
        "num_wgmma": ptx.count("wgmma.mma_async"),
        "num_tcgen05": ptx.count("tcgen05.mma"),
        "num_mma": ptx.count("mma.sync"),
        "num_tma_loads": ptx.count("cp.async.bulk.tensor"),
        "num_slow_conversions": sass.count("F2F."),
        "slow_conversions_in_loops": sum("F2F." in line for line in _lines_in_loops(sass)),  # 16 a clock, not 128
        "spills_in_loops": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in _lines_in_loops(sass)),
        "num_key_buffers": _num_key_buffers(compiled.asm["ttgir"], constants),
        "programs_that_fit": _programs_that_fit(int(found.group(1)), compiled.metadata.shared, num_warps),
        "num_async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def _lines_in_loops(sass: str) -> list[str]:
    """Instructions between the target of a branch that leads back, and that branch."""
    lines = [(int(found[1], 16), found[2]) for found in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(\S.*);", sass)]
    loops = [
        (int(found[1], 16), address)
        for address, line in lines
        if (found := re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", line)) and int(found[1], 16) < address
    ]
    return [line for address, line in lines if any(begin <= address <= end for begin, end in loops)]


def _num_key_buffers(ttgir: str, constants: dict[str, Any]) -> int:
    """Blocks of keys that shared memory holds: with two, one is on its way while the other is computed."""
    if "BLOCK_N" not in constants:
        return 0
    found = re.findall(rf"memdesc<(\d+)x{constants['BLOCK_N']}x{constants['HEAD_DIM']}x", ttgir)
    return max(map(int, found), default=0)


def _programs_that_fit(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs at once on a Hopper multiprocessor: 65,536 registers, 228 KiB of which each program costs one more."""
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * num_warps)
    return min(by_registers, 228 * 1024 // (shared_bytes + 1024), 64 // num_warps)


if __name__ == "__main__":
    sys.exit(main())
