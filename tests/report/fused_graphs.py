"""Graphs for the report's tests: the exporters' small ones, before and after fusion."""

from functools import cache
from pathlib import Path

import onnx_ir as ir

from qcompile.model_reader import load_model
from qcompile.passes.base import PassContext
from qcompile.passes.registry import CANONICALIZE, CLEAN, FUSE, PASSES
from qcompile.target import TARGETS

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
EXPORTED = tuple(sorted(path.stem for path in GRAPHS.glob("qwen*.onnx")))


def exported(name: str) -> ir.Model:
    """One of the exporters' graphs, as it came."""
    return load_model(GRAPHS / f"{name}.onnx")


@cache
def fused(name: str, target: str = "") -> ir.Model:
    """The same after fusing, and after lowering if a target is named; shared, so do not change it."""
    context = PassContext(exported(name), None)
    passes = [*CLEAN, *CANONICALIZE, *CLEAN, *CANONICALIZE, *CLEAN, *FUSE, *CLEAN]
    if target:
        passes += [*(PASSES[lowering] for lowering in TARGETS[target].lowering), *CLEAN]
    for one in passes:
        one()(context)
    return context.model
