"""Time on a GPU: captured graphs over several input sets, replayed in turns; and the two ceilings all is held against."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_COPY_BYTES = 1 << 30
_CACHE_BYTES = 256 << 20  # more than any GPU's second-level cache: input sets together exceed it
_MAX_SETS = 64
_ROUNDS = 20
_MANY_CALLS = 32  # so many, or so long a replay, hide what starting a graph takes: some 2 us
_LONG_REPLAY_US = 1500.0
_WARM_UP_SECONDS = 0.05  # a GPU that waited for a compiler has lowered its clocks
_MATRIX = 8192


def input_sets(size_bytes: int) -> int:
    """How many input sets keep repeated runs out of the cache."""
    return max(1, min(_MAX_SETS, -(-_CACHE_BYTES // max(size_bytes, 1))))


def times_us(functions: Mapping[str, Callable[..., Any]], sets: Sequence[tuple[Any, ...]]) -> dict[str, float]:
    """Microseconds a call of each function: the median over rounds in which every function's graph is replayed once.

    A graph calls its function on every input set, and goes round and round over them until it holds many calls: its own start
    is no cost of a kernel that has hundreds before and after it. In turns, so that a change of the machine's pace meets all
    alike.
    """
    captured = {name: _capture_many(function, sets) for name, function in functions.items()}
    begin = time.monotonic()
    while time.monotonic() - begin < _WARM_UP_SECONDS:
        for graph, _ in captured.values():
            graph.replay()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(_ROUNDS):
        for name, (graph, calls) in captured.items():
            times[name].append(_replay_us(graph) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def passes(num_sets: int, replay_us: float) -> int:
    """How often a graph goes over its input sets, when once takes replay_us."""
    return max(1, min(-(-_MANY_CALLS // num_sets), math.ceil(_LONG_REPLAY_US / max(replay_us, 1.0))))


def _capture_many(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of many calls, and how many; one of a single pass over the sets says how many passes are enough."""
    _warm_up(function, sets)
    once = _capture(function, sets, 1)
    _replay_us(once)
    number = passes(len(sets), _replay_us(once))
    graph = once if number == 1 else _capture(function, sets, number, once.pool())
    return graph, number * len(sets)


def _warm_up(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for arguments in (*sets, *sets):
            function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _capture(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], number: int, pool: Any = None
) -> torch.cuda.CUDAGraph:
    """Results are kept for a pass, so that each set has memory of its own; the next pass, or graph of that pool, reuses it."""
    graph = torch.cuda.CUDAGraph()
    results: list[Any] = [None] * len(sets)
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(number):
            for at, arguments in enumerate(sets):
                results[at] = None
                results[at] = function(*arguments)
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1000.0


def copy_bytes_per_us() -> float:
    """Bytes read plus bytes written a microsecond by a large device-to-device copy: the driver's or a kernel's, the faster."""
    source = torch.randint(0, 127, (_COPY_BYTES // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copies = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.bitwise_not(source, out=target)}
    return 2 * _COPY_BYTES / min(times_us(copies, [()]).values())


def operations_per_us(dtype: torch.dtype) -> float:
    """Multiplications and additions a microsecond of the library's plain product, 8192 on a side."""
    if dtype == torch.int8:
        left, right = (torch.randint(-127, 128, (_MATRIX, _MATRIX), dtype=dtype, device="cuda") for _ in range(2))
        product: Callable[[], Any] = lambda: torch._int_mm(left, right.T)  # noqa: E731
    else:
        left, right = (torch.randn(_MATRIX, _MATRIX, dtype=dtype, device="cuda") for _ in range(2))
        product = lambda: left @ right.T  # noqa: E731
    return 2 * _MATRIX**3 / times_us({"product": product}, [()])["product"]
