"""What quantization does to the real model, on the built-in text: the figures that take minutes and not hours.

Figures on the reference text are in docs/quantization_graph.md; `benchmarks/quality_table.py` makes them.
"""

from pathlib import Path

import pytest

from tests.real.real_model import Measured, qcompile

pytestmark = pytest.mark.real
PARAMETERS = 494_032_768
LLAMA_Q4_0_BYTES = 336e6


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def quality(work: Path, reference: Path, directory: Path) -> dict[str, float]:
    arguments = (
        "quality",
        reference,
        directory,
        "--tokens",
        "1200",
        "--stride",
        "1024",
        "--greedy",
        "0",
        "--no-layers",
    )
    record = qcompile(work, f"quality-{directory.name}", *arguments).record["overall"]
    figures = f"KL {record['mean_kl']:.5f}, top-1 {record['top1_agreement']:.2%}, {size_of(directory) / 1e6:.1f} MB"
    print(f"\n{directory.name}: {figures}")
    return dict(record)


@pytest.fixture(scope="module")
def int4(work: Path, exported: tuple[Path, Measured]) -> Path:
    qcompile(
        work, "optimize-fuse-int4", "optimize", exported[0], "--passes", "fuse,int4", "--strict", "-o", work / "int4"
    )
    return work / "int4"


def test_int8_is_near_the_float_model_in_a_byte_per_parameter(
    work: Path, exported: tuple[Path, Measured], int8: tuple[Path, Measured]
) -> None:
    assert size_of(int8[0]) <= 1.03 * PARAMETERS
    seen = quality(work, exported[0], int8[0])
    assert seen["mean_kl"] <= 0.008
    assert seen["top1_agreement"] >= 0.955


def test_int4_without_calibration_is_smaller_than_q4_0(work: Path, exported: tuple[Path, Measured], int4: Path) -> None:
    assert size_of(int4) <= LLAMA_Q4_0_BYTES
    assert quality(work, exported[0], int4)["mean_kl"] <= 0.12


def test_what_is_loaded_runs_quantized(int8: tuple[Path, Measured]) -> None:
    loaded = int8[1].record["loaded"]
    assert loaded["dequantized"] == []
    assert loaded["quantized"] == 98


def test_lossless_codes_of_a_q4_k_m_are_no_larger_than_the_file_and_nearer_than_llama_cpp(
    work: Path, exported: tuple[Path, Measured]
) -> None:
    arguments = ("optimize", exported[0], "--passes", "fuse,lossless", "--strict", "-o", work / "lossless")
    record = qcompile(work, "optimize-fuse-lossless", *arguments).record
    assert record["size_bytes"] <= 397.8e6
    assert record["loaded"]["dequantized"] == []
    assert not {"BitShift", "BitwiseOr"} & record["loaded"]["kernels"].keys()
    assert (
        quality(work, exported[0], work / "lossless")["mean_kl"] <= 0.0015
    )  # 0.00052 on the reference text; llama.cpp 0.0043
