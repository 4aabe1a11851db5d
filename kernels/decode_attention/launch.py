"""Check the arguments of decode_attention, choose tiles and splits, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import Launch, from_table, gpu_processors, grid, on_its_device, power_of_two

NAME = "decode_attention"
_MAX_SPLITS = 32
_GPU_BLOCK_T = 64
_NPU_CORES = 20
_SMALL_HEAD = 64  # two programs of this fit a multiprocessor without sharing its bandwidth
_MIN_HEAD_DIM = 16  # the smallest inner size of tl.dot


def validate(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
) -> None:
    """Require q [B, H, d], caches [B, K, T, d] of one float dtype, H a multiple of K, int32 starts and lengths [B].

    Raises:
        KernelError: Naming the argument, what it is and what is wanted. Lengths beyond the cache are seen on the CPU only.
    """
    floats = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    check.one_device(NAME, {**floats, "starts": starts, "lengths": lengths})
    check.dtype_of(NAME, floats)
    check.not_empty(NAME, floats)
    if q.dim() != 3 or k_cache.dim() != 4:
        raise check.fail(
            NAME, f"q is {list(q.shape)}, k_cache {list(k_cache.shape)}; wanted [B, H, d] and [B, K, T, d]"
        )
    batch, heads, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    check.power_of_two(NAME, "d", head_dim, _MIN_HEAD_DIM)
    check.shape_of(NAME, "k_cache", k_cache, (batch, kv_heads, capacity, head_dim), "B, K, T, d")
    check.shape_of(NAME, "v_cache", v_cache, k_cache.shape, "B, K, T, d")
    if heads % kv_heads:
        raise check.fail(NAME, f"{heads} query heads over {kv_heads} key heads; H must be a multiple of K")
    check.as_tokens(NAME, "q", q)
    check.cache_layout(NAME, k_cache, v_cache)
    check.integers(NAME, {"starts": starts, "lengths": lengths}, batch)
    check.within(NAME, "starts", starts, 0, capacity + 1)
    check.within(NAME, "lengths", lengths, 0, capacity + 1)


@on_its_device
def launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    tile: Launch | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Out as in reference.py, computed by a kernel for every split of the KV length and, if there are several, one that merges.

    Args:
        q: [B, H, d] float16, bfloat16 or float32.
        k_cache: [B, K, T, d]; any strides as long as a head's elements lie side by side.
        v_cache: Shape, dtype and strides of k_cache.
        starts: int32 [B].
        lengths: int32 [B].
        scale: Factor of the scores.
        tile: Instead of the one chosen for the device.
        splits: Parts of the KV length; chosen from the batch and the cache's capacity when None, so that a captured graph
            stays valid while lengths grow.

    Raises:
        KernelError: Arguments that the kernel does not take.
    """
    validate(q, k_cache, v_cache, starts, lengths)
    check.launchable(NAME, q)
    from qcompile.kernels.decode_attention.kernel import decode_attention_kernel

    (batch, heads, head_dim), kv_heads = q.shape, k_cache.shape[1]
    group = heads // kv_heads
    tile = tile or choose(q, group, head_dim, batch * kv_heads)
    splits = splits or count_splits(q, batch * kv_heads, k_cache.shape[2], tile.constants["BLOCK_T"])
    is_split = splits > 1 or q.device.type == "npu"  # its table has tiles with partial sums only
    dtype = torch.float32 if is_split else q.dtype
    partial = torch.empty((batch, heads, splits, head_dim), dtype=dtype, device=q.device)
    log_sums = torch.empty((batch, heads, splits) if is_split else 1, dtype=torch.float32, device=q.device)
    decode_attention_kernel[grid(q, batch * kv_heads * splits, "cube")](
        q,
        k_cache,
        v_cache,
        starts,
        lengths,
        partial,
        log_sums,
        batch,
        kv_heads,
        group,
        splits,
        check.as_tokens(NAME, "q", q).stride(0),
        *k_cache.stride()[:3],
        scale=scale,
        **tile.replace(IS_SPLIT=int(is_split)).arguments(q),
    )
    return merge(q, partial, log_sums) if is_split else partial.view(q.shape)


def merge(q: torch.Tensor, partial: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
    """The splits [B, H, splits, d] weighted by their sums of weights, as a tensor like q."""
    from qcompile.kernels.decode_attention.kernel import decode_attention_merge_kernel

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (batch, heads, splits), head_dim = log_sums.shape, q.shape[-1]
    tile = choose_merge(q, splits, head_dim)
    decode_attention_merge_kernel[grid(q, batch * heads)](
        partial, log_sums, out, batch * heads, splits, **tile.arguments(q)
    )
    return out


def choose(q: torch.Tensor, group: int, head_dim: int, rows: int) -> Launch:
    """The tile of the first kernel for the device of q; rows are sequences times key heads."""
    if q.device.type == "npu":
        return from_table(NAME, "decode_attention_kernel", q.dtype, {"D": head_dim}, BLOCK_G=group)
    block_t = _GPU_BLOCK_T if q.element_size() * head_dim <= 256 else _GPU_BLOCK_T // 2
    if rows >= gpu_processors(q) and head_dim > _SMALL_HEAD:  # more programs at a time, where there are more
        block_t = _GPU_BLOCK_T // 2
    return Launch(
        {"BLOCK_G": max(16, power_of_two(group)), "BLOCK_T": block_t, "D": head_dim}, {"num_warps": 4, "num_stages": 3}
    )


def choose_merge(q: torch.Tensor, splits: int, head_dim: int) -> Launch:
    """The tile of the second kernel for the device of q."""
    if q.device.type == "npu":
        return from_table(NAME, "decode_attention_merge_kernel", q.dtype, {"D": head_dim}, BLOCK_S=splits)
    return Launch({"BLOCK_S": power_of_two(splits), "D": head_dim}, {"num_warps": 1 if splits * head_dim <= 512 else 4})


def count_splits(q: torch.Tensor, rows: int, capacity: int, block_t: int) -> int:
    """As many parts as give every core work at once and none a second turn, but no part shorter than a block."""
    slots = 2 * _NPU_CORES if q.device.type == "npu" else gpu_processors(q) * (2 if q.shape[-1] <= _SMALL_HEAD else 1)
    return max(1, min(_MAX_SPLITS, slots // rows, -(-capacity // block_t)))
