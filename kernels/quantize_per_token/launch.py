"""Check the arguments of quantize_per_token, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import FEW_ROWS, Launch, compiled_in, from_table, grid, on_its_device, power_of_two

NAME = "quantize_per_token"
_NPU_ROW = 8192  # the longest row that stays in the unified buffer; longer ones are read twice
_GPU_ROW = 24576  # two pieces of 8192 and a part; longer ones are read twice, the second time from the cache
_GPU_BLOCK = 8192  # of long rows


def validate(x: torch.Tensor) -> None:
    """Require x [..., D] of a float dtype.

    Raises:
        KernelError: Naming what it is and what is wanted.
    """
    check.dtype_of(NAME, {"x": x})
    check.not_empty(NAME, {"x": x})
    check.as_rows(NAME, "x", x)


@on_its_device
def launch(
    x: torch.Tensor, tile: Launch | None = None, long_rows: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale as in reference.py, computed by the kernel.

    Args:
        x: [..., D] float16, bfloat16 or float32; rows may lie apart.
        tile: Instead of the one chosen for the device.
        long_rows: Read every row twice, in blocks; chosen by the length of the rows when None.

    Raises:
        KernelError: Arguments that the kernel does not take.
    """
    validate(x)
    check.launchable(NAME, x)
    from qcompile.kernels.quantize_per_token import in_pieces, kernel

    rows = check.as_rows(NAME, "x", x)
    num_rows, num_cols = rows.shape
    if long_rows is None:
        long_rows = num_cols > (_NPU_ROW if x.device.type == "npu" else _GPU_ROW)
    tile = tile or choose(x, num_rows, num_cols, long_rows)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if "PIECES" in tile.constants:
        in_pieces.quantize_in_pieces_kernel[(num_rows,)](
            rows, q, scale, *compiled_in(x, num_cols, rows.stride(0)), **tile.arguments(x)
        )
        return q, scale
    function = kernel.quantize_long_rows_kernel if long_rows else kernel.quantize_per_token_kernel
    function[grid(x, num_rows)](rows, q, scale, num_rows, num_cols, rows.stride(0), **tile.arguments(x))
    return q, scale


def choose(x: torch.Tensor, num_rows: int, num_cols: int, long_rows: bool) -> Launch:
    """The tile for the device of x."""
    if x.device.type == "npu":
        function = "quantize_long_rows_kernel" if long_rows else "quantize_per_token_kernel"
        return from_table(NAME, function, x.dtype, BLOCK_COLS=1 if long_rows else num_cols)
    if long_rows:
        return Launch({"BLOCK_COLS": min(power_of_two(num_cols), _GPU_BLOCK)}, {"num_warps": 16})
    full = max(1, power_of_two(num_cols) // 2)
    shortest = 2048 if num_rows <= FEW_ROWS else 1024  # fewer threads take longer where rows are few
    fitting = (n for n in (4, 2) if full // n >= shortest and num_cols <= full + full // n)
    pieces = next(fitting, 1)
    block = full // pieces
    return Launch({"PIECES": pieces, "BLOCK_COLS": block}, {"num_warps": max(1, min(16, block // 512))})
