"""`qcompile plan`: what each bucket will cost on a chip, before anything is compiled. Every number is an estimate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompile.ascend.buckets import DECODE, Bucket, BucketOptions
from qcompile.ascend.chips import Chip
from qcompile.ascend.cost import (
    LAUNCH_GAP_S,
    Estimate,
    Kernel,
    Range,
    constant_bytes,
    estimate,
    kernel_time,
    kernels_of,
    matrix_rate,
)
from qcompile.ascend.cost_by_config import SDPA_EXPORT, Sizes, config_kernels
from qcompile.ascend.cost_by_scheme import with_int4, with_int8
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
from qcompile.errors import GraphError
from qcompile.runtime.manifest import MANIFEST_NAME, GraphEntry, Manifest

_LAYER = re.compile(r"(?:^|[./])layers[./](\d+)[./]")
_WORKSPACE_FACTOR = 3
_ATC_BASE_BYTES, _ATC_WEIGHT_FACTOR = 2 << 30, 3
BEFORE, AFTER, INT8, INT4, BUILT = (
    "before fusion",
    "after fusion",
    "int8 (W8A8 behind norms)",
    "int4 (weights only)",
    "as built",
)


@dataclass(frozen=True)
class Memory:
    """What one bucket takes on the device, in bytes; `limit` is what the chip leaves a program."""

    weights: int
    cache: int
    workspace: int
    limit: int

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.weights + self.cache + self.workspace <= self.limit


@dataclass(frozen=True)
class Row:
    """One bucket in one form.

    Attributes:
        bucket: Its shapes.
        form: Before or after fusion, int8, int4, or as built.
        cost: What a call costs.
        layer: Time of one decoder layer.
        tokens_per_s: New tokens per second of all slots, worst and best.
        memory: On the device.
    """

    bucket: Bucket
    form: str
    cost: Estimate
    layer: Range
    tokens_per_s: tuple[float, float]
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """The whole plan.

    Attributes:
        directory: The model.
        chip: The chip.
        rows: Buckets by form.
        kernels: Bucket name -> the launches of its first layer after fusion, with their time.
        atc_bytes: What ATC will take for the largest graph.
        is_from_graphs: Whether "after fusion" was read off lowered graphs, not off the config.
        kernels_before: Kernels per layer that "before fusion" has.
        lowered_for: The target of lowered graphs, or "" where the buckets were free to choose.
    """

    directory: str
    chip: Chip
    rows: tuple[Row, ...]
    kernels: dict[str, list[tuple[Kernel, Range]]]
    atc_bytes: int
    is_from_graphs: bool
    kernels_before: int
    lowered_for: str = ""

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON; the word estimate is part of it."""
        return {
            "estimate": True,
            "directory": self.directory,
            "soc_version": self.chip.name,
            "constants": {
                "matrix_flops_per_s": matrix_rate(self.chip),
                "bandwidth_bytes_per_s": list(self.chip.bandwidth),
                "launch_gap_s": LAUNCH_GAP_S,
            },
            "atc_memory_bytes": self.atc_bytes,
            "kernels_per_layer_before": self.kernels_before,
            "after_fusion_from": "lowered graphs" if self.is_from_graphs else "config",
            "lowered_for": self.lowered_for,
            "rows": [_row_record(row) for row in self.rows],
            "layer_kernels": {
                name: [{"name": k.name, "op": k.op, "seconds": asdict(time)} for k, time in kernels]
                for name, kernels in self.kernels.items()
            },
        }


def _row_record(row: Row) -> dict[str, Any]:
    return {
        "bucket": row.bucket.name,
        "form": row.form,
        **asdict(row.cost),
        "layer": asdict(row.layer),
        "tokens_per_s": list(row.tokens_per_s),
        "memory": {**asdict(row.memory), "fits": row.memory.fits},
    }


def plan_model(directory: Path, chip: Chip, options: BucketOptions, export: Path | None = None) -> Plan:
    """Plan an exported, fused or lowered directory.

    Args:
        directory: A compiled-model directory; a lowered one brings its own buckets.
        chip: Target.
        options: Buckets of a directory that is not lowered.
        export: An exporter's .onnx file whose kernels are counted for "before fusion"; 59 per layer without one.

    Raises:
        GraphError: It is no compiled-model directory.
        ManifestError: Its manifest is damaged, or that of no decoder.
        ShapeError: Its config lacks the sizes, or the buckets do not fit the model.
    """
    if not (directory / MANIFEST_NAME).is_file():
        raise GraphError(f"{directory}: holds no {MANIFEST_NAME}; plan a directory that export or optimize wrote")
    manifest = Manifest.load(directory)
    manifest.require_decoder(directory)
    sizes = Sizes.of({**manifest.config, **_shape_words(manifest)})
    lowered = _lowered_graphs(directory, manifest)
    buckets = list(lowered) or options.buckets(manifest.model.max_position_embeddings)
    per_layer = SDPA_EXPORT if export is None else export_kernels_per_layer(export, sizes, buckets[0])
    rows: list[Row] = []
    shown: dict[str, list[tuple[Kernel, Range]]] = {}
    largest = 0
    for bucket in buckets:
        view = GraphView(read_onnx(lowered[bucket])) if bucket in lowered else None
        kernels = config_kernels(sizes, bucket) if view is None else kernels_of(view)
        stored = 2 * sizes.parameters if view is None else constant_bytes(view)
        rows += _forms(bucket, kernels, stored, sizes, chip, per_layer)
        shown[bucket.name] = [(k, kernel_time(k, chip)) for k in kernels if _layer_of(k) == 0]
        largest = max(largest, rows[-1].memory.weights, *(row.memory.weights for row in rows))
    atc = _ATC_BASE_BYTES + _ATC_WEIGHT_FACTOR * largest
    return Plan(
        str(directory), chip, tuple(rows), shown, atc, bool(lowered), per_layer, manifest.target if lowered else ""
    )


