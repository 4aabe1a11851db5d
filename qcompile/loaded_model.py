"""What a quantized model really is once ONNX Runtime has loaded it: which kernels run, and how much memory is resident.

Optimizers can undo a quantization silently: weights that stand behind a DequantizeLinear or a Cast are constants, and
folding constants makes floats of them. So the model is loaded in a process of its own, run once with profiling, and every
tensor that was quantized is looked up among the kernels that ran.

    python -m qcompile.loaded_model DIRECTORY        prints the findings as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import VerifyError
from qcompile.runtime.host import default_threads
from qcompile.runtime.huge_pages import release_free_memory
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.ort_options import session_options

QUANTIZED_KERNELS = frozenset(
    {
        "MatMulNBits",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "QLinearMatMul",
    }
)
_FLOAT_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
_TIMEOUT_S = 1800
_NUM_TOKENS = 3
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class LoadedModel:
    """What was found.

    Attributes:
        kernels: How often each kernel ran, for one call.
        quantized: Quantized tensors that a quantized kernel multiplied.
        dequantized: Those that became float when the model was loaded.
        int8_caches: Layers whose KV cache is int8.
        resident_bytes: Memory of the process after loading and one call.
        private_bytes: The part of it that is no file's: what no other process can share.
        peak_bytes: The most it had.
    """

    kernels: dict[str, int]
    quantized: int
    dequantized: tuple[str, ...]
    int8_caches: int
    resident_bytes: int
    private_bytes: int
    peak_bytes: int

    def record(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    def warnings(self, target: str) -> list[str]:
        """Say which tensors run as floats although they are stored quantized for a target."""
        if not self.dequantized:
            return []
        ort = "lower-quantized-blocks-to-ort says why no kernel takes them"
        advice = ort if target == "ort" else "--target ort has kernels for them"
        warning = (
            f"{len(self.dequantized)} of {self.quantized + len(self.dequantized)} quantized tensors are made float when "
            f"ONNX Runtime loads the model ('{self.dequantized[0]}', …): they take float memory and run no faster; "
            f"{advice}"
        )
        return [warning]

    def summary(self) -> str:
        """One line for people."""
        total = self.quantized + len(self.dequantized)
        parts = [f"{self.quantized} of {total} quantized tensors run quantized"] if total else []
        if self.int8_caches:
            parts.append(f"int8 KV cache in {self.int8_caches} layers")
        return ", ".join([*parts, f"{self.resident_bytes / 1e6:.0f} MB resident"])


def inspect_loaded(directory: Path) -> LoadedModel:
    """Load a compiled-model directory in a process of its own and look.

    Raises:
        VerifyError: It cannot be loaded or run.
    """
    command = [sys.executable, "-m", "qcompile.loaded_model", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise VerifyError(f"{directory}: not loaded and run once within {_TIMEOUT_S} s") from None
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise VerifyError(f"{directory}: ONNX Runtime cannot load and run it: {last[0][:400]}")
    record = json.loads(done.stdout)
    return LoadedModel(**{**record, "dequantized": tuple(record["dequantized"])})


def _look(directory: Path) -> LoadedModel:
    import onnxruntime

    manifest = Manifest.load(directory)
    options = session_options(onnxruntime, default_threads())
    with tempfile.TemporaryDirectory() as scratch:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        path = directory / manifest.graph().file.name
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        release_free_memory()
        inputs = session.get_inputs()
        session.run(["logits"], {value.name: _feed(value, manifest) for value in inputs})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [(e["name"].removesuffix("_kernel_time"), e["args"]["op_name"]) for e in events if _is_kernel(e)]
    tensors = manifest.quantization.get("tensors", [])
    lost = [tensor["name"] for tensor in tensors if not _runs_quantized(tensor, ran)]
    # the manifest says what was done to the cache; whether the graph that was loaded has it so is seen here
    int8_caches = sum(v.name.endswith(".key") and v.type == "tensor(int8)" for v in inputs)
    memory = _memory()
    kernels = dict(sorted(Counter(op for _, op in ran).items()))
    sizes = [memory.get(key, 0) for key in ("VmRSS", "RssAnon", "VmHWM")]
    return LoadedModel(kernels, len(tensors) - len(lost), tuple(lost), int8_caches, *sizes)


def _is_kernel(event: dict[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith("_kernel_time")


def _runs_quantized(tensor: dict[str, Any], ran: Sequence[tuple[str, str]]) -> bool:
    """Whether the kernel of that name reads codes, or those that the operator's definition was inlined to."""
    name, operator = str(tensor["name"]), str(tensor.get("operator", ""))
    inlined = f"_inlfunc_{operator}_"
    own = [op for seen, op in ran if seen == name or seen.startswith((f"{name}.", f"{name}_", f"{name}/"))]
    if not any(op in QUANTIZED_KERNELS | _FLOAT_PRODUCTS for op in own):
        own = [op for seen, op in ran if seen.startswith(inlined)]
    reads_codes = QUANTIZED_KERNELS | ({"Gather"} if operator.startswith("Embedding") else set())
    return any(op in reads_codes for op in own) and not any(op in _FLOAT_PRODUCTS for op in own)


def _feed(value: Any, manifest: Manifest) -> np.ndarray:
    """Return an input for one row of a few tokens after no past."""
    shape = manifest.model
    dtype = _TYPES[value.type]
    is_shared = manifest.graph().io.kv_cache == "shared"
    if value.name.startswith("past_key_values."):
        capacity = 2 * _NUM_TOKENS if is_shared else 0
        return np.zeros((1, shape.num_key_value_heads, capacity, shape.head_dim), dtype)
    feeds = {
        "input_ids": np.arange(_NUM_TOKENS)[None] % shape.vocab_size,
        "position_ids": np.arange(_NUM_TOKENS)[None],
        "attention_mask": np.ones((1, _NUM_TOKENS)),
        "seqlens_k": np.array([_NUM_TOKENS - 1]),
        "total_sequence_length": np.array(_NUM_TOKENS).reshape((1,) * len(value.shape)),
        "last_token_index": np.array([_NUM_TOKENS - 1]),
    }
    return feeds[value.name].astype(dtype)


def _memory() -> dict[str, int]:
    """Return the sizes in /proc/self/status, in bytes; empty where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {key: int(size.split()[0]) << 10 for key, size in pairs}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_look(Path(sys.argv[1])).record()))
