"""Directories for the ACL session: compiled by the stand-in for the simulated device, or by ATC for a real one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcompile.ascend.atc_build import build_oms, find_compiler
from qcompile.ascend.atc_jobs import plan_build
from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.cann_install import find_cann
from qcompile.ascend.chips import chip_named
from qcompile.ascend.doctor import machine_chips
from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.ascend.sim.machine import Machine
from tests.ascend_lowering.lowered import fuse_tiny, lower_tiny
from tests.ascend_sim.simulated import simulate

# logits too, so that whole rows are compared; caches of 64 and 200 tokens; prompts in one chunk
BUCKETS = BucketOptions(batches=(4,), kv_lens=(64, 200), prefill_lens=(64,))
_done: dict[str, Path] = {}


@contextmanager
def acl_directory(request: pytest.FixtureRequest, where: str) -> Iterator[tuple[Path, Machine | None]]:
    """Yield a compiled directory, made once, and the simulated machine (None on a real device)."""
    kind = "device" if where == "device" else "simulated"
    if kind == "device" and not (shutil.which("atc") and machine_chips(os.environ)):
        pytest.skip("no NPU with CANN here: source set_env.sh")
    if kind not in _done:
        made = request.getfixturevalue("tmp_path_factory").mktemp(kind)
        chip = machine_chips(os.environ)[0] if kind == "device" else "Ascend910B4"
        lower_tiny(fuse_tiny(made), made / "compiled", chip.lower(), BUCKETS, keep_logits=True)
        _done[kind] = compile_on_device(made / "compiled") if kind == "device" else simulate(made / "compiled")
    if kind == "device":
        yield _done[kind], None
        return
    with simulated_acl(cann=where) as machine:
        yield _done[kind], machine


def compile_on_device(directory: Path) -> Path:
    """Compile for this machine's chip with its ATC; returns the directory."""
    install = find_cann()
    assert install is not None
    chip = chip_named(machine_chips(os.environ)[0])
    atc, _ = find_compiler(install, os.environ)
    return build_oms(plan_build(directory, chip, {}), atc, install, os.environ, lambda *_: None).directory
