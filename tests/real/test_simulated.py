"""The real 0.5B, lowered, compiled by the stand-in for ATC, run by the ACL session on the simulated device."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.runtime import Engine, SamplingParams
from tests.real.real_model import Measured, qcompile

pytestmark = pytest.mark.real
NAMES = ("english", "chinese", "code", "arithmetic")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def simulated(work: Path, exported: tuple[Path, Measured]) -> Iterator[Path]:
    shapes = ("--batch", "4", "--kv-len", "256", "--prefill-len", "64")
    lowered = work / "simulated-910b4"
    qcompile(
        work, "lower", "optimize", exported[0], "--passes", "fuse", "--target", "ascend910b4", *shapes, "-o", lowered
    )
    qcompile(work, "simulate", "atc", lowered, "--simulate", "--cann", "9.1")
    yield lowered
    shutil.rmtree(lowered)


def test_four_slots_give_the_tokens_of_the_ort_session(
    simulated: Path, fused: tuple[Path, Measured], prompts: dict[str, list[int]]
) -> None:
    """Four prompts of different lengths at once: same tokens, a kilobyte per step at most, nothing left or misused."""
    asked = [prompts[name] for name in NAMES]
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    with Engine(fused[0], max_batch_size=4) as engine:
        wanted = [completion.token_ids for completion in engine.generate(asked, params)]
    with simulated_acl(cann="9.1", threads=2) as machine:
        with Engine(simulated, max_batch_size=4) as engine:
            for ids in asked:
                engine.add_request(ids, params)
            while len(engine._scheduler.decoding) < len(asked):
                engine.step()
            before = machine.traffic.copy()
            engine.step()
            moved = machine.traffic - before
        with Engine(simulated, max_batch_size=4) as engine:
            got = [completion.token_ids for completion in engine.generate(asked, params)]
    host_bytes = moved["host_to_device_bytes"] + moved["device_to_host_bytes"]
    print(
        f"\nper decode step: {host_bytes} bytes to and from the host, {moved['device_to_device_copies']} device copies"
    )
    assert got == wanted
    assert host_bytes <= 1024
    assert moved["executions"] == moved["host_to_device_copies"] == moved["device_to_host_copies"] == 1
    assert machine.reports == []
    assert list(machine.device.live()) == []
