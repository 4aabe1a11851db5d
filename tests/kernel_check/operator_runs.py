"""One run of every operator, on fresh inputs of odd shapes, with its kernels replaced by stand-ins."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from qcompile.kernels.placement import Launch
from qcompile.kernels.tile_table import Tile, table
from tests.kernel_check.compiled import CompiledStore
from tests.kernel_check.stand_in import TYPES, StandIn
from tests.kernels.numerics import apart, assert_close, fresh


@dataclass
class Placing:
    """Puts stand-ins in the place of kernels."""

    kind: type[StandIn]
    store: CompiledStore
    monkeypatch: pytest.MonkeyPatch

    def put(self, operator: str, *functions: str) -> list[StandIn]:
        """Replace functions of an operator's kernel.py."""
        module = importlib.import_module(f"qcompile.kernels.{operator}.kernel")
        stand_ins = [self.kind(operator, function, self.store) for function in functions]
        for function, stand_in in zip(functions, stand_ins, strict=True):
            self.monkeypatch.setattr(module, function, stand_in)
        return stand_ins


Run = Callable[[Placing, torch.dtype], None]


def tiles(operator: str, function: str, dtype: torch.dtype) -> list[Tile]:
    """The tiles of the table that are meant for a dtype."""
    kernel = table(operator, function)
    return [tile for tile in kernel.tiles if tile.expect == "ok" and TYPES[dtype] in tile.variants]


def add_rms_norm(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.add_rms_norm.launch import launch
    from qcompile.kernels.add_rms_norm.reference import reference

    (stand_in,) = placing.put("add_rms_norm", "add_rms_norm_kernel")
    for tile in tiles("add_rms_norm", "add_rms_norm_kernel", dtype)[:1]:
        rows, columns = 7 * tile.constants["BLOCK_ROWS"] - 1, tile.constants["BLOCK_COLS"] - 7
        x, residual, gamma = (
            fresh(rows, columns, dtype=dtype),
            fresh(rows, columns, dtype=dtype),
            fresh(columns, dtype=dtype),
        )
        y, h = launch(apart(x), apart(residual, 5), gamma, 0.3, Launch(dict(tile.constants)))
        want_y, want_h = reference(x, residual, gamma, 0.3, torch.float64)
        assert_close(y, want_y, dtype)
        assert torch.equal(h, want_h)
    assert len(stand_in.launches) == 1


VECTOR_RUNS: tuple[Run, ...] = (add_rms_norm,)
RUNS: tuple[Run, ...] = VECTOR_RUNS
