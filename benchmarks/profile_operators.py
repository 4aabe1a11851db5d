"""Where the time goes in a compiled model on ONNX Runtime, operator by operator, and what a native kernel would gain.

    python benchmarks/profile_operators.py DIR [DIR …] [--prefill 1024] [--batch 8] [--json FILE]

The models are quantized ones. Each runs three calls with ONNX Runtime's own profiler: a prompt of one row, and steps of one
row and of a batch behind it. Time is summed per operator; the fastest of the repetitions counts for each node, as other
work on the machine only ever adds. Products are the matrix products, with their GOP/s; everything else is what fused kernels
could save. The last line of each table says what would be left if products ran at --rate (by default ONNX Runtime's own
u8 x s8 rate at 512 x 1536 x 1536, measured first) or, in decoding, at memory speed, and the rest cost nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qcompile.benchmark.floor import matrix_rates, memory_rates
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.ort_options import session_options

PRODUCTS = {"MatMulNBits", "MatMulIntegerToFloat", "MatMulInteger", "MatMul", "Gemm", "FusedMatMul"}
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
REPETITIONS = 3


def main() -> int:
    """Profile every model, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rate", type=float, help="GOP/s that a native kernel would reach.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rate = arguments.rate or matrix_rates(arguments.threads, 2.0)["int8_ops_per_s"] / 1e9
    bandwidth = memory_rates(arguments.threads, 2.0)["read_bytes_per_s"] / 1e9
    print(f"{arguments.threads} threads, {rate:.0f} GOP/s in int8, {bandwidth:.1f} GB/s\n")
    records = []
    for directory in arguments.models:
        for name, rows, new, past in (
            (f"prefill {arguments.prefill}", 1, arguments.prefill, 0),
            ("decode, 1 row", 1, 1, 128),
            (f"decode, {arguments.batch} rows", arguments.batch, 1, 128),
        ):
            record = profile(directory, arguments.threads, rows, new, past)
            record |= {"model": directory.name, "case": name, "tokens": rows * new}
            record |= limit(record, directory, rate, bandwidth)
            records.append(record)
            print(table(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


def profile(directory: Path, threads: int, rows: int, new: int, past: int) -> dict[str, Any]:
    """Return milliseconds per operator of one call: the least of several for each node."""
    manifest = Manifest.load(directory)
    options = session_options(onnxruntime, threads)
    with tempfile.TemporaryDirectory() as scratch:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        path = directory / manifest.graph().file.name
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {value.name: feed(value, manifest, rows, new, past) for value in session.get_inputs()}
        for _ in range(REPETITIONS + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    least: dict[str, float] = {}
    kind: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            least[name] = min(least.get(name, np.inf), event["dur"] / 1e3)
            kind[name] = event["args"]["op_name"]
    milliseconds: dict[str, float] = defaultdict(float)
    nodes: dict[str, int] = defaultdict(int)
    for name, op in kind.items():
        milliseconds[op] += least[name]
        nodes[op] += 1
    return {"milliseconds": dict(milliseconds), "nodes": dict(nodes)}


def feed(value: Any, manifest: Manifest, rows: int, new: int, past: int) -> np.ndarray:
    """Return an input for `rows` rows of `new` tokens after `past`."""
    shape, dtype, total = manifest.model, _TYPES[value.type], past + new
    is_shared = manifest.graph().io.kv_cache == "shared"
    if value.name.startswith("past_key_values."):
        capacity = total if is_shared else past
        return np.zeros((rows, shape.num_key_value_heads, capacity, shape.head_dim), dtype)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (rows, new))
    arrays = {
        "input_ids": ids,
        "position_ids": np.tile(np.arange(past, total), (rows, 1)),
        "attention_mask": np.ones((rows, total)),
        "seqlens_k": np.full(rows, total - 1),
        "total_sequence_length": np.array(total).reshape((1,) * len(value.shape)),
        "last_token_index": np.full(rows, new - 1),
    }
    return arrays[value.name].astype(dtype)


def limit(record: dict[str, Any], directory: Path, rate: float, bandwidth: float) -> dict[str, float]:
    """Return the time of all, of products, and what products would take at the rate or at memory speed."""
    spent = record["milliseconds"]
    products = sum(ms for op, ms in spent.items() if op in PRODUCTS)
    multiplied = [
        t for t in Manifest.load(directory).quantization["tensors"] if not t["operator"].startswith("Embedding")
    ]
    sizes = [t["shape"][0] * t["shape"][1] for t in multiplied]
    head = max(sizes)  # it is computed for the last token of a prompt only
    tokens = record["tokens"]
    rows = 1 if record["case"].startswith("prefill") else tokens
    operations = 2.0 * (tokens * (sum(sizes) - head) + rows * head)
    weights = sum(f.stat().st_size for f in directory.glob("*.onnx*"))
    floor = max(operations / rate / 1e6, weights / bandwidth / 1e6)
    return {
        "total_ms": sum(spent.values()),
        "products_ms": products,
        "products_gops": operations / products / 1e6,
        "floor_ms": floor,
    }


def table(record: dict[str, Any]) -> str:
    """Return one case as a Markdown table, the largest first."""
    total = record["total_ms"]
    lines = [
        f"### {record['model']}, {record['case']}: {total:.1f} ms",
        "",
        "| operator | nodes | ms | share |",
        "|---|---|---|---|",
    ]
    ranked = sorted(record["milliseconds"].items(), key=lambda item: -item[1])
    lines += [f"| {op} | {record['nodes'][op]} | {ms:.2f} | {ms / total:.1%} |" for op, ms in ranked[:10]]
    products, floor, rate = record["products_ms"], record["floor_ms"], record["products_gops"]
    lines.append(
        f"\nproducts {products:.1f} ms at {rate:.0f} GOP/s, the rest {total - products:.1f} ms; at the limit of this machine "
        f"{floor:.1f} ms: a native kernel could gain {total / floor:.2f}x at most\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
