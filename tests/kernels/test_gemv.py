"""gemv_int8 and gemv_int4."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import KernelError
from qcompile.kernels.gemv_int4 import reference as int4
from qcompile.kernels.gemv_int4.few_rows import BF16_PLANES, FP16_PLANES
from qcompile.kernels.gemv_int4.launch import choose as choose_int4
from qcompile.kernels.gemv_int4.launch import dot_tile
from qcompile.kernels.gemv_int4.launch import launch as gemv_int4
from qcompile.kernels.gemv_int8 import launch as int8_launch
from qcompile.kernels.gemv_int8 import reference as int8
from qcompile.kernels.gemv_int8.few_rows import FP16_OF_BYTES
from qcompile.kernels.gemv_int8.launch import launch as gemv_int8
from qcompile.kernels.gemv_int8.launch import rows_tile
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 1152), (7, 9, 384), (16, 33, 128)])
@pytest.mark.parametrize("tile", [(16, 8, 3), (32, 4, 3), (64, 2, 4), (32, 2, 4, 3), (16, 1, 4, 7)])
def test_gemv_int4_on_matrix_units(dtype: torch.dtype, shape: tuple[int, int, int], tile: tuple[int, ...]) -> None:
    """The last two in 3 and 7 slices: K of 1 to 9 groups, so some slices are longer and some have nothing to do."""
    rows, num_out, num_in = shape
    x = fresh(rows, num_in, dtype=dtype)
    q, scale = int4.quantize_weight(fresh(num_out, num_in, dtype=dtype), 128)
    for bias in (None, fresh(num_out, dtype=dtype)):
        want = int4.reference(x, int4.pack(q), scale, bias, torch.float64)
        assert_close(gemv_int4(apart(x), int4.pack(q), scale, bias, dot_tile(x, rows, *tile)), want, dtype)


def test_the_int4_kernel_chosen_for_each_size() -> None:
    x = torch.zeros(1, 128, dtype=torch.float16)
    for num_out, num_in, slices, block_n in (  # the slices of one row, the tile of several
        (37888, 3584, 1, 64),
        (3584, 18944, 11, 32),
        (22016, 2048, None, 64),
        (2048, 11008, 14, 16),
        (9728, 896, None, 32),
        (896, 4864, None, 16),
    ):
        assert choose_int4(x, 1, num_out, num_in // 128, 128).constants.get("SPLITS") == slices
        stages = None if slices is None else 3 if slices == 1 else 2
        assert choose_int4(x, 1, num_out, num_in // 128, 128).gpu_options.get("num_stages") == stages
        assert choose_int4(x, 16, num_out, num_in // 128, 128).constants["BLOCK_N"] == block_n
    assert "SPLITS" not in choose_int4(x.float(), 1, 37888, 28, 128).constants
    assert "SPLITS" not in choose_int4(x, 16, 37888, 56, 64).constants


def halves(register: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Registers, int64 in 0 ... 2**32 - 1, as two numbers each, [2, count]."""
    return torch.where(register >= 1 << 31, register - (1 << 32), register).to(torch.int32).view(dtype).view(-1, 2).T


def step_of_ptx(line: str, registers: dict[str, torch.Tensor], dtype: torch.dtype, shape: torch.Size) -> None:
    """What one instruction, of the few that are used, does to registers."""
    name, target, *parts = line.replace(",", " ").rstrip(";").split()
    a, *rest = [registers[part] if part in registers else torch.tensor(int(part, 0)).expand(shape) for part in parts]
    if name == "mov.b32":
        result = a
    elif name == "shr.u32":
        result = a >> rest[0]
    elif name == "xor.b32":
        result = a ^ rest[0]
    elif name == "lop3.b32":
        assert parts[3] == "0xEA"
        result = (a & rest[0]) | rest[1]
    elif name == "prmt.b32":
        given = [(one >> (8 * byte)) & 255 for one in (a, rest[0]) for byte in range(4)]
        result = sum((given[(int(parts[2], 0) >> (4 * i)) & 15] << (8 * i) for i in range(4)), torch.zeros_like(a))
    else:
        assert name.startswith(("add.rn.", "fma.rn."))
        x, *others = [halves(one, dtype).double() for one in (a, *rest)]
        wide = x * others[0] + others[1] if name.startswith("fma") else x + others[0]
        result = wide.to(dtype).T.contiguous().view(torch.int32).flatten().long() & 0xFFFFFFFF
    registers[target] = result


