"""The kernels of a Qwen before any graph exists: from the sizes in its config, in the form the lowering gives it.

Per decoder layer, B slots, S new tokens, T cached, D hidden, H heads, K kv heads, d head, F ffn:

    AddRmsNorm, QKV [B·S,D]x[D,(H+2K)d], Split, rotary, Split, Concat K, Concat V, scores, mask, softmax, mix, output
    projection, AddRmsNorm, gate/up [B·S,D]x[D,2F], Split, sigmoid, mul, mul, down

which is 19 launches (23 for a chunk, whose heads are transposed). An exporter's graph has more: they are added as launches that
read and write the hidden state once each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qcompile.ascend.buckets import DECODE, Bucket
from qcompile.ascend.cost import Kernel
from qcompile.errors import ShapeError

# Kernels per decoder layer of a public project on 910B4 that compiled exports of Qwen3-0.6B.
SDPA_EXPORT, EAGER_EXPORT = 59, 516
# And of a graph by torch.onnx.export (`qcompile export --via torch`), counted as lowered graphs are; Qwen3 norms its heads.
TORCH_EXPORT = {"qwen2": 53, "qwen3": 67}
_HALF = 2


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config.json that decide what a step costs."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    is_tied: bool
    has_head_norms: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Read them.

        Raises:
            ShapeError: One is missing or no positive number.
        """
        words = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        wrong = [word for word in words if not _is_size(config.get(word))]
        if wrong:
            raise ShapeError(
                f"the model's config has no {', '.join(wrong)}; export it again, older manifests lack them"
            )
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        kv_heads, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
        if not _is_size(kv_heads) or not _is_size(head):
            raise ShapeError(f"the model's config has {kv_heads!r} key/value heads of size {head!r}")
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(kv_heads),
            head=int(head),
            vocab=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings")),
            has_head_norms=str(config.get("model_type", "")).startswith("qwen3"),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head
        return qkv + self.heads * self.head * self.hidden + 3 * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return self.layers * self.layer_weights + self.vocab * self.hidden * (1 if self.is_tied else 2)

    def cache_bytes(self, bucket: Bucket) -> int:
        """Keys and values of all slots in fp16."""
        return 2 * self.layers * bucket.batch * bucket.kv_len * self.kv_heads * self.head * _HALF


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def config_kernels(sizes: Sizes, bucket: Bucket, *, per_layer: int = 0, all_logits: bool = False) -> list[Kernel]:
    """Return the launches of one call.

    Args:
        sizes: The model.
        bucket: Its shapes.
        per_layer: Kernels per layer of an exporter's graph; 0 for the lowered one.
        all_logits: Whether logits of every position are computed, as an exporter's graph does.
    """
    rows = bucket.batch * bucket.query_len
    layer = _layer(sizes, bucket)
    hidden = rows * sizes.hidden * _HALF
    layer += [Kernel("extra", "Elementwise", 0.0, 2 * hidden)] * max(0, per_layer - len(layer))
    last = rows if all_logits else bucket.batch
    table = Kernel("embed_tokens", "Gather", 0.0, 2 * hidden, outputs=sizes.vocab, inputs=sizes.hidden)
    start = [table] + [Kernel("mask", "Mask", 0.0, hidden)] * 8
    end = [
        Kernel("norm", "NPURmsNorm", 0.0, 2 * hidden),
        _product("lm_head", last, sizes.hidden, sizes.vocab),
        Kernel("choice", "ArgMax", 0.0, last * sizes.vocab * _HALF),
    ]
    layers = [replace(k, name=f"layers.{i}.{k.name}") for i in range(sizes.layers) for k in layer]
    return [*start, *layers, *end]


def _layer(sizes: Sizes, bucket: Bucket) -> list[Kernel]:
    rows, s, t = bucket.batch * bucket.query_len, bucket.query_len, bucket.kv_len + bucket.query_len
    hidden, q = rows * sizes.hidden * _HALF, rows * sizes.heads * sizes.head * _HALF
    kv = rows * sizes.kv_heads * sizes.head * _HALF
    cache = bucket.batch * t * sizes.kv_heads * sizes.head * _HALF
    scores = bucket.batch * sizes.heads * s * t * _HALF
    ffn = rows * sizes.ffn * _HALF
    attention = 2.0 * bucket.batch * sizes.heads * s * t * sizes.head
    qkv_columns = (sizes.heads + 2 * sizes.kv_heads) * sizes.head
    made = [
        Kernel("norm", "NPURmsNorm", 0.0, 4 * hidden),
        _product("qkv", rows, sizes.hidden, qkv_columns, follows_norm=True, has_bias=not sizes.has_head_norms),
        Kernel("split", "Split", 0.0, 2 * (q + 2 * kv)),
        Kernel("rotary", "NPURotaryMul", 0.0, 2 * (q + kv)),
        Kernel("split", "Split", 0.0, 2 * (q + kv)),
        # one of both in a decode step, see `lowering.head_norms`; a prompt's are apart, and its split is one
        *[Kernel("head norm", "NPURmsNorm", 0.0, 2 * q)] * ((1 if s == 1 else 2) if sizes.has_head_norms else 0),
        *[Kernel("concat", "Concat", 0.0, 2 * cache)] * 2,
        Kernel("scores", "MatMul", attention, q + cache + scores),
        Kernel("mask", "Add", 0.0, 2 * scores),
        Kernel("softmax", "Softmax", 0.0, 2 * scores),
        Kernel("mix", "MatMul", attention, scores + cache + q),
        _product("o_proj", rows, sizes.heads * sizes.head, sizes.hidden),
        Kernel("norm", "NPURmsNorm", 0.0, 4 * hidden),
        _product("gate_up", rows, sizes.hidden, 2 * sizes.ffn, follows_norm=True),
        Kernel("split", "Split", 0.0, 4 * ffn),
        Kernel("sigmoid", "Sigmoid", 0.0, 2 * ffn),
        *[Kernel("mul", "Mul", 0.0, 3 * ffn)] * 2,
        _product("down", rows, sizes.ffn, sizes.hidden),
    ]
    if bucket.role != DECODE:
        made += [Kernel("transpose", "Transpose", 0.0, 2 * q)] * 2 + [Kernel("transpose", "Transpose", 0.0, 2 * kv)] * 2
    return made


def _product(name: str, rows: int, m: int, n: int, *, follows_norm: bool = False, has_bias: bool = False) -> Kernel:
    moved, flops = rows * (m + n) * _HALF, 2.0 * rows * m * n
    return Kernel(name, "MatMul", flops, moved, m * n * _HALF, n, m, follows_norm=follows_norm, has_bias=has_bias)
