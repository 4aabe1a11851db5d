"""Rotary angles in the graph: cos and sin of position times frequency, computed in float32.

default, linear, yarn:  inv_freq is a constant
dynamic (NTK):          n = max(max(position_ids) + 1, max_position_embeddings)
                        base = theta * (factor * n / max_position_embeddings - (factor - 1)) ^ (d / (d - 2))
                        inv_freq = 1 / base ^ (2i / d)
"""

import numpy as np
import onnx_ir as ir

from qcompile.export.graph_builder import Dims, GraphBuilder
from qcompile.model_config import ModelConfig

B, S = "batch_size", "sequence_length"
FLOAT = ir.DataType.FLOAT


def rotary_angles(
    g: GraphBuilder, config: ModelConfig, position_ids: ir.Value, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Return cos and sin [B,1,S,d] of the graph's dtype for position_ids [B,S] int64."""
    d = config.head_dim
    positions = g.cast(position_ids, FLOAT, "rotary.positions")
    last_axis = g.shape_constant("const.last_axis", [-1])
    column = g.op("Unsqueeze", [positions, last_axis], "rotary.position_column", [B, S, 1])
    inv_freq = _dynamic_inv_freq(g, config, position_ids) if _is_dynamic(config) else _fixed_inv_freq(g, config)
    angles = g.op("Mul", [column, inv_freq], "rotary.angles", [B, S, d // 2])
    both = g.op("Concat", [angles, angles], "rotary.both_halves", [B, S, d], axis=-1)
    return _wave(g, config, both, "Cos", dtype), _wave(g, config, both, "Sin", dtype)


def _wave(g: GraphBuilder, config: ModelConfig, angles: ir.Value, op_type: str, dtype: ir.DataType) -> ir.Value:
    name = f"rotary.{op_type.lower()}"
    dims: Dims = [B, S, config.head_dim]
    scaling = config.rope_parameters.attention_scaling()
    wave = g.op(op_type, [angles], name, dims)
    if scaling != 1.0:
        factor = g.constant("const.rope_attention_scaling", scaling, FLOAT)
        wave = g.op("Mul", [wave, factor], f"{name}.scaled", dims)
    wave = g.cast(wave, dtype, f"{name}.narrow")
    axis = g.shape_constant("const.axis_1", [1])
    return g.op("Unsqueeze", [wave, axis], f"{name}_4d", [B, 1, S, config.head_dim])


def _is_dynamic(config: ModelConfig) -> bool:
    return config.rope_parameters.rope_type == "dynamic"


def _fixed_inv_freq(g: GraphBuilder, config: ModelConfig) -> ir.Value:
    return g.constant("rotary.inv_freq", config.rope_parameters.inv_freq(config.head_dim), FLOAT)


def _dynamic_inv_freq(g: GraphBuilder, config: ModelConfig, position_ids: ir.Value) -> ir.Value:
    rope, d, longest = config.rope_parameters, config.head_dim, config.max_position_embeddings
    assert rope.factor is not None

    def scalar(name: str, value: float) -> ir.Value:
        return g.constant(f"rotary.ntk.{name}", value, FLOAT)

    last = g.op("ReduceMax", [position_ids], "rotary.ntk.last_position", [], keepdims=0)
    last = g.cast(last, FLOAT, "rotary.ntk.last_position_float")
    length = g.op("Add", [last, scalar("one", 1.0)], "rotary.ntk.length", [])
    length = g.op("Max", [length, scalar("max_position_embeddings", float(longest))], "rotary.ntk.used_length", [])
    stretch = g.op("Mul", [length, scalar("factor", rope.factor)], "rotary.ntk.scaled_length", [])
    stretch = g.op("Div", [stretch, scalar("max_position_embeddings", float(longest))], "rotary.ntk.ratio", [])
    stretch = g.op("Sub", [stretch, scalar("factor_less_one", rope.factor - 1)], "rotary.ntk.stretch", [])
    growth = g.op("Pow", [stretch, scalar("exponent", d / (d - 2))], "rotary.ntk.growth", [])
    base = g.op("Mul", [growth, scalar("theta", rope.rope_theta)], "rotary.ntk.base", [])
    exponents = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    exponent = g.constant("rotary.ntk.exponents", exponents, FLOAT)
    powers = g.op("Pow", [base, exponent], "rotary.ntk.powers", [d // 2])
    return g.op("Reciprocal", [powers], "rotary.ntk.inv_freq", [d // 2])
