"""Block sizes of the attention kernels, one entry per architecture and head dimension, and the list of what
ships.

The forward and dQ kernels take query tiles of Q_TILE, the dK/dV kernel key tiles of K_TILE; a Launch says how
many rows of the other side one step of their loop takes. Chosen from what the compiler says without a GPU
(`python -m benchmarks.compile_check`): no spills, `wgmma` on Hopper, `tcgen05` on Blackwell, shared memory
within the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from phi4r_kernels import attention_kernels as kernels
from phi4r_kernels.aot import Variant
from phi4r_kernels.attention_plan import K_TILE, Q_TILE


@dataclass(frozen=True)
class Launch:
    """block: rows per step of the kernel's loop; num_warps and num_stages as Triton takes them; tile: rows a
    program owns (a part of K_TILE for dK/dV)."""

    block: int
    num_warps: int
    num_stages: int
    tile: int = 128


@dataclass(frozen=True)
class Tiles:
    """The launches of one architecture and head dimension: forward, fused backward, and the two kernels of
    the deterministic backward."""

    fwd: Launch
    fused: Launch
    dkdv: Launch
    dq: Launch


TILES: dict[int, dict[int, Tiles]] = {
    80: {
        64: Tiles(Launch(32, 8, 3), Launch(32, 8, 2), Launch(16, 8, 2), Launch(64, 8, 2)),
        128: Tiles(Launch(32, 8, 2), Launch(16, 8, 2, 64), Launch(32, 8, 2, 64), Launch(32, 8, 2)),
    },
    90: {
        64: Tiles(Launch(128, 8, 2), Launch(64, 8, 2), Launch(64, 8, 2), Launch(128, 8, 2)),
        128: Tiles(Launch(128, 8, 2), Launch(64, 8, 2, 64), Launch(32, 8, 2), Launch(64, 8, 2)),
    },
    100: {
        64: Tiles(Launch(128, 8, 2), Launch(64, 8, 2, 64), Launch(64, 8, 2), Launch(128, 8, 2)),
        128: Tiles(Launch(128, 8, 2), Launch(64, 8, 2, 64), Launch(64, 8, 2, 64), Launch(64, 8, 2)),
    },
}
"""Compute capability (tens) -> head dimension -> launches. Head dimensions below 64 use the entry of 64."""

HEAD_DIMS = (16, 32, 64, 128)
"""Head dimensions the kernels take; 64 and 128 are compiled and tuned, 16 and 32 let small models run."""

ROWS = 64
"""Rows of one program of the two elementwise kernels."""


def arch_of(device: torch.device) -> int:
    """The entry of TILES for a device: the newest not newer than it. The interpreter runs Hopper's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in TILES if arch <= 10 * major + minor), default=min(TILES))


def tiles_for(device: torch.device, head_dim: int) -> Tiles:
    """The launches for a device and head dimension."""
    return TILES[arch_of(device)][max(head_dim, 64)]


_STRIDES = ("q_head", "k_head", "v_head", "do_head", "do_row")
_INTS = ("num_tiles", "section", "num_queries", "num_heads", "num_kv_heads", *_STRIDES)
_FP32 = ("lse_ptr", "delta_ptr", "sum_ptr")


def _variant(
    name: str, arch: int, dtype: str, dim: int, launch: Launch, query_block: int, key_block: int, group: int
) -> Variant:
    """The kernel `name` with blocks of query_block and key_block rows."""
    both_ways = name in ("fused", "dkdv")
    kernel = getattr(kernels, f"_attention_{'bwd' if both_ways else name}_kernel")
    queries, keys = f"tensordesc<{dtype}[{query_block}, {dim}]>", f"tensordesc<{dtype}[{key_block}, {dim}]>"
    types = dict.fromkeys(_INTS, "i32") | dict.fromkeys(_FP32, "*fp32")
    types |= {"scale": "fp32", "qk_scale": "fp32", "tiles_ptr": "*i32"}
    types |= {"q_desc": queries, "do_desc": queries, "k_desc": keys, "v_desc": keys}
    types |= {"dq_desc": f"tensordesc<fp32[{query_block}, {dim}]>"}
    sizes = {"GROUP": group, "H": dim, "BM": query_block, "BN": key_block, "FUSED": name == "fused"}
    sizes["PARTS"] = K_TILE // max(key_block, 1)
    constexprs = {argument: sizes[argument] for argument in kernel.arg_names if argument in sizes}
    if name == "dkdv":
        constexprs["dq_desc"] = None
    signature = {a: types.get(a, f"*{dtype}") for a in kernel.arg_names if a not in constexprs}
    aligned = tuple(a for a in signature if a.endswith("_ptr") or a in _STRIDES)
    full_name = f"attention {name} sm_{arch} H{dim} {dtype}"
    return Variant(
        full_name, arch, kernel, signature, constexprs, aligned, launch.num_warps, launch.num_stages
    )


def variants(group: int = 4) -> Iterator[Variant]:
    """Every kernel in every configuration that ships, for GQA groups of `group` (Phi-4: 4), bf16 and fp16."""
    elementwise = Launch(ROWS, 4, 1)
    for arch, of_arch in TILES.items():
        for dim, tiles in of_arch.items():
            for dtype in ("bf16", "fp16"):
                where = arch, dtype, dim
                yield _variant("fwd", *where, tiles.fwd, Q_TILE, tiles.fwd.block, group)
                yield _variant("fused", *where, tiles.fused, tiles.fused.block, tiles.fused.tile, group)
                yield _variant("dkdv", *where, tiles.dkdv, tiles.dkdv.block, tiles.dkdv.tile, group)
                yield _variant("dq", *where, tiles.dq, Q_TILE, tiles.dq.block, group)
                yield _variant("delta", *where, elementwise, ROWS, 0, group)
                yield _variant("dq_cast", *where, elementwise, ROWS, 0, group)
