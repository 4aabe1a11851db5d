"""torch.ops.qcompile: shape functions, mutation, the reference on the CPU, the checks."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.errors import KernelError
from qcompile.kernels import OPERATORS
from qcompile.kernels import operators as registered
from qcompile.kernels.gemv_int4.reference import pack, quantize_weight
from tests.kernels.numerics import fresh
from tests.kernels.test_rope_cache import arguments as rope_arguments

pytestmark = pytest.mark.torch


def _int8(*shape: int) -> torch.Tensor:
    return fresh(*shape).mul(40).to(torch.int8)


def _gemv_int4() -> tuple[Any, ...]:
    q, scale = quantize_weight(fresh(6, 256), 64)
    return fresh(2, 256), pack(q), scale, fresh(6)


def _decode() -> tuple[Any, ...]:
    ints = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([8, 5], dtype=torch.int32)
    return fresh(2, 4, 16), fresh(2, 2, 8, 16), fresh(2, 2, 8, 16), *ints, 0.25


EXAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "add_rms_norm": lambda: (fresh(2, 3, 8), fresh(2, 3, 8), fresh(8), 1e-6),
    "add_layer_norm": lambda: (fresh(3, 8), fresh(3, 8), fresh(8), fresh(8), 1e-5),
    "head_rms_norm": lambda: (fresh(2, 3, 8), fresh(8), 1e-6),
    "rope_cache": lambda: tuple(rope_arguments(2, 3, 4, 2, 16).values()),
    "swiglu": lambda: (fresh(2, 3, 8),),
    "quantize_per_token": lambda: (fresh(2, 3, 8),),
    "add_rms_norm_quantize": lambda: (fresh(3, 8), fresh(3, 8), fresh(8), 1e-6),
    "matmul_bias_residual": lambda: (fresh(2, 3, 8), fresh(5, 8), fresh(5), fresh(2, 3, 5)),
    "matmul_int8": lambda: (_int8(3, 8), _int8(5, 8), fresh(3), fresh(5), fresh(5).half(), torch.float16),
    "gemv_int8": lambda: (fresh(2, 8), _int8(5, 8), fresh(5), None),
    "gemv_int4": _gemv_int4,
    "decode_attention": _decode,
    "sampler": lambda: (fresh(2, 50), 3, 0.8, torch.rand(2)),
}


def test_every_kernel_is_an_operator() -> None:
    assert set(EXAMPLES) == set(OPERATORS)
    assert all(hasattr(torch.ops.qcompile, name) for name in OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_schema_and_shape_function_agree_with_what_it_does(name: str) -> None:
    operator = getattr(torch.ops.qcompile, name)
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(operator, EXAMPLES[name](), test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_cpu_and_the_kernel_agree(name: str) -> None:
    """The operator runs the reference here; the launcher runs the kernel, in Triton's interpreter."""
    given = EXAMPLES[name]()
    copies = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in given)
    by_reference = getattr(torch.ops.qcompile, name)(*given)
    by_kernel = getattr(registered, name).launch(*copies)
    both = (by_reference, by_kernel) if isinstance(by_kernel, tuple) else ((by_reference,), (by_kernel,))
    for one, other in (*zip(*both, strict=True), *zip(given, copies, strict=True)):  # copies: caches written in place
        if not isinstance(one, torch.Tensor):
            continue
        if one.dtype == torch.int8:
            assert int((one.int() - other.int()).abs().max()) <= 1
        else:
            assert torch.allclose(one.double(), other.double(), rtol=2e-3, atol=2e-5)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element after an aligned address."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape).copy_(tensor)


