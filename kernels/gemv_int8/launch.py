"""Check the arguments of gemv_int8, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import Launch, few_rows_grid, from_table, gpu_processors, on_its_device, power_of_two

NAME = "gemv_int8"
MAX_ROWS = 16  # more are work for a matrix product
_MANY_OUT = 3072
_ROWS = (16, 128, 4, 3)  # BLOCK_N, BLOCK_K, PARTS (so many warps), num_stages on the matrix units
_ROWS_WIDE = (32, 128, 4, 3)  # the same for several rows of fp16 where even so there are many programs
_ROWS_LONG = (16, 256, 4, 3)  # and where there are few, with much to do
_MANY_PROGRAMS = 4  # a multiprocessor
_LONG_IN = 8192
_LARGE = 1 << 24  # weights of which one row of fp16 goes to the matrix units too


def validate(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Require x [..., K] of at most 16 rows, weight int8 [N, K], scale float32 [N], bias [N], on one device.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    tensors = {"x": x, "weight": weight, "scale": scale} | ({} if bias is None else {"bias": bias})
    check.one_device(NAME, tensors)
    check.dtype_of(NAME, {"x": x} | ({} if bias is None else {"bias": bias}))
    check.dtype_of(NAME, {"weight": weight}, (torch.int8,))
    check.dtype_of(NAME, {"scale": scale}, (torch.float32,))
    check.not_empty(NAME, tensors)
    check.few_rows(NAME, x, MAX_ROWS)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise check.fail(NAME, f"weight is {list(weight.shape)}, wanted [N, K] with K = {x.shape[-1]}")
    check.shape_of(NAME, "scale", scale, weight.shape[:1], "N")
    check.contiguous(NAME, {"weight": weight, "scale": scale} | ({} if bias is None else {"bias": bias}))
    if bias is not None:
        check.shape_of(NAME, "bias", bias, weight.shape[:1], "N")


@on_its_device
def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: Launch | None = None,
) -> torch.Tensor:
    """Out as in reference.py, computed by the kernel; tile replaces the one chosen for the device.

    Raises:
        KernelError: Arguments that the kernel does not take.
    """
    validate(x, weight, scale, bias)
    check.launchable(NAME, x)
    from qcompile.kernels.gemv_int8.few_rows import gemv_int8_rows_kernel
    from qcompile.kernels.gemv_int8.kernel import gemv_int8_kernel

    rows = check.as_rows(NAME, "x", x)
    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    tile = (tile or choose(x, num_rows, num_out, num_in)).replace(HAS_BIAS=int(bias is not None))
    kernel = gemv_int8_kernel
    if "BLOCK_M" in tile.constants:
        kernel, tile = gemv_int8_rows_kernel, tile.replace(EVEN=_is_even(tile, num_out, num_in))
    out = torch.empty((*x.shape[:-1], num_out), dtype=x.dtype, device=x.device)
    kernel[few_rows_grid(x, tile, num_rows, num_out)](
        rows,
        weight,
        scale,
        out if bias is None else bias,
        out,
        num_rows,
        num_out,
        num_in,
        rows.stride(0),
        **tile.arguments(x),
    )
    return out


def choose(x: torch.Tensor, num_rows: int, num_out: int, num_in: int) -> Launch:
    """The tile for the device of x; measured on an H100 and an H200 (kernels/RESULTS.md)."""
    if x.device.type == "npu":
        return from_table(NAME, "gemv_int8_kernel", x.dtype, BLOCK_N=16)
    if num_rows > 1 or (has_ptx(x) and num_out * num_in >= _LARGE):
        return rows_tile(x, num_rows, *_cut(x, num_rows, num_out, num_in))
    block_k, stages = (512, 5) if num_out >= _MANY_OUT else (1024, 3)  # few programs want more bytes each
    return Launch({"BLOCK_N": 4, "BLOCK_K": min(power_of_two(num_in), block_k), "STAGES": stages}, {"num_warps": 4})


def has_ptx(x: torch.Tensor) -> bool:
    """Whether weights are widened to the dtype of x without conversions, of which a GPU does few at a time."""
    return x.device.type == "cuda" and torch.version.cuda is not None and x.dtype == torch.float16


def _cut(x: torch.Tensor, num_rows: int, num_out: int, num_in: int) -> tuple[int, int, int, int]:
    """BLOCK_N, BLOCK_K, PARTS and num_stages for the matrix units; few programs want more bytes each."""
    if num_rows == 1:
        blocks = -(-num_out // 16)
        if blocks <= gpu_processors(x):
            return 16, 128, 8, 3
        return 16, 128, 4, 5 if blocks < _MANY_PROGRAMS * gpu_processors(x) else 4
    if not has_ptx(x):
        return _ROWS
    if -(-num_out // 32) >= _MANY_PROGRAMS * gpu_processors(x):
        return _ROWS_WIDE
    return _ROWS_LONG if num_in >= _LONG_IN else _ROWS


def rows_tile(x: torch.Tensor, num_rows: int, block_n: int, block_k: int, parts: int, stages: int) -> Launch:
    """A tile for a GPU's matrix units, a warp a slice of K."""
    block_m = 1 if num_rows == 1 else 8 if num_rows <= 8 else 16
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PARTS": parts}
    return Launch(constants | {"PTX": int(has_ptx(x))}, {"num_warps": parts, "num_stages": stages})


def _is_even(tile: Launch, num_out: int, num_in: int) -> int:
    """Whether one row needs no masks (8 of 56 registers a thread); several were timed with them."""
    block_k = tile.constants["BLOCK_K"] * tile.constants["PARTS"]
    return int(tile.constants["BLOCK_M"] == 1 and num_out % tile.constants["BLOCK_N"] == 0 and num_in % block_k == 0)
