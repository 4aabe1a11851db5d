"""Level 2: every operator compiles for Ascend910B4 at every tile, within its stated budget; the negative tile overflows."""

import pytest

from qcompile.kernel_check.check import Result, cases
from qcompile.kernel_check.operators import Operator, read_operators
from tests.kernel_check.compiled import CompiledStore

OPERATORS = read_operators()
CAPACITY = {"ub": 196608, "cbuf": 524288, "cc": 131072}


def describe(result: Result) -> str:
    return f"{result.case.label}: {result.verdict} ({result.reason}) {result.over_budget}"


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_tile_is_what_its_table_says(operator: Operator, store: CompiledStore) -> None:
    results = store.check(cases((operator,), ("Ascend910B4",)))
    assert [describe(result) for result in results if not result.is_expected] == []
    for result in results:
        if result.facts is not None:
            check_facts(result)
    check_budgets_are_not_loose(results)
    for kernel in operator.kernels:
        mine = [result for result in results if result.case.kernel == kernel]
        assert {result.verdict for result in mine} == {"ok", "overflow"}, f"{kernel.function} lacks a negative tile"


def check_facts(result: Result) -> None:
    """What must hold of any kernel that is fit for the chip."""
    facts, case = result.facts, result.case
    assert facts is not None
    assert {
        name: facts.chip[f"{key}_SIZE"] for name, key in {"ub": "UB", "cbuf": "L1", "cc": "L0C"}.items()
    } == CAPACITY
    stated = case.tile.budget_bytes
    assert set(facts.used_bytes) <= set(stated), f"{case.label} states no budget for all of {facts.used_bytes}"
    assert all(stated[space] <= CAPACITY[space] for space in stated), case.label
    assert facts.set_flags == facts.wait_flags > 0, case.label
    assert facts.discrete == 0, f"{case.label} gathers element by element"
    cores = {"vector": "AIV", "cube": "AIC", "mix": "MIX"}
    assert facts.cores == cores[case.kernel.core], case.label
    assert (facts.cube_calls > 0) == (case.kernel.core != "vector"), case.label


def check_budgets_are_not_loose(results: list[Result]) -> None:
    """A budget says something only when the variant that needs most comes near it."""
    for tile in {id(result.case.tile): result.case.tile for result in results}.values():
        of_tile = [result.facts for result in results if result.case.tile is tile and result.facts is not None]
        for space, stated in tile.budget_bytes.items():
            most = max(facts.used_bytes.get(space, 0) for facts in of_tile)
            assert most >= 0.8 * stated, f"{tile.label}: {space} {most} of {stated} stated"
