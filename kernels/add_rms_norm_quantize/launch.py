"""Check the arguments of add_rms_norm_quantize, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import Launch, compiled_in, from_table, on_its_device, row_in_registers, tile_grid

NAME = "add_rms_norm_quantize"


def validate(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor) -> None:
    """Require x and residual [..., D] and gamma [D] of one float dtype on one device.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    check.residual_norm(NAME, x, residual, {"gamma": gamma})


@on_its_device
def launch(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float, tile: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, scale and h as in reference.py, computed by the kernel; tile replaces the one chosen for the device.

    Raises:
        KernelError: Arguments that the kernel does not take, or rows longer than any tile.
    """
    validate(x, residual, gamma)
    check.launchable(NAME, x)
    from qcompile.kernels.add_rms_norm_quantize.kernel import add_rms_norm_quantize_kernel

    x_rows, residual_rows = check.as_rows(NAME, "x", x), check.as_rows(NAME, "residual", residual)
    num_rows, num_cols = x_rows.shape
    tile = tile or choose(x, num_cols)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    add_rms_norm_quantize_kernel[tile_grid(x, tile, num_rows)](
        x_rows,
        residual_rows,
        gamma,
        q,
        scale,
        h,
        num_rows,
        *compiled_in(x, num_cols, x_rows.stride(0), residual_rows.stride(0)),
        eps,
        **tile.arguments(x),
    )
    return q, scale, h


def choose(x: torch.Tensor, num_cols: int) -> Launch:
    """The tile for the device of x."""
    if x.device.type == "npu":
        return from_table(NAME, "add_rms_norm_quantize_kernel", x.dtype, BLOCK_COLS=num_cols)
    return row_in_registers(NAME, num_cols).replace(WALK=0)