def run_ptx(ptx: Any, dtype: torch.dtype, **given: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every register after the instructions of ptx, on the registers given, by number."""
    registers = {f"${name[1:]}": value for name, value in given.items()}
    shape = next(iter(given.values())).shape
    for line in ptx.value.splitlines():
        if line and not line.startswith(("{", "}", ".reg")):
            step_of_ptx(line, registers, dtype, shape)
    return registers


@pytest.mark.parametrize(("ptx", "dtype"), [(FP16_PLANES, torch.float16), (BF16_PLANES, torch.bfloat16)])
def test_the_ptx_gives_the_nibbles_of_two_words(ptx: Any, dtype: torch.dtype) -> None:
    words = torch.randint(0, 1 << 32, (2, 1000))
    registers = run_ptx(ptx, dtype, _8=words[0], _9=words[1])
    for j in range(8):
        assert torch.equal(halves(registers[f"${j}"], dtype).long(), ((words >> (4 * j)) & 15) - 8)


def test_the_ptx_gives_the_numbers_of_four_bytes() -> None:
    register = torch.randint(0, 1 << 32, (1000,))
    registers = run_ptx(FP16_OF_BYTES, torch.float16, _2=register)
    got = torch.cat([halves(registers[name], torch.float16) for name in ("$0", "$1")])
    assert torch.equal(got.T.long().flatten(), register.to(torch.int32).view(torch.int8).long())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 70, 65), (1, 64, 1000), (1, 33, 1024), (1, 32, 1024), (5, 33, 1000), (16, 9, 1500)]
)
@pytest.mark.parametrize("tile", [(16, 128, 4, 3), (32, 64, 2, 3)])
def test_gemv_int8_on_matrix_units(
    dtype: torch.dtype, shape: tuple[int, int, int], tile: tuple[int, int, int, int]
) -> None:
    """One row is copied as it lies; of its shapes only the fourth fills every tile, and is loaded without masks."""
    rows, num_out, num_in = shape
    x, bias = fresh(rows, num_in, dtype=dtype), fresh(num_out, dtype=dtype)
    weight, scale = int8.quantize_weight(fresh(num_out, num_in))
    want = int8.reference(x, weight, scale, bias, torch.float64)
    assert_close(gemv_int8(apart(x), weight, scale, bias, rows_tile(x, rows, *tile)), want, dtype)


def test_the_int8_kernel_chosen_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_launch, "has_ptx", lambda x: x.dtype == torch.float16)
    x = torch.zeros(1, 128, dtype=torch.float16)
    for num_out, num_in, one, several in (
        (37888, 3584, (16, 128, 4, 4), (32, 128, 4, 3)),
        (3584, 18944, (16, 128, 4, 5), (16, 256, 4, 3)),
        (2048, 11008, (16, 128, 8, 3), (16, 256, 4, 3)),
        (9728, 896, None, (16, 128, 4, 3)),
        (896, 4864, None, (16, 128, 4, 3)),
    ):
        for rows, cut in ((1, one), (16, several)):
            tile = int8_launch.choose(x, rows, num_out, num_in)
            assert tile == rows_tile(x, rows, *cut) if cut else "STAGES" in tile.constants
            plain = int8_launch.choose(x.bfloat16(), rows, num_out, num_in)
            assert plain == rows_tile(x.bfloat16(), rows, 16, 128, 4, 3) if rows > 1 else "STAGES" in plain.constants


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
    with pytest.raises(KernelError, match=r"gemv_int8: weight is \[3\], wanted \[N, K\], not empty"):
        int8.quantize_weight(ones(3))
