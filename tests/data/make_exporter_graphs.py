"""Make the small checkpoints, the exporters' graphs and the reference outputs the tests read.

Run by hand from the repository root; what it writes is committed, so tests need neither torch nor Optimum:

    python tests/data/make_exporter_graphs.py checkpoints     # torch 2.13.0, transformers 5.23.0
    python tests/data/make_exporter_graphs.py reference
    python tests/data/make_exporter_graphs.py dynamo          # onnx 1.23.2, onnx-ir 1.1.0, onnxscript 0.7.2
    python tests/data/make_exporter_graphs.py builder         # qcompile's own export
    python tests/data/make_exporter_graphs.py check           # all graphs against the reference (onnxruntime)
    # in an environment of its own: optimum-onnx[onnxruntime] 0.1.0, torch 2.13.0, transformers 4.57.6
    OPTIMUM_PYTHON=/path/to/that/bin/python python tests/data/make_exporter_graphs.py optimum

Weights are random with a fixed seed and lie on the bfloat16 grid, as a trained Qwen's do; they are scaled so
that activations are of order one, which those of a plain transformers initialisation (std 0.02) are not.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real"))
from export_three import decoder_with_cache, export_builder, export_dynamo, export_optimum
from layernorm_gelu import export_toy, make_toy

DATA = Path(__file__).resolve().parent
CHECKPOINTS = DATA / "checkpoints"
GRAPHS = DATA / "graphs"
REFERENCE = DATA / "reference"
SEED = 20261124
NUM_LAYERS = 2

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-qwen2": _COMMON | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "tiny-qwen3": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "head_dim": 32,
        "attention_bias": False,
    },
}
# name -> (checkpoint, attention implementation, opset, dtype)
DYNAMO_GRAPHS = {
    "qwen2-dynamo-sdpa": ("tiny-qwen2", "sdpa", 18, "float32"),
    "qwen2-dynamo-eager": ("tiny-qwen2", "eager", 18, "float32"),
    "qwen2-dynamo-opset23": ("tiny-qwen2", "sdpa", 23, "float32"),
    "qwen2-dynamo-fp16": ("tiny-qwen2", "sdpa", 18, "float16"),
    "qwen3-dynamo-sdpa": ("tiny-qwen3", "sdpa", 18, "float32"),
    "qwen3-dynamo-eager": ("tiny-qwen3", "eager", 18, "float32"),
    "qwen3-dynamo-opset23": ("tiny-qwen3", "sdpa", 23, "float32"),
}
OPTIMUM_GRAPHS = {"qwen2-optimum": "tiny-qwen2", "qwen3-optimum": "tiny-qwen3"}
BUILDER_GRAPHS = {"qwen2-builder": "tiny-qwen2", "qwen3-builder": "tiny-qwen3"}
# The toys hold LayerNorm, Add + LayerNorm and three spellings of GELU: name -> (dynamo?, opset)
TOY_GRAPHS = {
    "layernorm-gelu-dynamo18": (True, 18),
    "layernorm-gelu-dynamo20": (True, 20),
    "layernorm-gelu-legacy14": (False, 14),
    "layernorm-gelu-legacy18": (False, 18),
}


def make_checkpoints() -> None:
    """Write `checkpoints/<name>/{config.json,model.safetensors}`."""
    import torch
    from safetensors.torch import save_file

    for name in CONFIGS:
        directory = CHECKPOINTS / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")
        (directory / "generation_config.json").write_text(
            json.dumps({"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}, indent=2) + "\n"
        )
        generator = np.random.default_rng(SEED)
        weights = {}
        for key, shape in sorted(_weight_shapes(CONFIGS[name]).items()):
            drawn = generator.standard_normal(shape).astype(np.float32)
            weights[key] = torch.from_numpy(_scaled(key, drawn)).to(torch.bfloat16)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _scaled(key: str, drawn: np.ndarray) -> np.ndarray:
    if "norm" in key:
        return 1.0 + 0.2 * drawn
    if key.endswith("bias"):
        return 0.5 * drawn
    if "embed" in key:
        return 0.5 * drawn
    return drawn / np.sqrt(drawn.shape[-1])


def _weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    rows = {
        "q": config["num_attention_heads"] * head_dim,
        "k": config["num_key_value_heads"] * head_dim,
        "v": config["num_key_value_heads"] * head_dim,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for letter, size in rows.items():
            shapes[f"{layer}.self_attn.{letter}_proj.weight"] = (size, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{layer}.self_attn.{letter}_proj.bias"] = (size,)
        if config["model_type"] == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, rows["q"])
        shapes[f"{layer}.mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _cases(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Feeds without past: name, {input_ids, attention_mask, position_ids, past_length}."""
    generator = np.random.default_rng(SEED + 1)
    # B, S, and the attention mask over T = P + S; the past comes from `_past`
    masks = {
        "prefill": np.ones((1, 7), np.int64),
        "decode": np.ones((1, 8), np.int64),
        "chunk": np.ones((1, 12), np.int64),
        "batch_prefill": np.array([[1] * 6, [0, 0, 0, 1, 1, 1]], np.int64),  # left padding
        "batch_decode": np.array([[1] * 7, [0, 0, 0, 1, 1, 1, 1]], np.int64),
        "batch_ragged": np.array([[1] * 9, [1, 1, 0, 0, 0, 1, 1, 1, 1]], np.int64),  # gap after a short past
    }
    new_tokens = {
        "prefill": 7,
        "decode": 1,
        "chunk": 5,
        "batch_prefill": 6,
        "batch_decode": 1,
        "batch_ragged": 4,
    }
    for name, mask in masks.items():
        count = new_tokens[name]
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -count:]
        ids = generator.integers(2, config["vocab_size"], (mask.shape[0], count), dtype=np.int64)
        yield (
            name,
            {"input_ids": ids, "attention_mask": mask, "position_ids": np.ascontiguousarray(positions)},
        )


