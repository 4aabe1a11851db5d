"""matmul_bias_residual and matmul_int8."""

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.matmul_bias_residual.launch import in_parts
from qcompile.kernels.matmul_bias_residual.launch import launch as matmul
from qcompile.kernels.matmul_bias_residual.plan import choose, is_copied_whole, plan
from qcompile.kernels.matmul_bias_residual.reference import reference as matmul_reference
from qcompile.kernels.matmul_int8.launch import choose as choose_int8
from qcompile.kernels.matmul_int8.launch import launch as matmul_int8
from qcompile.kernels.matmul_int8.reference import reference as matmul_int8_reference
from qcompile.kernels.placement import Launch
from tests.kernels.numerics import DTYPES, apart, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]
SMALL = Launch({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP_M": 8})
ONE_ROW = Launch({"BLOCK_N": 4, "BLOCK_K": 64, "STAGES": 2})
FEW_ROWS = Launch({"BLOCK_M": 8, "BLOCK_N": 16, "BLOCK_K": 16, "PARTS": 2})
SPLIT = tuple(Launch({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": splits}) for splits in (1, 3, 7))
TMA = SMALL.replace(TMA=1)
SPLIT_TMA = tuple(SMALL.replace(TMA=1, SPLITS=splits) for splits in (3, 7))
EXTRAS = ["", "bias", "residual", "bias residual"]


def with_addends(*shapes: tuple[int, int, int]) -> list[tuple[tuple[int, int, int], str]]:
    """Every shape with nothing and with all that can be added, the first with each alone too: the interpreter is slow."""
    return [(shapes[0], extras) for extras in EXTRAS] + [(s, e) for s in shapes[1:] for e in (EXTRAS[0], EXTRAS[-1])]


def check_matmul(
    dtype: torch.dtype, shape: tuple[int, int, int], extras: str, *tiles: Launch | None, gap: int = 3
) -> None:
    """With rows apart, and everything beside them NaN."""
    rows, num_out, num_in = shape
    x, weight = fresh(rows, num_in, dtype=dtype), fresh(num_out, num_in, dtype=dtype)
    bias = fresh(num_out, dtype=dtype) if "bias" in extras else None
    residual = fresh(rows, num_out, dtype=dtype) if "residual" in extras else None
    want = matmul_reference(x, weight, bias, residual, torch.float64)
    spread = None if residual is None else apart(residual)
    for tile in tiles:
        assert_close(matmul(apart(x, gap), apart(weight, gap), bias, spread, tile), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 65), (33, 20, 100), (2, 48, 32), (130, 17, 33)])
@pytest.mark.parametrize("extras", EXTRAS)
def test_matmul(dtype: torch.dtype, shape: tuple[int, int, int], extras: str) -> None:
    check_matmul(dtype, shape, extras, SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "extras"), with_addends((1, 70, 65), (1, 9, 1100), (3, 37, 101), (16, 17, 600), (10, 16, 32))
)
def test_few_rows_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int, int], extras: str) -> None:
    check_matmul(dtype, shape, extras, None, ONE_ROW, FEW_ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "extras"), with_addends((1, 70, 65), (33, 20, 100), (2, 48, 224), (50, 17, 333)))
def test_slices_of_k_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int, int], extras: str) -> None:
    """In 1, 3 and 7 slices: K of 65 to 333 has 3 to 11 blocks, so some slices are longer and some have nothing to do."""
    check_matmul(dtype, shape, extras, *SPLIT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_k_with_more_columns_than_their_sum_takes_at_once(dtype: torch.dtype) -> None:
    check_matmul(dtype, (3, 530, 30), "bias residual", *SPLIT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "extras"), with_addends((2, 48, 224), (33, 20, 104), (130, 17, 32)))
def test_tiles_copied_as_a_whole(dtype: torch.dtype, shape: tuple[int, int, int], extras: str) -> None:
    """Rows begin at multiples of 16 bytes, which such copies want."""
    check_matmul(dtype, shape, extras, TMA, TMA.replace(LATE=1), *SPLIT_TMA, gap=8)


