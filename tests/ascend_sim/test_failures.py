"""Whatever fails, at whatever moment: one line, and everything is given back."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.ascend.sim.machine import Machine
from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.acl_session import open_acl_session
from qcompile.runtime.errors import SessionError
from qcompile.runtime.manifest import Manifest
from tests.ascend_sim.test_end_to_end import assert_clean

GREEDY = SamplingParams(max_new_tokens=6, ignore_eos=True)
# What may fail on a real device; how each says so.
RETURNS_PAIR = ("rt.create_context", "rt.create_stream", "rt.malloc", "rt.malloc_host", "mdl.load_with_config")
RETURNS_PAIR += ("mdl.add_dataset_buffer",)
RETURNS_CODE = ("rt.set_device", "rt.set_context", "rt.memset", "rt.memcpy", "rt.memcpy_async", "rt.memcpy2d_async")
RETURNS_CODE += ("mdl.set_config_opt", "mdl.set_external_weight_address", "mdl.get_desc", "mdl.execute_async")
RETURNS_CODE += ("update_data_buffer",)
CODE = 507011


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


def once_failing(
    original: Any, path: str, numbers: Iterator[int], at: int, failed: list[str], raises: type[BaseException] | None
) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if next(numbers) != at:
            return original(*arguments)
        failed.append(path)
        if raises is not None:
            raise raises
        return (0, CODE) if path in RETURNS_PAIR else CODE

    return call


@contextmanager
def failing(acl: Any, at: int, raises: type[BaseException] | None = None) -> Iterator[list[str]]:
    """Let the call number `at` fail: nothing is done, and a code comes back (or Ctrl-C comes). Yields what failed."""
    failed: list[str] = []
    numbers = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        for path in (*RETURNS_PAIR, *RETURNS_CODE):
            module, _, name = path.rpartition(".")
            holder = getattr(acl, module) if module else acl
            if not hasattr(holder, name):
                continue

            patch.setattr(holder, name, once_failing(getattr(holder, name), path, numbers, at, failed, raises))
        yield failed


def session_life(directory: Path) -> None:
    """Everything a session does."""
    session = open_acl_session(directory, Manifest.load(directory), check_hash=False)
    try:
        session.reserve(2, 64)
        session.forward(0, np.arange(5, 15)[None], [0])
        session.forward(1, np.array([[7]]), [0], need_scores=False)
        session.forward(0, np.array([[3], [4]]), [10, 1], greedy_only=True)
        session.copy_slot(0, 1, 5)
        session.swap_slots(0, 1, 5)
        session.reserve(6, 128)
        session.forward(0, np.array([[3]]), [4])
    finally:
        session.close()


def outcome(directory: Path) -> str:
    """Live through a session's life; returns the error, or ""."""
    try:
        session_life(directory)
    except SessionError as error:
        return str(error)
    except Interrupt:
        return "interrupted"
    return ""


@pytest.mark.parametrize(("raises", "stride"), [(None, 1), (Interrupt, 3)])
def test_everything_is_given_back_wherever_it_fails(
    compiled_om: Path, raises: type[BaseException] | None, stride: int
) -> None:
    """Every call of a session's life fails once; the error is one line that names a call, and nothing is left."""
    seen = set()
    with simulated_acl(cann="9.1") as machine:
        acl = importlib.import_module("acl")
        for at in range(0, 1000, stride):
            with failing(acl, at, raises) as failed:
                message = outcome(compiled_om)
            assert message in {"", "interrupted"} or f"{CODE}" in message
            assert "\n" not in message
            assert list(machine.device.live()) == [], failed
            assert machine.host.pinned() == [], failed
            assert [thing for _, thing in machine.handles.of(object)] == [], failed
            seen.update(failed)
            if not failed:
                break
    assert at > 50
    expected = {"rt.malloc", "mdl.load_with_config", "mdl.set_external_weight_address", "mdl.execute_async"}
    expected |= {"rt.memcpy2d_async", "rt.set_context", "update_data_buffer"}
    assert stride > 1 or expected <= seen
    assert {report.kind for report in machine.reports} == set()


def first_failure(machine: Machine, directory: Path, path: str, skip: int) -> tuple[list[str], list[list[int]]]:
    """Run four prompts while call `skip` of one function fails; returns the errors, and tokens of a second try."""
    acl = importlib.import_module("acl")
    module, _, name = path.rpartition(".")
    holder = getattr(acl, module)
    original, numbers = getattr(holder, name), itertools.count()

    def call(*arguments: Any) -> Any:
        return CODE if next(numbers) == skip else original(*arguments)

    with Engine(directory, max_batch_size=4) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, call)
        prompts = [[5, 6, 7], [8], [9, 10], [11]]
        first = engine.generate(prompts, GREEDY, raise_errors=False)
        again = engine.generate(prompts, GREEDY)
    assert_clean(machine)
    return [completion.error for completion in first if completion.error], [c.token_ids for c in again]


@pytest.mark.parametrize("path", ["rt.synchronize_stream", "mdl.execute_async", "rt.memcpy_async"])
@pytest.mark.parametrize("skip", [3, 6])
def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(compiled_om: Path, path: str, skip: int) -> None:
    with simulated_acl() as machine:
        with Engine(compiled_om, max_batch_size=4) as engine:
            wanted = [c.token_ids for c in engine.generate([[5, 6, 7], [8], [9, 10], [11]], GREEDY)]
        errors, again = first_failure(machine, compiled_om, path, skip)
    assert errors
    assert all(f"{CODE}, the model failed while it ran" in error for error in errors)
    assert again == wanted


def test_a_model_that_overflows_is_named(compiled_om: Path) -> None:
    """NaN in the cache (a bad device, an overflow) comes back as a score that is no number."""
    with simulated_acl() as machine, Engine(compiled_om) as engine:
        engine.generate([[5, 6, 7]], GREEDY)
        session: Any = engine._session
        cache = session._cache
        allocation = machine.device.find(cache.address)
        assert allocation is not None
        assert allocation.content is not None
        allocation.content[:] = 0xFF
        with pytest.raises(SessionError, match="the model's scores are nan: the graph overflows"):
            engine.generate([[5, 6, 7, *range(30, 50)]], GREEDY)
