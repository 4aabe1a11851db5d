"""Check the arguments of matmul_bias_residual, choose a tile, launch."""

from typing import Any

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import (
    Launch,
    from_table,
    gpu_processors,
    grid,
    on_its_device,
    power_of_two,
    slices_of_k,
)

NAME = "matmul_bias_residual"
_GROUP_M = 8
_FEW_ROWS = 16
_SPLIT_ROWS = 512  # beyond, tiles are enough, or partial sums too large
_SHORT_IN = 1024  # of which a product is over before a second kernel would have begun
_SUM_COLS = 512
_FEW_WAVES = 6  # of large tiles: in more, an empty part of the last is little
_LONG_IN = 3072  # of which the last wave takes longer than another launch
_LARGE = {  # BLOCK_M, BLOCK_N, BLOCK_K, warps, num_stages: what a wave of them takes
    (128, 256, 64, 8, 3): 1.0,
    (256, 128, 64, 8, 4): 1.0,
    (128, 128, 64, 8, 4): 0.58,
}
_TMA = {"TMA": 1, "EARLY": 0}  # added to a tile where whole tiles are copied
_SPLIT_TILE = (128, 64, 8, 4)  # BLOCK_M, BLOCK_K, warps, num_stages for more than 64 rows
_SPLIT_WIDTHS = (128, 64)  # BLOCK_N, the first that gives most multiprocessors work
_SPLIT_RESIDENT = 1  # programs of such a tile on a multiprocessor at a time
_SPLIT_TMA = {"TMA": 1, "PDL": 0}  # the same where K is cut into slices
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
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise check.fail(NAME, f"weight is {list(weight.shape)}, wanted [N, K] with K = {x.shape[-1]}")
    check.as_rows(NAME, "x", x)
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
            for that of few rows, with SPLITS for those that cut K into so many slices, with TMA for one in tma.py.

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
    """The same, so many rows after each other with each tile."""
    rows = check.as_rows(NAME, "x", x)
    residual_rows = rows if residual is None else check.as_rows(NAME, "residual", residual)
    extras = {"HAS_BIAS": int(bias is not None), "HAS_RESIDUAL": int(residual is not None)}
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    out_rows = out.view(-1, weight.shape[0])
    first = 0
    for count, tile in parts:
        some = slice(first, first + count)
        launch_one = _split if "SPLITS" in tile.constants else _tma if "TMA" in tile.constants else _whole
        some_bias = weight if bias is None else bias
        launch_one(rows[some], weight, some_bias, residual_rows[some], out_rows[some], tile.replace(**extras))
        first += count
    return out


