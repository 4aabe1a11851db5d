"""One file for several shapes: gears by batch and by dimensions, and what may be done wrong with them."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.ascend.om_reader import read_om
from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.ascend.sim.atc import main
from qcompile.ascend.sim.machine import Machine
from tests.ascend.graphs import parsed, saved
from tests.ascend_sim.misused import D2H, H2D, Program

ROWS, WIDTH = 8, 64


@contextmanager
def geared(directory: Path, shape: str, flag: str) -> Iterator[tuple[Program, Machine]]:
    """A program with y = relu(x) for several shapes loaded."""
    saved(parsed("y = Relu (x)", "float16[N, S] x", "float16[N, S] y"), directory, "m.onnx")
    flags = ["--framework=5", f"--model={directory}/m.onnx", f"--output={directory}/m", "--soc_version=Ascend910B4"]
    assert main([*flags, "--input_format=ND", f"--input_shape=x:{shape}", flag]) == 0
    with simulated_acl() as machine:
        program = Program(importlib.import_module("acl"), directory / "m.om")
        program.start()
        yield program, machine


@pytest.fixture
def by_batch(tmp_path: Path) -> Iterator[tuple[Program, Machine]]:
    with geared(tmp_path, f"-1,{WIDTH}", "--dynamic_batch_size=1,2,8") as started:
        yield started


def ran(p: Program, rows: int, width: int) -> np.ndarray:
    """Run on numbers from -1 to 1; returns the output of that shape."""
    numbers = np.linspace(-1, 1, rows * width).astype(np.float16)
    host = p.pinned(numbers.nbytes)
    p.acl.util.ptr_to_numpy(host, (numbers.size,), 23)[:] = numbers
    assert p.acl.rt.memcpy(p.places[0], p.sizes[0], host, numbers.nbytes, H2D) == 0
    assert p.run() == 0
    assert p.acl.rt.memcpy(host, numbers.nbytes, p.places[-1], numbers.nbytes, D2H) == 0
    result = p.acl.util.ptr_to_numpy(host, (numbers.size,), 23)
    np.testing.assert_array_equal(result, np.maximum(numbers, 0))
    return np.array(result)


def described(p: Program) -> tuple[Any, int]:
    description = p.acl.mdl.create_desc()
    p.acl.mdl.get_desc(description, p.model)
    return p.acl.mdl, description


def test_inputs_are_those_of_the_largest_gear_and_the_selector(by_batch: tuple[Program, Machine]) -> None:
    p, machine = by_batch
    mdl, description = described(p)
    assert mdl.get_num_inputs(description) == 2
    assert mdl.get_input_size_by_index(description, 0) == ROWS * WIDTH * 2
    assert mdl.get_input_index_by_name(description, "ascend_mbatch_shape_data") == (1, 0)
    assert mdl.get_dynamic_batch(description) == ({"batchCount": 3, "batch": [1, 2, 8]}, 0)
    assert mdl.get_input_dynamic_gear_count(description, -1) == (3, 0)
    (model,) = read_om(p.om).models
    assert model.gears == (((1, WIDTH),), ((2, WIDTH),), ((8, WIDTH),))
    assert machine.reports == []


def test_the_chosen_gear_runs_and_the_largest_without_a_choice(by_batch: tuple[Program, Machine]) -> None:
    p, machine = by_batch
    mdl, description = described(p)
    ran(p, 8, WIDTH)
    for batch in (1, 2, 8, 1):
        assert mdl.set_dynamic_batch_size(p.model, p.inputs, 1, batch) == 0
        ran(p, batch, WIDTH)
        assert mdl.get_cur_output_dims(description, 0)[0]["dims"] == [batch, WIDTH]
    assert machine.reports == []


def test_by_dimensions_of_all_inputs(tmp_path: Path) -> None:
    with geared(tmp_path, "-1,-1", "--dynamic_dims=1,16;2,64;4,32") as (p, machine):
        mdl, description = described(p)
        gears, code = mdl.get_input_dynamic_dims(description, -1, 3)
        assert code == 0
        assert [gear["dims"] for gear in gears] == [[1, 16], [2, 64], [4, 32]]
        for rows, width in ((1, 16), (4, 32), (2, 64)):
            dims = {"name": "", "dimCount": 2, "dims": [rows, width]}
            assert mdl.set_input_dynamic_dims(p.model, p.inputs, 1, dims) == 0
            ran(p, rows, width)
        assert machine.reports == []
        dims = {"name": "", "dimCount": 2, "dims": [4, 64]}
        assert mdl.set_input_dynamic_dims(p.model, p.inputs, 1, dims) == 145013
        dims = {"name": "", "dimCount": 1, "dims": [4]}
        assert mdl.set_input_dynamic_dims(p.model, p.inputs, 1, dims) == 145012
        assert [report.kind for report in machine.reports] == ["wrong-gear", "wrong-gear"]


@pytest.mark.parametrize(
    ("do_wrong", "kind", "code"),
    [
        (lambda p: p.acl.mdl.set_dynamic_batch_size(p.model, p.inputs, 1, 3), "wrong-gear", 145013),
        (lambda p: p.acl.mdl.set_dynamic_batch_size(p.model, p.inputs, 0, 2), "wrong-gear-input", 145000),
        (lambda p: p.acl.mdl.set_dynamic_batch_size(99, p.inputs, 1, 2), "unknown-model", 145003),
        (lambda p: p.acl.mdl.set_dynamic_batch_size(p.model, 99, 1, 2), "unknown-dataset", 100000),
        (lambda p: p.acl.mdl.get_input_dynamic_dims(described(p)[1], -1, 1)[1], "wrong-gear", 100000),
    ],
)
def test_wrong_gears_are_reported(
    by_batch: tuple[Program, Machine], do_wrong: Callable[[Program], int], kind: str, code: int
) -> None:
    p, machine = by_batch
    assert do_wrong(p) == code
    assert [report.kind for report in machine.reports] == [kind]


def test_a_buffer_for_a_smaller_gear_is_too_small(by_batch: tuple[Program, Machine]) -> None:
    p, machine = by_batch
    p.acl.update_data_buffer(p.buffers[0], p.device(WIDTH * 2), WIDTH * 2)
    assert p.run() == 145000
    assert [report.kind for report in machine.reports] == ["buffer-too-small"]
