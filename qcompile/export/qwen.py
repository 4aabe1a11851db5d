"""The Qwen2 / Qwen3 decoder as an ONNX graph of standard operators, built from config and checkpoint.

    x = embed(input_ids)
    per layer:  x = x + o_proj(attention(rope(q), [past_k | rope(k)], [past_v | v]))    of rms_norm(x)
                x = x + down_proj(silu(gate_proj(n)) * up_proj(n))                      n = rms_norm(x)
    logits = lm_head(rms_norm(x))

Dims: B batch_size, S sequence_length, P past_sequence_length, T total_sequence_length = P + S. In float16
    and bfloat16
graphs norms, rotary angles and softmax run in float32, as in transformers; a float32 graph has no such casts.
Source: transformers, modeling_qwen2.py and modeling_qwen3.py.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile import __version__
from qcompile.export import weights
from qcompile.export.checkpoint import EMBEDDING, HEAD, Checkpoint, SourceTensor
from qcompile.export.graph_builder import Dims, GraphBuilder, shape_of
from qcompile.export.rotary import rotary_angles
from qcompile.model_config import ModelConfig

B, S, P, T = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64


def build_model(checkpoint: Checkpoint, dtype: ir.DataType, *, tie: bool = True) -> ir.Model:
    """Build the decoder graph; weights stay lazy.

    Args:
        checkpoint: Config and tensors.
        dtype: FLOAT, FLOAT16 or BFLOAT16: of weights, activations, KV cache and logits.
        tie: Let a tied head share the embedding's initializer; otherwise it gets a matrix of its own.

    Raises:
        ExportError: A tensor is missing or has another shape than the config implies.
    """
    return _Decoder(checkpoint, dtype, tie=tie).build()


@dataclass(frozen=True)
class _Shared:
    """Values every layer uses: cos and sin [B,1,S,d], the additive mask [B,1,S,T] float32."""

    cos: ir.Value
    sin: ir.Value
    mask: ir.Value


class _Decoder:
    def __init__(self, checkpoint: Checkpoint, dtype: ir.DataType, *, tie: bool) -> None:
        self.checkpoint, self.dtype, self.tie = checkpoint, dtype, tie
        self.config: ModelConfig = checkpoint.config
        self.g = GraphBuilder(self.config.model_type)
        self.hidden: Dims = [B, S, self.config.hidden_size]

    def build(self) -> ir.Model:
        config, g = self.config, self.g
        self.checkpoint.check_size()
        input_ids = g.input("input_ids", INT64, [B, S])
        attention_mask = g.input("attention_mask", INT64, [B, T])
        position_ids = g.input("position_ids", INT64, [B, S])
        past = [self._past(i) for i in range(config.num_hidden_layers)]
        embedding = self._embedding()
        x = g.op("Gather", [embedding, input_ids], "embed_tokens", self.hidden, dtype=self.dtype, axis=0)
        cos, sin = rotary_angles(g, config, position_ids, self.dtype)
        shared = _Shared(cos, sin, self._mask(input_ids, attention_mask))
        present = []
        for i in range(config.num_hidden_layers):
            x, key, value = self._layer(i, x, past[i], shared)
            present.append((key, value))
        x = self._norm(x, "norm", self._vector("model.norm.weight", config.hidden_size))
        g.output(self._logits(x, embedding), "logits")
        for i, (key, value) in enumerate(present):
            g.output(key, f"present.{i}.key")
            g.output(value, f"present.{i}.value")
        return g.model(__version__)

    def _past(self, i: int) -> tuple[ir.Value, ir.Value]:
        dims: Dims = [B, self.config.num_key_value_heads, P, self.config.head_dim]
        key = self.g.input(f"past_key_values.{i}.key", self.dtype, dims)
        return key, self.g.input(f"past_key_values.{i}.value", self.dtype, dims)

    # weights

    def _embedding(self) -> ir.Value:
        return self.g.weight(weights.as_stored(self.checkpoint.embedding(), self.dtype, EMBEDDING))

    def _vector(self, name: str, length: int) -> ir.Value:
        return self.g.weight(weights.as_stored(self.checkpoint.tensor(name, (length,)), self.dtype, name))

    def _projection(self, x: ir.Value, name: str, weight: str, sizes: tuple[int, int], *, bias: bool) -> ir.Value:
        """Return x @ W^T (+ b) for a stored weight [out, in]; sizes is (in, out)."""
        in_size, out_size = sizes
        source: SourceTensor = self.checkpoint.tensor(f"{weight}.weight", (out_size, in_size))
        matrix = self.g.weight(weights.transposed(source, self.dtype, f"{weight}.weight"))
        dims: Dims = [B, S, out_size]
        if not bias:
            return self.g.op("MatMul", [x, matrix], name, dims)
        product = self.g.op("MatMul", [x, matrix], f"{name}.matmul", dims)
        return self.g.op("Add", [product, self._vector(f"{weight}.bias", out_size)], name, dims)

    # blocks

    def _norm(self, x: ir.Value, name: str, gamma: ir.Value) -> ir.Value:
        """Return RMSNorm over the last axis: gamma * (x / sqrt(mean(x^2) + eps)), the bracket in float32."""
        g, dims = self.g, shape_of(x)
        row: Dims = [*dims[:-1], 1]
        wide = g.cast(x, FLOAT, f"{name}.float")
        two = g.constant("const.two", 2.0, FLOAT)
        eps = g.constant("const.rms_norm_eps", self.config.rms_norm_eps, FLOAT)
        square = g.op("Pow", [wide, two], f"{name}.square", dims)
        mean = g.op("ReduceMean", [square, g.shape_constant("const.last_axis", [-1])], f"{name}.mean", row, keepdims=1)
        root = g.op("Sqrt", [g.op("Add", [mean, eps], f"{name}.eps", row)], f"{name}.rms", row)
        inverse = g.op("Reciprocal", [root], f"{name}.inverse_rms", row)
        normed = g.cast(g.op("Mul", [wide, inverse], f"{name}.normed", dims), self.dtype, f"{name}.narrow")
        return g.op("Mul", [normed, gamma], name, dims)

    def _mask(self, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
        """Return 0 where query s may see key t (causal and not padding), else float32's lowest, [B,1,S,T]."""
        g = self.g
        zero, one = g.constant("const.zero", 0, INT64), g.constant("const.one", 1, INT64)
        length = self._dimension(input_ids, 1, "mask.sequence_length")
        total = self._dimension(attention_mask, 1, "mask.total_length")
        past = g.op("Sub", [total, length], "mask.past_length", [])
        keys = g.op("Range", [zero, total, one], "mask.key_index", [T])
        queries = g.op("Range", [past, total, one], "mask.query_index", [S])
        column = g.op("Unsqueeze", [queries, g.shape_constant("const.axis_1", [1])], "mask.query_column", [S, 1])
        causal = g.op("LessOrEqual", [keys, column], "mask.causal", [S, T], dtype=ir.DataType.BOOL)
        real = g.cast(attention_mask, ir.DataType.BOOL, "mask.not_padding")
        axes = g.shape_constant("const.axes_1_2", [1, 2])
        real = g.op("Unsqueeze", [real, axes], "mask.not_padding_4d", [B, 1, 1, T])
        allowed = g.op("And", [causal, real], "mask.allowed", [B, 1, S, T])
        nothing = g.constant("const.mask_allowed", 0.0, FLOAT)
        lowest = g.constant("const.mask_forbidden", float(np.finfo(np.float32).min), FLOAT)
        return g.op("Where", [allowed, nothing, lowest], "mask", [B, 1, S, T], dtype=FLOAT)

    def _dimension(self, value: ir.Value, axis: int, name: str) -> ir.Value:
        """Return one dimension of a value as an int64 scalar."""
        g = self.g
        shape = g.op("Shape", [value], f"{name}.shape", [1], dtype=INT64, start=axis, end=axis + 1)
        return g.op("Squeeze", [shape, g.shape_constant("const.axis_0", [0])], name, [])

    def _layer(
        self, i: int, x: ir.Value, past: tuple[ir.Value, ir.Value], shared: _Shared
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        g, name, stored = self.g, f"layers.{i}", f"model.layers.{i}"
        size = self.config.hidden_size
        normed = self._norm(x, f"{name}.input_norm", self._vector(f"{stored}.input_layernorm.weight", size))
        attended, key, value = self._attention(i, normed, past, shared)
        x = g.op("Add", [x, attended], f"{name}.attn.residual", self.hidden)
        gamma = self._vector(f"{stored}.post_attention_layernorm.weight", size)
        fed = self._mlp(i, self._norm(x, f"{name}.post_attn_norm", gamma))
        return g.op("Add", [x, fed], f"{name}.mlp.residual", self.hidden), key, value

    def _mlp(self, i: int, x: ir.Value) -> ir.Value:
        g, name, stored = self.g, f"layers.{i}.mlp", f"model.layers.{i}.mlp"
        hidden, ffn = self.config.hidden_size, self.config.intermediate_size
        dims: Dims = [B, S, ffn]
        gate = self._projection(x, f"{name}.gate_proj", f"{stored}.gate_proj", (hidden, ffn), bias=False)
        up = self._projection(x, f"{name}.up_proj", f"{stored}.up_proj", (hidden, ffn), bias=False)
        silu = g.op("Mul", [gate, g.op("Sigmoid", [gate], f"{name}.sigmoid", dims)], f"{name}.silu", dims)
        product = g.op("Mul", [silu, up], f"{name}.product", dims)
        return self._projection(product, f"{name}.down_proj", f"{stored}.down_proj", (ffn, hidden), bias=False)

    def _attention(
        self, i: int, x: ir.Value, past: tuple[ir.Value, ir.Value], shared: _Shared
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        config, g, name, stored = self.config, self.g, f"layers.{i}.attn", f"model.layers.{i}.self_attn"
        heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        query = self._rotated(self._heads(x, name, stored, "q", heads), f"{name}.q_rope", heads, shared)
        key = self._rotated(self._heads(x, name, stored, "k", kv_heads), f"{name}.k_rope", kv_heads, shared)
        value = self._heads(x, name, stored, "v", kv_heads)
        cache: Dims = [B, kv_heads, T, d]
        key = g.op("Concat", [past[0], key], f"{name}.k_cache", cache, axis=2)
        value = g.op("Concat", [past[1], value], f"{name}.v_cache", cache, axis=2)
        # scaled before the product: float16 scores of Qwen's large k biases would overflow after it
        scale = g.constant("const.attention_scale", d**-0.5, self.dtype)
        query = g.op("Mul", [query, scale], f"{name}.q_scaled", [B, heads, S, d])
        keys = g.op(
            "Transpose",
            [self._repeated(key, f"{name}.k")],
            f"{name}.k_t",
            [B, heads, d, T],
            perm=[0, 1, 3, 2],
        )
        scores = g.op("MatMul", [query, keys], f"{name}.scores", [B, heads, S, T])
        scores = g.cast(scores, FLOAT, f"{name}.scores.float")
        masked = g.op("Add", [scores, shared.mask], f"{name}.masked_scores", [B, heads, S, T])
        weight = g.op("Softmax", [masked], f"{name}.softmax", [B, heads, S, T], axis=-1)
        weight = g.cast(weight, self.dtype, f"{name}.softmax.narrow")
        mixed = g.op("MatMul", [weight, self._repeated(value, f"{name}.v")], f"{name}.mixed", [B, heads, S, d])
        mixed = g.op("Transpose", [mixed], f"{name}.mixed_t", [B, S, heads, d], perm=[0, 2, 1, 3])
        flat = g.shape_constant("const.merge_heads", [0, 0, heads * d])
        mixed = g.op("Reshape", [mixed, flat], f"{name}.merged", [B, S, heads * d])
        sizes = (heads * d, config.hidden_size)
        out = self._projection(mixed, f"{name}.o_proj", f"{stored}.o_proj", sizes, bias=config.output_bias)
        return out, key, value

    def _heads(self, x: ir.Value, name: str, stored: str, letter: str, heads: int) -> ir.Value:
        """Return the q, k or v projection as [B,heads,S,d], normalized per head in Qwen3."""
        config, g, d = self.config, self.g, self.config.head_dim
        name, stored = f"{name}.{letter}", f"{stored}.{letter}"
        sizes = (config.hidden_size, heads * d)
        flat = self._projection(x, f"{name}_proj", f"{stored}_proj", sizes, bias=config.attention_bias)
        split = g.shape_constant(f"const.split_{heads}_heads", [0, 0, heads, d])
        value = g.op("Reshape", [flat, split], f"{name}_heads", [B, S, heads, d])
        if config.qk_norm and letter != "v":
            value = self._norm(value, f"{name}_norm", self._vector(f"{stored}_norm.weight", d))
        return g.op("Transpose", [value], f"{name}_heads_t", [B, heads, S, d], perm=[0, 2, 1, 3])

    def _rotated(self, x: ir.Value, name: str, heads: int, shared: _Shared) -> ir.Value:
        """Return x * cos + rotate_half(x) * sin for x [B,heads,S,d]."""
        g, d = self.g, self.config.head_dim
        dims: Dims = [B, heads, S, d]
        half: Dims = [B, heads, S, d // 2]
        axes = g.shape_constant("const.last_axis", [-1])
        begin, middle = (
            g.shape_constant("const.half_begin", [0]),
            g.shape_constant("const.half_middle", [d // 2]),
        )
        end = g.shape_constant("const.half_end", [d])
        first = g.op("Slice", [x, begin, middle, axes], f"{name}.first_half", half)
        second = g.op("Slice", [x, middle, end, axes], f"{name}.second_half", half)
        negated = g.op("Neg", [second], f"{name}.negated_half", half)
        turned = g.op("Concat", [negated, first], f"{name}.rotate_half", dims, axis=-1)
        straight = g.op("Mul", [x, shared.cos], f"{name}.cos_part", dims)
        return g.op("Add", [straight, g.op("Mul", [turned, shared.sin], f"{name}.sin_part", dims)], name, dims)

    def _repeated(self, x: ir.Value, name: str) -> ir.Value:
        """Return keys or values [B,K,T,d] as [B,H,T,d], each head H/K times."""
        g, config = self.g, self.config
        heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        group = heads // kv_heads
        if group == 1:
            return x
        axis = g.shape_constant("const.axis_2", [2])
        x = g.op("Unsqueeze", [x, axis], f"{name}_grouped", [B, kv_heads, 1, T, d])
        repeats = g.shape_constant("const.repeat_kv", [1, 1, group, 1, 1])
        x = g.op("Expand", [x, repeats], f"{name}_expanded", [B, kv_heads, group, T, d])
        merge = g.shape_constant("const.merge_groups", [0, heads, -1, d])
        return g.op("Reshape", [x, merge], f"{name}_repeated", [B, heads, T, d])

    def _logits(self, x: ir.Value, embedding: ir.Value) -> ir.Value:
        config, g = self.config, self.g
        dims: Dims = [config.hidden_size, config.vocab_size]
        if self.checkpoint.ties_head and self.tie:
            matrix = g.op("Transpose", [embedding], "lm_head.weight_t", dims, perm=[1, 0])
        else:
            matrix = g.weight(weights.transposed(self.checkpoint.head(), self.dtype, HEAD))
        return g.op("MatMul", [x, matrix], "lm_head", [B, S, config.vocab_size])
