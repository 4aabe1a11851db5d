"""What a device would punish, the simulated one reports; and a correct program has no report."""

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.ascend.sim.machine import Machine
from tests.ascend_sim.misused import D2H, H2D, MISUSES, Program


@pytest.fixture
def started(compiled_om: Path) -> Iterator[tuple[Program, Machine]]:
    with simulated_acl(cann="9.1") as machine:
        program = Program(importlib.import_module("acl"), compiled_om / "decode_b4_t128.om")
        program.start()
        assert machine.reports == []
        yield program, machine


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_is_reported_with_its_code(name: str, started: tuple[Program, Machine]) -> None:
    program, machine = started
    kind, do_wrong, code = MISUSES[name]
    assert do_wrong(program) == code
    assert kind in {report.kind for report in machine.reports}
    report = next(report for report in machine.reports if report.kind == kind)
    if code >= 100000:
        assert report.code == code


def test_the_last_message_is_of_this_thread_and_read_once(started: tuple[Program, Machine]) -> None:
    program, _ = started
    program.elsewhere(program.run)
    assert program.acl.get_recent_err_msg() == ""
    program.acl.rt.free(0x1234)
    assert program.acl.get_recent_err_msg() == "free: 0x1234 is no device memory"
    assert program.acl.get_recent_err_msg() == ""


def test_there_are_many_kinds() -> None:
    kinds = Counter(kind for kind, _, _ in MISUSES.values())
    assert len(kinds) >= 40


def test_before_init_nothing_works(compiled_om: Path) -> None:
    with simulated_acl() as machine:
        acl = importlib.import_module("acl")
        assert acl.rt.set_device(0) == acl.rt.malloc(64, 0)[1] == 100001
        assert acl.mdl.load_from_file(str(compiled_om / "decode_b4_t128.om"))[1] == 100001
        assert {report.kind for report in machine.reports} == {"not-initialized"}


def test_a_result_is_not_there_before_somebody_waited(started: tuple[Program, Machine]) -> None:
    program, machine = started
    host, address = program.pinned(64), program.device(64)
    program.acl.rt.memset(address, 64, 7, 64)
    assert program.acl.rt.memcpy_async(host, 64, address, 64, D2H, program.stream) == 0
    assert set(program.acl.util.ptr_to_bytes(host, 64)) == {0xFF}
    assert program.acl.rt.synchronize_stream(program.stream) == 0
    assert set(program.acl.util.ptr_to_bytes(host, 64)) == {7}
    assert machine.reports == []


def test_a_source_that_changes_before_it_was_copied_is_seen(started: tuple[Program, Machine]) -> None:
    program, _ = started
    host, address, back = program.pinned(64), program.device(64), program.pinned(64)
    program.acl.util.ptr_to_numpy(host, (64,), 2)[:] = 1
    program.acl.rt.memcpy_async(address, 64, host, 64, H2D, program.stream)
    program.acl.util.ptr_to_numpy(host, (64,), 2)[:] = 2
    program.acl.rt.synchronize_stream(program.stream)
    program.acl.rt.memcpy(back, 64, address, 64, D2H)
    assert set(program.acl.util.ptr_to_bytes(back, 64)) == {2}


def test_fresh_memory_is_no_zeros(started: tuple[Program, Machine]) -> None:
    program, _ = started
    back = program.pinned(64)
    program.acl.rt.memcpy(back, 64, program.device(64), 64, D2H)
    assert set(program.acl.util.ptr_to_bytes(back, 64)) == {0xFF}


def test_work_space_holds_nothing_across_a_run(started: tuple[Program, Machine]) -> None:
    """A buffer kept in the work space of a model is lost when the model runs."""
    program, machine = started
    mdl = program.acl.mdl
    work_size, _, _ = mdl.query_size(str(program.om))
    work, back = program.device(work_size), program.pinned(64)
    model, code = mdl.load_from_file_with_mem(str(program.om), work, work_size, 0, 0)
    assert code == 0
    program.acl.rt.memset(work, 64, 7, 64)
    assert mdl.execute(model, program.inputs, program.outputs) == 0
    program.acl.rt.memcpy(back, 64, work, 64, D2H)
    assert set(program.acl.util.ptr_to_bytes(back, 64)) == {0xFF}
    assert machine.reports == []


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", 545001), (b"ONNX" * 200, 545001), (None, 145002)],
)
def test_files_that_are_no_model(
    started: tuple[Program, Machine], tmp_path: Path, content: bytes | None, code: int
) -> None:
    program, machine = started
    path = tmp_path / "x.om"
    if content is not None:
        path.write_bytes(content)
    assert program.acl.mdl.load_from_file(str(path)) == (0, code)
    assert str(path) in program.acl.get_recent_err_msg()
    assert machine.reports == []  # a bad file is no fault of the program


def test_a_truncated_file_and_one_with_strange_weights(started: tuple[Program, Machine], tmp_path: Path) -> None:
    program, _ = started
    content = program.om.read_bytes()
    path = tmp_path / "x.om"
    path.write_bytes(content[:-40])
    assert program.acl.mdl.load_from_file(str(path)) == (0, 145006)
    path.write_bytes(content.replace(b"weight/weight_", b"../../../wt_x/"))
    assert program.acl.mdl.load_from_file(str(path)) == (0, 545001)
    assert "no place of the compiler's" in program.acl.get_recent_err_msg()
    path.write_bytes(content)
    assert program.acl.mdl.load_from_file(str(path)) == (0, 545001)
    assert "copy `weight` with the .om" in program.acl.get_recent_err_msg()