def test_bias_and_residual_come_last_where_their_rows_can_be_copied() -> None:
    x, weight, bias, residual = fresh(50, 40), fresh(48, 40), fresh(48), fresh(50, 48)
    want = matmul_reference(x, weight, bias, residual, torch.float64)
    for gap in (8, 1):  # with rows 49 numbers apart they come first after all
        got = matmul(x, weight, bias, apart(residual, gap), tile=TMA.replace(LATE=1))
        assert_close(got, want, torch.float32)
    assert is_copied_whole(apart(residual, 8))
    assert not is_copied_whole(apart(residual, 1))
    assert not is_copied_whole(residual[:1].expand(50, 48))  # rows on each other


def test_slices_of_k_have_no_late_bias() -> None:
    x, weight, bias, residual = fresh(50, 80), fresh(48, 80), fresh(48), fresh(50, 48)
    got = matmul(x, weight, bias, residual, tile=TMA.replace(LATE=1, SPLITS=2))
    assert_close(got, matmul_reference(x, weight, bias, residual, torch.float64), torch.float32)


@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((4096, 3584, 18944), [3584, 512]),  # 448 tiles of 128 x 256 for 132 multiprocessors
        ((4096, 3584, 2048), [4096]),  # over too soon
        ((4096, 2048, 11008), [4096]),  # two waves, nearly full
        ((512, 3584, 18944), [512]),
        ((1, 3584, 18944), [1]),
    ],
)
def test_rows_of_the_last_wave(shape: tuple[int, int, int], heads: list[int]) -> None:
    rows, num_out, num_in = shape
    x, weight = torch.zeros(1, num_in, dtype=torch.float16), torch.zeros(1).half().expand(num_out, num_in)
    assert [count for count, _ in plan(x, weight, rows)] == heads


def test_large_tiles_by_their_waves() -> None:
    x = torch.zeros(1, 4864, dtype=torch.float16)
    for rows, num_out, cut in (
        (4096, 896, (128, 256)),  # 128 tiles, one wave
        (32768, 896, (256, 128)),  # 7 waves instead of 8
        (1024, 896, (128, 128)),
        (4096, 3584, (128, 256)),
    ):
        tile = choose(x, rows, num_out, 4864)
        assert (tile.constants["BLOCK_M"], tile.constants["BLOCK_N"]) == cut