def _shape_words(manifest: Manifest) -> dict[str, Any]:
    shape = manifest.model
    return {
        "vocab_size": shape.vocab_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "model_type": shape.model_type,
    }


def _lowered_graphs(directory: Path, manifest: Manifest) -> dict[Bucket, Path]:
    found = {}
    for entry in manifest.graphs:
        path = directory / _onnx_name(entry)
        if entry.bucket is not None and path.is_file():
            batch, query_len, kv_len = entry.bucket
            found[Bucket(entry.role, batch, query_len, kv_len)] = path
    return found


def _onnx_name(entry: GraphEntry) -> str:
    """The graph an .om was built from still lies beside it."""
    name = Path(entry.file.name).name
    return name if name.endswith(".onnx") else f"{re.sub(r'(_linux_[a-z0-9_]+)?[.]om$', '', name)}.onnx"


def _is_quantized(kernels: Sequence[Kernel]) -> bool:
    return any(k.is_int8 or "Quant" in k.op for k in kernels)


def export_kernels_per_layer(path: Path, sizes: Sizes, bucket: Bucket) -> int:
    """Count the kernels of an exporter's graph at the shapes of a bucket, per decoder layer.

    Raises:
        GraphError: The graph cannot be read, or is not a decoder's.
    """
    file = read_onnx(path)
    batch, new, past = bucket.batch, bucket.query_len, bucket.kv_len
    shapes: dict[str, tuple[int | None, ...]] = {}
    for info in file.proto.graph.input:
        if info.name.startswith("past"):
            shapes[info.name] = (batch, sizes.kv_heads, past, sizes.head)
        elif info.name in {"input_ids", "position_ids"}:
            shapes[info.name] = (batch, new)
        elif info.name == "attention_mask":
            shapes[info.name] = (batch, past + new)
    if "input_ids" not in shapes:
        raise GraphError(f"{path}: has no input_ids; --before takes an exported decoder")
    return max(1, round(len(kernels_of(GraphView(file, shapes))) / sizes.layers))


def _forms(bucket: Bucket, kernels: list[Kernel], stored: int, sizes: Sizes, chip: Chip, per_layer: int) -> list[Row]:
    """Return the rows of a bucket; `stored` are the bytes of its weights as they are."""
    if _is_quantized(kernels):
        return [_row(bucket, BUILT, kernels, sizes, chip, stored)]
    before = config_kernels(sizes, bucket, per_layer=per_layer, all_logits=bucket.role != DECODE)
    forms = [(BEFORE, before, 2 * sizes.parameters), (AFTER, kernels, stored)]
    for form, quantized in ((INT8, with_int8), (INT4, with_int4)):
        listed = quantized(kernels, sizes, chip.family)
        if _is_quantized(listed):  # else the chip has no kernels for it
            forms.append((form, listed, sum(k.weight_bytes + k.stored_bytes for k in listed)))
    return [_row(bucket, form, listed, sizes, chip, weights) for form, listed, weights in forms]


def _row(bucket: Bucket, form: str, kernels: list[Kernel], sizes: Sizes, chip: Chip, weights: int) -> Row:
    cost = estimate(kernels, chip)
    in_layers = [k for k in kernels if _layer_of(k) is not None]
    spent = estimate(in_layers, chip).time
    count = max(1, len({_layer_of(k) for k in in_layers}))
    new = bucket.batch * bucket.query_len
    workspace = _WORKSPACE_FACTOR * max((k.moved_bytes for k in kernels), default=0)
    memory = Memory(weights, sizes.cache_bytes(bucket), workspace, chip.usable_bytes)
    layer = Range(spent.low / count, spent.high / count)
    return Row(bucket, form, cost, layer, (new / cost.time.high, new / cost.time.low), memory)


def _layer_of(kernel: Kernel) -> int | None:
    match = _LAYER.search(kernel.name)
    return int(match.group(1)) if match else None
