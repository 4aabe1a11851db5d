"""Level 3: what the Ascend adapter lowers to computes the operator, in every dtype, bfloat16 too, on this CPU."""

import pytest
import torch

from tests.kernel_check import operator_runs, x86
from tests.kernel_check.compiled import CompiledStore
from tests.kernel_check.stand_in import LinalgStandIn
from tests.kernels.numerics import poisoned  # noqa: F401

pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(bool(x86.missing_tools()), reason=x86.missing_tools()),
]


@pytest.mark.parametrize("run", operator_runs.RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_numbers(
    run: operator_runs.Run, dtype: torch.dtype, store: CompiledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(operator_runs.Placing(LinalgStandIn, store, monkeypatch), dtype)