def launched(name: str, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    results = getattr(registered, name).launch(*arguments)
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("name", OPERATORS)
def test_memory_that_is_not_aligned_is_taken(name: str) -> None:
    given = EXAMPLES[name]()
    copies = tuple(misaligned(one) if isinstance(one, torch.Tensor) else one for one in given)
    for one, other in zip(launched(name, given), launched(name, copies), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_tensor_must_be_on_the_same_device(name: str) -> None:
    given = EXAMPLES[name]()
    tensors = [index for index, one in enumerate(given) if isinstance(one, torch.Tensor)]
    for index in tensors if len(tensors) > 1 else ():
        moved = (*given[:index], given[index].to("meta"), *given[index + 1 :])
        for call in (lambda moved: launched(name, moved), lambda moved: getattr(torch.ops.qcompile, name)(*moved)):
            with pytest.raises(KernelError, match=f"{name}: tensors on different devices .*meta"):
                call(moved)


@pytest.mark.parametrize("name", OPERATORS)
def test_no_operator_takes_a_scalar_for_a_tensor(name: str) -> None:
    given = EXAMPLES[name]()
    for index, one in enumerate(given):
        if isinstance(one, torch.Tensor):
            scalar = torch.zeros((), dtype=one.dtype)
            with pytest.raises(KernelError, match=rf"{name}: .*(is a scalar|\[\].*wanted)"):
                getattr(torch.ops.qcompile, name)(*given[:index], scalar, *given[index + 1 :])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sizes", ["fake", "symbolic"])
def test_it_is_traced_with_sizes_known_and_open(name: str, sizes: str) -> None:
    given, operator = EXAMPLES[name](), getattr(torch.ops.qcompile, name)
    tensors = {index: one for index, one in enumerate(given) if isinstance(one, torch.Tensor)}

    def call(tensors: dict[int, torch.Tensor]) -> Any:
        return operator(*(tensors.get(index, one) for index, one in enumerate(given)))

    graph = make_fx(call, tracing_mode=sizes)(tensors).graph
    assert operator.default in {node.target for node in graph.nodes}


def test_bad_shapes_are_refused_without_values_too() -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    with pytest.raises(KernelError, match="swiglu: gate_up has rows of 7, an odd number"):
        torch.ops.qcompile.swiglu(meta(2, 7))
    with pytest.raises(KernelError, match=r"add_rms_norm: gamma is \[7\]"):
        torch.ops.qcompile.add_rms_norm(meta(2, 8), meta(2, 8), meta(7), 1e-6)
    with pytest.raises(KernelError, match=r"matmul_bias_residual: weight is \[4, 9\]"), FakeTensorMode():
        torch.ops.qcompile.matmul_bias_residual(torch.ones(2, 8), torch.ones(4, 9))


@pytest.mark.parametrize("name", OPERATORS)
def test_no_operator_takes_an_empty_tensor(name: str) -> None:
    given = EXAMPLES[name]()
    with pytest.raises(KernelError, match=f"{name}: .*empty"):
        launched(name, (given[0][:0], *given[1:]))


@pytest.mark.parametrize("name", OPERATORS)
def test_no_operator_takes_complex_numbers(name: str) -> None:
    given = EXAMPLES[name]()
    with pytest.raises(KernelError, match=f"{name}: .*(complex64|mixed dtypes)"):
        launched(name, (given[0].to(torch.complex64), *given[1:]))


def test_defaults() -> None:
    x, weight = fresh(2, 8), fresh(5, 8)
    assert torch.allclose(torch.ops.qcompile.matmul_bias_residual(x, weight), x @ weight.T, atol=1e-5)
    _, ids, token = torch.ops.qcompile.sampler(fresh(3, 40))
    assert torch.equal(ids[:, 0], token)


def test_bad_arguments_are_refused_on_the_cpu_too() -> None:
    with pytest.raises(KernelError, match=r"add_rms_norm: gamma is \[7\]"):
        torch.ops.qcompile.add_rms_norm(fresh(2, 8), fresh(2, 8), fresh(7), 1e-6)
    with pytest.raises(KernelError, match="decode_attention: mixed dtypes"):
        torch.ops.qcompile.decode_attention(fresh(2, 4, 16).half(), *_decode()[1:])


def test_a_kernel_without_interpreter_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delitem(sys.modules, "qcompile.kernels.swiglu.kernel", raising=False)
    with pytest.raises(
        KernelError, match=r"swiglu: a kernel runs on cuda or npu, not on cpu; use torch.ops.qcompile.swiglu"
    ):
        registered.swiglu.launch(fresh(2, 8))
    assert "qcompile.kernels.swiglu.kernel" not in sys.modules  # it would be compiled from now on, not interpreted
