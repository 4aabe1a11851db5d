"""gemv_int8 and gemv_int4."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import KernelError
from qcompile.kernels.gemv_int4 import reference as int4
from qcompile.kernels.gemv_int4.launch import launch as gemv_int4
from qcompile.kernels.gemv_int8 import reference as int8
from qcompile.kernels.gemv_int8.launch import launch as gemv_int8
from qcompile.kernels.placement import Launch
from tests.kernels.numerics import DTYPES, apart, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 65), (3, 9, 1500), (16, 4, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemv_int8(dtype: torch.dtype, shape: tuple[int, int, int], with_bias: bool) -> None:
    rows, num_out, num_in = shape
    x = fresh(rows, num_in, dtype=dtype)
    weight, scale = int8.quantize_weight(fresh(num_out, num_in))
    bias = fresh(num_out, dtype=dtype) if with_bias else None
    want = int8.reference(x, weight, scale, bias, torch.float64)
    assert_close(gemv_int8(apart(x), weight, scale, bias), want, dtype)
    assert_close(gemv_int8(x, weight, scale, bias, Launch({"BLOCK_N": 8, "BLOCK_K": 32, "STAGES": 0})), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 10, 896), (3, 5, 384), (2, 4, 128)])
@pytest.mark.parametrize("group", int4.GROUPS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemv_int4(dtype: torch.dtype, shape: tuple[int, int, int], group: int, with_bias: bool) -> None:
    rows, num_out, num_in = shape
    x = fresh(rows, num_in, dtype=dtype)
    q, scale = int4.quantize_weight(fresh(num_out, num_in, dtype=dtype), group)
    bias = fresh(num_out, dtype=dtype) if with_bias else None
    want = int4.reference(x, int4.pack(q), scale, bias, torch.float64)
    assert_close(gemv_int4(apart(x), int4.pack(q), scale, bias), want, dtype)
    small = Launch({"BLOCK_N": 8, "BLOCK_G": 2, "GROUP": group, "STAGES": 0})
    assert_close(gemv_int4(x, int4.pack(q), scale, bias, small), want, dtype)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), group=st.sampled_from(int4.GROUPS), rows=st.integers(1, 5), groups=st.integers(1, 4))
def test_packing_is_reversible(seed: int, group: int, rows: int, groups: int) -> None:
    q = torch.randint(-8, 8, (rows, groups, group), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = int4.pack(q)
    assert words.dtype == torch.int32
    assert words.shape == (rows, groups * group // 8)
    assert torch.equal(int4.unpack(words, group), q)


def test_rounding_of_the_weights_is_half_a_step_at_most() -> None:
    weight = fresh(5, 256)
    q, scale = int8.quantize_weight(weight)
    assert bool(((q * scale[:, None] - weight).abs() <= scale[:, None] / 2 * 1.0001).all())
    q4, scale4 = int4.quantize_weight(weight, 64)
    error = (q4.float() * scale4[..., None] - weight.view(5, 4, 64)).abs()
    assert bool((error <= scale4[..., None] / 2 * 1.0001).all())


def test_nan_reaches_its_row_only() -> None:
    x = fresh(3, 128)
    x[1, 7] = float("nan")
    weight, scale = int8.quantize_weight(fresh(5, 128))
    q, scale4 = int4.quantize_weight(fresh(5, 128))
    for out in (gemv_int8(x, weight, scale), gemv_int4(x, int4.pack(q), scale4)):
        assert bool(out[1].isnan().all())
        assert bool(torch.isfinite(out[[0, 2]]).all())


def test_what_they_do_not_take() -> None:
    ones = torch.ones
    weight = ones(4, 128, dtype=torch.int8)
    with pytest.raises(KernelError, match="gemv_int8: x has 17 rows; this operator takes at most 16"):
        gemv_int8(ones(17, 128), weight, ones(4))
    with pytest.raises(KernelError, match=r"wanted .* K = 64"):
        gemv_int8(ones(1, 64), weight, ones(4))
    with pytest.raises(KernelError, match="weight float32"):
        gemv_int8(ones(1, 128), ones(4, 128), ones(4))
    with pytest.raises(KernelError, match=r"scale is \[5\]"):
        gemv_int8(ones(1, 128), weight, ones(5))
    words = ones(4, 16, dtype=torch.int32)
    with pytest.raises(KernelError, match="gemv_int4: x has 17 rows"):
        gemv_int4(ones(17, 128), words, ones(4, 1))
    with pytest.raises(KernelError, match=r"weight is \[4, 16\], wanted \[N, K / 8\] with K = 64"):
        gemv_int4(ones(1, 64), words, ones(4, 1))
    with pytest.raises(KernelError, match=r"G one of \[32, 64, 128\]"):
        gemv_int4(ones(1, 128), words, ones(4, 8))
    with pytest.raises(KernelError, match="mixed dtypes"):
        gemv_int4(ones(1, 128), words, ones(4, 1).half())
    with pytest.raises(KernelError, match="groups of 48"):
        int4.quantize_weight(ones(4, 96), 48)