def test_tiles_that_are_copied_as_a_whole() -> None:
    for rows, num_out, num_in, cut in (
        (4096, 896, 4864, (128, 128, 64, None)),  # 224 tiles at a time, two a multiprocessor
        (32768, 896, 4864, (256, 128, 64, None)),
        (4096, 2048, 11008, (128, 256, 64, None)),
        (128, 3584, 18944, (128, 64, 128, 2)),
        (128, 3584, 3584, (128, 64, 128, 2)),
        (128, 2048, 11008, (128, 64, 128, 4)),
        (65, 2048, 2048, (128, 64, 128, 4)),
        (128, 896, 4864, (128, 64, 128, 9)),
        (128, 896, 896, (64, 32, 64, None)),
        (128, 9728, 4864, (128, 64, 64, None)),  # more tiles than multiprocessors
        (512, 3584, 18944, (128, 128, 64, None)),
        (64, 3584, 18944, (64, 64, 128, 2)),
        (17, 2048, 11008, (64, 64, 128, 4)),
    ):
        constants = choose(torch.zeros(1, num_in, dtype=torch.float16), rows, num_out, num_in, True).constants
        assert tuple(constants.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS")) == cut
        assert constants["TMA"] == 1
        assert constants.get("LATE", 0) == int(rows == 4096 and num_out == 896)


def test_rows_in_parts() -> None:
    x, weight, residual = fresh(50, 40), fresh(17, 40), fresh(50, 17)
    want = matmul_reference(x, weight, None, residual, torch.float64)
    for head, tail in ((SMALL, SPLIT[1]), (TMA, TMA), (TMA, SPLIT_TMA[0])):
        got = in_parts(apart(x, 8), weight, None, apart(residual), [(33, head), (17, tail)])
        assert_close(got, want, torch.float32)


def test_the_slices_chosen_for_each_size() -> None:
    for rows, num_out, num_in, cut in (
        (32, 3584, 18944, (64, 128, 4)),
        (128, 3584, 18944, (128, 128, 4)),
        (128, 2048, 11008, (128, 128, 8)),
        (128, 3584, 3584, (128, 128, 4)),
        (128, 2048, 2048, (128, 64, 4)),
        (128, 896, 4864, (128, 64, 9)),
        (128, 896, 896, (64, 32, None)),
        (512, 2048, 2048, (128, 128, 2)),
        (513, 2048, 2048, (128, 128, None)),
        (4096, 2048, 11008, (128, 256, None)),
    ):
        x = torch.zeros(1, num_in, dtype=torch.float16)
        for tile in (choose(x, rows, num_out, num_in), choose_int8(x.to(torch.int8), rows, num_out, torch.float16)):
            assert tuple(tile.constants.get(name) for name in ("BLOCK_M", "BLOCK_N", "SPLITS")) == cut


def test_the_slices_chosen_are_launched() -> None:
    check_matmul(torch.float32, (17, 70, 1100), "bias residual", None)


def test_the_kernel_chosen_for_each_number_of_rows() -> None:
    x = fresh(1, 40)
    kernels = {rows: {"STAGES", "PARTS", "GROUP_M"} & set(choose(x, rows, 30, 40).constants) for rows in (1, 2, 16, 17)}
    assert kernels == {1: {"STAGES"}, 2: {"PARTS"}, 16: {"PARTS"}, 17: {"GROUP_M"}}


def test_the_tile_chosen_for_each_size() -> None:
    for rows, dtype in ((3, torch.float16), (20, torch.float16), (70, torch.float32)):
        x, weight = fresh(rows, 40, dtype=dtype), fresh(30, 40, dtype=dtype)
        assert_close(matmul(x, weight), matmul_reference(x, weight, None, None, torch.float64), dtype)


def test_every_tile_is_visited_once_in_bands() -> None:
    x, weight = fresh(16 * 11, 32), fresh(16 * 3, 32)
    want = matmul_reference(x, weight, None, None, torch.float64)
    assert_close(matmul(x, weight, tile=SMALL), want, torch.float32)


def int8s(*shape: int) -> torch.Tensor:
    return fresh(*shape).mul(50).clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 65), (33, 20, 100), (2, 48, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_int8(dtype: torch.dtype, shape: tuple[int, int, int], with_bias: bool) -> None:
    rows, num_out, num_in = shape
    x, weight = int8s(rows, num_in), int8s(num_out, num_in)
    x_scale, weight_scale = fresh(rows).abs() / 100, fresh(num_out).abs() / 100
    bias = fresh(num_out, dtype=dtype) if with_bias else None
    want = matmul_int8_reference(x, weight, x_scale, weight_scale, bias, dtype, torch.float64)
    assert_close(matmul_int8(x, weight, x_scale, weight_scale, bias, dtype, SMALL), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "with_bias"),
    [((1, 70, 65), False), ((33, 20, 100), True), ((2, 48, 224), False), ((50, 17, 333), True), ((3, 530, 30), True)],
)
def test_slices_of_k_change_no_bit_of_int8(dtype: torch.dtype, shape: tuple[int, int, int], with_bias: bool) -> None:
    rows, num_out, num_in = shape
    x, weight = int8s(rows, num_in), int8s(num_out, num_in)
    scales = fresh(rows).abs() / 100, fresh(num_out).abs() / 100
    bias = fresh(num_out, dtype=dtype) if with_bias else None
    want = matmul_int8(x, weight, *scales, bias, dtype, SMALL)
    assert_close(want, matmul_int8_reference(x, weight, *scales, bias, dtype, torch.float64), dtype)
    for tile in SPLIT:
        assert torch.equal(matmul_int8(x, weight, *scales, bias, dtype, tile), want)


