"""Check the arguments of head_rms_norm, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import (
    FEW_ROWS,
    Launch,
    compiled_in,
    from_table,
    on_its_device,
    power_of_two,
    row_in_registers,
    tile_grid,
    walks,
)

NAME = "head_rms_norm"
_GPU_BLOCK = 1024  # elements of a program
_MANY = 1 << 24  # elements, of more of which programs twice as large gain nothing
_LIST = (
    1 << 16,
    1 << 23,
)  # elements, from and to, that a GPU takes as one list of rows where a token's heads leave lanes idle


def validate(x: torch.Tensor, gamma: torch.Tensor) -> None:
    """Require x [..., H, d] and gamma [d] of one float dtype on one device.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    tensors = {"x": x, "gamma": gamma}
    check.one_device(NAME, tensors)
    check.dtype_of(NAME, tensors)
    check.not_empty(NAME, tensors)
    check.as_tokens(NAME, "x", x)
    check.shape_of(NAME, "gamma", gamma, x.shape[-1:], "d")
    check.contiguous(NAME, {"gamma": gamma})


@on_its_device
def launch(x: torch.Tensor, gamma: torch.Tensor, eps: float, tile: Launch | None = None) -> torch.Tensor:
    """y as in reference.py, computed by the kernel.

    Args:
        x: [..., H, d] float16, bfloat16 or float32; a token's heads side by side, tokens may lie apart. For the norm of whole
            rows [..., D] pass ``x.unsqueeze(-2)``.
        gamma: [d], dtype of x.
        eps: Added to the mean square.
        tile: Instead of the one chosen for the device.

    Raises:
        KernelError: Arguments that the kernel does not take, or rows longer than any tile.
    """
    validate(x, gamma)
    check.launchable(NAME, x)
    from qcompile.kernels.head_rms_norm.kernel import head_rms_norm_kernel

    tokens = check.as_tokens(NAME, "x", x)
    num_tokens, (heads, head_dim) = tokens.shape[0], x.shape[-2:]
    sizes = compiled_in(x, heads, head_dim, tokens.stride(0))
    if tile is None and is_one_list(x, heads, head_dim):
        tile = list_tile(num_tokens, head_dim)
        num_tokens, heads = 1, num_tokens * heads
        sizes = (heads, *compiled_in(x, head_dim, 0))
    tile = tile or choose(x, num_tokens, heads, head_dim)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = tile_grid(x, tile, -(-heads // tile.constants["BLOCK_ROWS"]), num_tokens)
    head_rms_norm_kernel[programs](tokens, gamma, y, num_tokens, *sizes, eps, **tile.arguments(x))
    return y


def is_one_list(x: torch.Tensor, heads: int, head_dim: int) -> bool:
    """Whether a GPU takes all heads as one token's, so that a tile has rows of several: else 14 leave 2 of 16 idle."""
    is_idle = power_of_two(heads) != heads and heads < _GPU_BLOCK // power_of_two(head_dim)
    return is_idle and x.device.type != "npu" and x.is_contiguous() and _LIST[0] <= x.numel() <= _LIST[1]


def list_tile(num_tokens: int, head_dim: int) -> Launch:
    """The tile for it: 8 elements a thread, or 16."""
    block_cols = power_of_two(head_dim)
    elements = _GPU_BLOCK // 2 if num_tokens <= FEW_ROWS else _GPU_BLOCK
    return Launch({"BLOCK_ROWS": elements // block_cols, "BLOCK_COLS": block_cols, "WALK": 0}, {"num_warps": 2})


def choose(x: torch.Tensor, num_tokens: int, heads: int, head_dim: int) -> Launch:
    """The tile for the device of x."""
    if x.device.type == "npu":
        return from_table(NAME, "head_rms_norm_kernel", x.dtype, BLOCK_COLS=head_dim)
    block_cols = power_of_two(head_dim)
    if block_cols > _GPU_BLOCK:  # a whole row of the hidden size
        row = row_in_registers(NAME, head_dim)
        return row.replace(BLOCK_ROWS=1, WALK=walks(num_tokens))
    block, per_thread = _GPU_BLOCK, 4 if num_tokens <= FEW_ROWS else 8
    if num_tokens > FEW_ROWS and num_tokens * heads * head_dim <= _MANY:
        block, per_thread = 2 * _GPU_BLOCK, 16
    block_rows = min(power_of_two(heads), block // block_cols)
    return Launch(
        {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "WALK": walks(num_tokens)},
        {"num_warps": max(1, block_rows * block_cols // 32 // per_thread)},
    )
