"""Export one Qwen checkpoint by three exporters: qcompile's builder, torch.onnx.export (dynamo) and Optimum.

    python tests/real/export_three.py CHECKPOINT OUT [--only builder,dynamo,optimum] [--optimum-python PYTHON]

writes OUT/{builder,dynamo,optimum}/model.onnx (+ data). CHECKPOINT is a Hugging Face directory, or a .gguf
file, which is first written out as one (OUT/checkpoint, float32) so that all three see the same weights.
Optimum pins an older transformers than we use, so it runs under its own interpreter: `--optimum-python`,
or QCOMPILE_OPTIMUM_PYTHON in the environment.
"""

import argparse
import json
import math
import os
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

EXPORTERS = ("builder", "dynamo", "optimum")
OPSET = 18
_ROWS = 4096


def checkpoint_directory(source: Path, directory: Path) -> Path:
    """Return `source` if it is a directory; write a .gguf out as a Hugging Face directory, row by row."""
    if source.is_dir():
        return source
    from qcompile.export.checkpoint import EMBEDDING, HEAD
    from qcompile.export.export_checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(source))
    config = checkpoint.config.to_dict()
    # transformers 4 reads rope_theta, transformers 5 rope_parameters
    config |= {"tie_word_embeddings": checkpoint.ties_head, "torch_dtype": "float32"}
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"]}
    tensors = dict(checkpoint.tensors)
    if checkpoint.ties_head:
        tensors[EMBEDDING] = tensors.pop(HEAD, None) or tensors[EMBEDDING]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in checkpoint.files.items():
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    _write_safetensors(tensors, directory / "model.safetensors")
    return directory


def _write_safetensors(tensors: dict[str, Any], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size_bytes = 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
            for first in range(0, rows, _ROWS):
                block = tensor.block(slice(first, min(first + _ROWS, rows)), slice(0, columns))
                stream.write(np.ascontiguousarray(block, "<f4").tobytes())


def decoder_with_cache(checkpoint: Path, attention: str = "eager", dtype: str = "float32") -> Any:
    """The transformers model as a function (ids, mask, positions, [(k, v), ...]) -> logits, [(k, v), ...]."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from qcompile.export.torch_tracer import cache_argument

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=getattr(torch, dtype), attn_implementation=attention
            )
            self.cache_name = cache_argument(self.model)

        def forward(
            self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any
        ) -> tuple[Any, list[tuple[Any, Any]]]:
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{self.cache_name: DynamicCache(past_key_values)},
            )
            return output.logits, [(layer.keys, layer.values) for layer in getattr(output, self.cache_name).layers]

    return Decoder().eval()


def export_builder(checkpoint: Path, directory: Path) -> Path:
    """Export with qcompile itself; returns the graph's path."""
    from qcompile.export.export_checkpoint import export_checkpoint

    export_checkpoint(str(checkpoint), directory)
    return directory / "model.onnx"


def export_dynamo(
    checkpoint: Path, path: Path, *, attention: str = "sdpa", opset: int = OPSET, dtype: str = "float32"
) -> Path:
    """Export with `torch.onnx.export(dynamo=True)` under the input and output names the ecosystem uses."""
    import torch

    decoder = decoder_with_cache(checkpoint, attention, dtype)
    config = decoder.model.config
    layers = range(config.num_hidden_layers)
    kinds = [f"{i}.{kind}" for i in layers for kind in ("key", "value")]
    batch, new, past = 2, 3, 5
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = torch.zeros(batch, config.num_key_value_heads, past, head_dim, dtype=decoder.model.dtype)
    tokens = {0: "batch_size", 1: "sequence_length"}
    cached = {0: "batch_size", 2: "past_sequence_length"}
    torch.onnx.export(
        decoder,
        (
            torch.ones(batch, new, dtype=torch.int64),
            torch.ones(batch, past + new, dtype=torch.int64),
            torch.arange(past, past + new).expand(batch, new).contiguous(),
            [(cache.clone(), cache.clone()) for _ in layers],
        ),
        path,
        dynamo=True,
        opset_version=opset,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{k}" for k in kinds)],
        output_names=["logits", *(f"present.{k}" for k in kinds)],
        dynamic_shapes=(
            tokens,
            {0: "batch_size", 1: "total_sequence_length"},
            tokens,
            [(cached, cached) for _ in layers],
        ),
        external_data=_is_large(checkpoint),
    )
    return path


def export_optimum(checkpoint: Path, directory: Path, python: str) -> Path:
    """Export with Optimum, under the interpreter that has it; returns the graph's path."""
    cli = Path(python).with_name("optimum-cli")
    task = ["--task", "text-generation-with-past", "--framework", "pt", "--opset", str(OPSET)]
    subprocess.run(
        [python, str(cli), "export", "onnx", "--model", str(checkpoint), *task, str(directory)],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
    )
    return directory / "model.onnx"


def _is_large(checkpoint: Path) -> bool:
    return sum(shard.stat().st_size for shard in checkpoint.glob("*.safetensors")) > 100_000_000


def main() -> None:
    """Parse the command line and run the exporters asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(EXPORTERS), help="comma-separated subset")
    parser.add_argument("--optimum-python", default=os.environ.get("QCOMPILE_OPTIMUM_PYTHON"))
    options = parser.parse_args()
    checkpoint = checkpoint_directory(options.checkpoint, options.out / "checkpoint")
    for exporter in options.only.split(","):
        if exporter not in EXPORTERS:
            parser.error(f"unknown exporter '{exporter}'; there are {', '.join(EXPORTERS)}")
        directory = options.out / exporter
        directory.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        if exporter == "builder":
            path = export_builder(checkpoint, directory)
        elif exporter == "dynamo":
            path = export_dynamo(checkpoint, directory / "model.onnx")
        elif options.optimum_python:
            path = export_optimum(checkpoint, directory, options.optimum_python)
        else:
            parser.error("optimum needs --optimum-python or QCOMPILE_OPTIMUM_PYTHON")
        print(f"{exporter}: {path} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
