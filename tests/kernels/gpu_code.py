"""Compile kernels for an H100 on a machine without a GPU and print, as JSON, what the machine code looks like.

Run in a process of its own, without TRITON_INTERPRET: `python -m tests.kernels.gpu_code`.
"""

import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qcompile.kernels.tile_table import table

_H100 = GPUTarget("cuda", 90, 32)
_COUNTS = {"n_rows", "n_tokens", "n_batch", "n_splits", "n_kv_heads", "n_heads", "n_chunks", "n_groups", "n_candidates"}
_COUNTS |= {"group", "tokens_per_row", "top_k"}  # arguments that are seldom multiples of 16
OPERATORS = {"gemv_int4_dot": "gemv_int4", "gemv_int8_rows": "gemv_int8"}
FEW_ROWS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "matmul_one_row": ({"BLOCK_N": 4, "BLOCK_K": 256, "STAGES": 6, "HAS_BIAS": 1, "HAS_RESIDUAL": 1}, {"num_warps": 2}),
    "matmul_few_rows": (
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "PARTS": 4, "HAS_BIAS": 1, "HAS_RESIDUAL": 1},
        {"num_warps": 4, "num_stages": 3},
    ),
    "gemv_int4_dot": (
        {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_G": 4, "GROUP": 128, "HAS_BIAS": 1, "PTX": 1, "SPLITS": 1, "PDL": 0},
        {"num_warps": 4, "num_stages": 2},
    ),
    "gemv_int8_rows": (
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "PARTS": 4, "HAS_BIAS": 1, "PTX": 1, "EVEN": 0},
        {"num_warps": 4, "num_stages": 3},
    ),
}
SPLIT: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "matmul_split": (
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLITS": 4},
        {"num_warps": 8, "num_stages": 4},
    ),
    "matmul_int8_split": (
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "SPLITS": 4},
        {"num_warps": 8, "num_stages": 4},
    ),
    "matmul_tma": (
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "SPLITS": 1, "PDL": 1, "AFTER": 1, "LATE": 0}
        | {"HAS_BIAS": 1, "HAS_RESIDUAL": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
    "matmul_sum": ({"BLOCK_COLS": 512, "SPLITS": 8, "HAS_BIAS": 1, "HAS_RESIDUAL": 1, "PDL": 0}, {"num_warps": 4}),
    "matmul_int8_sum": ({"BLOCK_COLS": 512, "SPLITS": 8, "HAS_BIAS": 1}, {"num_warps": 4}),
}
_ROW = {"n_cols": 3584, "x_stride": 3584, "residual_stride": 3584}  # sizes that launchers hand over as constants
_HEADS = {"n_heads": 28, "n_kv_heads": 4, "q_stride": 4608, "k_stride": 4608, "v_stride": 4608}
ROWS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "quantize_in_pieces": (
        {"PIECES": 4, "BLOCK_COLS": 4096, "n_cols": 18944, "x_stride": 18944},
        {"num_warps": 8},
    ),
    "rope_cache_rows": ({"BLOCK_ROWS": 16, "HALF": 64, **_HEADS}, {"num_warps": 4}),
    "sampler_part": (
        {"BLOCK_VOCAB": 1024, "STAGES": 3, "PDL": 1, "n_vocab": 151_936, "n_parts": 149},
        {"num_warps": 4},
    ),
    "sampler_segment": (
        {"BLOCK_VOCAB": 1024, "SEGMENTS": 256, "STAGES": 4, "PDL": 1, "n_vocab": 151_936, "n_parts": 6},
        {"num_warps": 4},
    ),
    "sampler_candidates": (
        {"BLOCK_VOCAB": 1024, "SEGMENTS": 256, "BLOCK_SEGMENTS": 2048, "BLOCK_CANDIDATES": 2048, "BLOCK_K": 32}
        | {"HAS_UNIFORM": 1, "PDL": 1, "n_vocab": 151_936, "n_parts": 6},
        {"num_warps": 4},
    ),
    "sampler_largest": ({"BLOCK_PARTS": 256, "PDL": 1, "n_parts": 149}, {"num_warps": 1}),
}
TYPES_OF = {
    "sampler_part": ("sampler_chunk_kernel", "fp16"),
    "sampler_segment": ("sampler_chunk_kernel", "fp16"),
    "sampler_candidates": ("sampler_merge_kernel", "fp32"),
    "sampler_largest": ("sampler_merge_kernel", "fp32"),
}
CASES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "add_rms_norm": ({"BLOCK_ROWS": 1, "BLOCK_COLS": 4096, "WALK": 0, **_ROW}, {"num_warps": 16}),
    "add_layer_norm": ({"BLOCK_ROWS": 1, "BLOCK_COLS": 4096, "WALK": 0, **_ROW}, {"num_warps": 16}),
    "head_rms_norm": (
        {"BLOCK_ROWS": 8, "BLOCK_COLS": 128, "WALK": 0, "n_heads": 28, "n_cols": 128, "token_stride": 4608},
        {"num_warps": 4},
    ),
    "swiglu": ({"BLOCK_COLS": 1024, "WALK": 0, "ONCE": 0}, {"num_warps": 8}),
    "add_rms_norm_quantize": ({"BLOCK_COLS": 4096, "WALK": 0, **_ROW}, {"num_warps": 16}),
    "matmul_bias_residual": (
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "HAS_BIAS": 1, "HAS_RESIDUAL": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
    "matmul_int8": (
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "GROUP_M": 8, "HAS_BIAS": 1},
        {"num_warps": 8, "num_stages": 3},
    ),
    "gemv_int8": ({"BLOCK_N": 4, "BLOCK_K": 512, "HAS_BIAS": 1, "STAGES": 5}, {"num_warps": 4}),
    "gemv_int4": ({"BLOCK_N": 8, "BLOCK_G": 8, "GROUP": 128, "HAS_BIAS": 1, "STAGES": 2}, {"num_warps": 1}),
    "decode_attention": ({"BLOCK_G": 16, "BLOCK_T": 64, "D": 128, "IS_SPLIT": 1}, {"num_warps": 4, "num_stages": 3}),
}