def _whole(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual_rows: torch.Tensor,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch one kernel for all of K."""
    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    _kernel(rows, tile, num_rows, num_out)(
        rows,
        weight,
        bias,
        residual_rows,
        out,
        num_rows,
        num_out,
        num_in,
        rows.stride(0),
        weight.stride(0),
        residual_rows.stride(0),
        **tile.arguments(rows),
    )


def _tma(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual_rows: torch.Tensor,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch the kernel that has whole tiles copied, for one slice of K or, into partial sums, for several."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from qcompile.kernels.matmul_bias_residual.tma import matmul_tma_kernel

    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    constants = {"EARLY": 0, "SPLITS": 1, "PDL": 0, "GROUP_M": _GROUP_M} | tile.constants
    constants = {name: value for name, value in constants.items() if name != "TMA"}
    block_m, block_n, block_k = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    matmul_tma_kernel[-(-num_rows // block_m) * -(-num_out // block_n), constants["SPLITS"]](
        TensorDescriptor.from_tensor(rows, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        bias,
        residual_rows,
        out,
        num_rows,
        num_out,
        num_in,
        residual_rows.stride(0),
        **Launch(constants, tile.gpu_options).arguments(rows),
    )


def _split(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual_rows: torch.Tensor,
    out: torch.Tensor,
    tile: Launch,
) -> None:
    """Launch the product of every slice of K, then their sum into out."""
    from qcompile.kernels.matmul_bias_residual.split import matmul_split_kernel, matmul_sum_kernel

    num_rows, (num_out, num_in) = rows.shape[0], weight.shape
    constants = {name: tile.constants[name] for name in _SPLIT_CONSTANTS}
    extras = {name: tile.constants[name] for name in ("HAS_BIAS", "HAS_RESIDUAL")}
    splits, is_dependent = constants["SPLITS"], tile.constants.get("PDL", 0)
    partial = torch.empty((splits, num_rows, num_out), dtype=torch.float32, device=rows.device)
    if "TMA" in tile.constants:
        _tma(rows, weight, bias, residual_rows, partial, tile.replace(HAS_BIAS=0, HAS_RESIDUAL=0))
    else:
        blocks = (-(-num_out // constants["BLOCK_N"]), -(-num_rows // constants["BLOCK_M"]), splits)
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
    options = {"num_warps": 4} | ({"launch_pdl": True} if is_dependent else {})
    total = Launch({"BLOCK_COLS": _SUM_COLS, "SPLITS": splits, "PDL": is_dependent, **extras}, options)
    matmul_sum_kernel[num_rows, -(-num_out // _SUM_COLS)](
        partial, bias, residual_rows, out, num_rows, num_out, residual_rows.stride(0), **total.arguments(rows)
    )


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


def plan(x: torch.Tensor, weight: torch.Tensor, num_rows: int) -> list[tuple[int, Launch]]:
    """How many rows go with which tile: those of the last, mostly empty wave of large tiles on a GPU with smaller ones.

    With TMA where the operands lie as it wants them.
    """
    num_out, num_in = weight.shape
    tile = choose(x, num_rows, num_out, num_in)
    if x.device.type == "npu" or "GROUP_M" not in tile.constants:
        return [(num_rows, tile)]
    head = num_rows if num_rows <= _SPLIT_ROWS else whole_waves(x, tile, num_rows, num_out)
    parts = [(head, tile)]
    if head < num_rows:
        parts.append((num_rows - head, choose(x, num_rows - head, num_out, num_in)))
    if not takes_tma(x, weight):
        return parts
    return [(count, one.replace(**(_SPLIT_TMA if "SPLITS" in one.constants else _TMA))) for count, one in parts]


def whole_waves(x: torch.Tensor, tile: Launch, num_rows: int, num_out: int) -> int:
    """The rows of so many blocks of rows as a GPU's multiprocessors take in whole waves; all, if that saves little."""
    processors, block_m = gpu_processors(x), tile.constants["BLOCK_M"]
    n_blocks = -(-num_out // tile.constants["BLOCK_N"])
    waves, left = divmod(-(-num_rows // block_m) * n_blocks, processors)
    head = waves * processors // n_blocks * block_m
    is_worth = 0 < waves <= _FEW_WAVES and 0 < left <= processors // 2 and 0 < num_rows - head <= _SPLIT_ROWS
    return head if is_worth and x.shape[-1] >= _LONG_IN else num_rows


def takes_tma(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the GPU copies whole tiles by itself, and x and weight lie as that wants them."""
    if x.device.type != "cuda" or torch.version.cuda is None or x.dtype == torch.float32:
        return False
    operands = (check.as_rows(NAME, "x", x), weight)
    is_aligned = all(one.data_ptr() % 16 == 0 and one.stride(0) * one.element_size() % 16 == 0 for one in operands)
    return is_aligned and torch.cuda.get_device_capability(x.device) >= (9, 0)


def choose(x: torch.Tensor, num_rows: int, num_out: int, num_in: int) -> Launch:
    """The tile for the device of x: the largest that still gives every core work; on a GPU another kernel for few rows."""
    if x.device.type == "npu":
        return from_table(
            NAME, "matmul_bias_residual_kernel", x.dtype, BLOCK_M=min(num_rows, 64 if x.dtype == torch.float32 else 128)
        )
    if num_rows <= _FEW_ROWS:
        return _few_rows(x, num_rows, num_in)
    wide_tiles = -(-num_rows // 128) * -(-num_out // 256)
    if x.dtype != torch.float32 and (num_rows > _SPLIT_ROWS or wide_tiles >= gpu_processors(x)):
        return _large(x, num_rows, num_out)
    return _some_rows(x, num_rows, num_out)


def _large(x: torch.Tensor, num_rows: int, num_out: int) -> Launch:
    """Of the large tiles the one whose waves over a GPU's multiprocessors take least time."""

    def cost(wave: float, block_m: int, block_n: int) -> float:
        tiles = -(-num_rows // block_m) * -(-num_out // block_n)
        return wave * -(-tiles // gpu_processors(x))

    return _gpu(*min(_LARGE, key=lambda tile: cost(_LARGE[tile], *tile[:2])))


def _some_rows(x: torch.Tensor, num_rows: int, num_out: int) -> Launch:
    """A tile for a GPU that large tiles do not fill: K in slices, or small tiles where K is short."""
    is_fp32, is_low = x.dtype == torch.float32, num_rows <= 64
    block_m, block_k, warps, stages = (64, 32, 4, 3) if is_fp32 else (64, 64, 4, 4) if is_low else _SPLIT_TILE
    widths, m_blocks = (64,) if is_fp32 else _SPLIT_WIDTHS, -(-num_rows // block_m)
    if num_rows > _SPLIT_ROWS:
        return _gpu(block_m, widths[0], block_k, warps, stages)
    block_n, splits = slices_of_k(x, m_blocks, num_out, widths, 1 if is_fp32 or is_low else _SPLIT_RESIDENT)
    if x.shape[-1] < _SHORT_IN and m_blocks * -(-num_out // block_n) < gpu_processors(x):
        return _gpu(64, 32, block_k, 4, stages)
    tile = _gpu(block_m, block_n, block_k, warps, stages)
    return tile if splits == 1 else tile.replace(SPLITS=splits)


def _few_rows(x: torch.Tensor, num_rows: int, num_in: int) -> Launch:
    if num_rows == 1:
        block_k = min(power_of_two(num_in), 512 // x.element_size())
        return Launch({"BLOCK_N": 4, "BLOCK_K": block_k, "STAGES": 6}, {"num_warps": 2})
    constants = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256 // x.element_size(), "PARTS": 4}
    return Launch(constants, {"num_warps": 4, "num_stages": 3})


def _gpu(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Launch:
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": _GROUP_M}
    return Launch(constants, {"num_warps": warps, "num_stages": stages})
