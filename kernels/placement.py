"""Where a kernel runs: how many programs to start, and with which tile.

On an NPU a program stays on one core and walks over the work, so there are as many programs as cores, and the tile comes
from the table that was checked against the chip's buffers. On a GPU there is one program for each tile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any, TypeVar

import torch

from qcompile.kernels.arguments import VARIANTS, fail
from qcompile.kernels.tile_table import table

_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])
_INTERPRETED_PROGRAMS = 3  # few and odd, so that programs walk over several tiles and end unevenly
_MAX_ROW = 1 << 16
_MIN_SLICE = 512  # of K: a shorter one is over before its loads are many
FEW_ROWS = 1024  # up to so many a GPU waits for memory, and for programs to start and end; beyond, for bandwidth
_SECOND_AXIS = 65_535  # the longest of a GPU's grid; the first ends at 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """The compile-time constants of a launch and what only a GPU is told."""

    constants: dict[str, int]
    gpu_options: dict[str, int] = field(default_factory=dict)

    def replace(self, **constants: int) -> "Launch":
        """The same with other values of some constants."""
        return Launch({**self.constants, **constants}, self.gpu_options)

    def arguments(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments for the launch of a kernel on the tensor's device."""
        return {**self.constants, **(self.gpu_options if tensor.device.type == "cuda" else {})}


def on_its_device(launch: _Launcher) -> _Launcher:
    """Make the device of the first tensor the current one during a launch: Triton launches on the current device."""

    @wraps(launch)
    def guarded(*arguments: Any, **options: Any) -> Any:
        first = next((one for one in (*arguments, *options.values()) if isinstance(one, torch.Tensor)), None)
        if first is None or first.device.type not in ("cuda", "npu"):
            return launch(*arguments, **options)
        with getattr(torch, first.device.type).device(first.device):
            return launch(*arguments, **options)

    return guarded  # type: ignore[return-value]


def compiled_in(tensor: torch.Tensor, *sizes: int) -> tuple[Any, ...]:
    """Sizes of a model as a kernel's arguments, for a GPU constants of the compilation whatever the kernel's signature says.

    Masks and addresses fold, and division by them is a multiplication: loads start sooner. Every width is compiled anew, so
    this is not for what changes from call to call. An NPU's tiles were checked with arguments.
    """
    return tuple(_constant(size) for size in sizes) if tensor.device.type == "cuda" else sizes


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least number."""
    return 1 << max(number - 1, 0).bit_length()


def grid(tensor: torch.Tensor, num_tiles: int, core: str = "vector") -> tuple[int]:
    """How many programs to start for that many tiles."""
    if tensor.device.type == "npu":
        return (min(num_tiles, _npu_cores(tensor.device, core)),)
    if tensor.device.type == "cpu":
        return (min(num_tiles, _INTERPRETED_PROGRAMS),)
    return (num_tiles,)


def walks(num_rows: int) -> int:
    """WALK for a GPU: whether programs number their tiles through, as on an NPU, or have a grid of two axes.

    Two axes spare the divisions; there may be more rows than the second axis holds.
    """
    return int(num_rows > _SECOND_AXIS)


def tile_grid(tensor: torch.Tensor, tile: Launch, num_blocks: int, num_rows: int = 1) -> tuple[int, ...]:
    """How many programs to start for rows that are cut into blocks, by the WALK of the tile.

    Without a walk the blocks are the first axis, so that programs start in the order of memory.
    """
    return grid(tensor, num_rows * num_blocks) if tile.constants["WALK"] else (num_blocks, num_rows)


def few_rows_grid(x: torch.Tensor, tile: Launch, num_rows: int, num_out: int) -> tuple[int]:
    """How many programs a weight-only product starts: only the kernel without stages walks over tiles."""
    num_tiles = -(-num_out // tile.constants["BLOCK_N"])
    if "BLOCK_M" in tile.constants:  # takes all rows at once
        return (num_tiles,)
    return (num_rows * num_tiles,) if tile.constants["STAGES"] else grid(x, num_rows * num_tiles)


def slices_of_k(x: torch.Tensor, m_blocks: int, num_out: int, widths: Sequence[int]) -> tuple[int, int]:
    """BLOCK_N, one of widths, and the number of slices of K that give a GPU's multiprocessors their programs.

    The widest tile of which three quarters of them get one, because it reads x least often; else that of which most do.

    Args:
        x: The left operand, [..., K].
        m_blocks: Blocks of rows.
        num_out: N.
        widths: To choose from, widest first.
    """
    processors = gpu_processors(x)
    most, cut = 0, (widths[0], 1)
    for width in widths:
        tiles = m_blocks * -(-num_out // width)
        splits = max(1, min(processors // tiles, x.shape[-1] // _MIN_SLICE))
        if tiles * splits > most:
            most, cut = tiles * splits, (width, splits)
        if 4 * most >= 3 * processors:
            break
    return cut


def from_table(
    operator: str, function: str, dtype: torch.dtype, exactly: Mapping[str, int] | None = None, **wanted: int
) -> Launch:
    """The smallest tile of the operator's table that is large enough."""
    return Launch(dict(table(operator, function).pick(VARIANTS[dtype], exactly, **wanted).constants))


def row_in_registers(operator: str, num_cols: int, per_thread: int = 8) -> Launch:
    """A GPU tile of one whole row with so many elements a thread, more where a block has no more threads."""
    if num_cols > _MAX_ROW:
        raise fail(operator, f"rows of {num_cols} elements; this operator takes at most {_MAX_ROW}")
    block_cols = power_of_two(num_cols)
    return Launch({"BLOCK_COLS": block_cols}, {"num_warps": max(1, min(32, block_cols // 32 // per_thread))})


def gpu_processors(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU (an H100's number where there is no GPU to ask)."""
    if tensor.device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@cache
def _constant(size: int) -> Any:
    from triton.language import constexpr

    return constexpr(size)


def is_hopper(tensor: torch.Tensor) -> bool:
    """Whether the tensor's GPU copies whole tiles by itself and can start a kernel before the last has ended."""
    if tensor.device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def _npu_cores(device: torch.device, core: str) -> int:
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["num_vectorcore" if core == "vector" else "num_aicore"])
