"""Level 4: the memory plan of the vector kernels is right, and a broken one is noticed."""

import pytest
import torch

from tests.kernel_check import operator_runs, x86
from tests.kernel_check.compiled import CompiledStore
from tests.kernel_check.mutations import mutations
from tests.kernel_check.planned_replay import PlannedStandIn
from tests.kernels.numerics import poisoned  # noqa: F401

pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(bool(x86.missing_tools()), reason=x86.missing_tools()),
]


@pytest.mark.parametrize("run", operator_runs.VECTOR_RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_plan_computes_the_operator(
    run: operator_runs.Run, dtype: torch.dtype, store: CompiledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(operator_runs.Placing(PlannedStandIn, store, monkeypatch), dtype)


class MutatedStandIn(PlannedStandIn):
    """Replays a broken plan, once there is one; keeps the plan it was given."""

    broken = ""
    given = ""

    def mutated(self, planned: str) -> str:
        type(self).given = planned
        return self.broken or planned


KINDS = ("moved onto another", "shifted", "past the end", "call left out", "operands swapped")
OF_A_KIND = 3


def test_a_broken_plan_is_noticed(store: CompiledStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five kinds of fault, each put in several places; all places of add_rms_norm: 64 of 70 are noticed.

    What is not noticed moves a buffer onto memory that nobody uses at that time.
    """
    stand_in = type("OneTest", (MutatedStandIn,), {})
    placing = operator_runs.Placing(stand_in, store, monkeypatch)
    operator_runs.add_rms_norm(placing, torch.float16)
    noticed: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    found = list(mutations(stand_in.given))
    for kind in KINDS:
        places = [mutation for mutation in found if mutation.kind == kind]
        for mutation in places[:: max(1, len(places) // OF_A_KIND)][:OF_A_KIND]:
            monkeypatch.setattr(stand_in, "broken", mutation.text)
            noticed[kind].append(is_noticed(placing))
    # of three places of each kind in an address, one lies in memory that is free
    assert all(2 * sum(seen) > len(seen) for seen in noticed.values()), noticed


def is_noticed(placing: operator_runs.Placing) -> bool:
    try:
        operator_runs.add_rms_norm(placing, torch.float16)
    except AssertionError:
        return True
    return False
