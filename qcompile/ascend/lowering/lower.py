"""Lower a fused model for one chip: every bucket's static graph, from one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.ascend.buckets import Bucket, BucketOptions
from qcompile.ascend.chips import Chip
from qcompile.ascend.cost_by_config import TORCH_EXPORT
from qcompile.ascend.lowering.centring import bias_scores, coarse_layers
from qcompile.ascend.lowering.decoder import DecoderLowering, LoweringOptions, heads_of
from qcompile.ascend.lowering.flash_attention import why_no_flash
from qcompile.ascend.lowering.folding import foldings_of
from qcompile.ascend.lowering.kernels import KernelCount, count_kernels
from qcompile.ascend.lowering.plugin_ops import use_plugins
from qcompile.ascend.lowering.static_graph import dims
from qcompile.ascend.lowering.typed_weights import TypedWeights
from qcompile.ascend.value_range import ValueRanges
from qcompile.errors import ShapeError, UnsupportedOpError
from qcompile.functions import DOMAIN
from qcompile.passes.narrow_scales import widen_scales
from qcompile.passes.rope_table import RopeTable, tabulate
from qcompile.runtime.manifest import FileEntry, GraphEntry, GraphIO, ModelShape

Report = Callable[[str, int, int], None]
MAX_TOP_K = 1024
ATTENTIONS = ("matmul", "pfa")
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class AscendOptions:
    """What to compile for an Ascend chip.

    Attributes:
        buckets: The shapes.
        dtype: ``fp16`` or ``bf16``: weights, activations and KV cache.
        top_k: Logits and ids returned for sampling on the host; 0 leaves only the greedy token.
        keep_logits: Return the logits too, for comparisons; they are most of what the host would have to copy.
        plugins: Parser plugins to use, see `qcompile.ascend.plugins`; they must be installed where ATC runs.
        attention: ``matmul``: two products and a softmax. ``pfa``: NPUPromptFlashAttention.
    """

    buckets: BucketOptions = field(default_factory=BucketOptions)
    dtype: str = "fp16"
    top_k: int = 64
    keep_logits: bool = False
    attention: str = "matmul"
    plugins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LoweredGraph:
    """One static graph and what it costs in kernels."""

    bucket: Bucket
    model: ir.Model
    kernels: KernelCount

    def entry(self, dtype: str) -> GraphEntry:
        """Return what the manifest says of it; its file is yet to be written."""
        io = GraphIO(
            kv_cache="appended",
            logits="chosen",
            inputs=tuple(value.name or "" for value in self.model.graph.inputs),
            outputs=tuple(value.name or "" for value in self.model.graph.outputs),
            dtype={"fp16": "float16", "bf16": "bfloat16"}[dtype],
        )
        sizes = (self.bucket.batch, self.bucket.query_len, self.bucket.kv_len)
        return GraphEntry(self.bucket.role, FileEntry(f"{self.bucket.name}.onnx", 0, ""), (), io, sizes)


@dataclass(frozen=True)
class LoweredModel:
    """All graphs of a model.

    Attributes:
        graphs: One per bucket, smallest first; their weights are the same objects.
        bias_scores: Attention layer -> largest score its biases make.
        centred: Attention layers whose keys are centred.
        reasons: What was spelled out in standard operators, why, and how often.
        ranges: How large values become on text; None when that was not measured.
        torch_export: Kernels per layer of a graph by torch.onnx.export, for comparison; 0 where that was not counted.
        notes: What else to warn of.
    """

    graphs: list[LoweredGraph]
    bias_scores: dict[int, float]
    centred: frozenset[int]
    reasons: dict[str, int]
    ranges: ValueRanges | None = None
    torch_export: int = 0
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return what the manifest and the report say, JSON-ready."""
        return {
            "graphs": {g.bucket.name: g.kernels.record() for g in self.graphs},
            "torch_export_kernels_per_layer": self.torch_export,
            "centred_layers": sorted(self.centred),
            "largest_bias_score": round(max(self.bias_scores.values(), default=0.0), 1),
            "spelled_out": self.reasons,
            "ranges": self.ranges.record() if self.ranges is not None else {},
        }