def test_the_int8_slices_of_few_rows() -> None:
    for num_out, num_in, splits in (
        (3584, 18944, 4),
        (2048, 11008, 4),
        (896, 4864, 4),
        (896, 896, None),
        (37888, 3584, None),
    ):
        x = torch.zeros(1, num_in, dtype=torch.int8)
        assert choose_int8(x, 1, num_out, torch.float16).constants.get("SPLITS") == splits


def test_sums_of_int8_are_exact() -> None:
    x = torch.full((2, 2048), 127, dtype=torch.int8)
    for tile in (None, SMALL, *SPLIT):
        out = matmul_int8(x, x, torch.ones(2), torch.ones(2), None, torch.float32, tile)
        assert out.tolist() == [[127.0 * 127 * 2048] * 2] * 2


def test_the_longest_sum_of_int8_stays_in_int32() -> None:
    x, one = torch.full((1, 131_071), -128, dtype=torch.int8), torch.ones(1)
    whole = Launch({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 4096})
    for tile in (whole, whole.replace(SPLITS=3)):
        assert matmul_int8(x, x, one, one, None, torch.float32, tile).tolist() == [[float(131_071 * 128**2)]]
    x = torch.full((1, 131_072), -128, dtype=torch.int8)  # 2**31
    with pytest.raises(KernelError, match="K is 131072; sums longer than 131071 could leave int32"):
        matmul_int8(x, x, one, one, None, torch.float32)


def test_the_int8_slices_chosen_are_launched() -> None:
    x, weight = int8s(17, 1100), int8s(9, 1100)
    got = matmul_int8(x, weight, torch.ones(17), torch.ones(9), None, torch.float32)
    assert torch.equal(got.double(), x.double() @ weight.double().T)


def test_nan_reaches_its_row_only() -> None:
    x, weight = fresh(3, 40), fresh(5, 40)
    x[1, 7] = float("nan")
    for tile in (SMALL, ONE_ROW, FEW_ROWS, *SPLIT):
        out = matmul(x, weight, tile=tile)
        assert bool(out[1].isnan().all())
        assert bool(torch.isfinite(out[[0, 2]]).all())


def test_what_they_do_not_take() -> None:
    ones = torch.ones
    with pytest.raises(KernelError, match=r"weight is \[4, 9\], wanted \[N, K\] with K = 8"):
        matmul(ones(2, 8), ones(4, 9))
    with pytest.raises(KernelError, match=r"residual is \[2, 5\]"):
        matmul(ones(2, 8), ones(4, 8), None, ones(2, 5))
    with pytest.raises(KernelError, match="mixed dtypes"):
        matmul(ones(2, 8), ones(4, 8).half())
    with pytest.raises(KernelError, match="2 apart"):
        matmul(ones(8, 2).T, ones(4, 8))
    with pytest.raises(KernelError, match="weight is empty"):
        matmul(ones(2, 8), ones(0, 8))
    q = ones(2, 8, dtype=torch.int8)
    with pytest.raises(KernelError, match="x float32"):
        matmul_int8(ones(2, 8), ones(2, 8), ones(2), ones(2))
    with pytest.raises(KernelError, match=r"x_scale is \[3\]"):
        matmul_int8(q, q, ones(3), ones(2))
    with pytest.raises(KernelError, match="not contiguous"):
        matmul_int8(ones(8, 2, dtype=torch.int8).T, q, ones(2), ones(2))
    with pytest.raises(KernelError, match="bias float32"):
        matmul_int8(q, q, ones(2), ones(2), ones(2), torch.float16)
