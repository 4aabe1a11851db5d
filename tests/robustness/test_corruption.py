"""A damaged file is optimized or refused; it never raises anything else and writes nothing half."""

import random
import shutil
from pathlib import Path

import pytest

from qcompile.errors import QCompileError
from qcompile.pipeline import OptimizeOptions, optimize


def damaged(content: bytes, seed: int) -> bytes:
    """Flip, change, drop or repeat a few bytes."""
    rng, damage = random.Random(seed), bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, kind = rng.randrange(len(damage)), rng.choice(["flip", "change", "drop", "repeat"])
        if kind == "flip":
            damage[at] ^= 1 << rng.randrange(8)
        elif kind == "change":
            damage[at] = rng.randrange(256)
        elif kind == "drop":
            del damage[at : at + rng.randrange(1, 9)]
        else:
            start = rng.randrange(len(damage))
            damage[at:at] = damage[start : start + rng.randrange(1, 40)]
    return bytes(damage)


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data key")
def test_damaged_graphs_are_optimized_or_refused(exported: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(exported, source)
    (source / "qcompile.json").unlink()
    content = (exported / "model.onnx").read_bytes()
    refusals = []
    for seed in range(40):
        (source / "model.onnx").write_bytes(damaged(content, seed))
        try:
            optimize(source / "model.onnx", output, OptimizeOptions(target="portable", verify="off"))
        except QCompileError as error:
            refusals.append((str(error), output.exists()))
        shutil.rmtree(output, ignore_errors=True)
    assert 20 <= len(refusals) < 40
    assert [message for message, is_left in refusals if is_left or "\n" in message] == []
