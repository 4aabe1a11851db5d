"""What this machine allows: memory bandwidth and matrix rates, measured in a fresh process between the other runs.

    python -m qcompile.benchmark.floor     reads {"threads": n, "seconds": s} from stdin, answers in JSON

Bandwidth is that of buffers far larger than any cache, read (a dot product of a vector with itself) and copied (read and
write both counted), with one thread per core. Matrix rates are those of ONNX Runtime's own MatMul (float32) and MatMulInteger
(u8 x s8) kernels at 512 x 1536 x 1536.
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":  # before NumPy is loaded: our threads share the buffers, its own would only get in the way
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime

from qcompile.runtime.ort_options import session_options

Clock = Callable[[], float]
_BUFFER_BYTES = 256 << 20
_ROWS, _INNER, _COLUMNS = 512, 1536, 1536


def best_rate(work: Callable[[], None], amount: float, seconds: float, clock: Clock) -> float:
    """Repeat `work` for about `seconds` (three times at least) and return the best amount per second.

    The best, not the median: this is a limit, and whoever else uses the machine only ever lowers it.
    """
    work()
    rates: list[float] = []
    end = clock() + seconds
    while len(rates) < 3 or clock() < end:
        started = clock()
        work()
        rates.append(amount / max(clock() - started, 1e-9))
    return max(rates)


def memory_rates(threads: int, seconds: float, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Return read and copy bandwidth in bytes per second."""
    count = _BUFFER_BYTES // 4 // threads
    source = [np.ones(count, np.float32) for _ in range(threads)]
    target = [np.zeros(count, np.float32) for _ in range(threads)]
    total = 4 * count * threads
    with ThreadPoolExecutor(threads) as pool:

        def read() -> None:
            list(pool.map(lambda a: np.dot(a, a), source))

        def copy() -> None:
            list(pool.map(np.copyto, target, source))

        return {
            "read_bytes_per_s": best_rate(read, total, seconds, clock),
            "copy_bytes_per_s": best_rate(copy, 2 * total, seconds, clock),
        }


def matrix_rates(threads: int, seconds: float, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Return multiply-add rates in operations per second (two per multiply-add)."""
    operations = 2.0 * _ROWS * _INNER * _COLUMNS
    rng = np.random.default_rng(0)
    rates = {}
    for name, inputs in (
        ("fp32_ops_per_s", {"x": rng.standard_normal((_ROWS, _INNER), np.float32)}),
        ("int8_ops_per_s", {"x": rng.integers(0, 256, (_ROWS, _INNER), np.uint8)}),
    ):
        session = _matmul_session(name.startswith("int8"), threads, rng)

        def multiply(session: Any = session, inputs: dict[str, Any] = inputs) -> None:
            session.run(None, inputs)

        rates[name] = best_rate(multiply, operations, seconds, clock)
    return rates


def _matmul_session(is_integer: bool, threads: int, rng: np.random.Generator) -> Any:
    import onnx_ir as ir

    if is_integer:
        weight = ir.tensor(rng.integers(-127, 128, (_INNER, _COLUMNS), np.int8), name="w")
        op, given, made = "MatMulInteger", ir.DataType.UINT8, ir.DataType.INT32
    else:
        weight = ir.tensor(rng.standard_normal((_INNER, _COLUMNS), np.float32), name="w")
        op, given, made = "MatMul", ir.DataType.FLOAT, ir.DataType.FLOAT
    x = ir.Value(name="x", type=ir.TensorType(given), shape=ir.Shape([_ROWS, _INNER]))
    w = ir.Value(name="w", type=ir.TensorType(weight.dtype), shape=ir.Shape([_INNER, _COLUMNS]), const_value=weight)
    node = ir.node(op, [x, w])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(made)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 18}, name="rate")
    options = session_options(onnxruntime, threads)
    model_bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])


def run_job(job: dict[str, Any]) -> dict[str, float]:
    """Measure everything."""
    threads, seconds = job["threads"], job["seconds"]
    return {**memory_rates(threads, seconds), **matrix_rates(threads, seconds)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_job(json.loads(sys.stdin.read()))) + "\n")
