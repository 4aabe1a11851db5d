"""Optimize one model: the phases in order, each pass timed, proved and recorded.

    surgery -> clean -> canonicalize -> fuse -> quantize -> lower -> clean

What is written is complete or absent, and its manifest lists every pass with what it did and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.artifact import (
    GRAPH_NAME,
    WEIGHTS_NAME,
    ArtifactWriter,
    Provenance,
    check_output,
    find_graph,
    graph_io_of,
    load_model,
)
from qcompile.ascend.chips import chip_named
from qcompile.ascend.lowering.lower import AscendOptions, lower_model
from qcompile.ascend.value_range import ValueRanges, profile
from qcompile.calibration.provide import CalibratedStatistics, TextSource
from qcompile.calibration.text import BUILT_IN
from qcompile.errors import PassError, UnsupportedOpError, VerifyError
from qcompile.fusion_counts import expected_counts, missing_fusions
from qcompile.loaded_model import LoadedModel, inspect_loaded
from qcompile.model_shape import describe_any, is_decoder, model_io_of, refuse_lowered_for_ascend
from qcompile.passes import registry
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection, op_histogram
from qcompile.passes.finite_weights import check_finite
from qcompile.passes.fold_scales import Awq, FoldScales
from qcompile.passes.lower_attention_to_ort import LowerAttentionToOrt
from qcompile.passes.proof import Prover
from qcompile.passes.quantize_int8 import QuantizeInt8Norm, QuantizeInt8Static
from qcompile.passes.quantize_kv8 import QuantizeKv8
from qcompile.passes.quantize_lossless import QuantizeLossless
from qcompile.passes.quantize_model import QuantizeModel
from qcompile.passes.quantize_rotation import RotateResidual
from qcompile.passes.schedule import schedule
from qcompile.passes.select_last_token import SelectLastToken
from qcompile.quantization_checks import cache_dtype, check_quantization
from qcompile.quantize_options import QuantizeOptions
from qcompile.runtime.manifest import FileEntry, GraphEntry, Manifest, ModelShape
from qcompile.surgeon import apply_surgery
from qcompile.target import Target, default_target, target_named
from qcompile.verify import Agreement, compare_directories

VERIFY_LEVELS = ("off", "fast", "full")
# They change the interface to what generating needs.
_DECODER_PASSES = (SelectLastToken.name, LowerAttentionToOrt.name)
_COMPUTING = (RotateResidual, FoldScales, QuantizeKv8, QuantizeInt8Norm, QuantizeInt8Static)
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OptimizeOptions:
    """What to do to a model.

    Attributes:
        passes: Names of passes and groups.
        skip: Names of passes and groups to leave out.
        target: A target's name, or None for the default of the model's dtype.
        verify: ``off``: no checks. ``fast``: every rewrite is proved. ``full``: and the whole model is compared.
        strict: Fail when fewer fusions fire than the model has places for.
        surgery: `file.py:function` to run first.
        dry_run: Do everything but write.
        quantize: Changes to what the quantization passes do by themselves.
        layer_chart: Where to write how a quality or a size chose the scheme of every layer, as .html or .svg.
        ascend: Shapes and types of the static graphs, for an Ascend target.
        names_ascend: Whether some of `ascend` was asked for, be it what it is by default; refused for other targets.
    """

    passes: tuple[str, ...] = ("fuse",)
    skip: tuple[str, ...] = ()
    target: str | None = None
    verify: str = "fast"
    strict: bool = False
    surgery: str | None = None
    dry_run: bool = False
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    layer_chart: Path | None = None
    ascend: AscendOptions = field(default_factory=AscendOptions)
    names_ascend: bool = False


@dataclass
class OptimizeReport:
    """What happened: one result per pass, and what the model looks like before and after."""

    source: str
    output: str
    target: str
    results: list[PassResult] = field(default_factory=list)
    expected: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    agreement: Agreement | None = None
    loaded: LoadedModel | None = None
    size_bytes: int = 0
    ascend: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str) -> int:
        """Return how many rewrites the passes of that name made together."""
        return sum(result.rewrites for result in self.results if result.name == name)

    def record(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {
            "source": self.source,
            "output": self.output,
            "target": self.target,
            "passes": [result.record() for result in self.results],
            "expected": self.expected,
            "warnings": self.warnings,
            "ops_before": self.ops_before,
            "ops_after": self.ops_after,
            "verification": self.agreement.record() if self.agreement is not None else {},
            "loaded": self.loaded.record() if self.loaded is not None else {},
            "size_bytes": self.size_bytes,
            "ascend": self.ascend,
        }


def optimize(source: Path, output: Path, options: OptimizeOptions, report: Report | None = None) -> OptimizeReport:
    """Optimize a model file or compiled-model directory and write a compiled-model directory.

    Args:
        source: An .onnx file or a compiled-model directory.
        output: The directory to write.
        options: Passes, target and checks.
        report: Called with (what, done, total) as work goes on.

    Raises:
        QCompileError: The model cannot be read, a pass name or target is unknown, a check failed, or the output
            cannot be written. Nothing is left behind.
    """
    say = report or (lambda what, done, total: None)
    graph_path, manifest = find_graph(source)
    _check_request(options, output, graph_path)
    model = load_model(graph_path)
    refuse_lowered_for_ascend(model, graph_path, manifest)
    target = _target(options, model)
    _check_ascend(options, target)
    plan = _schedule(model, target, options)
    check_quantization(plan, options.quantize, target, model, has_chart=options.layer_chart is not None)
    shape, config = describe_any(model, graph_path.parent, manifest)
    context = PassContext(model, None if options.verify == "off" else Prover())
    done = OptimizeReport(str(source), str(output), target.name, ops_before=op_histogram(model))
    if options.surgery:
        context.model = apply_surgery(model, options.surgery)
        done.warnings.append(f"surgery {options.surgery} is yours: it was run as it is and not checked")
    _check_weights(context.model.graph, plan, options.quantize)
    statistics = CalibratedStatistics(
        TextSource(graph_path.parent, manifest, options.quantize.calibration),
        with_hessians=options.quantize.needs_hessian or Awq in plan,
        rounds_per_token=target.rounds_per_token,
        say=say,
    )
    statistics.text.check()
    steps = [_instance(step, shape, options.quantize, statistics, target, plan) for step in plan]
    first = next((i for i, step in enumerate(plan) if step in registry.QUANTIZE), len(plan))
    _run(steps[:first], context, done, say)
    ranges = _ranges(context.model, target, statistics.text, options, done, say)
    _run(steps[first:], context, done, say)
    done.warnings += _text_notes(options, statistics)
    _judge_counts(done, expected_counts(shape, {step.name for step in plan}), manifest, options.strict)
    done.ops_after = op_histogram(context.model)
    origin = _Origin(graph_path, manifest, shape, config)
    graphs = _graphs(context.model, target, origin, options, ranges, done, say)
    if not options.dry_run:
        _write(graphs, output, done, origin, options, say)
    if options.layer_chart is not None and statistics.decision is not None:
        statistics.decision.page().write(options.layer_chart)
    return done


@dataclass(frozen=True)
class _Origin:
    """Where a model came from and what its manifest says."""

    graph_path: Path
    manifest: Manifest | None
    shape: ModelShape
    config: dict[str, Any]


def _check_request(options: OptimizeOptions, output: Path, graph_path: Path) -> None:
    if options.verify not in VERIFY_LEVELS:
        raise PassError(f"--verify {options.verify}: wanted one of {', '.join(VERIFY_LEVELS)}")
    if not options.dry_run:
        check_output(output, graph_path)


def _target(options: OptimizeOptions, model: ir.Model) -> Target:
    logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
    dtype = logits.dtype if logits is not None and logits.dtype is not None else ir.DataType.FLOAT
    cache = cache_dtype(model)
    if cache is not None and cache != ir.DataType.INT8:  # an int8 cache says nothing of the floats
        dtype = cache
    if options.target is None:
        return default_target(dtype)
    target = target_named(options.target)
    if dtype not in target.dtypes:
        raise UnsupportedOpError(
            f"the model is {dtype.name}; target {target.name} has kernels for "
            f"{', '.join(sorted(d.name for d in target.dtypes))}: export with --dtype fp32, or use --target portable"
        )
    return target


def _schedule(model: ir.Model, target: Target, options: OptimizeOptions) -> list[type[Pass]]:
    """Return the passes; a graph that cannot generate keeps its interface."""
    if is_decoder(model.graph):
        return schedule(options.passes, options.skip, target.lowering)
    if options.verify == "full" or target.chip is not None:
        raise UnsupportedOpError(
            f"graph '{model.graph.name}' is no decoder (past_key_values.{{i}}.key|value in, logits out): "
            "use --verify fast, which proves every rewrite, and --target ort or portable"
        )
    return schedule(options.passes, (*options.skip, *_DECODER_PASSES), target.lowering)


def _check_ascend(options: OptimizeOptions, target: Target) -> None:
    """Refuse shapes of graphs for Ascend where the target is none."""
    if target.chip is None and (options.names_ascend or options.ascend != AscendOptions()):
        raise PassError(
            f"--batch, --kv-len, --attention and the like shape graphs for Ascend; --target is {target.name}"
        )


def _check_weights(graph: ir.Graph, plan: Sequence[type[Pass]], options: QuantizeOptions) -> None:
    """Refuse NaN and infinity: matrices here only if something mixes them, or runs the model, before a quantizer looks."""
    is_chosen = options.quality is not None or options.size is not None
    is_computed = is_chosen or options.needs_hessian or any(issubclass(step, _COMPUTING) for step in plan)
    if not set(registry.QUANTIZE).isdisjoint(plan):
        check_finite(graph, with_matrices=is_computed)


def _instance(
    pass_class: type[Pass],
    shape: ModelShape,
    quantize: QuantizeOptions,
    statistics: CalibratedStatistics,
    target: Target,
    plan: Sequence[type[Pass]],
) -> Pass:
    if pass_class is LowerAttentionToOrt:
        return LowerAttentionToOrt(shape.max_position_embeddings)
    if issubclass(pass_class, QuantizeModel):
        return pass_class(quantize, statistics, target.smallest_group, rounds_per_token=target.rounds_per_token)
    if issubclass(pass_class, FoldScales):
        defaults = (step.defaults for step in plan if issubclass(step, QuantizeModel))
        return pass_class(quantize, statistics, next(defaults, None), rounds_per_token=target.rounds_per_token)
    if pass_class is QuantizeLossless:
        return QuantizeLossless(quantize)
    if pass_class is QuantizeKv8:
        return QuantizeKv8(statistics)
    return pass_class()


def _text_notes(options: OptimizeOptions, statistics: CalibratedStatistics) -> tuple[str, ...]:
    if options.quantize.calibration != BUILT_IN and not statistics.was_used:
        return ("the calibration text was not needed: no algorithm or scheme that looks at activations",)
    return statistics.notes


def _run(plan: Sequence[Pass], context: PassContext, done: OptimizeReport, say: Report) -> None:
    told: set[tuple[str, Rejection]] = set()
    for index, step in enumerate(plan):
        say(step.name, index, len(plan))
        result = step(context)
        # A pass that runs again meets what it met before.
        result.rejected = [r for r in result.rejected if (step.name, r) not in told]
        told.update((step.name, r) for r in result.rejected)
        done.results.append(result)


def _judge_counts(done: OptimizeReport, expected: dict[str, int], earlier: Manifest | None, strict: bool) -> None:
    done.expected = expected
    # what an earlier run has fused is not there to be fused again
    records = [step for step in earlier.passes if isinstance(step, dict)] if earlier is not None else []
    before = [(step.get("name"), step.get("rewrites", 0)) for step in records]
    seen = {name: done.count(name) + sum(n for other, n in before if other == name) for name in expected}
    shortfalls = missing_fusions(done.expected, seen)
    for result in done.results:
        rolled_back = [r for r in result.rejected if r.reason.startswith("rolled back")]
        shortfalls += [f"{result.name}: '{r.node}' {r.reason}" for r in rolled_back]
        shortfalls += [f"{result.name}: {result.detail['left_float']}"] if "left_float" in result.detail else []
    if shortfalls and strict:
        raise VerifyError(
            f"--strict: {shortfalls[0]}" + (f" (and {len(shortfalls) - 1} more)" if shortfalls[1:] else "")
        )
    done.warnings += shortfalls


def _ranges(
    model: ir.Model, target: Target, text: TextSource, options: OptimizeOptions, done: OptimizeReport, say: Report
) -> ValueRanges | None:
    """Measure how large values become, where they will be float16."""
    if target.chip is None or options.ascend.dtype != "fp16" or options.verify == "off":
        return None
    if text.manifest is None:
        done.warnings.append("there is no tokenizer beside the graph: how large values become was not measured")
        return None
    ranges = profile(model, text, say)
    done.warnings += ranges.warnings()
    return ranges


def _graphs(
    model: ir.Model,
    target: Target,
    origin: _Origin,
    options: OptimizeOptions,
    ranges: ValueRanges | None,
    done: OptimizeReport,
    say: Report,
) -> list[tuple[GraphEntry, ir.Model]]:
    """Return the graphs to write: the model itself, or one per bucket for an Ascend chip."""
    if target.chip is None:
        can_generate = is_decoder(model.graph)
        role, io = ("decoder", graph_io_of(model)) if can_generate else ("model", model_io_of(model.graph))
        return [(GraphEntry(role, FileEntry(GRAPH_NAME, 0, ""), (), io), model)]
    lowered = lower_model(model, origin.shape, chip_named(target.chip), options.ascend, ranges, say)
    done.ascend = lowered.record()
    done.warnings += lowered.notes
    done.warnings += [f"{what}; spelled out in {count} places" for what, count in lowered.reasons.items()]
    return [(graph.entry(options.ascend.dtype), graph.model) for graph in lowered.graphs]


def _write(
    graphs: Sequence[tuple[GraphEntry, ir.Model]],
    output: Path,
    done: OptimizeReport,
    origin: _Origin,
    options: OptimizeOptions,
    say: Report,
) -> None:
    with ArtifactWriter(output) as artifact:
        data_name = f"{graphs[0][0].file.name}.data" if len(graphs) == 1 else WEIGHTS_NAME
        saved = artifact.save_graphs(graphs, data_name=data_name, progress=lambda n, total: say("writing", n, total))
        artifact.copy_auxiliary(origin.graph_path.parent)
        done.size_bytes = sum(s.file.size_bytes for s in saved) + sum(entry.size_bytes for entry in saved[0].data)
        earlier = origin.manifest
        provenance = Provenance(
            target=done.target,
            shape=origin.shape,
            passes=(*(earlier.passes if earlier else ()), *(r.record() for r in done.results)),
            quantization=_quantization(done.results, earlier),
            source=earlier.source if earlier else {"path": str(origin.graph_path)},
            config=origin.config,
        )
        artifact.stage(provenance)
        if options.verify == "full":
            done.agreement = compare_directories(origin.graph_path, artifact.path, say=say)
            if not done.agreement.holds(quantized=bool(provenance.quantization)):
                raise VerifyError(f"{done.agreement.summary()}; nothing was written")
            artifact.stage(replace(provenance, verification=done.agreement.record()))
        entry = graphs[0][0]
        runs_here = target_named(done.target).runs_here and entry.role == "decoder" and entry.io.dtype != "bfloat16"
        if provenance.quantization and options.verify != "off" and runs_here:
            say("loading what was written", 0, 0)
            done.loaded = inspect_loaded(artifact.path)
            done.warnings += done.loaded.warnings(done.target)
        artifact.publish()


def _quantization(results: Sequence[PassResult], earlier: Manifest | None) -> dict[str, Any]:
    """Return what the manifest says of quantized tensors: this run's, or what an earlier run did."""
    found = {key: result.detail[key] for result in results for key in _QUANTIZED if result.detail.get(key)}
    if not found:
        return earlier.quantization if earlier is not None else {}
    schemes = [result.name for result in results if {"quantized", "kv8"} & set(result.detail)]
    return {"scheme": "+".join(schemes), "tensors": [], **{_QUANTIZED[key]: value for key, value in found.items()}}


# What passes say in their details, and how the manifest calls it.
_QUANTIZED = {"quantized": "tensors", "calibration": "calibration", "rotation": "rotation", "kv8": "kv_cache"}
