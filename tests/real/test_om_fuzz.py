"""The whole of `benchmarks/fuzz_om.py`: 10,000 mutated .om files."""

import pytest

from benchmarks.fuzz_om import fuzz

pytestmark = pytest.mark.real


def test_10000_mutated_files() -> None:
    """No crash, no hang; each at most 1 s, and together not 200 MB more memory."""
    figures = fuzz(10_000, seed=1)
    print(f"\n{figures}")
    assert figures["read"] + figures["refused"] == 10_000
    assert figures["read"] > 1000
    assert figures["refused"] > 1000
    assert figures["longest_s"] < 1
    assert figures["grown_mib"] < 200