def lower_model(
    model: ir.Model,
    shape: ModelShape,
    chip: Chip,
    options: AscendOptions,
    ranges: ValueRanges | None = None,
    say: Report | None = None,
) -> LoweredModel:
    """Lower a fused model.

    Args:
        model: A fused graph with the standard interface; scales in half precision apart, it is left as it is.
        shape: Its config words.
        chip: The chip.
        options: Shapes and types.
        ranges: How large values become: float16 sums that would overflow are made float32 ones.
        say: Called with (what, done, total).

    Raises:
        UnsupportedOpError: The model has nodes, types or angles that cannot be lowered.
        ShapeError: The buckets do not fit the model.
    """
    dtype = _checked_type(options, chip)
    buckets = options.buckets.buckets(shape.max_position_embeddings)
    widen_scales(model.graph)
    table = _rope_table(model, max(b.kv_len + b.query_len for b in buckets))
    foldings = foldings_of(model)
    scores = bias_scores(model, foldings)
    centred = coarse_layers(scores)
    wants_flash = options.attention == "pfa" or "attention" in options.plugins
    no_flash = _why_no_flash(model, chip, options) if wants_flash else ""
    flash = wants_flash and not no_flash
    centred = frozenset() if flash else centred
    wide = ranges.wide_sums() if ranges is not None and options.dtype == "fp16" else frozenset()
    lowering = LoweringOptions(
        chip, dtype, options.top_k, centred, options.keep_logits, flash, wide, "rms-norm" in options.plugins
    )
    weights = TypedWeights(dtype)
    graphs, reasons = [], {}
    for index, bucket in enumerate(buckets):
        if say is not None:
            say(f"lowering {bucket.name}", index, len(buckets))
        walk = DecoderLowering(bucket, lowering, weights, foldings, table)
        lowered = walk.lower(model)
        reasons = walk.reasons
        if no_flash:
            reasons[no_flash] = shape.num_hidden_layers
        reasons |= use_plugins(lowered, options.plugins, chip)
        graphs.append(LoweredGraph(bucket, lowered, count_kernels(lowered)))
    notes = _check_memory(graphs, chip)
    torch_export = TORCH_EXPORT.get(shape.model_type.removesuffix("_text"), 0)
    return LoweredModel(graphs, scores, centred, reasons, ranges, torch_export, notes)


def _check_memory(graphs: list[LoweredGraph], chip: Chip) -> tuple[str, ...]:
    """Refuse graphs that cannot be loaded; boards that share memory with their host come in sizes, so there it is a note.

    Raises:
        ShapeError: Weights and cache of a graph exceed the chip's memory.
    """
    for graph in graphs:
        weights, inputs = (
            sum(value.const_value.nbytes for value in graph.model.graph.initializers.values() if value.const_value),
            sum(_size_bytes(value) for value in graph.model.graph.inputs),
        )
        if weights + inputs <= chip.usable_bytes:
            continue
        problem = (
            f"{graph.bucket.name}: a KV cache of {inputs / 1e9:.1f} GB beside weights of {weights / 1e9:.1f} GB does not fit "
            f"the {chip.usable_bytes / 1e9:.1f} GB that {chip.name} leaves a program; give a smaller --batch or --kv-len"
        )
        if chip.family != "310B":
            raise ShapeError(problem)
        return (f"{problem}, or use a board with more memory",)
    return ()


def _size_bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    return int(np.prod(dims(value))) * value.dtype.bitwidth // 8


def _checked_type(options: AscendOptions, chip: Chip) -> ir.DataType:
    if options.dtype not in _TYPES:
        raise UnsupportedOpError(f"--ascend-dtype {options.dtype}: wanted one of {', '.join(_TYPES)}")
    if not 0 <= options.top_k <= MAX_TOP_K:
        raise UnsupportedOpError(f"--top-k {options.top_k}: wanted 0 to {MAX_TOP_K}")
    if options.attention not in ATTENTIONS:
        raise UnsupportedOpError(f"--attention {options.attention}: wanted one of {', '.join(ATTENTIONS)}")
    if options.dtype.replace("fp", "f") not in chip.floats:
        raise UnsupportedOpError(f"{chip.name} has no {options.dtype} kernels; lower with --ascend-dtype fp16")
    return _TYPES[options.dtype]


def _why_no_flash(model: ir.Model, chip: Chip, options: AscendOptions) -> str:
    attentions = (n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, "Attention"))
    reason = next((reason for node in attentions if (reason := why_no_flash(chip, heads_of(node)))), "")
    asked = "--attention pfa" if options.attention == "pfa" else "--plugins attention"
    return f"{asked}: {reason}" if reason else ""


def _rope_table(model: ir.Model, rows: int) -> RopeTable:
    attentions = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, "Attention")]
    if not attentions and any(n.domain == "com.microsoft" for n in model.graph):
        raise UnsupportedOpError(
            "the graph is lowered to ONNX Runtime's operators; give the directory that `qcompile export` wrote, or one "
            "that was optimized with --target portable"
        )
    if not attentions:
        raise UnsupportedOpError(
            "the graph has no fused attention; add --passes fuse, and see inspect --why fuse-attention"
        )
    angles = {(n.inputs[5], n.inputs[6]) for n in attentions}
    if len(angles) != 1:
        raise UnsupportedOpError(f"the attentions use {len(angles)} different rotary embeddings; one is lowered")
    ((cos, sin),) = angles
    assert cos is not None
    assert sin is not None
    table = tabulate(cos, sin, rows)
    if isinstance(table, str):
        raise UnsupportedOpError(f"the rotary embedding has no table: {table}")
    return table
