"""Check the arguments of add_layer_norm, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import Launch, compiled_in, from_table, on_its_device, row_in_registers, tile_grid

NAME = "add_layer_norm"


def validate(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> None:
    """Require x and residual [..., D], gamma and beta [D] of one float dtype on one device.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    check.residual_norm(NAME, x, residual, {"gamma": gamma, "beta": beta})


@on_its_device
def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    eps: float,
    tile: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and h as in reference.py, computed by the kernel; tile replaces the one chosen for the device.

    Raises:
        KernelError: Arguments that the kernel does not take, or rows longer than any tile.
    """
    validate(x, residual, gamma, beta)
    check.launchable(NAME, x)
    from qcompile.kernels.add_layer_norm.kernel import add_layer_norm_kernel

    x_rows, residual_rows = check.as_rows(NAME, "x", x), check.as_rows(NAME, "residual", residual)
    num_rows, num_cols = x_rows.shape
    tile = tile or choose(x, num_cols)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y)
    add_layer_norm_kernel[tile_grid(x, tile, -(-num_rows // tile.constants["BLOCK_ROWS"]))](
        x_rows,
        residual_rows,
        gamma,
        beta,
        y,
        h,
        num_rows,
        *compiled_in(x, num_cols, x_rows.stride(0), residual_rows.stride(0)),
        eps,
        **tile.arguments(x),
    )
    return y, h


def choose(x: torch.Tensor, num_cols: int) -> Launch:
    """The tile for the device of x."""
    if x.device.type == "npu":
        return from_table(NAME, "add_layer_norm_kernel", x.dtype, BLOCK_COLS=num_cols)
    return row_in_registers(NAME, num_cols).replace(BLOCK_ROWS=1, WALK=0)
