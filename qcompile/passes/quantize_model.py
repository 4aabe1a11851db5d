"""What all quantization passes do: decide a scheme per projection, put the quantized operator in its place.

    MatMul(x, W) | Linear(x, W, b)   ->   LinearW8 | LinearW4 | LinearW8A8 | …(x, codes, scales, …) [+ b]
    Gather(E, input_ids)             ->   EmbeddingW8 | EmbeddingW4 | …(input_ids, codes, scales, …)

A tied embedding and head share one set of codes: no float copy of the table is left. Weights are quantized row by row
while the model is saved; with statistics (GPTQ and what else looks at activations) they are quantized on the spot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.calibration.mixed_precision import Decision, Given, Goal, candidate_schemes
from qcompile.calibration.sensitivity import Candidates
from qcompile.calibration.trial import tensors_of
from qcompile.errors import QuantError
from qcompile.functions import DOMAIN, DOMAIN_VERSION
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, named_constant, node_label
from qcompile.passes.quantize_projections import Projection, find_projections
from qcompile.passes.quantize_weights import QuantizedPieces, holds_scales
from qcompile.passes.unit_norm import scheme_for_input
from qcompile.quant.activations import UNIT_NORM_STEP
from qcompile.quant.algorithms import NEEDS_HESSIAN, default_options, weight_quantizer
from qcompile.quant.scheme import AlgorithmOptions, InputStatistics, ScaleType, WeightScheme
from qcompile.quantize_options import GROUP_SIZES, LayerOptions, LinearScheme, QuantizeOptions
from qcompile.tensors import StreamedTensor


class Statistics(Protocol):
    """What is known about the inputs of projections."""

    def prepare(self, model: ir.Model) -> Any:
        """Gather it for a float model, before anything in it is replaced."""

    def __call__(self, projection: Projection) -> InputStatistics:
        """Return it for one projection."""

    def record(self) -> dict[str, Any]:
        """Return where it comes from, for the manifest."""

    def decide(self, model: ir.Model, candidates: Candidates, goal: Goal, given: Given | None = None) -> Decision:
        """Choose a scheme for every tensor of a float model."""


_DTYPES: dict[ScaleType, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_SCALE_TYPES = {dtype: name for name, dtype in _DTYPES.items()}
_KEPT, _TIED = "kept float, as asked", "tied to an output head that stays float"
_CHOSEN = {"quality": "kept float by --quality", "size": "kept float by --size"}
_AS_ASKED = frozenset({_KEPT, _TIED, *_CHOSEN.values()})
_INT8_MAX = 127
_TIED_DAMPING = 1.0


@dataclass
class _Codes:
    """A quantized weight in the graph: the inputs after x, and the attributes, of the operators that read it."""

    suffix: str
    values: list[ir.Value]
    attributes: dict[str, int] = field(default_factory=dict)

    def operator(self, projection: Projection) -> str:
        """Return the operator that stands for a projection."""
        return ("Embedding" if projection.is_lookup else "Linear") + self.suffix


class QuantizeModel(Pass):
    """A quantization scheme.

    Args:
        options: Changes to the scheme's own values.
        statistics: Returns what is known of a projection's inputs, for schemes and algorithms that need it.
        smallest_group: Smallest block that the target's kernels take; smaller ones are used only where asked for.
        rounds_per_token: Whether the target has kernels for activations with a scale per token.
    """

    defaults: ClassVar[tuple[LayerOptions, ...]] = ()

    def __init__(
        self,
        options: QuantizeOptions | None = None,
        statistics: Statistics | None = None,
        smallest_group: int = GROUP_SIZES[0],
        *,
        rounds_per_token: bool = True,
    ) -> None:
        self.asked = self.options = options or QuantizeOptions()
        self.statistics = statistics
        self.smallest_group, self.rounds_per_token = smallest_group, rounds_per_token

    def call(self, context: PassContext, result: PassResult) -> None:
        """Quantize every projection and the embedding; what stays float is reported with the reason."""
        projections = find_projections(context.model.graph)
        unused = self.options.unused_patterns(p.names for p in projections)
        if unused:
            raise QuantError(f"no layer is called '{unused[0]}'; there are, for example: {_examples(projections)}")
        self._choose_schemes(context.model, result)
        tables: dict[tuple[ir.Value, LinearScheme], _Codes] = {}
        tensors = []
        decided = self._decide(projections, result)
        self._judge_widths(projections, decided, result)
        self._prepare(context.model, decided, result)
        for projection, scheme in decided:
            key = (projection.source, scheme)
            if key not in tables or scheme.activations != "float":
                tables[key] = self._quantized(context.model.graph, projection, scheme)
            _replace(context.model.graph, projection, tables[key])
            tensors.append(_record(projection, scheme, tables[key]))
            result.rewrites += 1
        result.detail["quantized"] = tensors
        if result.rewrites:
            context.forget_analysis()
            finish_rewrites(context)

    def _decide(self, projections: Sequence[Projection], result: PassResult) -> list[tuple[Projection, LinearScheme]]:
        """Return what is quantized and how; lookups come last, as a tied one takes what its head has."""
        result.matches = len(projections)
        decided: dict[int, LinearScheme] = {}
        for index, projection in sorted(enumerate(projections), key=lambda item: item[1].is_lookup):
            tied = [decided.get(i) for i, p in enumerate(projections) if p.source is projection.source and i != index]
            scheme = self._scheme(projection, tied)
            if isinstance(scheme, str):
                result.rejected.append(Rejection(node_label(projection.node), self.name, scheme))
            else:
                decided[index] = scheme
        return [(projections[index], scheme) for index, scheme in decided.items()]

    def _judge_widths(
        self,
        projections: Sequence[Projection],
        decided: Sequence[tuple[Projection, LinearScheme]],
        result: PassResult,
    ) -> None:
        """Say which weights stay float although nobody asked for it; refuse if none is left, asked for or not."""
        unfit = [rejection for rejection in result.rejected if rejection.reason not in _AS_ASKED]
        if not unfit:
            self._refuse_all_kept(decided, result)
            return
        # two codes of 4 bits share a byte, even where a row is one group
        scheme = "--passes int8-weight " if any(p.num_inputs % 2 for p in projections) else ""
        cure = f"{scheme}--group-size channel stores any width quantized, though ONNX Runtime multiplies it as floats"
        first = f"'{unfit[0].node}': {unfit[0].reason}"
        if not decided:
            raise QuantError(f"{self.name}: no weight can be quantized: {first}; {cure}")
        result.detail["left_float"] = f"{len(unfit)} of {len(projections)} weights stay float, such as {first}; {cure}"

    def _refuse_all_kept(self, decided: Sequence[tuple[Projection, LinearScheme]], result: PassResult) -> None:
        """Refuse patterns that keep everything float; what a quality or a size chose has its own note."""
        reasons = {rejection.reason for rejection in result.rejected}
        if reasons and not decided and reasons <= {_KEPT, _TIED}:
            raise QuantError(
                f"{self.name}: keep_float is {', '.join(map(repr, self.asked.keep_float))}: all {len(result.rejected)} "
                f"weights would stay float; name fewer layers with --keep-float, or leave {self.name} out of --passes"
            )

    def _choose_schemes(self, model: ir.Model, result: PassResult) -> None:
        """Let a quality or a size decide, where one was given."""
        if self.options.quality is None and self.options.size is None:
            return
        goal = Goal(self.options.quality, self.options.size)
        if self.statistics is None:
            raise QuantError(f"{self.name}: {goal.describe()}: choosing needs calibration text, and there is none")
        decision = self.statistics.decide(model, self._candidates(model), goal, self._given(model))
        self.options = decision.apply(self.options)
        result.detail["mixed_precision"] = {"summary": decision.summary(), **decision.record()}

    def _candidates(self, model: ir.Model) -> dict[str, list[LinearScheme]]:
        """Return what each weight is chosen from, by name: what this pass makes of it comes first."""
        found = {}
        for tensor in tensors_of(model.graph):
            done = {use.node: scheme for use, scheme in self._decide(tensor.uses, PassResult(self.name))}
            own = done.get(tensor.reader.node)
            if own is not None:
                asked = self.options.asks_group_size(tensor.reader.names)
                found[tensor.name] = candidate_schemes(
                    own, tensor.reader.num_inputs, self.smallest_group, is_group_asked=asked
                )
        return found

    def _given(self, model: ir.Model) -> Given:
        """Return what the options say of single weights, as it will be done: a size and a quality are of them too."""
        patterns = [*self.options.keep_float, *(o.pattern for o in self.options.layers if o.pattern != "*")]
        schemes: dict[str, LinearScheme | None] = {}
        other_bytes = 0
        for tensor in tensors_of(model.graph):
            named = [use for use in tensor.uses if any(LayerOptions(p).matches(use.names) for p in patterns)]
            if not named:
                continue
            done = {use.node: scheme for use, scheme in self._decide(tensor.uses, PassResult(self.name))}
            own = done.get(tensor.reader.node)
            if tensor.reader in named:
                schemes[tensor.name] = own
            other_bytes += sum(tensor.size_bytes(s) for s in {done.get(use.node) for use in tensor.uses} - {own})
        return Given(schemes, other_bytes)

    def _prepare(self, model: ir.Model, decided: Sequence[tuple[Projection, LinearScheme]], result: PassResult) -> None:
        """Gather statistics if any scheme needs them."""
        wanting = next(((p, s) for p, s in decided if _is_calibrated(s)), None)
        if wanting is None:
            return
        projection, scheme = wanting
        if self.statistics is None:
            wanted = "static activations" if scheme.activations == "static" else scheme.algorithm
            raise QuantError(f"{projection.name}: {wanted} needs calibration data, and there is none")
        self.statistics.prepare(model)
        result.detail["calibration"] = self.statistics.record()

    def _scheme(self, projection: Projection, tied: Sequence[LinearScheme | None]) -> LinearScheme | str:
        """Return the scheme of a projection, or why it stays float; `tied` are those of others with its weight."""
        options = self.options
        if projection.is_lookup:
            if tied and tied[0] is None:
                return _TIED
            layers = tuple(replace(layer, activations=None) for layer in options.layers)
            options = replace(options, activations="float", layers=layers)
        scheme = options.scheme_for(projection.names, self.defaults)
        if scheme is None:
            return self._kept(projection)
        if projection.is_lookup and scheme.algorithm in NEEDS_HESSIAN:
            scheme = replace(scheme, algorithm="mse")  # a lookup multiplies nothing: its rows are what counts
        if projection.is_lookup and tied and tied[0] is not None and tied[0].activations == "float":
            return tied[0]
        if scheme.bits == 4 and projection.num_inputs % 2:
            return f"its {projection.num_inputs} inputs are odd: two codes of 4 bits share a byte"
        scheme = scheme_for_input(scheme, projection.node.inputs[0], rounds_per_token=self.rounds_per_token)
        return self._grouped(projection, scheme, is_asked=options.asks_group_size(projection.names))

    def _kept(self, projection: Projection) -> str:
        """Return who keeps a projection float: the user, or the choice of bits."""
        if any(LayerOptions(pattern).matches(projection.names) for pattern in self.asked.keep_float):
            return _KEPT
        return _CHOSEN["size" if self.asked.quality is None else "quality"]

    def _grouped(self, projection: Projection, scheme: LinearScheme, *, is_asked: bool) -> LinearScheme | str:
        """Return the scheme with a block that the target takes and that divides the inputs, or why there is none."""
        if scheme.group_size == "channel":
            return scheme
        group = scheme.group_size if is_asked else max(scheme.group_size, self.smallest_group)
        if projection.num_inputs % group == 0:
            return replace(scheme, group_size=group)
        if is_asked:
            raise QuantError(
                f"{projection.name}: a group size of {group} does not divide its {projection.num_inputs} inputs; give "
                f"{_fitting(projection.num_inputs)}, or keep it float with --keep-float '{projection.name}'"
            )
        smaller = [size for size in GROUP_SIZES if size <= group and projection.num_inputs % size == 0]
        if not smaller:
            return f"its {projection.num_inputs} inputs are not divisible by any of {', '.join(map(str, GROUP_SIZES))}"
        return replace(scheme, group_size=max(smaller))

    def _quantized(self, graph: ir.Graph, projection: Projection, scheme: LinearScheme) -> _Codes:
        statistics = self._statistics(projection, scheme)
        group_size = None if scheme.group_size == "channel" else scheme.group_size
        stored = _stored(projection, WeightScheme(scheme.bits, group_size, scheme.symmetric))
        name = projection.source.name or projection.name
        pieces = QuantizedPieces(
            name,
            (projection.num_outputs, projection.num_inputs),
            projection.dtype,
            projection.rows,
            weight_quantizer(
                stored, scheme.algorithm, statistics, options=_options_of(projection, scheme.algorithm), name=name
            ),
            _DTYPES[stored.scale_type],
        )
        if scheme.algorithm in NEEDS_HESSIAN:
            pieces.compute()
        if scheme.activations == "float":
            return _blocked(graph, pieces, stored)
        values = [_initializer(graph, pieces.codes_by_inputs()), _initializer(graph, pieces.channel_scales())]
        if scheme.activations == "dynamic":
            return _Codes("W8A8", values)
        if scheme.activations == "norm":
            step = named_constant(graph, "unit_norm.step", np.array(UNIT_NORM_STEP, np.float32))
            return _Codes("W8A8Static", [*values, step])
        assert statistics is not None
        return _Codes("W8A8Static", [*values, _step(graph, projection, statistics)])

    def _statistics(self, projection: Projection, scheme: LinearScheme) -> InputStatistics | None:
        """Return what is known of the inputs, if the scheme needs it."""
        return self.statistics(projection) if self.statistics is not None and _is_calibrated(scheme) else None


def _options_of(projection: Projection, algorithm: str) -> AlgorithmOptions:
    """Return what the algorithm is told: a table that is looked up as well must keep its rows and not only its products.

    GPTQ moves errors to where the inputs of the head are small; a lookup has no such place. With H + mean(diag H) I both
    uses weigh alike.
    """
    readers = [use.node for use in projection.source.uses()]
    is_tied = not projection.is_lookup and any(node.op_type == "Gather" for node in readers)
    options = default_options(algorithm)
    return replace(options, damping=_TIED_DAMPING) if is_tied else options


def _stored(projection: Projection, scheme: WeightScheme) -> WeightScheme:
    """Return a scheme with the type that scales are rounded to: half precision where it has numbers for all of them."""
    if projection.dtype != ir.DataType.FLOAT:
        return replace(scheme, scale_type=_SCALE_TYPES[projection.dtype])
    half = replace(scheme, scale_type="float16")
    shape = (projection.num_outputs, projection.num_inputs)
    name = projection.source.name or projection.name
    return half if holds_scales(half, shape, projection.rows, name) else scheme


def _is_calibrated(scheme: LinearScheme) -> bool:
    return scheme.algorithm in NEEDS_HESSIAN or scheme.activations == "static"


def _blocked(graph: ir.Graph, pieces: QuantizedPieces, scheme: WeightScheme) -> _Codes:
    """Codes and scales of a weight that is dequantized block by block; the activations stay float."""
    num_groups = scheme.num_groups(pieces.num_inputs)
    values = [_initializer(graph, pieces.codes(packed=scheme.bits == 4))]
    values.append(_initializer(graph, pieces.scales(num_groups)))
    suffix = f"W{scheme.bits}"
    if not scheme.symmetric:
        values.append(_initializer(graph, pieces.zero_points(num_groups)))
        suffix += "Asymmetric"
    return _Codes(suffix, values, {"block_size": scheme.group_of(pieces.num_inputs)})


def _step(graph: ir.Graph, projection: Projection, statistics: InputStatistics) -> ir.Value:
    """The step of static activations: the largest value seen becomes code 127."""
    largest = float(statistics.abs_max.max())
    if not np.isfinite(largest):
        raise QuantError(f"{projection.name}: its inputs reach {largest} on the calibration data; it cannot be static")
    step = np.array(max(largest, 1e-30) / _INT8_MAX, np.float32)
    name = f"{projection.source.name or projection.name}.step"
    tensor = ir.tensor(step, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor)
    graph.register_initializer(value)
    return value


def _initializer(graph: ir.Graph, tensor: StreamedTensor) -> ir.Value:
    """Register a tensor under its name, or the nearest free one (a weight that is quantized in two ways)."""
    name, count = tensor.name or "", 1
    while name in graph.initializers:
        count += 1
        name = f"{tensor.name}.{count}"
    tensor.name = name
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, projection: Projection, codes: _Codes) -> None:
    node = projection.node
    x = node.inputs[1] if projection.is_lookup else node.inputs[0]
    inputs = [x, *codes.values]
    new = ir.node(codes.operator(projection), inputs, codes.attributes, domain=DOMAIN, name=node.name)
    old, new_nodes, output = node.outputs[0], [new], new.outputs[0]
    output.type, output.shape = old.type, old.shape
    if node.op_type == "Linear":
        add = ir.node("Add", [output, node.inputs[2]], name=f"{node.name}.bias")
        new_nodes.append(add)
        output = add.outputs[0]
        output.type, output.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], new_nodes, node.outputs, [output])
    graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)


def _record(projection: Projection, scheme: LinearScheme, codes: _Codes) -> dict[str, Any]:
    return {
        "name": projection.name,
        "operator": codes.operator(projection),
        "weight": projection.source.name,
        "shape": [projection.num_outputs, projection.num_inputs],
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activations": "float" if projection.is_lookup else scheme.activations,
        "algorithm": scheme.algorithm,
    }


def _fitting(num_inputs: int) -> str:
    sizes = [str(size) for size in GROUP_SIZES if num_inputs % size == 0]
    return "one of " + ", ".join([*sizes, "channel"])


def _examples(projections: Sequence[Projection]) -> str:
    names = [projection.name for projection in projections]
    return ", ".join(dict.fromkeys([*names[:3], *names[-1:]])) or "none"
