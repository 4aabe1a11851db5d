"""Check the arguments of swiglu, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import FEW_ROWS, Launch, from_table, on_its_device, power_of_two, tile_grid, walks

NAME = "swiglu"


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
    # sizes stay arguments here: as constants (placement.compiled_in) they cost 3 to 5 % in prefill on an H200
    swiglu_kernel[tile_grid(gate_up, tile, num_blocks, num_rows)](
        rows, out, num_rows, num_cols, rows.stride(0), **tile.arguments(gate_up)
    )
    return out


def choose(gate_up: torch.Tensor, num_rows: int, num_cols: int) -> Launch:
    """The tile for the device of gate_up; long rows are cut into blocks, so there is no longest one."""
    if gate_up.device.type == "npu":
        return from_table(NAME, "swiglu_kernel", gate_up.dtype, BLOCK_COLS=min(num_cols, 4096))
    size = num_rows * num_cols
    # few results want many programs, many want 8 elements a thread, and beyond FEW_ROWS 4 again: more loads at a time
    block = 512 if size < 1 << 16 else 1024 if size < 1 << 20 or num_rows > FEW_ROWS else 2048
    block = min(power_of_two(num_cols), block)
    return Launch({"BLOCK_COLS": block, "WALK": walks(num_rows)}, {"num_warps": max(1, min(8, block // 128))})
