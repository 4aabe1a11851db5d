"""Check the arguments of rope_cache, choose a tile, launch."""

from typing import Any

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import FEW_ROWS, Launch, compiled_in, from_table, grid, on_its_device

NAME = "rope_cache"


def validate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Require the shapes of reference.py, one float dtype (cos and sin float32), one device, d a power of two.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted. Positions and slots out of range are seen on the CPU
            only: looking at them would stop a device.
    """
    floats = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    others = {"cos": cos, "sin": sin, "positions": positions, "slots": slots}
    check.one_device(NAME, {**floats, **others})
    check.dtype_of(NAME, floats)
    check.dtype_of(NAME, {"cos": cos, "sin": sin}, (torch.float32,))
    check.not_empty(NAME, {**floats, **others})
    _shapes(q, k, v, cos, sin, k_cache, v_cache)
    batch, length = q.shape[:2]
    check.integers(NAME, {"positions": positions, "slots": slots}, batch * length)
    check.contiguous(NAME, {"cos": cos, "sin": sin})
    check.within(NAME, "positions", positions, 0, cos.shape[0])
    check.within(NAME, "slots", slots, -(1 << 31), k_cache.shape[2])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check.as_tokens(NAME, name, tensor)
    check.cache_layout(NAME, k_cache, v_cache)


def _shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or k_cache.dim() != 4 or cos.dim() != 2:
        raise check.fail(
            NAME,
            f"q {list(q.shape)}, k {list(k.shape)}, k_cache {list(k_cache.shape)}, cos {list(cos.shape)}; "
            "wanted [B, S, H, d], [B, S, K, d], [B, K, T, d], [P, d / 2]",
        )
    batch, length, _, head_dim = q.shape
    kv_heads, capacity = k.shape[2], k_cache.shape[2]
    check.power_of_two(NAME, "d", head_dim, 2)
    check.shape_of(NAME, "k", k, (batch, length, kv_heads, head_dim), "B, S, K, d")
    check.shape_of(NAME, "v", v, k.shape, "B, S, K, d")
    check.shape_of(NAME, "cos", cos, (cos.shape[0], head_dim // 2), "P, d / 2")
    check.shape_of(NAME, "sin", sin, cos.shape, "P, d / 2")
    check.shape_of(NAME, "k_cache", k_cache, (batch, kv_heads, capacity, head_dim), "B, K, T, d")
    check.shape_of(NAME, "v_cache", v_cache, k_cache.shape, "B, K, T, d")


@on_its_device
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tile: Launch | None = None,
) -> torch.Tensor:
    """q rotated, and the caches written, as in reference.py, by the kernel; tile replaces the one chosen for the device.

    Raises:
        KernelError: Arguments that the kernel does not take.
    """
    validate(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
    check.launchable(NAME, q)
    rows = [check.as_tokens(NAME, name, tensor) for name, tensor in (("q", q), ("k", k), ("v", v))]
    (batch, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
    tile = tile or choose(q, batch * length, head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _placed(q, kv_heads, tile)(
        *rows,
        cos,
        sin,
        positions,
        slots,
        out,
        k_cache,
        v_cache,
        batch * length,
        length,
        *compiled_in(q, heads, kv_heads, *(row.stride(0) for row in rows)),
        *k_cache.stride()[:3],
        **tile.arguments(q),
    )
    return out


def _placed(q: torch.Tensor, kv_heads: int, tile: Launch) -> Any:
    """The kernel that the tile is for, with its programs: rows of heads on a GPU, heads of a token on an NPU."""
    from qcompile.kernels.rope_cache.kernel import rope_cache_kernel
    from qcompile.kernels.rope_cache.rows import rope_cache_rows_kernel

    num_tokens, heads = q.shape[0] * q.shape[1], q.shape[2]
    if "BLOCK_ROWS" in tile.constants:
        block = tile.constants["BLOCK_ROWS"]
        return rope_cache_rows_kernel[(-(-num_tokens * heads // block) - (-num_tokens * kv_heads // block),)]
    block = tile.constants["BLOCK_HEADS"]
    return rope_cache_kernel[grid(q, num_tokens * (-(-heads // block) - (-kv_heads // block)))]


def choose(q: torch.Tensor, num_tokens: int, head_dim: int) -> Launch:
    """The tile for the device of q."""
    if q.device.type == "npu":
        return from_table(NAME, "rope_cache_kernel", q.dtype, {"HALF": head_dim // 2})
    half, pairs = head_dim // 2, 512 if num_tokens <= FEW_ROWS else 1024
    return Launch({"BLOCK_ROWS": max(1, pairs // half), "HALF": half}, {"num_warps": 4})
