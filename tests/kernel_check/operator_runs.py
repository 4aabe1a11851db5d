"""One run of every operator, on fresh inputs of odd shapes, with its kernels replaced by stand-ins."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from qcompile.kernels.placement import Launch
from qcompile.kernels.tile_table import table
from tests.kernel_check.compiled import CompiledStore
from tests.kernel_check.stand_in import TYPES, LinalgStandIn, StandIn
from tests.kernels.numerics import apart, assert_close, fresh
from tests.kernels.test_quantize import assert_equal_but_for_ties
from tests.kernels.test_rope_cache import arguments as rope_arguments


@dataclass
class Placing:
    """Puts stand-ins in the place of kernels."""

    kind: type[StandIn]
    store: CompiledStore
    monkeypatch: pytest.MonkeyPatch

    def put(self, operator: str, *functions: str) -> None:
        """Replace functions of an operator's kernel.py; only vector kernels have a plan that can be replayed."""
        module = importlib.import_module(f"qcompile.kernels.{operator}.kernel")
        for function in functions:
            kind = self.kind if table(operator, function).core == "vector" else LinalgStandIn
            self.monkeypatch.setattr(module, function, kind(operator, function, self.store))


Run = Callable[[Placing, torch.dtype], None]


def tile_of(operator: str, function: str, dtype: torch.dtype, **wanted: int) -> Launch:
    """The smallest tile of the table with these constants, for a dtype."""
    for tile in table(operator, function).tiles:
        is_meant = tile.expect == "ok" and TYPES[dtype] in tile.variants
        if is_meant and wanted.items() <= tile.constants.items():
            return Launch(dict(tile.constants))
    raise AssertionError(f"{function} has no tile {wanted} for {dtype}")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def add_rms_norm(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.add_rms_norm.launch import launch
    from qcompile.kernels.add_rms_norm.reference import reference

    placing.put("add_rms_norm", "add_rms_norm_kernel")
    tile = tile_of("add_rms_norm", "add_rms_norm_kernel", dtype)
    rows, columns = 7 * tile.constants["BLOCK_ROWS"] - 1, tile.constants["BLOCK_COLS"] - 7
    x, residual, gamma = (fresh(*shape, dtype=dtype) for shape in ((rows, columns), (rows, columns), (columns,)))
    y, h = launch(apart(x), apart(residual, 5), gamma, 0.3, tile)
    want_y, want_h = reference(x, residual, gamma, 0.3, torch.float64)
    assert_close(y, want_y, dtype)
    assert torch.equal(h, want_h)


def add_layer_norm(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.add_layer_norm.launch import launch
    from qcompile.kernels.add_layer_norm.reference import reference

    placing.put("add_layer_norm", "add_layer_norm_kernel")
    tile = tile_of("add_layer_norm", "add_layer_norm_kernel", dtype)
    x, residual = fresh(9, 900, dtype=dtype), fresh(9, 900, dtype=dtype)
    gamma, beta = fresh(900, dtype=dtype), fresh(900, dtype=dtype)
    y, h = launch(apart(x), apart(residual, 5), gamma, beta, 0.3, tile)
    want_y, want_h = reference(x, residual, gamma, beta, 0.3, torch.float64)
    assert_close(y, want_y, dtype)
    assert torch.equal(h, want_h)


def head_rms_norm(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.head_rms_norm.launch import launch
    from qcompile.kernels.head_rms_norm.reference import reference

    placing.put("head_rms_norm", "head_rms_norm_kernel")
    x, gamma = fresh(3, 4, 7, 128, dtype=dtype), fresh(128, dtype=dtype)
    y = launch(x[:, :, 1:6], gamma, 0.3, tile_of("head_rms_norm", "head_rms_norm_kernel", dtype, BLOCK_COLS=128))
    assert_close(y, reference(x[:, :, 1:6], gamma, 0.3, torch.float64), dtype)


def rope_cache(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.rope_cache.launch import launch
    from qcompile.kernels.rope_cache.reference import reference

    placing.put("rope_cache", "rope_cache_kernel")
    given = rope_arguments(2, 5, 7, 2, 64, dtype)
    want = {name: value.double() if value.dtype == dtype else value for name, value in given.items()}
    want |= {name: given[name] for name in ("cos", "sin")}
    want_q = reference(**want, compute=torch.float64)
    got_q = launch(**given, tile=tile_of("rope_cache", "rope_cache_kernel", dtype, HALF=32))
    assert_close(got_q, want_q, dtype)
    assert_close(given["k_cache"], want["k_cache"], dtype)
    assert torch.equal(given["v_cache"], want["v_cache"].to(dtype))
    assert bool((given["k_cache"][:, :, :2] == 7.0).all()), "slots that nobody named were written"


def swiglu(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.swiglu.launch import launch
    from qcompile.kernels.swiglu.reference import reference

    placing.put("swiglu", "swiglu_kernel")
    x = fresh(7, 2 * 1300, dtype=dtype)
    assert_close(launch(apart(x), tile_of("swiglu", "swiglu_kernel", dtype)), reference(x, torch.float64), dtype)


def quantize_per_token(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.quantize_per_token.launch import launch
    from qcompile.kernels.quantize_per_token.reference import reference

    placing.put("quantize_per_token", "quantize_per_token_kernel", "quantize_long_rows_kernel")
    for function, columns in (("quantize_per_token_kernel", 1000), ("quantize_long_rows_kernel", 9001)):
        x = fresh(7, columns, dtype=dtype)
        x[3] = 0
        is_long = "long" in function
        q, scale = launch(apart(x), tile_of("quantize_per_token", function, dtype), is_long)
        _, want_scale = reference(x, torch.float64)
        assert_close(scale, want_scale, torch.float32)
        assert_equal_but_for_ties(q, x, want_scale)


def add_rms_norm_quantize(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.add_rms_norm_quantize.launch import launch
    from qcompile.kernels.add_rms_norm_quantize.reference import reference

    placing.put("add_rms_norm_quantize", "add_rms_norm_quantize_kernel")
    x, residual, gamma = fresh(7, 900, dtype=dtype), fresh(7, 900, dtype=dtype), fresh(900, dtype=dtype)
    tile = tile_of("add_rms_norm_quantize", "add_rms_norm_quantize_kernel", dtype)
    q, scale, h = launch(apart(x), residual, gamma, 0.3, tile)
    want_q, want_scale, want_h = reference(x, residual, gamma, 0.3, torch.float64)
    assert torch.equal(h, want_h)
    assert_close(scale, want_scale, torch.float32)
    assert (q.int() - want_q.int()).abs().max() <= 1
    assert int((q != want_q).sum()) <= q.numel() // 100  # ties, and what float32 moves across one


def matmul_bias_residual(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.matmul_bias_residual.launch import launch
    from qcompile.kernels.matmul_bias_residual.reference import reference

    placing.put("matmul_bias_residual", "matmul_bias_residual_kernel")
    x, weight = fresh(19, 200, dtype=dtype), fresh(150, 200, dtype=dtype)
    bias, residual = fresh(150, dtype=dtype), fresh(19, 150, dtype=dtype)
    tile = tile_of("matmul_bias_residual", "matmul_bias_residual_kernel", dtype)
    got = launch(apart(x, 8), weight, bias, residual, tile)
    assert_close(got, reference(x, weight, bias, residual, torch.float64), dtype)


def codes(*shape: int) -> torch.Tensor:
    return fresh(*shape).mul(40).round().clamp(-127, 127).to(torch.int8)


def matmul_int8(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.matmul_int8.launch import launch
    from qcompile.kernels.matmul_int8.reference import reference

    placing.put("matmul_int8", "matmul_int8_kernel")
    x, weight = codes(19, 320), codes(150, 320)
    x_scale, weight_scale = fresh(19).abs() * 0.01, fresh(150).abs() * 0.01
    bias = fresh(150, dtype=dtype)
    got = launch(x, weight, x_scale, weight_scale, bias, dtype, tile_of("matmul_int8", "matmul_int8_kernel", dtype))
    assert_close(got, reference(x, weight, x_scale, weight_scale, bias, torch.float64, torch.float64), dtype)


def gemv_int8(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.gemv_int8.launch import launch
    from qcompile.kernels.gemv_int8.reference import quantize_weight, reference

    placing.put("gemv_int8", "gemv_int8_kernel")
    x, (weight, scale), bias = fresh(2, 1200, dtype=dtype), quantize_weight(fresh(37, 1200)), fresh(37, dtype=dtype)
    got = launch(x, weight, scale, bias, tile_of("gemv_int8", "gemv_int8_kernel", dtype))
    assert_close(got, reference(x, weight, scale, bias, torch.float64), dtype)


def gemv_int4(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.gemv_int4.launch import launch
    from qcompile.kernels.gemv_int4.reference import pack, quantize_weight, reference

    placing.put("gemv_int4", "gemv_int4_kernel")
    q, scale = quantize_weight(fresh(37, 1280), 64)
    x, bias, weight = fresh(2, 1280, dtype=dtype), fresh(37, dtype=dtype), pack(q)
    scale = scale.to(dtype) if table("gemv_int4", "gemv_int4_kernel").signature["scale_ptr"] == "*T" else scale
    got = launch(x, weight, scale, bias, tile_of("gemv_int4", "gemv_int4_kernel", dtype, GROUP=64))
    assert_close(got, reference(x, weight, scale, bias, torch.float64), dtype)


def decode_attention(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.decode_attention import launch as module
    from qcompile.kernels.decode_attention.reference import reference

    placing.put("decode_attention", "decode_attention_kernel", "decode_attention_merge_kernel")
    merge_tile = tile_of("decode_attention", "decode_attention_merge_kernel", dtype, D=64)
    placing.monkeypatch.setattr(module, "choose_merge", lambda *_: merge_tile)
    q, k, v = (fresh(*shape, dtype=dtype) for shape in ((3, 14, 64), (3, 2, 150, 64), (3, 2, 150, 64)))
    starts, lengths = ints(0, 5, 149), ints(1, 133, 150)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):  # what is not attended to is poison
        for cache in (k, v):
            cache[row, :, :start], cache[row, :, length:] = float("nan"), float("nan")
    tile = tile_of("decode_attention", "decode_attention_kernel", dtype, D=64)
    got = module.launch(q, k, v, starts, lengths, 0.125, tile, 3)
    assert_close(got, reference(q, k, v, starts, lengths, 0.125, torch.float64), dtype)


def sampler(placing: Placing, dtype: torch.dtype) -> None:
    from qcompile.kernels.sampler.launch import launch
    from qcompile.kernels.sampler.reference import reference

    placing.put("sampler", "sampler_chunk_kernel", "sampler_merge_kernel")
    logits, uniform = fresh(3, 9001, dtype=dtype), torch.rand(3)
    tiles = (
        tile_of("sampler", "sampler_chunk_kernel", dtype),
        tile_of("sampler", "sampler_merge_kernel", torch.float32),
    )
    values, ids, token = launch(apart(logits), 5, 0.7, uniform, tiles)
    want_values, want_ids, want_token = reference(logits, 5, 0.7, uniform)
    assert torch.equal(values, want_values)
    assert torch.equal(ids, want_ids)
    assert torch.equal(token, want_token)


VECTOR_RUNS: tuple[Run, ...] = (
    add_rms_norm,
    add_layer_norm,
    head_rms_norm,
    rope_cache,
    swiglu,
    quantize_per_token,
    add_rms_norm_quantize,
    gemv_int8,
    gemv_int4,
    decode_attention,
    sampler,
)
RUNS: tuple[Run, ...] = (*VECTOR_RUNS, matmul_bias_residual, matmul_int8)
