"""Rates of ONNX Runtime's quantized matrix products, one projection per graph, at the shapes of a 0.5B Qwen.

    python benchmarks/ort_quantized_kernels.py [--threads 2] [--seconds 2] [--only TEXT] [--json FILE]

What each row says: the time of one product of `rows` tokens (median and best), GOP/s, GB/s of weights, and the largest
difference from the exact product of the same codes, relative to the largest output: the activations that a kernel
rounds to 8 bits by itself show there. Kernels are run in turns, so that a busy moment hits all of them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

SHAPES = {"qkv": (896, 1152), "o": (896, 896), "gate_up": (896, 9728), "down": (4864, 896), "lm_head": (896, 151936)}
DECODE, PREFILL = (1, 4, 8), (128, 1024)
QUANTIZE_ROWS = """
    magnitude = Abs (x)
    largest = ReduceMax <keepdims = 1> (magnitude, last)
    step = Div (largest, most)
"""
PER_TOKEN = f"""{QUANTIZE_ROWS}
    steps = Reshape (step, last)
    count = Shape (steps)
    middles = Expand (middle, count)
    codes = QuantizeLinear <axis = 0> (x, steps, middles)
    product = com.microsoft.MatMulIntegerToFloat (codes, weight, one, scales, middle)
    y = Mul (product, step)
"""
PRIMITIVES = f"""{QUANTIZE_ROWS}
    divided = Div (x, step)
    nearest = Round (divided)
    stored = Add (nearest, offset)
    codes = Cast <to = 2> (stored)
    sums = MatMulInteger (codes, weight, middle)
    float_sums = Cast <to = 1> (sums)
    by_row = Mul (float_sums, step)
    y = Mul (by_row, scales)
"""
STATIC = """
    codes = QuantizeLinear (x, fixed, middle)
    y = com.microsoft.MatMulIntegerToFloat (codes, weight, fixed, scales, middle)
"""


@dataclass
class Kernel:
    """A way to multiply: the body of a graph, its constants, and the weight [K, N] that they stand for."""

    name: str
    body: str
    constants: dict[str, np.ndarray]
    weight: np.ndarray
    weight_bytes: int


def blocks(num_inputs: int, num_outputs: int, bits: int, block: int, level: int, *, asymmetric: bool = False) -> Kernel:
    """MatMulNBits."""
    rng = np.random.default_rng(0)
    groups = num_inputs // block
    codes = rng.integers(0, 1 << bits, (num_outputs, groups, block)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.01, (num_outputs, groups)).astype(np.float32)
    zeros = rng.integers(6, 11, (num_outputs, groups)).astype(np.uint8) if asymmetric else None
    stored = codes if bits == 8 else codes[:, :, ::2] | (codes[:, :, 1::2] << 4)
    constants = {"weight": stored, "scales": scales}
    middle = np.full((num_outputs, groups), 1 << (bits - 1)) if zeros is None else zeros
    if zeros is not None:
        even = np.pad(zeros, ((0, 0), (0, groups % 2)))
        constants["zeros"] = even[:, ::2] | (even[:, 1::2] << 4)
    inputs = ", ".join(["x", *constants])
    attributes = f"K = {num_inputs}, N = {num_outputs}, bits = {bits}, block_size = {block}, accuracy_level = {level}"
    exact = ((codes - middle[:, :, None].astype(np.float32)) * scales[:, :, None]).reshape(num_outputs, -1).T
    name = f"MatMulNBits {bits} bit, blocks of {block}{', zero points' if asymmetric else ''}, level {level}"
    body = f"y = com.microsoft.MatMulNBits <{attributes}> ({inputs})"
    return Kernel(name, body, constants, exact, sum(array.nbytes for array in constants.values()))


def integers(num_inputs: int, num_outputs: int, name: str, body: str, *, signed: bool = False) -> Kernel:
    """Int8 weights per output channel."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (num_inputs, num_outputs)).astype(np.int8)
    scales = rng.uniform(0.005, 0.01, num_outputs).astype(np.float32)
    constants = {
        "weight": weight,
        "scales": scales,
        "last": np.array([-1]),
        "most": np.array(127, np.float32),
        "offset": np.array(128, np.float32),
        "one": np.array(1, np.float32),
        "fixed": np.array(4 / 127, np.float32),
        "middle": np.array(0, np.int8) if signed else np.array(128, np.uint8),
    }
    used = {key: value for key, value in constants.items() if f"({key}" in body or f" {key}" in body}
    return Kernel(name, body, used, weight * scales, weight.nbytes + scales.nbytes)


