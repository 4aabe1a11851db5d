"""The real Qwen2.5-Coder-0.5B-Instruct lowered for Ascend910B4: legal, few kernels, and the fused graph's tokens.

The lowered graphs run through the definitions of their operators in the roundings of float16, not on a device.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qcompile.ascend.reference_session import ReferenceSession
from qcompile.runtime.manifest import Manifest
from tests.real.real_model import PROMPTS, Measured, Trace, qcompile, traces_of

pytestmark = pytest.mark.real
NUM_TOKENS = 64
BUCKETS = ("--batch", "1,4", "--kv-len", "1024", "--prefill-len", "128")
MAX_KERNELS = {"fuse": 20, "fuse,int8": 28}


Lowered = Iterator[tuple[Path, Measured]]


def lower(work: Path, exported: Path, passes: str, *more: str) -> Lowered:
    """Yield a directory with what was measured, and remove it: two gigabytes, wanted in this file only."""
    output = work / f"ascend-{passes.replace(',', '-')}"
    arguments = ("--passes", passes, "--target", "ascend910b4", *BUCKETS, "-o", output)
    yield output, qcompile(work, output.name, "optimize", exported, *arguments, *more)
    shutil.rmtree(output)


@pytest.fixture(scope="module")
def lowered(work: Path, exported: tuple[Path, Measured]) -> Lowered:
    yield from lower(work, exported[0], "fuse")


@pytest.fixture(scope="module")
def lowered_int8(work: Path, exported: tuple[Path, Measured]) -> Lowered:
    yield from lower(work, exported[0], "fuse,int8", "--verify", "off")


def check_legality_and_kernels(work: Path, directory: Path, report: Measured, most: int) -> None:
    for cann in ("8.1", "9.1"):
        name = f"check-{directory.name}-{cann}"
        found = qcompile(work, name, "check", directory, "--target", "ascend910b4", "--cann", cann).record
        assert [graph["findings"] for graph in found["graphs"]] == [[], [], []]
    kernels = {name: graph["kernels_per_layer"] for name, graph in report.record["ascend"]["graphs"].items()}
    print(f"\n{directory.name}: kernels per layer {json.dumps(kernels)}, peak RSS {report.peak_rss_bytes / 1e6:.0f} MB")
    assert all(count <= most for name, count in kernels.items() if name.startswith("decode"))


def test_float16_is_legal_and_has_few_kernels(work: Path, lowered: tuple[Path, Measured]) -> None:
    check_legality_and_kernels(work, *lowered, MAX_KERNELS["fuse"])
    assert lowered[1].peak_rss_bytes <= 1.5e9


def test_int8_is_legal_and_has_few_kernels(work: Path, lowered_int8: tuple[Path, Measured]) -> None:
    check_legality_and_kernels(work, *lowered_int8, MAX_KERNELS["fuse,int8"])


@pytest.fixture(scope="module")
def traces(lowered: tuple[Path, Measured], prompts: dict[str, list[int]]) -> dict[str, Trace]:
    session = ReferenceSession(lowered[0], Manifest.load(lowered[0]), threads=2)
    return traces_of(session, prompts, NUM_TOKENS)


@pytest.mark.parametrize("name", PROMPTS)
def test_same_tokens_as_the_fused_graph(name: str, traces: dict[str, Trace], fused_traces: dict[str, Trace]) -> None:
    seen, wanted = traces[name], fused_traces[name]
    assert seen.tokens == wanted.tokens[:NUM_TOKENS]
    a, b = seen.logits.astype(np.float64), wanted.logits[:NUM_TOKENS].astype(np.float64)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    print(f"\n{name}: lowest cosine {cosines.min():.6f}, largest logit difference {np.abs(a - b).max():.3f}")
    assert cosines.min() >= 0.999
