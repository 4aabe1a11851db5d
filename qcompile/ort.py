"""ONNX Runtime as a calculator for small models: proofs and control subgraphs."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnxruntime

from qcompile.errors import GraphError
from qcompile.exact_products import with_exact_products
from qcompile.runtime.ort_options import session_options


def open_session(model_bytes: bytes) -> Any:
    """Load a small model for exact evaluation: no graph optimizers, integer products exact, one thread pool, no logging.

    Raises:
        GraphError: ONNX Runtime refuses the model.
    """
    options = session_options(onnxruntime, threads=2)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            with_exact_products(model_bytes), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        raise GraphError(f"ONNX Runtime cannot load a subgraph: {_first_line(error)}") from error


def run_session(cache: dict[bytes, Any], model_bytes: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a small model, keeping its session in `cache` by content.

    Raises:
        GraphError: ONNX Runtime refuses the model or fails while running it.
    """
    key = hashlib.blake2b(model_bytes, digest_size=16).digest()
    if key not in cache:
        cache[key] = open_session(model_bytes)
    try:
        return [np.asarray(x) for x in cache[key].run(None, feeds)]
    except Exception as error:
        raise GraphError(f"ONNX Runtime cannot run a subgraph: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
