"""What the compiler makes of the kernels for an H100, without a GPU: wide loads, asynchronous copies, matrix instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = pytest.importorskip("tests.kernels.gpu_code", reason="needs triton (Linux): its compiler").CASES
pytestmark = pytest.mark.torch
ROW_KERNELS = ("add_rms_norm", "add_layer_norm", "add_rms_norm_quantize", "head_rms_norm", "swiglu")
SPLIT = ("matmul_split", "matmul_int8_split")
SUMS = ("matmul_sum", "matmul_int8_sum")
ROWS = ("quantize_in_pieces", "rope_cache_rows")
ON_MATRIX_UNITS = ("matmul_few_rows", "gemv_int4_dot", "gemv_int8_rows")
ONE_ROW_INT4 = "gemv_int4_dot, one row"
ONE_ROW_INT8 = "gemv_int8_rows, one row"
FEW_ROWS = ("gemv_int8", "gemv_int4", ONE_ROW_INT4, ONE_ROW_INT8, "matmul_one_row", *ON_MATRIX_UNITS)
SWIGLU = ("swiglu", "swiglu, few rows")
ATTENTION = ("decode_attention", "decode_attention, whole")
MEMORY_BOUND = (*ROW_KERNELS, SWIGLU[1], *ROWS, *FEW_ROWS, *ATTENTION, "sampler_part", "sampler_segment")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.gpu_code"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert isinstance(facts, dict)
    assert set(CASES) < set(facts)
    return facts


@pytest.mark.parametrize("operator", [name for name in MEMORY_BOUND if name not in SWIGLU])
def test_memory_is_moved_in_pieces_of_16_bytes(code: dict[str, dict[str, Any]], operator: str) -> None:
    assert code[operator]["widest"] == 16 or code[operator]["async_16"]
    assert code[operator]["wide"] + code[operator]["async_16"] >= 2


@pytest.mark.parametrize("operator", SWIGLU)
def test_swiglu_moves_8_bytes_at_a_time_on_more_threads(code: dict[str, dict[str, Any]], operator: str) -> None:
    """4 elements a thread were faster than 8 on an H100 (docs/kernels.md)."""
    assert code[operator]["widest"] == 8


@pytest.mark.parametrize(
    "operator", [*(name for name in ROW_KERNELS if name != "swiglu"), "quantize_in_pieces", "swiglu, few rows"]
)
def test_sizes_that_are_constants_leave_no_product_of_64_bits(code: dict[str, dict[str, Any]], operator: str) -> None:
    assert code[operator]["wide_products"] == 0


@pytest.mark.parametrize("operator", FEW_ROWS)
def test_products_of_few_rows_have_several_tiles_on_their_way(code: dict[str, dict[str, Any]], operator: str) -> None:
    assert code[operator]["async_16"] >= 2


def test_a_greedy_choice_has_several_blocks_on_their_way(code: dict[str, dict[str, Any]]) -> None:
    assert code["sampler_part"]["async_16"] >= 2
    assert code["sampler_part"]["stack"] == code["sampler_largest"]["stack"] == 0


def test_a_top_k_choice_reads_ahead_and_reduces_a_warp_in_one_instruction(code: dict[str, dict[str, Any]]) -> None:
    assert code["sampler_segment"]["async_16"] >= 2
    assert code["sampler_candidates"]["redux"] >= 4
    assert code["sampler_segment"]["stack"] == code["sampler_candidates"]["stack"] == 0


def test_without_stages_they_have_one(code: dict[str, dict[str, Any]]) -> None:
    assert code["gemv_int8, one tile at a time"]["async_16"] == 0


def test_only_several_rows_need_a_matrix_unit(code: dict[str, dict[str, Any]]) -> None:
    assert all(code[operator]["mma"] > 0 for operator in ON_MATRIX_UNITS)
    assert code["matmul_one_row"]["mma"] == 0


def test_packed_weights_become_fp16_without_conversions(code: dict[str, dict[str, Any]]) -> None:
    assert code["gemv_int8"]["from_int"] > 0
    for operator in ("gemv_int4_dot", ONE_ROW_INT4, "gemv_int8_rows", ONE_ROW_INT8):
        assert code[operator]["from_int"] == 0


def test_one_row_of_x_is_not_copied_for_every_column(code: dict[str, dict[str, Any]]) -> None:
    words, x = 32 * 2 * 64, 2 * 128 * 2  # bytes of a tile; two are on their way
    assert code[ONE_ROW_INT4]["shared"] < 2 * (words + x) + 512
    weights, x = 16 * 4 * 128, 4 * 128 * 2  # four are on their way
    assert code[ONE_ROW_INT8]["shared"] < 4 * (weights + x) + 512


@pytest.mark.parametrize("operator", ["matmul_bias_residual", "matmul_int8", *SPLIT])
def test_large_products_use_the_warpgroup_matrix_instruction(code: dict[str, dict[str, Any]], operator: str) -> None:
    assert code[operator]["wgmma"] > 0
    assert code[operator]["async_16"] > 0


def test_tiles_are_copied_as_a_whole(code: dict[str, dict[str, Any]]) -> None:
    assert code["matmul_tma"]["wgmma"] > 0
    assert code["matmul_tma"]["tma"] >= 2
    assert code["matmul_tma"]["async_16"] == 0


def test_two_programs_that_copy_their_ends_fit_a_multiprocessor(code: dict[str, dict[str, Any]]) -> None:
    pair = code["matmul_tma, two a multiprocessor"]
    assert pair["shared"] <= (227 << 10) // 2
    assert pair["stack"] == 0
    assert pair["tma"] >= 4


@pytest.mark.parametrize("operator", SUMS)
def test_sums_of_slices_read_them_in_pieces_of_16_bytes(code: dict[str, dict[str, Any]], operator: str) -> None:
    assert code[operator]["wide"] >= 8


@pytest.mark.parametrize("operator", [*MEMORY_BOUND, *SPLIT, *SUMS])
def test_no_register_is_spilled(code: dict[str, dict[str, Any]], operator: str) -> None:
    assert code[operator]["stack"] == 0
