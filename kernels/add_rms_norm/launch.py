"""Check the arguments of add_rms_norm, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import (
    FEW_ROWS,
    Launch,
    compiled_in,
    from_table,
    on_its_device,
    row_in_registers,
    tile_grid,
)

NAME = "add_rms_norm"


def validate(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor) -> None:
    """Require x and residual [..., D] and gamma [D] of one float dtype on one device.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    check.residual_norm(NAME, x, residual, {"gamma": gamma})


@on_its_device
def launch(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float, tile: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and h as in reference.py, computed by the kernel.

    Args:
        x: [..., D] float16, bfloat16 or float32; rows may lie apart, as in a slice of a wider tensor.
        residual: [..., D], dtype of x.
        gamma: [D], dtype of x.
        eps: Added to the mean square.
        tile: Instead of the one chosen for the device.

    Raises:
        KernelError: Arguments that the kernel does not take, or rows longer than any tile.
    """
    validate(x, residual, gamma)
    check.launchable(NAME, x)
    from qcompile.kernels.add_rms_norm.kernel import add_rms_norm_kernel

    x_rows, residual_rows = check.as_rows(NAME, "x", x), check.as_rows(NAME, "residual", residual)
    num_rows, num_cols = x_rows.shape
    tile = tile or choose(x, num_rows, num_cols)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y)
    num_tiles = -(-num_rows // tile.constants["BLOCK_ROWS"])
    add_rms_norm_kernel[tile_grid(x, tile, num_tiles)](
        x_rows,
        residual_rows,
        gamma,
        y,
        h,
        num_rows,
        *compiled_in(x, num_cols, x_rows.stride(0), residual_rows.stride(0)),
        eps,
        **tile.arguments(x),
    )
    return y, h


def choose(x: torch.Tensor, num_rows: int, num_cols: int) -> Launch:
    """The tile for the device of x."""
    if x.device.type == "npu":
        return from_table(NAME, "add_rms_norm_kernel", x.dtype, BLOCK_COLS=num_cols)
    per_thread = 8 if num_rows <= FEW_ROWS else 32
    return row_in_registers(NAME, num_cols, per_thread).replace(BLOCK_ROWS=1, WALK=0)