def _past(config: dict[str, Any], batch: int, length: int, seed: int) -> dict[str, np.ndarray]:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    generator = np.random.default_rng(seed)
    shape = (batch, config["num_key_value_heads"], length, head_dim)
    return {
        f"past_key_values.{i}.{kind}": generator.standard_normal(shape).astype(np.float32)
        for i in range(config["num_hidden_layers"])
        for kind in ("key", "value")
    }


def make_reference() -> None:
    """Write `reference/<checkpoint>.npz`: per case the feeds and what transformers (eager, fp32) answers."""
    import torch

    REFERENCE.mkdir(exist_ok=True)
    for name, config in CONFIGS.items():
        decoder = decoder_with_cache(CHECKPOINTS / name)
        arrays = {}
        for number, (case, feeds) in enumerate(_cases(config)):
            batch, length = feeds["attention_mask"].shape
            past_length = length - feeds["input_ids"].shape[1]
            past = _past(config, batch, past_length, SEED + 10 + number)
            pairs = [
                tuple(torch.from_numpy(past[f"past_key_values.{i}.{kind}"]) for kind in ("key", "value"))
                for i in range(NUM_LAYERS)
            ]
            with torch.no_grad():
                logits, present = decoder(*(torch.from_numpy(feeds[key]) for key in feeds), pairs)
            arrays |= {f"{case}/{key}": value for key, value in (feeds | past).items()}
            arrays[f"{case}/logits"] = logits.numpy()
            for i, (key, value) in enumerate(present):
                arrays[f"{case}/present.{i}.key"] = key.numpy()
                arrays[f"{case}/present.{i}.value"] = value.numpy()
        np.savez_compressed(REFERENCE / f"{name}.npz", **arrays)
    _toy_reference()


def _toy_reference() -> None:
    import torch

    x = torch.from_numpy(np.random.default_rng(SEED).standard_normal((2, 5, 32)).astype(np.float32))
    with torch.no_grad():
        np.savez_compressed(REFERENCE / "layernorm-gelu.npz", hidden_states=x.numpy(), output=make_toy(SEED)(x).numpy())


