"""Check the arguments of swiglu, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import (
    FEW_ROWS,
    Launch,
    compiled_in,
    from_table,
    on_its_device,
    power_of_two,
    tile_grid,
    walks,
)

NAME = "swiglu"
_GPU_BLOCK = 1024
_LARGE = 1 << 20  # results, from which on marking inputs costs 1 to 2 %; fewer gain up to 4 %


def validate(gate_up: torch.Tensor) -> None:
    """Require gate_up [..., 2F] of a float dtype.

    Raises:
        KernelError: Naming what it is and what is wanted.
    """
    check.dtype_of(NAME, {"gate_up": gate_up})
    check.not_empty(NAME, {"gate_up": gate_up})
    rows = check.as_rows(NAME, "gate_up", gate_up)
    if rows.shape[1] % 2:
        raise check.fail(NAME, f"gate_up has rows of {rows.shape[1]}, an odd number; wanted [..., 2F]")


@on_its_device
def launch(gate_up: torch.Tensor, tile: Launch | None = None) -> torch.Tensor:
    """Out as in reference.py, computed by the kernel.

    Args:
        gate_up: [..., 2F] float16, bfloat16 or float32; rows may lie apart.
        tile: Instead of the one chosen for the device.

    Raises:
        KernelError: Arguments that the kernel does not take.
    """
    validate(gate_up)
    check.launchable(NAME, gate_up)
    from qcompile.kernels.swiglu.kernel import swiglu_kernel

    rows = check.as_rows(NAME, "gate_up", gate_up)
    num_rows, num_cols = rows.shape[0], rows.shape[1] // 2
    tile = tile or choose(gate_up, num_rows, num_cols)
    out = torch.empty((*gate_up.shape[:-1], num_cols), dtype=gate_up.dtype, device=gate_up.device)
    num_blocks = -(-num_cols // tile.constants["BLOCK_COLS"])
    sizes = (num_cols, rows.stride(0))
    if num_rows <= FEW_ROWS:  # of many they cost 3 to 5 % as constants of the compilation (H200)
        sizes = compiled_in(gate_up, *sizes)
    swiglu_kernel[tile_grid(gate_up, tile, num_blocks, num_rows)](
        rows, out, num_rows, *sizes, **tile.arguments(gate_up)
    )
    return out


def choose(gate_up: torch.Tensor, num_rows: int, num_cols: int) -> Launch:
    """The tile for the device of gate_up; long rows are cut into blocks, so there is no longest one."""
    if gate_up.device.type == "npu":
        return from_table(NAME, "swiglu_kernel", gate_up.dtype, BLOCK_COLS=min(num_cols, 4096))
    block = min(power_of_two(num_cols), _GPU_BLOCK)  # 4 elements a thread
    constants = {"BLOCK_COLS": block, "WALK": walks(num_rows), "ONCE": int(num_rows * num_cols < _LARGE)}
    return Launch(constants, {"num_warps": max(1, block // 128)})
