"""What the six tests of all passes share: each is made once per session."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompile.passes import registry
from qcompile.passes.base import PassContext
from qcompile.passes.canonicalize_shapes import CanonicalizeShapes
from qcompile.passes.clean import EliminateIdentities
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.proof import Prover
from qcompile.passes.quantize_int8 import QuantizeInt8
from tests.passes.six_tests import TIDY

ROOT = Path(__file__).parents[2]
GRAPHS = ROOT / "tests" / "data" / "graphs"


@pytest.fixture(scope="session")
def digests() -> list[dict[str, str]]:
    """Digest of every example under two hash seeds."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.passes.hash_seed"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "20")
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return [json.loads(text) for text in outputs]


@pytest.fixture(scope="session")
def counts_of() -> Callable[[str], dict[str, int]]:
    """Rewrites per pass when the phases run over one of the small exporter graphs."""

    @functools.cache
    def count(graph_name: str) -> dict[str, int]:
        context = PassContext(ir.load(GRAPHS / f"{graph_name}.onnx"), Prover())
        counts: Counter[str] = Counter(dict.fromkeys(registry.PASSES, 0))
        plan = [*TIDY]
        for fusion in registry.FUSE:
            plan += [fusion, CanonicalizeShapes, EliminateIdentities] if fusion is FuseAttention else [fusion]
        for pass_class in (*plan, QuantizeInt8, *registry.LOWER, *registry.CLEAN):
            counts[pass_class.name] += pass_class()(context).rewrites
        return dict(counts)

    return count
