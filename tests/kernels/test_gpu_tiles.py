"""The tiles that a GPU is given, and the sizes that are compiled into its kernels."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcompile.kernels.placement import compiled_in

pytestmark = pytest.mark.torch


def on(device: str) -> Any:
    """As much of a tensor as choosing a tile looks at."""
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=torch.float16)


@pytest.mark.parametrize(
    ("operator", "sizes", "constants", "warps"),
    [
        ("add_rms_norm", (128, 896), {"BLOCK_COLS": 1024, "BLOCK_ROWS": 1, "WALK": 0}, 4),
        ("add_rms_norm", (4096, 896), {"BLOCK_COLS": 1024, "BLOCK_ROWS": 1, "WALK": 0}, 1),
        ("add_rms_norm", (4096, 3584), {"BLOCK_COLS": 4096, "BLOCK_ROWS": 1, "WALK": 0}, 4),
        ("add_rms_norm", (1, 65_536), {"BLOCK_COLS": 65_536, "BLOCK_ROWS": 1, "WALK": 0}, 32),
        ("add_layer_norm", (3584,), {"BLOCK_COLS": 4096, "BLOCK_ROWS": 1, "WALK": 0}, 16),
        ("add_rms_norm_quantize", (2048,), {"BLOCK_COLS": 2048, "WALK": 0}, 8),
        ("head_rms_norm", (4096, 14, 64), {"BLOCK_ROWS": 16, "BLOCK_COLS": 64, "WALK": 0}, 2),
        ("head_rms_norm", (128, 14, 64), {"BLOCK_ROWS": 16, "BLOCK_COLS": 64, "WALK": 0}, 8),
        ("head_rms_norm", (4096, 16, 128), {"BLOCK_ROWS": 16, "BLOCK_COLS": 128, "WALK": 0}, 4),
        ("head_rms_norm", (32_768, 16, 128), {"BLOCK_ROWS": 8, "BLOCK_COLS": 128, "WALK": 0}, 4),
        ("swiglu", (1, 4864), {"BLOCK_COLS": 1024, "WALK": 0, "ONCE": 1}, 8),
        ("swiglu", (16, 100), {"BLOCK_COLS": 128, "WALK": 0, "ONCE": 1}, 1),
        ("swiglu", (128, 18_944), {"BLOCK_COLS": 1024, "WALK": 0, "ONCE": 0}, 8),
        ("swiglu", (65_536, 18_944), {"BLOCK_COLS": 1024, "WALK": 1, "ONCE": 0}, 8),
        ("rope_cache", (128, 64), {"BLOCK_ROWS": 16, "HALF": 32}, 4),
        ("rope_cache", (4096, 128), {"BLOCK_ROWS": 16, "HALF": 64}, 4),
        ("quantize_per_token", (1, 4864, False), {"PIECES": 2, "BLOCK_COLS": 2048}, 4),
        ("quantize_per_token", (4096, 4864, False), {"PIECES": 4, "BLOCK_COLS": 1024}, 2),
        ("quantize_per_token", (4096, 11_008, False), {"PIECES": 2, "BLOCK_COLS": 4096}, 8),
        ("quantize_per_token", (1, 18_944, False), {"PIECES": 4, "BLOCK_COLS": 4096}, 8),
        ("quantize_per_token", (1, 1, False), {"PIECES": 1, "BLOCK_COLS": 1}, 1),
    ],
)
def test_tiles(operator: str, sizes: tuple[int, ...], constants: dict[str, int], warps: int) -> None:
    tile = importlib.import_module(f"qcompile.kernels.{operator}.launch").choose(on("cuda"), *sizes)
    assert tile.constants == constants
    assert tile.gpu_options == {"num_warps": warps}


def test_sizes_are_constants_on_a_gpu_only() -> None:
    language = pytest.importorskip("triton.language", reason="needs triton (Linux)")
    constants = compiled_in(on("cuda"), 896, 1792)
    assert all(isinstance(one, language.constexpr) for one in constants)
    assert [one.value for one in constants] == [896, 1792]
    for device in ("npu", "cpu"):
        assert compiled_in(on(device), 896, 1792) == (896, 1792)


@pytest.mark.parametrize(("batch", "stride", "compiled"), [(4, 300, True), (1, 2100, True), (4, 2100, False)])
def test_how_far_rows_of_logits_lie_apart_compiles_nothing_anew(batch: int, stride: int, compiled: bool) -> None:
    """The last of S logits of every sequence lie S rows apart."""
    language = pytest.importorskip("triton.language")
    logits = on("cuda")
    logits.shape, logits.stride = (batch, 300), lambda axis: stride
    *sizes, last = importlib.import_module("qcompile.kernels.sampler.launch").part_sizes(logits, 2)
    assert [one.value for one in sizes] == [300, 2]
    assert isinstance(last, language.constexpr) == compiled
    assert getattr(last, "value", last) == (300 if compiled else 2100)
