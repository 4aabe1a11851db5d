"""The second kernel of a product whose K was cut into slices on a GPU: it adds their partial sums."""

import torch

from qcompile.kernels.placement import Launch

_BLOCK_COLS = 512


def add_slices(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    is_dependent: bool,
) -> None:
    """Write the sum of partial sums, bias and residual to out.

    Args:
        partial: float32 [slices, M, N].
        bias: [N] or None.
        residual: [M, N], rows may lie apart, or None.
        out: [M, N], contiguous.
        is_dependent: Whether the kernel that makes the partial sums lets this one start early (PDL), to wait for them there.
    """
    from qcompile.kernels.matmul_bias_residual.split import matmul_sum_kernel

    splits, num_rows, num_out = partial.shape
    constants = {"BLOCK_COLS": _BLOCK_COLS, "SPLITS": splits, "PDL": int(is_dependent)} | has_addends(bias, residual)
    total = Launch(constants, {"num_warps": 4} | ({"launch_pdl": True} if is_dependent else {}))
    matmul_sum_kernel[num_rows, -(-num_out // _BLOCK_COLS)](
        partial,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        num_rows,
        num_out,
        0 if residual is None else residual.stride(0),
        **total.arguments(out),
    )


def has_addends(bias: torch.Tensor | None, residual: torch.Tensor | None) -> dict[str, int]:
    """The constants that tell a kernel what is added to its product."""
    return {"HAS_BIAS": int(bias is not None), "HAS_RESIDUAL": int(residual is not None)}