def kernels_for(num_inputs: int, num_outputs: int) -> list[Kernel]:
    """Every way to compare for one shape."""
    block: Callable[..., Kernel] = lambda *a, **k: blocks(num_inputs, num_outputs, *a, **k)  # noqa: E731
    whole: Callable[..., Kernel] = lambda *a, **k: integers(num_inputs, num_outputs, *a, **k)  # noqa: E731
    found = [block(8, 128, 4), block(8, 64, 4), block(8, 32, 4), block(8, 16, 4), block(8, 256, 4)]
    found = [kernel for kernel in found if num_inputs % kernel.constants["weight"].shape[2] == 0]
    found += [block(4, 32, 4), block(4, 32, 4, asymmetric=True), block(4, 64, 4, asymmetric=True)]
    found += [block(4, 128, 4, asymmetric=True)]
    found += [block(4, 32, level) for level in (0, 1, 2, 3)]
    if num_outputs < 10000:
        found += [block(8, 128, level) for level in (0, 1)]
        found.append(Kernel("MatMul float32", "y = MatMul (x, weight)", {}, np.empty(0), 0))
        random = np.random.default_rng(0).standard_normal((num_inputs, num_outputs)).astype(np.float32)
        found[-1].constants, found[-1].weight, found[-1].weight_bytes = {"weight": random}, random, random.nbytes
    dynamic = "y = com.microsoft.DynamicQuantizeMatMul (x, weight, scales)"
    found.append(whole("W8A8 per token, fused (what int8-dynamic lowers to)", PER_TOKEN))
    found.append(whole("W8A8 per token, single operators", PRIMITIVES))
    found.append(whole("W8A8 static (what int8-static lowers to)", STATIC))
    found.append(whole("W8A8 per tensor, DynamicQuantizeMatMul", dynamic))
    if num_outputs < 10000:
        found.append(whole("W8A8 per token, fused, int8 activations", PER_TOKEN, signed=True))
    return found


def session_for(kernel: Kernel, num_inputs: int, threads: int) -> Any:
    """Load a kernel's graph."""
    text = f'<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>\ng (float[R, {num_inputs}] x) => (float y)'
    names = ", ".join(f"{ir.DataType.from_numpy(a.dtype).name.lower()} {key}" for key, a in kernel.constants.items())
    model = ir.from_onnx_text(f"{text} {{\n{kernel.body}\n}}".replace("(float[R", f"({names}, float[R"))
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in kernel.constants]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(kernel.constants[value.name], name=value.name)
        graph.register_initializer(value)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def measure(shape: str, rows: int, kernels: list[Kernel], sessions: list[Any], seconds: float) -> list[dict[str, Any]]:
    """Time the kernels in turns on the same tokens."""
    num_inputs = SHAPES[shape][0]
    x = np.clip(np.random.default_rng(1).standard_normal((rows, num_inputs)), -4, 4).astype(np.float32)
    times: list[list[float]] = [[] for _ in kernels]
    errors = []
    for kernel, session in zip(kernels, sessions, strict=True):
        exact = x[:8] @ kernel.weight
        errors.append(float(np.abs(session.run(None, {"x": x})[0][:8] - exact).max() / np.abs(exact).max()))
    slow = [False] * len(kernels)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds * len(kernels) or len(times[0]) < 3:
        for index, session in enumerate(sessions):
            if slow[index] and len(times[index]) >= 2:
                continue
            begun = time.perf_counter()
            session.run(None, {"x": x})
            times[index].append(time.perf_counter() - begun)
            slow[index] = times[index][-1] > seconds / 4
    rates = []
    for kernel, seen, error in zip(kernels, times, errors, strict=True):
        median = statistics.median(seen)
        gops = 2 * rows * num_inputs * SHAPES[shape][1] / median / 1e9
        rate = {
            "shape": shape,
            "rows": rows,
            "kernel": kernel.name,
            "median_ms": median * 1e3,
            "best_ms": min(seen) * 1e3,
        }
        rates.append({**rate, "gops": gops, "gb_per_s": kernel.weight_bytes / median / 1e9, "relative_error": error})
    return rates


def main() -> None:
    """Measure all shapes; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="per kernel and number of rows")
    parser.add_argument("--only", default="", help="shapes to measure, separated by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for shape in options.only.split(",") if options.only else SHAPES:
        kernels = kernels_for(*SHAPES[shape])
        sessions = [session_for(kernel, SHAPES[shape][0], options.threads) for kernel in kernels]
        for rows in DECODE if shape == "lm_head" else (*DECODE, *PREFILL):
            print(f"\n{shape} {SHAPES[shape][0]} x {SHAPES[shape][1]}, {rows} rows")
            for rate in measure(shape, rows, kernels, sessions, options.seconds):
                found.append(rate)
                print(
                    f"  {rate['kernel']:52s} {rate['median_ms']:9.3f} ms  best {rate['best_ms']:9.3f}  "
                    f"{rate['gops']:6.0f} GOP/s  {rate['gb_per_s']:5.1f} GB/s  error {rate['relative_error']:.1e}"
                )
            sys.stdout.flush()
        del kernels, sessions
    if options.json:
        record = {"onnxruntime": onnxruntime.__version__, "threads": options.threads, "rates": found}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
