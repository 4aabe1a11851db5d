"""A small stand-in for the compiler: tiny checkpoint to compiled-model directory, in either KV cache style.

It shares no code with the exporter or the lowering, so the runtime is tested against the contract of the
manifest and not against whatever those produce today. Letters: B, S, T, H heads, K kv heads, d head_dim.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    sha256_of,
)
from tests.tiny_checkpoints import random_tensors, tiny_config, write_tiny_checkpoint

AUXILIARY = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_DTYPES = {
    "float32": (ir.DataType.FLOAT, np.float32),
    "float16": (ir.DataType.FLOAT16, np.float16),
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}


def compile_tiny(
    directory: Path,
    model_type: str = "qwen2",
    *,
    kv_cache: str = "shared",
    logits: str = "last",
    dtype: str = "float32",
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write `directory/checkpoint` (as Hugging Face) and `directory/compiled`; returns the latter."""
    checkpoint = write_tiny_checkpoint(directory / "checkpoint", model_type, seed=seed, **config_overrides)
    config = tiny_config(model_type, **config_overrides)
    compiled = directory / "compiled"
    compiled.mkdir()
    model = _Decoder(config, random_tensors(config, seed=seed), kv_cache, logits, dtype).build()
    ir.save(model, compiled / "model.onnx", external_data="model.onnx.data")
    for name in AUXILIARY:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, compiled / name)
    write_manifest(compiled, config, model, kv_cache, logits, dtype)
    return compiled


