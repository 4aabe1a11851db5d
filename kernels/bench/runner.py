"""Check a case, then time it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.kernels.bench import timing
from qcompile.kernels.bench.attention_cases import attention_cases
from qcompile.kernels.bench.cases import Case, Setting, elementwise_cases, norm_cases
from qcompile.kernels.bench.product_cases import product_cases

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
_INT8_DIFFERENCES = 0.01  # of the elements may be one off: ties, and a row's values before they were rounded


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, as measured.

    Attributes:
        copy: Bytes a microsecond, read plus written.
        rates: Operations a microsecond by dtype name.
    """

    copy: float
    rates: dict[str, float]

    def floor_us(self, case: Case) -> float:
        """The least time of a case: bytes over the copy's rate or operations over the product's, whichever is longer."""
        compute = case.operations / self.rates[case.rate] if case.operations else 0.0
        return max(case.size_bytes / self.copy, compute)


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Measure both on this GPU."""
    rates = {"fp16": timing.operations_per_us(dtype), "int8": timing.operations_per_us(torch.int8)}
    return Ceilings(timing.copy_bytes_per_us(), rates)


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of a model in a phase."""
    yield from norm_cases(setting)
    yield from elementwise_cases(setting)
    yield from attention_cases(setting)
    yield from product_cases(setting)


def error_of(got: Any, want: Any) -> float:
    """Largest relative error (in the norm) over the results; inf when an int8 or id is off by more than rounding explains."""
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    return max(_error(one.detach(), other.detach()) for one, other in pairs)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.dtype == torch.int8:
        difference = (got.int() - want.int()).abs()
        close = int(difference.max()) <= 1 and float((difference > 0).float().mean()) <= _INT8_DIFFERENCES
        return 0.0 if close else math.inf
    if not got.is_floating_point():
        return 0.0 if torch.equal(got.long(), want.long()) else math.inf
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return math.inf if bool(error.isnan()) else float(error)


def check(case: Case) -> dict[str, float]:
    """Errors of the kernel and of eager PyTorch against float64, on fresh inputs."""
    arguments = case.make()
    want = case.exact(*arguments)
    return {"kernel": error_of(case.kernel(*arguments), want), "eager": error_of(case.eager(*arguments), want)}


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """torch.compile for these very sizes; without a graph of its own, since timing captures one for all."""
    torch._dynamo.reset()
    return torch.compile(function, mode=mode, dynamic=False)


def measure(case: Case, ceilings: Ceilings, dtype: torch.dtype, compile_mode: str = "default") -> dict[str, Any]:
    """One row of the table: errors, microseconds of all, floor and fraction reached."""
    errors = check(case)
    functions = {"kernel": case.kernel, "eager": case.eager, "compile": compiled(case.eager, compile_mode)}
    if case.vendor is not None:
        functions["vendor"] = case.vendor[1]
    sets = [case.make() for _ in range(timing.input_sets(case.size_bytes))]
    times = timing.times_us(functions, sets)
    floor = ceilings.floor_us(case)
    return {
        "operator": case.operator,
        "case": case.label,
        "size_bytes": case.size_bytes,
        "operations": case.operations,
        "errors": errors,
        "is_right": errors["kernel"] <= LIMITS[dtype],
        "us": times,
        "floor_us": floor,
        "fraction": floor / times["kernel"],
        "vendor": None if case.vendor is None else case.vendor[0],
        "vendor_computes_less": bool(case.extra.get("vendor_computes_less")),
    }
