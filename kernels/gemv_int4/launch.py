"""Check the arguments of gemv_int4, choose a tile, launch."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.gemv_int4.reference import GROUPS
from qcompile.kernels.placement import (
    Launch,
    few_rows_grid,
    from_table,
    gpu_processors,
    is_hopper,
    on_its_device,
    power_of_two,
)
from qcompile.kernels.slices import add_slices

NAME = "gemv_int4"
MAX_ROWS = 16
_MANY_OUT = 8192
_MANY = (8, 128, 2, 1)  # BLOCK_N, words of a row of the tile, STAGES, warps, for one row of x
_FEW = (4, 512, 2, 4)  # the same where results are so few that warps have to share them
_DOT_GROUP = 128  # the words of a smaller group are too few for tl.dot: row by row then
_ONE_ROW = (32, 2)  # BLOCK_N and BLOCK_G (so many warps) of one row on the matrix units
_ONE_ROW_STAGES = (3, 2)  # num_stages of it, whole and in slices of K
_ONE_ROW_RESIDENT = 10  # programs of it that a multiprocessor has at a time, by registers: some 90 a thread
_ONE_ROW_GROUPS = 6  # of a slice, at least
_SEVERAL_ROWS = (  # the same of several rows, each for so many blocks of BLOCK_N to a multiprocessor, or more
    ((64, 4, 2), 2.0),
    ((32, 4, 3), 0.75),
    ((16, 8, 3), 0.0),
)


def validate(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> int:
    """Require x [..., K] of at most 16 rows, weight int32 [N, K / 8], scale [N, K / G] and bias [N] of x's dtype.

    Returns:
        G, the size of a group.

    Raises:
        KernelError: Naming the argument, what it is and what is wanted.
    """
    tensors = {"x": x, "weight": weight, "scale": scale} | ({} if bias is None else {"bias": bias})
    check.one_device(NAME, tensors)
    check.dtype_of(NAME, {name: tensor for name, tensor in tensors.items() if name != "weight"})
    check.dtype_of(NAME, {"weight": weight}, (torch.int32,))
    check.not_empty(NAME, tensors)
    check.few_rows(NAME, x, MAX_ROWS)
    num_in = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] * 8 != num_in:
        raise check.fail(NAME, f"weight is {list(weight.shape)}, wanted [N, K / 8] with K = {num_in}")
    if scale.dim() != 2 or num_in % scale.shape[1] or num_in // scale.shape[1] not in GROUPS:
        raise check.fail(
            NAME, f"scale is {list(scale.shape)}, wanted [N, K / G] with K = {num_in} and G one of {list(GROUPS)}"
        )
    check.shape_of(NAME, "scale", scale, (weight.shape[0], scale.shape[1]), "N, K / G")
    check.contiguous(NAME, {"weight": weight, "scale": scale} | ({} if bias is None else {"bias": bias}))
    if bias is not None:
        check.shape_of(NAME, "bias", bias, weight.shape[:1], "N")
    return int(num_in // scale.shape[1])


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
    group = validate(x, weight, scale, bias)
    check.launchable(NAME, x)
    from qcompile.kernels.gemv_int4.kernel import gemv_int4_kernel

    rows = check.as_rows(NAME, "x", x)
    num_rows, (num_out, num_groups) = rows.shape[0], scale.shape
    tile = tile or choose(x, num_rows, num_out, num_groups, group)
    out = torch.empty((*x.shape[:-1], num_out), dtype=x.dtype, device=x.device)
    if "SPLITS" in tile.constants:
        _on_matrix_units(rows, weight, scale, bias, out.view(num_rows, num_out), tile)
        return out
    tile = tile.replace(HAS_BIAS=int(bias is not None))
    gemv_int4_kernel[few_rows_grid(x, tile, num_rows, num_out)](
        rows,
        weight,
        scale,
        out if bias is None else bias,
        out,
        num_rows,
        num_out,
        num_groups,
        rows.stride(0),
        **tile.arguments(x),
    )
    return out


def _on_matrix_units(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch the product of all of K or, into partial sums, of every slice, and then their sum."""
    from qcompile.kernels.gemv_int4.few_rows import gemv_int4_dot_kernel

    num_rows, (num_out, num_groups) = rows.shape[0], scale.shape
    splits = tile.constants["SPLITS"]
    is_split, is_dependent = splits > 1, splits > 1 and is_hopper(rows)
    target = torch.empty((splits, num_rows, num_out), dtype=torch.float32, device=out.device) if is_split else out
    tile = tile.replace(HAS_BIAS=int(bias is not None and not is_split), PDL=int(is_dependent))
    gemv_int4_dot_kernel[-(-num_out // tile.constants["BLOCK_N"]), splits](
        rows,
        weight,
        scale,
        out if bias is None else bias,
        target,
        num_rows,
        num_out,
        num_groups,
        rows.stride(0),
        **tile.arguments(rows),
    )
    if is_split:
        add_slices(target, bias, None, out, is_dependent)


def choose(x: torch.Tensor, num_rows: int, num_out: int, num_groups: int, group: int) -> Launch:
    """The tile for the device of x; measured on an H100 and an H200 (kernels/RESULTS.md)."""
    if x.device.type == "npu":
        return from_table(NAME, "gemv_int4_kernel", x.dtype, {"GROUP": group})
    if group >= _DOT_GROUP and num_rows > 1:
        return _several_rows(x, num_rows, num_out)
    splits = one_row_slices(x, num_out, num_groups)
    if group >= _DOT_GROUP and x.dtype != torch.float32 and splits:
        return dot_tile(x, num_rows, *_ONE_ROW, _ONE_ROW_STAGES[splits > 1], splits)
    block_n, words, stages, warps = _MANY if num_out >= _MANY_OUT else _FEW
    block_groups = min(power_of_two(num_groups), words // (group // 8))
    return Launch({"BLOCK_N": block_n, "BLOCK_G": block_groups, "GROUP": group, "STAGES": stages}, {"num_warps": warps})


def one_row_slices(x: torch.Tensor, num_out: int, num_groups: int) -> int:
    """The slices of K that fill a GPU with programs for the matrix units; 0 where two thirds cannot be filled."""
    tiles, programs = -(-num_out // _ONE_ROW[0]), _ONE_ROW_RESIDENT * gpu_processors(x)
    splits = max(1, min(programs // tiles, num_groups // _ONE_ROW_GROUPS))
    return splits if 3 * tiles * splits >= 2 * programs else 0


def _several_rows(x: torch.Tensor, num_rows: int, num_out: int) -> Launch:
    """The widest tile that leaves a GPU's multiprocessors enough programs: each reads all of x."""
    cut = next(cut for cut, blocks in _SEVERAL_ROWS if -(-num_out // cut[0]) >= blocks * gpu_processors(x))
    return dot_tile(x, num_rows, *cut)


def dot_tile(x: torch.Tensor, num_rows: int, block_n: int, block_groups: int, stages: int, splits: int = 1) -> Launch:
    """A tile for a GPU's matrix units, a warp a group; in PTX where the device and the dtype have it."""
    is_ptx = x.device.type == "cuda" and torch.version.cuda is not None and x.dtype != torch.float32
    constants = {
        "BLOCK_M": 1 if num_rows == 1 else 8 if num_rows <= 8 else 16,
        "BLOCK_N": block_n,
        "BLOCK_G": block_groups,
        "GROUP": _DOT_GROUP,
        "SPLITS": splits,
        "PTX": int(is_ptx),
    }
    return Launch(constants, {"num_warps": block_groups, "num_stages": stages})