def make_dynamo() -> None:
    """Write the graphs of `torch.onnx.export(dynamo=True)`, and the toys (TorchScript exporter included)."""
    GRAPHS.mkdir(exist_ok=True)
    for name, (checkpoint, attention, opset, dtype) in DYNAMO_GRAPHS.items():
        export_dynamo(CHECKPOINTS / checkpoint, GRAPHS / f"{name}.onnx", attention=attention, opset=opset, dtype=dtype)
        _clean(GRAPHS / f"{name}.onnx", GRAPHS / f"{name}.onnx")
    for name, (is_dynamo, opset) in TOY_GRAPHS.items():
        export_toy(GRAPHS / f"{name}.onnx", SEED, opset, is_dynamo=is_dynamo)
        _clean(GRAPHS / f"{name}.onnx", GRAPHS / f"{name}.onnx")


def make_optimum() -> None:
    """Write Optimum's graphs (through the interpreter OPTIMUM_PYTHON)."""
    GRAPHS.mkdir(exist_ok=True)
    for name, checkpoint in OPTIMUM_GRAPHS.items():
        with tempfile.TemporaryDirectory() as scratch:
            exported = export_optimum(CHECKPOINTS / checkpoint, Path(scratch), os.environ["OPTIMUM_PYTHON"])
            _clean(exported, GRAPHS / f"{name}.onnx")


def make_builder() -> None:
    """Write the graphs of qcompile's own export."""
    for name, checkpoint in BUILDER_GRAPHS.items():
        with tempfile.TemporaryDirectory() as scratch:
            exported = export_builder(CHECKPOINTS / checkpoint, Path(scratch))
            _clean(exported, GRAPHS / f"{name}.onnx")


def _clean(path: Path, destination: Path) -> None:
    """Put the weights into the graph's file; drop stack traces and paths of the exporting machine."""
    model = ir.load(path)
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for key in ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"):
                node.metadata_props.pop(key, None)
            node.doc_string = None
    for initializer in model.graph.initializers.values():
        values = initializer.const_value.numpy().copy()
        initializer.const_value = ir.Tensor(values, name=initializer.name)
    ir.save(model, destination)


def check_graphs() -> None:
    """Run every graph on the reference feeds and print the largest difference where the mask is 1."""
    import onnxruntime

    for path in sorted(GRAPHS.glob("qwen*.onnx")):
        reference = np.load(REFERENCE / f"tiny-{path.name.split('-')[0]}.npz")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        worst = 0.0
        for case in sorted({key.split("/")[0] for key in reference}):
            worst = max(worst, _difference(session, reference, case))
        print(f"{path.name:34} {path.stat().st_size / 1000:7.0f} kB  {worst:.2e}")
    toy = np.load(REFERENCE / "layernorm-gelu.npz")
    for path in sorted(GRAPHS.glob("layernorm*.onnx")):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {"hidden_states": toy["hidden_states"]})
        print(f"{path.name:34} {path.stat().st_size / 1000:7.0f} kB  {np.abs(output - toy['output']).max():.2e}")


def _difference(session: Any, reference: Any, case: str) -> float:
    half = any(i.type == "tensor(float16)" for i in session.get_inputs())
    feeds = {}
    for i in session.get_inputs():
        value = reference[f"{case}/{i.name}"]
        feeds[i.name] = value.astype(np.float16) if half and value.dtype == np.float32 else value
    names = [o.name for o in session.get_outputs()]
    mask = reference[f"{case}/attention_mask"].astype(bool)
    worst = 0.0
    for name, got in zip(names, session.run(None, feeds), strict=True):
        wanted = reference[f"{case}/{name}"]
        assert got.shape == wanted.shape, (case, name, got.shape, wanted.shape)
        difference = np.abs(got.astype(np.float32) - wanted)
        kept = difference[mask[:, -got.shape[1] :]] if name == "logits" else difference.swapaxes(1, 2)[mask]
        worst = max(worst, float(kept.max()))
    return worst


STEPS: dict[str, Callable[[], None]] = {
    "checkpoints": make_checkpoints,
    "reference": make_reference,
    "dynamo": make_dynamo,
    "optimum": make_optimum,
    "builder": make_builder,
    "check": check_graphs,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    for step in parser.parse_args().steps:
        STEPS[step]()