def write_manifest(
    compiled: Path, config: dict[str, Any], model: ir.Model, kv_cache: str, logits: str, dtype: str
) -> None:
    """Write qcompile.json for what lies in the directory."""

    def entry(name: str) -> dict[str, Any]:
        path = compiled / name
        return {"name": name, "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}

    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    words = ("model_type", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    io = {
        "kv_cache": kv_cache,
        "logits": logits,
        "inputs": [value.name for value in model.graph.inputs],
        "outputs": [value.name for value in model.graph.outputs],
        "dtype": dtype,
    }
    record = {
        "schema_version": SCHEMA_VERSION,
        "target": "ort" if kv_cache == "shared" else "portable",
        "model": {
            **{word: config[word] for word in words},
            "head_dim": head_dim,
            "max_position_embeddings": config["max_position_embeddings"],
        },
        "graphs": [{"role": "decoder", "file": entry("model.onnx"), "data": [entry("model.onnx.data")], "io": io}],
        "files": [entry(name) for name in AUXILIARY if (compiled / name).is_file()],
        "config": config,
    }
    (compiled / MANIFEST_NAME).write_text(json.dumps(record), encoding="utf-8")


class _Decoder:
    """Builds one graph."""

    def __init__(self, config: dict[str, Any], tensors: Any, kv_cache: str, logits: str, dtype: str) -> None:
        self.config = config
        self.tensors = tensors
        self.kv_cache = kv_cache
        self.logits = logits
        self.ir_type, self.np_type = _DTYPES[dtype]
        self.H, self.K = config["num_attention_heads"], config["num_key_value_heads"]
        self.d = config.get("head_dim") or config["hidden_size"] // self.H
        self.tape = Tape()
        self.inputs: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}

    def build(self) -> ir.Model:
        int64, int32 = ir.DataType.INT64, ir.DataType.INT32
        self._input("input_ids", int64, ["B", "S"])
        if self.kv_cache == "shared":
            self._input("seqlens_k", int32, ["B"])
            self._input("total_sequence_length", int32, [])
        else:
            self._input("attention_mask", int64, ["B", "T"])
            self._input("position_ids", int64, ["B", "S"])
        if self.logits == "last":
            self._input("last_token_index", int64, ["B"])
        self._tables()
        x = self.op("Gather", self._weight("model.embed_tokens.weight"), self.inputs["input_ids"])
        presents = []
        for i in range(self.config["num_hidden_layers"]):
            x, key, value = self._layer(x, i)
            presents += [key, value]
        if self.logits == "last":
            index = self.op("Unsqueeze", self.inputs["last_token_index"], self._ints([1, 2]))
            index = self.op("Expand", index, self._ints([1, 1, self.config["hidden_size"]]))
            x = self.op("GatherElements", x, index, axis=1)
        x = self._norm(x, "model.norm.weight")
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        logits = self.op("MatMul", x, self._weight(head, transpose=True))
        self._name_outputs(logits, presents)
        graph = ir.Graph(
            list(self.inputs.values()),
            [logits, *presents],
            nodes=self.tape.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": 18, "com.microsoft": 1},
            name="toy",
        )
        return ir.Model(graph, ir_version=8)

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self.tape.op(op_type, inputs, attributes, domain=domain)

    def _layer(self, x: ir.Value, i: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        name = f"model.layers.{i}"
        h = self._norm(x, f"{name}.input_layernorm.weight")
        q, k, v = (self._linear(h, f"{name}.self_attn.{n}_proj") for n in "qkv")
        if self.config["model_type"] == "qwen3":
            q = self._head_norm(q, f"{name}.self_attn.q_norm.weight", self.H)
            k = self._head_norm(k, f"{name}.self_attn.k_norm.weight", self.K)
        attention = self._shared_attention if self.kv_cache == "shared" else self._plain_attention
        pasts = [self._past(f"past_key_values.{i}.{n}") for n in ("key", "value")]
        context, key, value = attention(q, k, v, *pasts)
        x = self.op("Add", x, self._linear(context, f"{name}.self_attn.o_proj"))
        h = self._norm(x, f"{name}.post_attention_layernorm.weight")
        gate, up = (self._linear(h, f"{name}.mlp.{n}_proj") for n in ("gate", "up"))
        h = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.op("Add", x, self._linear(h, f"{name}.mlp.down_proj")), key, value

    def _shared_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, *past: ir.Value) -> tuple[ir.Value, ...]:
        lengths = (self.inputs["seqlens_k"], self.inputs["total_sequence_length"])
        return tuple(
            self.tape.op_multi_out(
                "GroupQueryAttention",
                [q, k, v, *past, *lengths, self._cos, self._sin],
                {"num_heads": self.H, "kv_num_heads": self.K, "do_rotary": 1},
                domain="com.microsoft",
                num_outputs=3,
            )
        )

    def _plain_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ...]:
        q, k = self._rotate(self._heads(q, self.H)), self._rotate(self._heads(k, self.K))
        key = self.op("Concat", past_key, k, axis=2)
        value = self.op("Concat", past_value, self._heads(v, self.K), axis=2)
        scores = self.op("MatMul", q, self.op("Transpose", self._repeat(key), perm=[0, 1, 3, 2]))
        scores = self.op("Add", self.op("Mul", scores, self._floats(self.d**-0.5)), self._mask())
        context = self.op("MatMul", self.op("Softmax", scores, axis=-1), self._repeat(value))
        context = self.op("Transpose", context, perm=[0, 2, 1, 3])
        return self.op("Reshape", context, self._ints([0, 0, self.H * self.d])), key, value

    def _mask(self) -> ir.Value:
        """0 where query s of row b may see entry t (valid, and not after it); else a large negative."""
        valid = self.inputs["attention_mask"]
        t = self.op("Shape", valid, start=1, end=2)
        s = self.op("Shape", self.inputs["input_ids"], start=1, end=2)
        zero, one = self._scalar(0), self._scalar(1)
        entries = self.op("Range", zero, self.op("Squeeze", t), one)
        first = self.op("Squeeze", self.op("Sub", t, s))
        queries = self.op("Range", first, self.op("Squeeze", t), one)
        causal = self.op("LessOrEqual", self.op("Unsqueeze", entries, self._ints([0])), self._column(queries))
        seen = self.op("Cast", self.op("Unsqueeze", valid, self._ints([1, 2])), to=ir.DataType.BOOL)
        allowed = self.op("And", self.op("Unsqueeze", causal, self._ints([0, 1])), seen)
        return self.op("Where", allowed, self._floats(0.0), self._floats(-1e4))

    def _column(self, value: ir.Value) -> ir.Value:
        return self.op("Unsqueeze", value, self._ints([1]))

    def _rotate(self, x: ir.Value) -> ir.Value:
        cos, sin = (
            self.op("Unsqueeze", self.op("Gather", table, self.inputs["position_ids"]), self._ints([1]))
            for table in (self._cos, self._sin)
        )
        low, high = self.tape.op_multi_out("Split", [x], {"axis": 3, "num_outputs": 2}, num_outputs=2)
        first = self.op("Sub", self.op("Mul", low, cos), self.op("Mul", high, sin))
        second = self.op("Add", self.op("Mul", high, cos), self.op("Mul", low, sin))
        return self.op("Concat", first, second, axis=3)

    def _repeat(self, x: ir.Value) -> ir.Value:
        x = self.op("Unsqueeze", x, self._ints([2]))
        x = self.op("Concat", *[x] * (self.H // self.K), axis=2)
        return self.op("Reshape", x, self._ints([0, self.H, -1, self.d]))

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        return self.op("Transpose", self.op("Reshape", x, self._ints([0, 0, heads, self.d])), perm=[0, 2, 1, 3])

    def _head_norm(self, x: ir.Value, weight: str, heads: int) -> ir.Value:
        x = self._norm(self.op("Reshape", x, self._ints([0, 0, heads, self.d])), weight)
        return self.op("Reshape", x, self._ints([0, 0, heads * self.d]))

    def _norm(self, x: ir.Value, weight: str) -> ir.Value:
        h = self.op("Cast", x, to=ir.DataType.FLOAT)
        mean = self.op("ReduceMean", self.op("Mul", h, h), self._ints([-1]), keepdims=1)
        eps = self._constant(f"eps {weight}", np.float32(self.config["rms_norm_eps"]))
        h = self.op("Div", h, self.op("Sqrt", self.op("Add", mean, eps)))
        return self.op("Mul", self.op("Cast", h, to=self.ir_type), self._weight(weight))

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        y = self.op("MatMul", x, self._weight(f"{name}.weight", transpose=True))
        return self.op("Add", y, self._weight(f"{name}.bias")) if f"{name}.bias" in self.tensors else y

    def _tables(self) -> None:
        steps = np.arange(0, self.d, 2) / self.d
        angles = np.outer(np.arange(self.config["max_position_embeddings"]), self.config["rope_theta"] ** -steps)
        self._cos = self._constant("cos", np.cos(angles).astype(self.np_type))
        self._sin = self._constant("sin", np.sin(angles).astype(self.np_type))

    def _input(self, name: str, dtype: ir.DataType, dims: list[Any]) -> ir.Value:
        self.inputs[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))
        return self.inputs[name]

    def _past(self, name: str) -> ir.Value:
        return self._input(name, self.ir_type, ["B", self.K, "P", self.d])

    def _weight(self, name: str, transpose: bool = False) -> ir.Value:
        array = self.tensors[name].astype(self.np_type)
        return self._constant(name + (".T" if transpose else ""), array.T.copy() if transpose else array)

    def _constant(self, name: str, array: Any) -> ir.Value:
        if name not in self.initializers:
            tensor = ir.tensor(np.asarray(array), name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self.initializers[name] = value
        return self.initializers[name]

    def _ints(self, values: list[int]) -> ir.Value:
        return self._constant(f"ints {values}", np.array(values, np.int64))

    def _scalar(self, value: int) -> ir.Value:
        return self._constant(f"int {value}", np.array(value, np.int64))

    def _floats(self, value: float) -> ir.Value:
        return self._constant(f"float {value}", np.array(value, self.np_type))

    def _name_outputs(self, logits: ir.Value, presents: list[ir.Value]) -> None:
        logits.name = "logits"
        outputs = {logits: ["B", 1 if self.logits == "last" else "S", self.config["vocab_size"]]}
        for i, value in enumerate(presents):
            value.name = f"present.{i // 2}.{('key', 'value')[i % 2]}"
            outputs[value] = ["B", self.K, "T_out", self.d]
        for value, dims in outputs.items():
            value.type, value.shape = ir.TensorType(self.ir_type), ir.Shape(dims)
