"""The tile tables agree with the kernels, and every Qwen finds its tiles in them."""

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels import OPERATORS
from qcompile.kernels.decode_attention.launch import choose_merge, count_splits
from qcompile.kernels.matmul_bias_residual import plan
from qcompile.kernels.tile_table import ROOT, KernelTable, table, tables

pytest.importorskip("triton")
pytestmark = pytest.mark.torch
KERNELS = [kernel for operator in OPERATORS for kernel in tables(operator)]
CAPACITY = {"ub": 192 << 10, "cbuf": 512 << 10, "cc": 128 << 10}
# hidden_size, intermediate_size, heads, key heads, head_dim of Qwen2.5 0.5B to 72B and Qwen3 0.6B to 32B
QWENS = [
    (896, 4864, 14, 2, 64),
    (1536, 8960, 12, 2, 128),
    (2048, 11008, 16, 2, 128),
    (3584, 18944, 28, 4, 128),
    (5120, 13824, 40, 8, 128),
    (8192, 29568, 64, 8, 128),
    (1024, 3072, 16, 8, 128),
    (5120, 25600, 64, 8, 128),
]


def test_every_folder_is_an_operator_and_has_all_its_files() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/kernel.py")}
    assert folders == set(OPERATORS)
    for name in OPERATORS:
        assert {"kernel.py", "reference.py", "launch.py", "tiles.toml", "README.md"} <= {
            path.name for path in (ROOT / name).iterdir()
        }


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.function)
def test_signature_and_constants_are_the_arguments_of_the_kernel(kernel: KernelTable) -> None:
    function = getattr(importlib.import_module(f"qcompile.kernels.{kernel.operator}.kernel"), kernel.function)
    for tile in kernel.tiles:
        assert [*kernel.signature, *tile.constants] == function.arg_names


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.function)
def test_budgets_fit_and_one_tile_must_not(kernel: KernelTable) -> None:
    assert "Ascend910B4" in kernel.chips
    assert {"fp16", "bf16", "fp32"} >= set(kernel.variants)
    for tile in kernel.tiles:
        assert bool(tile.budget_bytes) == (tile.expect == "ok")
        assert all(0 < size <= CAPACITY[buffer] for buffer, size in tile.budget_bytes.items())
    assert {tile.expect for tile in kernel.tiles} == {"ok", "overflow"}
    assert {variant for tile in kernel.tiles if tile.expect == "ok" for variant in tile.variants} == set(
        kernel.variants
    )


def npu(dtype: torch.dtype) -> Any:
    """As much of a tensor on an NPU as choosing a tile looks at."""
    return SimpleNamespace(device=SimpleNamespace(type="npu"), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", QWENS, ids=str)
def test_every_qwen_has_its_tiles_on_an_npu(dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    hidden, ffn, heads, kv_heads, head_dim = sizes
    x = npu(dtype)
    launchers = {name: importlib.import_module(f"qcompile.kernels.{name}.launch") for name in OPERATORS}
    assert launchers["add_rms_norm"].choose(x, 8, hidden).constants["BLOCK_COLS"] >= hidden
    for name in ("add_layer_norm", "add_rms_norm_quantize"):
        assert launchers[name].choose(x, hidden).constants["BLOCK_COLS"] >= hidden
    assert launchers["head_rms_norm"].choose(x, 8, heads, head_dim).constants["BLOCK_COLS"] == head_dim
    assert launchers["rope_cache"].choose(x, 8, head_dim).constants["HALF"] == head_dim // 2
    assert launchers["swiglu"].choose(x, 8, ffn).constants["BLOCK_COLS"] > 0
    assert launchers["quantize_per_token"].choose(x, 8, hidden, False).constants["BLOCK_COLS"] >= hidden
    assert launchers["quantize_per_token"].choose(x, 8, ffn, True).constants["BLOCK_COLS"] > 0
    for rows in (1, 17, 4096):
        assert plan.choose(x, rows, hidden, ffn).constants["BLOCK_M"] >= min(rows, 64)
        assert launchers["matmul_int8"].choose(x, rows, hidden, dtype).constants["BLOCK_M"] >= min(rows, 128)
    assert launchers["gemv_int8"].choose(x, 1, ffn, hidden).constants["BLOCK_K"] > 0
    assert launchers["gemv_int4"].choose(x, 1, ffn, hidden // 128, 128).constants["GROUP"] == 128
    assert launchers["decode_attention"].choose(x, heads // kv_heads, head_dim, 8 * kv_heads).constants["D"] == head_dim
    splits = count_splits(x, kv_heads, 32768, 64)
    assert choose_merge(x, splits, head_dim).constants["BLOCK_S"] >= splits
    for top_k in (1, 64):
        logits = SimpleNamespace(device=x.device, dtype=dtype, shape=(1, 152_064))
        chunk, merge = launchers["sampler"].choose(logits, top_k)
        chunks = -(-152_064 // chunk.constants["BLOCK_VOCAB"])
        assert merge.constants["BLOCK_CANDIDATES"] >= chunks * top_k


def test_what_no_tile_is_large_enough_for() -> None:
    message = r"add_rms_norm: no tile for Ascend910B4 in fp16 has .*9000.*; the table has .*8192.* \(kernels/add_rms_norm/tiles"
    with pytest.raises(KernelError, match=message):
        table("add_rms_norm", "add_rms_norm_kernel").pick("fp16", BLOCK_COLS=9000)
    with pytest.raises(KernelError, match="'D': 96"):
        table("decode_attention", "decode_attention_kernel").pick("fp16", {"D": 96}, BLOCK_G=4)


def test_importing_the_package_needs_neither_torch_nor_triton() -> None:
    code = (
        "import sys, qcompile.kernels, qcompile.kernels.tile_table as t\n"
        "t.tables('swiglu')\nprint(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
