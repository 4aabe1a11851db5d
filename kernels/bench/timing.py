"""Time on a GPU: a captured graph over several input sets, replayed; and the two ceilings everything is held against."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

_COPY_BYTES = 1 << 30
_CACHE_BYTES = 256 << 20  # more than any GPU's second-level cache: input sets together exceed it
_MAX_SETS = 64
_REPEATS = 20
_MATRIX = 8192


def input_sets(size_bytes: int) -> int:
    """How many input sets keep repeated runs out of the cache."""
    return max(1, min(_MAX_SETS, -(-_CACHE_BYTES // max(size_bytes, 1))))


def time_us(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> float:
    """Microseconds a call: the median of replays of a graph that calls the function once on every input set."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for arguments in (*sets, *sets):
            function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function(*arguments) for arguments in sets]  # kept, so that each has memory of its own
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000.0 / len(sets))
    del results
    return statistics.median(times)


def copy_bytes_per_us() -> float:
    """Bytes read plus bytes written a microsecond by a large device-to-device copy."""
    source = torch.randint(0, 127, (_COPY_BYTES,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / time_us(lambda: target.copy_(source), [()])


def operations_per_us(dtype: torch.dtype) -> float:
    """Multiplications and additions a microsecond of the library's plain product, 8192 on a side."""
    if dtype == torch.int8:
        left, right = (torch.randint(-127, 128, (_MATRIX, _MATRIX), dtype=dtype, device="cuda") for _ in range(2))
        return 2 * _MATRIX**3 / time_us(lambda: torch._int_mm(left, right.T), [()])
    left, right = (torch.randn(_MATRIX, _MATRIX, dtype=dtype, device="cuda") for _ in range(2))
    return 2 * _MATRIX**3 / time_us(lambda: left @ right.T, [()])
