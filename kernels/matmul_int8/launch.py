"""Check the arguments of matmul_int8, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import Launch, from_table, gpu_processors, grid, on_its_device, slices_of_k

NAME = "matmul_int8"
_GROUP_M = 8
_FEW_ROWS = 16
_FEW_ROWS_TILE = (16, 64, 256, 4, 4)  # BLOCK_M, BLOCK_N, BLOCK_K, warps, num_stages
_FEW_ROWS_SLICE = (16, 32, 256, 4, 4)  # the same for a slice of K
_FEW_ROWS_PROGRAMS = 4  # a multiprocessor, of slices
_FEW_ROWS_SLICES = 4  # at most
_SPLIT_ROWS = 512  # as in matmul_bias_residual
_SHORT_IN = 1024
_SUM_COLS = 512
_SPLIT_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS")
_MAX_IN = (2**31 - 1) // 128**2  # 131071: a longer sum of products of -128 could leave int32


def validate(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Require x int8 [..., K], weight int8 [N, K], float32 scales [...] and [N], bias [N] of out_dtype, on one device.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    tensors = {"x": x, "weight": weight, "x_scale": x_scale, "weight_scale": weight_scale}
    tensors |= {} if bias is None else {"bias": bias}
    check.one_device(NAME, tensors)
    check.dtype_of(NAME, {"x": x, "weight": weight}, (torch.int8,))
    check.dtype_of(NAME, {"x_scale": x_scale, "weight_scale": weight_scale}, (torch.float32,))
    check.not_empty(NAME, {"x": x, "weight": weight})
    if out_dtype not in check.FLOATS:
        raise check.fail(NAME, f"out_dtype is {out_dtype}; this operator gives float16, bfloat16, float32")
    check.contiguous(NAME, tensors)
    check.as_rows(NAME, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise check.fail(NAME, f"weight is {list(weight.shape)}, wanted [N, K] with K = {x.shape[-1]}")
    if x.shape[-1] > _MAX_IN:
        raise check.fail(NAME, f"K is {x.shape[-1]}; sums longer than {_MAX_IN} could leave int32")
    check.shape_of(NAME, "x_scale", x_scale, x.shape[:-1], "...")
    check.shape_of(NAME, "weight_scale", weight_scale, weight.shape[:1], "N")
    if bias is not None:
        check.shape_of(NAME, "bias", bias, weight.shape[:1], "N")
        check.dtype_of(NAME, {"bias": bias}, (out_dtype,))


@on_its_device
def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    tile: Launch | None = None,
) -> torch.Tensor:
    """Out as in reference.py, computed by the kernel; tile replaces the one chosen for the device, with SPLITS it cuts K.

    Raises:
        KernelError: Arguments that the kernel does not take.
    """
    validate(x, weight, x_scale, weight_scale, bias, out_dtype)
    check.launchable(NAME, x)
    from qcompile.kernels.matmul_int8.kernel import matmul_int8_kernel

    rows = check.as_rows(NAME, "x", x)
    num_rows, num_out = rows.shape[0], weight.shape[0]
    tile = (tile or choose(x, num_rows, num_out, out_dtype)).replace(HAS_BIAS=int(bias is not None))
    out = torch.empty((*x.shape[:-1], num_out), dtype=out_dtype, device=x.device)
    if "SPLITS" in tile.constants:
        _split(rows, weight, x_scale, weight_scale, bias, out, tile)
        return out
    tile = tile.replace(GROUP_M=_GROUP_M)
    num_tiles = -(-num_rows // tile.constants["BLOCK_M"]) * -(-num_out // tile.constants["BLOCK_N"])
    matmul_int8_kernel[grid(x, num_tiles, "cube")](
        rows,
        weight,
        x_scale,
        weight_scale,
        out if bias is None else bias,
        out,
        num_rows,
        num_out,
        rows.shape[1],
        **tile.arguments(x),
    )
    return out


def _split(
    rows: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch the product of every slice of K, then their sum into out."""
    from qcompile.kernels.matmul_int8.split import matmul_int8_split_kernel, matmul_int8_sum_kernel

    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    constants = {name: tile.constants[name] for name in _SPLIT_CONSTANTS}
    splits = constants["SPLITS"]
    partial = torch.empty((splits, num_rows, num_out), dtype=torch.int32, device=rows.device)
    blocks = (-(-num_out // constants["BLOCK_N"]), -(-num_rows // constants["BLOCK_M"]), splits)
    matmul_int8_split_kernel[blocks](
        rows, weight, partial, num_rows, num_out, num_in, **Launch(constants, tile.gpu_options).arguments(rows)
    )
    total = Launch({"BLOCK_COLS": _SUM_COLS, "SPLITS": splits, "HAS_BIAS": int(bias is not None)}, {"num_warps": 4})
    matmul_int8_sum_kernel[num_rows, -(-num_out // _SUM_COLS)](
        partial,
        x_scale,
        weight_scale,
        out if bias is None else bias,
        out,
        num_rows,
        num_out,
        **total.arguments(rows),
    )


def choose(x: torch.Tensor, num_rows: int, num_out: int, out_dtype: torch.dtype) -> Launch:
    """The tile for the device of x: the largest that still gives every core work."""
    if x.device.type == "npu":
        return from_table(NAME, "matmul_int8_kernel", out_dtype, BLOCK_M=min(num_rows, 128))
    if num_rows <= _FEW_ROWS:
        return _few_rows(x, num_out)
    wide_tiles = -(-num_rows // 128) * -(-num_out // 256)
    if wide_tiles >= gpu_processors(x):
        return _gpu(128, 256, 128, 8, 3)
    return _some_rows(x, num_rows, num_out)


def _few_rows(x: torch.Tensor, num_out: int) -> Launch:
    """A tile for the rows of a decode step on a GPU: K in as many slices as keep enough bytes on their way."""
    tiles = -(-num_out // _FEW_ROWS_SLICE[1])
    splits = min(_FEW_ROWS_PROGRAMS * gpu_processors(x) // tiles, x.shape[-1] // _SHORT_IN, _FEW_ROWS_SLICES)
    return _gpu(*_FEW_ROWS_TILE) if splits <= 1 else _gpu(*_FEW_ROWS_SLICE).replace(SPLITS=splits)


def _some_rows(x: torch.Tensor, num_rows: int, num_out: int) -> Launch:
    """A tile for a GPU that large tiles do not fill: K in slices, or small tiles where K is short."""
    block_m, warps = (64, 4) if num_rows <= 64 else (128, 8)
    if num_rows > _SPLIT_ROWS:
        return _gpu(block_m, 128, 128, warps, 4)
    m_blocks = -(-num_rows // block_m)
    block_n, splits = slices_of_k(x, m_blocks, num_out, (128, 64))
    if x.shape[-1] < _SHORT_IN and m_blocks * -(-num_out // block_n) < gpu_processors(x):
        return _gpu(64, 32, 128, 4, 4)
    tile = _gpu(block_m, block_n, 128, warps, 4)
    return tile if splits == 1 else tile.replace(SPLITS=splits)


def _gpu(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Launch:
    return Launch(
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, {"num_warps": warps, "num_stages": stages}
    )