def function_of(case: str) -> tuple[Any, dict[str, str]]:
    """The kernel of a case, and the types of its arguments in fp16."""
    operator, module = case, "kernel"
    if case in FEW_ROWS:
        operator, module = OPERATORS.get(case, "matmul_bias_residual"), "few_rows"
    if case in SPLIT:
        operator, module = (
            "matmul_int8" if "int8" in case else "matmul_bias_residual",
            "tma" if "tma" in case else "split",
        )
    if case in ROWS:
        operator, module = {
            "quantize_in_pieces": ("quantize_per_token", "in_pieces"),
            "rope_cache_rows": ("rope_cache", "rows"),
            "sampler_part": ("sampler", "greedy"),
            "sampler_largest": ("sampler", "greedy"),
            "sampler_segment": ("sampler", "top_k"),
            "sampler_candidates": ("sampler", "top_k"),
        }[case]
    function, variant = TYPES_OF.get(case, (f"{operator}_kernel", "fp16"))
    typed = table(operator, function).typed_signature(variant)
    if case in SPLIT:
        typed |= {"x": "tensordesc<fp16[128, 64]>", "weight": "tensordesc<fp16[256, 64]>"}
        typed |= {"residual": "*fp16", "out": "*fp16"}
        typed["partial_ptr"] = "*i32" if operator == "matmul_int8" else "*fp32"
    if case == "sampler_candidates":
        typed |= {"logits_ptr": "*fp16", "row_stride": "i32"}
    return getattr(importlib.import_module(f"qcompile.kernels.{operator}.{module}"), f"{case}_kernel"), typed


def compiled(case: str, options: dict[str, int], changed: dict[str, int]) -> Any:
    """The first kernel of an operator, or another that only a GPU runs, for sizes that are multiples of 16 as Qwen's are."""
    constants, usual = (CASES | FEW_ROWS | ROWS | SPLIT)[case]
    constants = constants | changed
    jit, typed = function_of(case)
    if constants.get("LATE"):
        height, width, depth = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        typed |= {"x": f"tensordesc<fp16[{height}, {depth}]>", "weight": f"tensordesc<fp16[{width}, {depth}]>"}
        typed |= dict.fromkeys(("residual", "out"), f"tensordesc<fp16[{height}, {width}]>")
    signature = {name: "constexpr" if name in constants else typed[name] for name in jit.arg_names}
    aligned = [
        index
        for index, name in enumerate(jit.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in _COUNTS)
    ]
    source = ASTSource(
        fn=jit,
        signature=signature,
        constexprs={(jit.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    return triton.compile(source, target=_H100, options=usual | options)


def stack_bytes(cubin: bytes) -> int:
    """Local memory a thread, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max(int(number) for number in re.findall(r"STACK:(\d+)", listed.stdout + listed.stderr))


def facts(operator: str, options: dict[str, int] | None = None, **changed: int) -> dict[str, Any]:
    """Widths of global accesses in bytes, asynchronous copies, matrix instructions, memory a thread and a program."""
    kernel = compiled(operator, options or {}, changed)
    ptx = kernel.asm["ptx"]
    widths = [int(v or 1) * int(b) // 8 for v, b in re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx)]
    return {
        "widest": max(widths, default=0),
        "wide": widths.count(16),
        "async_16": len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)),
        "wide_products": len(
            re.findall(r"(?:mul|mad)\.(?:lo|hi)\.[su]64|(?:mul|mad)\.wide\.[su]32\s+%\S+ %\S+ %", ptx)
        ),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "redux": ptx.count("redux.sync"),
        "from_int": len(re.findall(r"cvt\.rn\.f\d+\.s", ptx)),
        "shared": kernel.metadata.shared,
        "stack": stack_bytes(kernel.asm["cubin"]),
    }


if __name__ == "__main__":
    found = {operator: facts(operator) for operator in (*CASES, *FEW_ROWS, *ROWS, *SPLIT)}
    one_row = facts("gemv_int4_dot", options={"num_warps": 2, "num_stages": 3}, BLOCK_M=1, BLOCK_N=32, BLOCK_G=2)
    found["gemv_int4_dot, one row"] = one_row
    found["gemv_int8_rows, one row"] = facts("gemv_int8_rows", options={"num_stages": 5}, BLOCK_M=1, EVEN=1)
    pair = {"BLOCK_N": 128, "LATE": 1, "PDL": 0, "AFTER": 0}
    found["matmul_tma, two a multiprocessor"] = facts("matmul_tma", options={"num_warps": 4}, **pair)
    found["decode_attention, whole"] = facts("decode_attention", BLOCK_T=32, IS_SPLIT=0)
    found["swiglu, few rows"] = facts("swiglu", ONCE=1, n_cols=11008, row_stride=22016)
    found["gemv_int8, one tile at a time"] = facts("gemv_int8", STAGES=0)
    print(json.dumps(found))
