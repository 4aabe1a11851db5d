"""Check the arguments of matmul_bias_residual and launch the kernels that `plan` chooses."""

from typing import Any

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.matmul_bias_residual.plan import GROUP_M, NAME, is_copied_whole, plan
from qcompile.kernels.placement import Launch, grid, is_hopper, on_its_device
from qcompile.kernels.slices import add_slices, has_addends

_SPLIT_CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS")


def validate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> None:
    """Require x [..., K], weight [N, K], bias [N], residual [..., N] of one float dtype on one device.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    check.one_device(NAME, tensors)
    check.dtype_of(NAME, tensors)
    check.not_empty(NAME, tensors)
    check.as_rows(NAME, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise check.fail(NAME, f"weight is {list(weight.shape)}, wanted [N, K] with K = {x.shape[-1]}")
    check.as_rows(NAME, "weight", weight)
    if bias is not None:
        check.shape_of(NAME, "bias", bias, weight.shape[:1], "N")
        check.contiguous(NAME, {"bias": bias})
    if residual is not None:
        check.shape_of(NAME, "residual", residual, (*x.shape[:-1], weight.shape[0]), "..., N")
        check.as_rows(NAME, "residual", residual)


@on_its_device
def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    tile: Launch | None = None,
) -> torch.Tensor:
    """Out as in reference.py, computed by the kernel.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        residual: [..., N] or None.
        tile: Instead of the one chosen for the device. With STAGES it is one for the kernel of one row, with PARTS
            for that of few rows, with SPLITS for those that cut K into so many slices, with TMA for one in tma.py, where LATE
            adds bias and residual last if the GPU can copy residual and out whole.

    Raises:
        KernelError: Arguments that the kernel does not take.
    """
    validate(x, weight, bias, residual)
    check.launchable(NAME, x)
    num_rows = x.numel() // x.shape[-1]
    parts = plan(x, weight, num_rows) if tile is None else [(num_rows, tile)]
    return in_parts(x, weight, bias, residual, parts)


def in_parts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    parts: list[tuple[int, Launch]],
) -> torch.Tensor:
    """The same, so many rows after each other with each tile; with TMA the next starts while the last one ends."""
    rows = check.as_rows(NAME, "x", x)
    residual_rows = None if residual is None else check.as_rows(NAME, "residual", residual)
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    out_rows = out.view(-1, weight.shape[0])
    first = 0
    for count, tile in parts:
        some = slice(first, first + count)
        if "TMA" in tile.constants and is_hopper(x):
            tile = tile.replace(PDL=int(first + count < len(rows)), AFTER=int(first > 0))
        launch_one = _split if "SPLITS" in tile.constants else _tma if "TMA" in tile.constants else _whole
        some_residual = None if residual_rows is None else residual_rows[some]
        launch_one(rows[some], weight, bias, some_residual, out_rows[some], tile)
        first += count
    return out


def _whole(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch one kernel for all of K."""
    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    _kernel(rows, tile, num_rows, num_out)(
        rows,
        weight,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        num_rows,
        num_out,
        num_in,
        rows.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        **tile.replace(**has_addends(bias, residual)).arguments(rows),
    )


def _tma(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch the kernel that has whole tiles copied, for one slice of K or, into partial sums, for several."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from qcompile.kernels.matmul_bias_residual.tma import matmul_tma_kernel

    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    constants = {"SPLITS": 1, "PDL": 0, "AFTER": 0, "LATE": 0, "GROUP_M": GROUP_M} | tile.constants
    constants = {name: value for name, value in constants.items() if name != "TMA"} | has_addends(bias, residual)
    options = tile.gpu_options | ({"launch_pdl": True} if constants["AFTER"] else {})
    block_m, block_n, block_k = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    ends = [out if residual is None else residual, out]
    constants["LATE"] &= int(is_copied_whole(*ends))
    if constants["LATE"]:
        ends = [TensorDescriptor.from_tensor(end, [block_m, block_n]) for end in ends]
    matmul_tma_kernel[-(-num_rows // block_m) * -(-num_out // block_n), constants["SPLITS"]](
        TensorDescriptor.from_tensor(rows, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        out if bias is None else bias,
        *ends,
        num_rows,
        num_out,
        num_in,
        0 if residual is None else residual.stride(0),
        **Launch(constants, options).arguments(rows),
    )


def _split(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch the product of every slice of K, then their sum into out."""
    from qcompile.kernels.matmul_bias_residual.split import matmul_split_kernel

    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    constants = {name: tile.constants[name] for name in _SPLIT_CONSTANTS}
    is_tma = "TMA" in tile.constants
    is_dependent = is_tma and is_hopper(rows)
    partial = torch.empty((constants["SPLITS"], num_rows, num_out), dtype=torch.float32, device=rows.device)
    if is_tma:
        _tma(rows, weight, None, None, partial, tile.replace(PDL=int(is_dependent), LATE=0))
    else:
        blocks = (-(-num_out // constants["BLOCK_N"]), -(-num_rows // constants["BLOCK_M"]), constants["SPLITS"])
        matmul_split_kernel[blocks](
            rows,
            weight,
            partial,
            num_rows,
            num_out,
            num_in,
            rows.stride(0),
            weight.stride(0),
            **Launch(constants, tile.gpu_options).arguments(rows),
        )
    add_slices(partial, bias, residual, out, is_dependent)


def _kernel(x: torch.Tensor, tile: Launch, num_rows: int, num_out: int) -> Any:
    """The kernel that the tile is for, with its grid."""
    m_blocks = -(-num_rows // tile.constants.get("BLOCK_M", 1))
    n_blocks = -(-num_out // tile.constants["BLOCK_N"])
    if "STAGES" in tile.constants:
        from qcompile.kernels.matmul_bias_residual.few_rows import matmul_one_row_kernel

        return matmul_one_row_kernel[n_blocks, m_blocks]
    if "PARTS" in tile.constants:
        from qcompile.kernels.matmul_bias_residual.few_rows import matmul_few_rows_kernel

        return matmul_few_rows_kernel[n_blocks, m_blocks]
    from qcompile.kernels.matmul_bias_residual.kernel import matmul_bias_residual_kernel

    return matmul_bias_residual_kernel[grid(x, m_blocks * n_blocks, "cube")]
