"""Which tiles a product of matmul_bias_residual takes, on a GPU by waves over its multiprocessors."""

import torch

from qcompile.kernels import arguments as check
from qcompile.kernels.placement import Launch, from_table, gpu_processors, is_hopper, power_of_two, slices_of_k

NAME = "matmul_bias_residual"
GROUP_M = 8
_FEW_ROWS = 16
_SPLIT_ROWS = 512  # beyond, tiles are enough, or partial sums too large
_SHORT_IN = 1024  # of which a product is over before a second kernel would have begun
_WIDE = 128 * 256
_FEW_WAVES = 6  # of large tiles: in more, an empty part of the last is little
_LONG_IN = 3072  # of which the last wave takes longer than another launch
_LARGE = {  # BLOCK_M, BLOCK_N, BLOCK_K, warps, num_stages: what a wave of them takes
    (128, 256, 64, 8, 3): 1.0,
    (256, 128, 64, 8, 4): 1.0,
    (128, 128, 64, 8, 4): 0.58,
}
_PAIR = (128, 128, 64, 4, 3)  # two to a multiprocessor, copied by TMA, where all run at once
_PAIR_GROUP_M = 32
_SPLIT_TILE = (128, 64, 8, 4)  # BLOCK_M, BLOCK_K, warps, num_stages for more than 64 rows, cut into slices of K
_SPLIT_WIDTHS = (128, 64)  # BLOCK_N, the first that gives most multiprocessors work
_ONE_BLOCK = (64, 128)  # BLOCK_M of the tiles for 17 to 128 rows that TMA copies
_DEEP = (64, 128, 4, 4)  # BLOCK_N, BLOCK_K, warps, num_stages: one to a multiprocessor, many weights on their way
_SHALLOW = (64, 64, 4, 4)  # two, where one to each would not hold all
_MIN_SLICE = 512


def plan(x: torch.Tensor, weight: torch.Tensor, num_rows: int) -> list[tuple[int, Launch]]:
    """How many rows go with which tile: those of the last, mostly empty wave of large tiles on a GPU with smaller ones."""
    (num_out, num_in), is_tma = weight.shape, takes_tma(x, weight)
    tile = choose(x, num_rows, num_out, num_in, is_tma)
    if x.device.type == "npu" or "GROUP_M" not in tile.constants or num_rows <= _SPLIT_ROWS:
        return [(num_rows, tile)]
    head = whole_waves(x, tile, num_rows, num_out)
    if head == num_rows:
        return [(num_rows, tile)]
    return [(head, tile), (num_rows - head, choose(x, num_rows - head, num_out, num_in, is_tma))]


def whole_waves(x: torch.Tensor, tile: Launch, num_rows: int, num_out: int) -> int:
    """The rows of so many blocks of rows as a GPU's multiprocessors take in whole waves; all, if that saves little."""
    processors, block_m = gpu_processors(x), tile.constants["BLOCK_M"]
    n_blocks = -(-num_out // tile.constants["BLOCK_N"])
    waves, left = divmod(-(-num_rows // block_m) * n_blocks, processors)
    head = waves * processors // n_blocks * block_m
    is_wide = block_m * tile.constants["BLOCK_N"] >= _WIDE  # smaller ones are what the last wave would get
    is_worth = (
        is_wide and 0 < waves <= _FEW_WAVES and 0 < left <= processors // 2 and 0 < num_rows - head <= _SPLIT_ROWS
    )
    return head if is_worth and x.shape[-1] >= _LONG_IN else num_rows


def takes_tma(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the GPU copies whole tiles by itself, and x and weight lie as that wants them."""
    if x.dtype == torch.float32 or not is_hopper(x):
        return False
    return is_copied_whole(check.as_rows(NAME, "x", x), weight)


def is_copied_whole(*matrices: torch.Tensor) -> bool:
    """Whether every matrix lies as a GPU's copies of whole tiles want it; rows of an expanded one lie on each other."""
    return all(
        one.data_ptr() % 16 == 0 and one.stride(0) * one.element_size() % 16 == 0 and one.stride(0) >= one.shape[1]
        for one in matrices
    )


def choose(x: torch.Tensor, num_rows: int, num_out: int, num_in: int, is_tma: bool = False) -> Launch:
    """The tile for the device of x: the largest that still gives every core work; on a GPU another kernel for few rows.

    Measured on an H100 and, with is_tma, where tiles are copied as a whole, on an H200.
    """
    if x.device.type == "npu":
        return from_table(
            NAME, "matmul_bias_residual_kernel", x.dtype, BLOCK_M=min(num_rows, 64 if x.dtype == torch.float32 else 128)
        )
    if num_rows <= _FEW_ROWS:
        return _few_rows(x, num_rows, num_in)
    wide_tiles = -(-num_rows // 128) * -(-num_out // 256)
    if x.dtype != torch.float32 and (num_rows > _SPLIT_ROWS or wide_tiles >= gpu_processors(x)):
        tile = _large(x, num_rows, num_out, is_tma)
    elif is_tma and num_rows <= _ONE_BLOCK[-1] and num_in >= _SHORT_IN:
        tile = _one_block(x, num_rows, num_out, num_in)
    else:
        tile = _some_rows(x, num_rows, num_out)
    return tile.replace(TMA=1) if is_tma else tile


def _large(x: torch.Tensor, num_rows: int, num_out: int, is_tma: bool) -> Launch:
    """Of the large tiles the one whose waves over a GPU's multiprocessors take least time."""

    def tiles(block_m: int, block_n: int) -> int:
        return -(-num_rows // block_m) * -(-num_out // block_n)

    if is_tma and tiles(*_PAIR[:2]) <= 2 * gpu_processors(x):
        return _gpu(*_PAIR).replace(LATE=1, GROUP_M=_PAIR_GROUP_M)
    return _gpu(*min(_LARGE, key=lambda tile: _LARGE[tile] * -(-tiles(*tile[:2]) // gpu_processors(x))))


def _one_block(x: torch.Tensor, num_rows: int, num_out: int, num_in: int) -> Launch:
    """A tile of all rows, in slices of K that fill a wave of one program to a multiprocessor."""
    block_m = next(height for height in _ONE_BLOCK if num_rows <= height)
    blocks, processors = -(-num_out // _DEEP[0]), gpu_processors(x)
    if blocks > processors:
        return _gpu(block_m, *_SHALLOW)
    splits = max(1, min(processors // blocks, num_in // _MIN_SLICE))
    tile = _gpu(block_m, *_DEEP)
    return tile if splits == 1 else tile.replace(SPLITS=splits)


def _some_rows(x: torch.Tensor, num_rows: int, num_out: int) -> Launch:
    """A tile for a GPU that large tiles do not fill: K in slices, or small tiles where K is short."""
    is_fp32, is_low = x.dtype == torch.float32, num_rows <= 64
    block_m, block_k, warps, stages = (64, 32, 4, 3) if is_fp32 else (64, 64, 4, 4) if is_low else _SPLIT_TILE
    widths, m_blocks = (64,) if is_fp32 else _SPLIT_WIDTHS, -(-num_rows // block_m)
    if num_rows > _SPLIT_ROWS:
        return _gpu(block_m, widths[0], block_k, warps, stages)
    block_n, splits = slices_of_k(x, m_blocks, num_out, widths)
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
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": GROUP_M}
    return Launch(constants, {"num_warps": warps, "num_stages": stages})
