"""Time and peak memory of `qcompile export` and `qcompile optimize`: the real 0.5B model, and Qwen2.5-7B's shape.

    python benchmarks/time_and_memory.py real MODEL.gguf           # fp32; wanted: see WANTED
    python benchmarks/time_and_memory.py make-7b DIR               # writes 15 GB of random bfloat16 shards
    python benchmarks/time_and_memory.py 7b DIR --work SCRATCH     # bf16, beside a plain copy of the same bytes

Peak memory is the child's ru_maxrss, the figure `/usr/bin/time -v` prints. Each command prints a table and, as
its last line, JSON. What a step wrote is deleted when nothing needs it any more; `7b` needs 30 GB of scratch beside the
15 GB of DIR.
"""

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONFIG_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SHARD_BYTES = 4 << 30
CHUNK_BYTES = 64 << 20
WANTED = {  # most seconds, most megabytes; a 7B step is compared with the copy instead of a limit in seconds
    ("real 0.5B, fp32", "export"): (10, 1000),
    ("real 0.5B, fp32", "fuse"): (40, 1500),
    ("7B shape, bf16", "export"): ("", 2000),
    ("7B shape, bf16", "fuse"): ("", 2000),
}


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; return its wall time, CPU time and peak resident memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
    }


def qcompile(*arguments: str | Path) -> dict[str, float]:
    """Measure one qcompile command in a process of its own."""
    entry = "from qcompile.cli.main import main; main()"
    return measured([sys.executable, "-c", entry, *map(str, arguments)])


def shapes_7b() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of Qwen2.5-7B: name and shape."""
    hidden, ffn, vocab = CONFIG_7B["hidden_size"], CONFIG_7B["intermediate_size"], CONFIG_7B["vocab_size"]
    kv = CONFIG_7B["num_key_value_heads"] * hidden // CONFIG_7B["num_attention_heads"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(CONFIG_7B["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        for letter, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{letter}_proj.weight", (rows, hidden)
            yield f"{layer}.self_attn.{letter}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{layer}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def make_checkpoint(directory: Path, seed: int) -> None:
    """Write config.json and sharded safetensors with random bfloat16 weights (2^-15 to 2^-7 in size)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG_7B, indent=2))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes_7b():
        size_bytes = 2 * int(np.prod(shape))
        if filled and filled + size_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size_bytes
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / file_name, tensors, rng)
        weight_map |= {name: file_name for name, _ in tensors}
        print(f"{directory / file_name}: {len(tensors)} tensors", file=sys.stderr)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> None:
    """Write one safetensors file, a chunk at a time."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors:
        size_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            left = int(np.prod(shape))
            while left > 0:
                count = min(left, CHUNK_BYTES // 2)
                stream.write(random_bfloat16(rng, count, is_norm="norm" in name).data)
                left -= count


def random_bfloat16(rng: np.random.Generator, count: int, *, is_norm: bool) -> np.ndarray:
    """Return bfloat16 values as bits [count]: ones for a norm, else random sign, mantissa, low exponent."""
    if is_norm:
        return np.full(count, 0x3F80, np.uint16)
    bits = np.frombuffer(rng.bytes(2 * count), np.uint16).copy()
    bits &= 0x83FF
    bits |= 0x70 << 7
    return bits


def copy_seconds(source: Path, scratch: Path) -> float:
    """Return the time of a plain copy of a checkpoint's safetensors."""
    target = scratch / "copy"
    target.mkdir(parents=True)
    started = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        subprocess.run(["cp", "--reflink=never", "--sparse=never", str(path), str(target)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def report(title: str, steps: dict[str, list[dict[str, float]]], **facts: float) -> None:
    """Print a table, medians over the runs of each step, and the JSON line."""
    width = max(map(len, steps))
    print(f"{title}\n{'':<{width}} {'seconds':>9} {'wanted':>8} {'peak MB':>9} {'wanted':>8}")
    for name, runs in steps.items():
        seconds, peak = (statistics.median(run[key] for run in runs) for key in ("seconds", "peak_rss_mb"))
        most = WANTED.get((title, name), ("", ""))
        print(f"{name:<{width}} {seconds:>9.1f} {most[0]:>8} {peak:>9.0f} {most[1]:>8}")
    print(json.dumps({"what": title, "machine_load": os.getloadavg()[0], **facts, "steps": steps}))


def run_real(options: argparse.Namespace) -> None:
    """Measure the real model several times: the fp32 export, then each list of passes on it."""
    steps: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            exported = Path(scratch) / "exported"
            steps.setdefault("export", []).append(qcompile("export", options.source, "-o", exported))
            for passes in options.passes:
                steps.setdefault(passes, []).append(optimize(exported, passes, Path(scratch)))
    report("real 0.5B, fp32", steps)


def run_7b(options: argparse.Namespace) -> None:
    """Measure the 7B shape once: the plain copy, the bf16 export, then each list of passes on it."""
    size_bytes = sum(path.stat().st_size for path in options.source.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        steps = {"plain copy": [{"seconds": copy_seconds(options.source, Path(scratch)), "peak_rss_mb": 0.0}]}
        exported = options.keep or Path(scratch) / "exported"
        steps["export"] = [qcompile("export", options.source, "-o", exported, "--dtype", "bf16")]
        if options.consume:
            for shard in options.source.glob("*.safetensors"):
                shard.unlink()
        for passes in options.passes:
            steps[passes] = [optimize(exported, passes, Path(scratch))]
    report("7B shape, bf16", steps, size_bytes=size_bytes)


def optimize(exported: Path, passes: str, scratch: Path) -> dict[str, float]:
    """Measure `qcompile optimize` with the default verification; delete what it wrote."""
    output = scratch / "optimized"
    run = qcompile("optimize", exported, "--passes", *passes.split(), "-o", output)
    shutil.rmtree(output)
    return run


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    real = commands.add_parser("real")
    real.add_argument("source", type=Path)
    real.add_argument("--repeat", type=int, default=3)
    real.set_defaults(run=run_real)
    make = commands.add_parser("make-7b")
    make.add_argument("directory", type=Path)
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(run=lambda options: make_checkpoint(options.directory, options.seed))
    large = commands.add_parser("7b")
    large.add_argument("source", type=Path)
    large.add_argument("--keep", type=Path, help="keep the export here")
    large.add_argument("--consume", action="store_true", help="delete the shards once exported: 30 GB do, not 45")
    large.set_defaults(run=run_7b)
    for command in (real, large):
        command.add_argument(
            "--passes", nargs="*", default=["fuse"], help="lists for optimize: fuse,int8 'fuse,int4 --algorithm rtn'"
        )
        command.add_argument("--work", type=Path, help="scratch directory")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
