"""Scale the inputs of projections so that rounding loses less, and fold the scale into the operation before them.

    norm(h; gamma) W             ->   norm(h; gamma / s) (diag(s) W)
    (silu(x G) * (x U)) D        ->   (silu(x G) * (x U / s)) (diag(s) D)

The model computes the same, at no cost: a norm's gamma and the columns of an up projection are constants. `smooth-quant`
chooses s so that activations and weights are about equally hard to round to int8 (Xiao et al. 2022); `awq` so that the
weights that large inputs multiply are rounded more finely (Lin et al. 2023). Both try each s on the calibration text, as
the scheme that follows will round, and fold it only where the outputs' error falls by 5 %. Every place is proved.

Attention's values are left alone: with grouped queries one value channel feeds several inputs of o_proj, and the scale that
they can agree on gains little.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.functions import DOMAIN, GAMMA_INPUTS
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import detach, finish_rewrites, node_label
from qcompile.passes.folded_weights import ScaledWeight
from qcompile.passes.kernel_rewrite import first_columns
from qcompile.passes.pack import is_projection
from qcompile.passes.proof import Prover, Rewrite
from qcompile.passes.quantize_projections import Projection, find_projections
from qcompile.passes.unit_norm import scheme_for_input
from qcompile.quant.activations import round_per_tensor, round_per_token, search_static_scale
from qcompile.quant.awq import ScaleChoice, search_scale
from qcompile.quant.scheme import FloatArray, InputStatistics, WeightScheme
from qcompile.quant.smooth import search_smoothing
from qcompile.quantize_options import LayerOptions, LinearScheme, QuantizeOptions

_MOST_ERROR = 0.95
# A product and a quotient by the same number, each rounded; half-precision weights are rounded to their type again.
MAX_RELATIVE_ERROR = {ir.DataType.FLOAT: 2e-5, ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1.6e-2}
Search = Callable[[Sequence[FloatArray], InputStatistics], ScaleChoice]


class Statistics(Protocol):
    """What is known about the inputs of projections."""

    def prepare(self, model: ir.Model) -> Any:
        """Gather it for a float model."""

    def __call__(self, projection: Projection) -> InputStatistics:
        """Return it for one projection."""


@dataclass(frozen=True)
class _Place:
    """An operation whose output only projections read.

    Attributes:
        node: The norm or the SwiGlu.
        readers: The projections.
        up: The projection that makes SwiGlu's second factor; None for a norm.
        columns: Which of its outputs do.
    """

    node: ir.Node
    readers: tuple[Projection, ...]
    up: ir.Node | None = None
    columns: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """For new initializers."""
        return node_label(self.node)

    @property
    def label(self) -> str:
        """For people: what reads it; the name of a fused node is what the names of its parts begin with."""
        return ", ".join(dict.fromkeys(reader.name for reader in self.readers))


class FoldScales(Pass):
    """Scales of the inputs of projections.

    Args:
        options: What the quantization pass that follows was told.
        statistics: About the inputs of projections; without it nothing is found.
        defaults: The values of the quantization pass that follows; by default those the algorithm is meant for.
        rounds_per_token: Whether the target has kernels for activations with a scale per token.
    """

    own_defaults: ClassVar[tuple[LayerOptions, ...]]

    def __init__(
        self,
        options: QuantizeOptions | None = None,
        statistics: Statistics | None = None,
        defaults: Sequence[LayerOptions] | None = None,
        *,
        rounds_per_token: bool = True,
    ) -> None:
        self.options, self.statistics = options or QuantizeOptions(), statistics
        self.rounds_per_token = rounds_per_token
        self.defaults = tuple(self.own_defaults if defaults is None else defaults)

    @abstractmethod
    def suits(self, scheme: LinearScheme) -> bool:
        """Whether a scheme rounds what this makes easier to round."""

    @abstractmethod
    def search(self, scheme: LinearScheme, name: str) -> Search:
        """Return the search of a scale for weights that are stored in a scheme."""

    def call(self, context: PassContext, result: PassResult) -> None:
        """Fold a scale in every place where it gains something.

        Raises:
            QuantError: The calibration text cannot be used, or the model cannot be run on it.
        """
        refused = [(place, self._refusal(place)) for place in _places(context.model.graph)]
        places = [place for place, reason in refused if reason is None]
        result.matches = len(places)
        if refused and not places:
            place, reason = refused[0]
            result.rejected.append(Rejection(place.label, self.name, f"nothing to fold anywhere: {reason}"))
        if self.statistics is None:
            if places:
                why = "its scales come from calibration: `qcompile optimize`"
                result.rejected.append(Rejection("graph", self.name, why))
            return
        if places:
            self.statistics.prepare(context.model)
        for place in places:
            self._fold(context, result, place)
        if result.rewrites:
            context.forget_analysis()
            finish_rewrites(context)

    def explain(self, context: PassContext) -> list[Rejection]:
        """Return why operations that projections read are no places."""
        found = ((place, self._refusal(place)) for place in _places(context.model.graph))
        return [Rejection(place.label, self.name, reason) for place, reason in found if reason is not None]

    def _refusal(self, place: _Place) -> str | None:
        if any(f".{self.name}" in (p.source.name or "") for p in place.readers):
            return "was folded before"
        schemes = [self._scheme(reader) for reader in place.readers]
        if any(scheme is not None and scheme.activations == "norm" for scheme in schemes):
            other = "int8-dynamic" if self.rounds_per_token else "int8-static"
            return f"its inputs are rounded by the step of a unit norm, which takes no scale; use {other}"
        if any(scheme is None or not self.suits(scheme) for scheme in schemes):
            return f"what reads it is not rounded in a way that {self.name} helps"
        return None

    def _scheme(self, reader: Projection) -> LinearScheme | None:
        """Return what becomes of a projection as long as nothing is folded."""
        scheme = self.options.scheme_for(reader.names, self.defaults)
        x = reader.node.inputs[0]
        return scheme and scheme_for_input(scheme, x, rounds_per_token=self.rounds_per_token)

    def _fold(self, context: PassContext, result: PassResult, place: _Place) -> None:
        assert self.statistics is not None
        scheme = self._scheme(place.readers[0])
        assert scheme is not None
        weights = [p.rows(0, p.num_outputs) for p in place.readers]
        choice = self.search(scheme, place.label)(weights, self.statistics(place.readers[0]))
        if choice.is_plain or choice.error > _MOST_ERROR:
            result.rejected.append(Rejection(place.label, self.name, f"no scale gains {1 - _MOST_ERROR:.0%}"))
            return
        reason = _disproof(context, result, place, choice.scale)
        if reason:
            result.rejected.append(Rejection(place.label, self.name, f"rolled back: {reason}"))
            return
        _replace(context.model.graph, place, choice.scale, self.name)
        result.rewrites += 1
        folded = result.detail.setdefault("folded", {})
        folded[place.label] = {"alpha": choice.alpha, "error": choice.error}


class SmoothQuant(FoldScales):
    """Scales between activations and weights that are both rounded to int8."""

    name = "smooth-quant"
    summary = "activation outliers moved into the weights, folded into norms and up projections"
    own_defaults = (LayerOptions("*", bits=8, activations="dynamic"),)

    def suits(self, scheme: LinearScheme) -> bool:
        """Whether activations are rounded by a step that follows them: that of a unit norm fits no other gamma."""
        return scheme.activations in {"dynamic", "static"}

    def search(self, scheme: LinearScheme, name: str) -> Search:
        """Return SmoothQuant's search, with the activations rounded as the scheme does."""
        stored = _stored(scheme)

        def run(weights: Sequence[FloatArray], statistics: InputStatistics) -> ScaleChoice:
            if scheme.activations == "dynamic":
                return search_smoothing(weights, stored, statistics, round_inputs=round_per_token, name=name)
            return search_smoothing(weights, stored, statistics, round_inputs=_round_by_one_step, name=name)

        return run


class Awq(FoldScales):
    """Scales that round the weights of large inputs more finely."""

    name = "awq"
    summary = "weights of large inputs enlarged before rounding, folded into norms and up projections"
    own_defaults = (LayerOptions("*", bits=4, symmetric=False, activations="float"),)

    def suits(self, scheme: LinearScheme) -> bool:
        """Whether only weights are rounded, and coarsely."""
        return scheme.activations == "float" and scheme.bits == 4

    def search(self, scheme: LinearScheme, name: str) -> Search:
        """Return AWQ's search."""
        stored = _stored(scheme)
        return lambda weights, statistics: search_scale(weights, stored, statistics, name=name)


def _stored(scheme: LinearScheme) -> WeightScheme:
    return WeightScheme(scheme.bits, None if scheme.group_size == "channel" else scheme.group_size, scheme.symmetric)


def _round_by_one_step(x: FloatArray) -> FloatArray:
    largest = np.abs(x).max(axis=0)
    return round_per_tensor(x, search_static_scale(InputStatistics(len(x), largest, largest, None, x)))


def _places(graph: ir.Graph) -> list[_Place]:
    """Return norms and SwiGlus that only projections with weights of their own read, in graph order."""
    projections = {p.node: p for p in find_projections(graph) if not p.is_lookup}
    found = []
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in {*GAMMA_INPUTS, "SwiGlu"}:
            continue
        users = [use.node for use in node.outputs[0].uses()]
        readers = tuple(projections[user] for user in users if user in projections)
        own = all(is_projection(p.node) and len(p.source.uses()) == 1 for p in readers)
        if not readers or not own or len(readers) != len(users) or node.outputs[0].is_graph_output():
            continue
        place = _Place(node, readers) if node.op_type in GAMMA_INPUTS else _after_up(node, readers)
        if place is not None and _is_constant(_before(place)):
            found.append(place)
    return found


def _after_up(node: ir.Node, readers: tuple[Projection, ...]) -> _Place | None:
    """Return the place of a SwiGlu whose second factor comes from a projection, packed with others or not."""
    up = node.inputs[1]
    maker = up.producer() if up is not None else None
    if up is None or maker is None or len(up.uses()) != 1:
        return None
    if is_projection(maker):
        return _Place(node, readers, maker, (0, readers[0].num_inputs))
    packed = maker.inputs[0].producer() if maker.op_type == "Split" and maker.inputs[0] is not None else None
    sizes = maker.inputs[1].const_value if len(maker.inputs) > 1 and maker.inputs[1] is not None else None
    if packed is None or sizes is None or not is_projection(packed) or len(packed.outputs[0].uses()) != 1:
        return None
    ends = np.cumsum(sizes.numpy()).tolist()
    index = maker.outputs.index(up)
    return _Place(node, readers, packed, (ends[index] - readers[0].num_inputs, ends[index]))


def _before(place: _Place) -> ir.Value | None:
    """Return the constant that is divided: gamma, or the weight of the up projection."""
    return place.node.inputs[GAMMA_INPUTS[place.node.op_type]] if place.up is None else place.up.inputs[1]


def _is_constant(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.const_value is not None
        and (len(value.const_value.shape) == 1 or len(value.uses()) == 1)
    )


def _disproof(context: PassContext, result: PassResult, place: _Place, scale: FloatArray) -> str:
    """Prove a place on the real weights, some outputs of each reader; return why not, or nothing."""
    if context.prover is None:
        return ""
    for reader in place.readers:
        prover = Prover(context.prover.seed, MAX_RELATIVE_ERROR[reader.dtype])
        rewrite = _norm_rewrite(place, reader, scale) if place.up is None else _up_rewrite(place, reader, scale)
        try:
            proof = prover.prove(rewrite, context.analysis)
        finally:
            detach([*rewrite.old_nodes, *rewrite.new_nodes])
        if not proof.holds:
            return proof.reason
        result.proved += 1
        result.max_error = max(result.max_error, proof.error)
    return ""


def _norm_rewrite(place: _Place, reader: Projection, scale: FloatArray) -> Rewrite:
    """norm(h; gamma) W = norm(h; gamma / s) (diag(s) W), on a few columns of W; h may stand for a sum."""
    gamma, h = _before(place), place.node.inputs[0]
    assert gamma is not None
    epsilon = {"epsilon": place.node.attributes["epsilon"].as_float()}

    def side(own: ir.Value, weight: ir.Value) -> list[ir.Node]:
        norm = ir.node("RmsNorm", [h, own], epsilon, domain=DOMAIN)
        return [norm, ir.node("MatMul", [norm.outputs[0], first_columns(weight)])]

    old = side(gamma, reader.source)
    new = side(_divided(gamma, scale, ""), _scaled(reader.source, "", inputs=scale))
    return Rewrite(old, old[-1].outputs, new, new[-1].outputs)


def _up_rewrite(place: _Place, reader: Projection, scale: FloatArray) -> Rewrite:
    """(g * (x U)) D = (g * (x U / s)) (diag(s) D), on a few columns of D; g stands for the other factor."""
    weight, gate = _before(place), place.node.inputs[0]
    assert weight is not None
    assert place.up is not None
    x = place.up.inputs[0]

    def side(up: ir.Value, down: ir.Value) -> list[ir.Node]:
        first = ir.node("MatMul", [x, _columns(up, *place.columns)])
        product = ir.node("Mul", [gate, first.outputs[0]])
        return [first, product, ir.node("MatMul", [product.outputs[0], first_columns(down)])]

    old = side(weight, reader.source)
    new = side(_divided_columns(place, weight, scale, ""), _scaled(reader.source, "", inputs=scale))
    return Rewrite(old, old[-1].outputs, new, new[-1].outputs)


def _columns(value: ir.Value, start: int, stop: int) -> ir.Value:
    assert value.const_value is not None
    return _constant(f"{value.name}.up", ir.tensor(np.ascontiguousarray(value.const_value.numpy()[:, start:stop])))


def _replace(graph: ir.Graph, place: _Place, scale: FloatArray, suffix: str) -> None:
    before = _before(place)
    assert before is not None
    if place.up is None:
        index = GAMMA_INPUTS[place.node.op_type]
        place.node.replace_input_with(index, _registered(graph, _divided(before, scale, f"{place.name}.{suffix}")))
    else:
        divided = _divided_columns(place, before, scale, f"{before.name}.divided")
        place.up.replace_input_with(1, _registered(graph, divided))
        if place.up.op_type == "Linear":
            place.up.replace_input_with(2, _registered(graph, _divided_bias(place, scale, suffix)))
    for reader in place.readers:
        name = f"{reader.source.name}.{suffix}"
        reader.node.replace_input_with(1, _registered(graph, _scaled(reader.source, name, inputs=scale)))


def _divided(gamma: ir.Value, scale: FloatArray, name: str) -> ir.Value:
    assert gamma.const_value is not None
    array = gamma.const_value.numpy()
    return _constant(name, ir.tensor((array.astype(np.float32) / scale).astype(array.dtype)))


def _divided_columns(place: _Place, weight: ir.Value, scale: FloatArray, name: str) -> ir.Value:
    return _scaled(weight, name, outputs=_inverse(place, weight, scale))


def _inverse(place: _Place, weight: ir.Value, scale: FloatArray) -> FloatArray:
    assert weight.const_value is not None
    outputs = np.ones(int(weight.const_value.shape.numpy()[1]), np.float32)
    outputs[place.columns[0] : place.columns[1]] = 1 / scale
    return outputs


def _divided_bias(place: _Place, scale: FloatArray, suffix: str) -> ir.Value:
    assert place.up is not None
    weight, bias = place.up.inputs[1], place.up.inputs[2]
    if weight is None or bias is None or bias.const_value is None:
        raise QuantError(f"the bias of '{node_label(place.up)}' is no constant; drop {suffix}")
    array = bias.const_value.numpy()
    divided = (array.astype(np.float32) * _inverse(place, weight, scale)).astype(array.dtype)
    return _constant(f"{bias.name}.{suffix}", ir.tensor(divided))


def _scaled(
    weight: ir.Value, name: str, *, inputs: FloatArray | None = None, outputs: FloatArray | None = None
) -> ir.Value:
    assert weight.const_value is not None
    return _constant(name, ScaledWeight(weight.const_value, name, inputs, outputs))


def _constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name or None, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


def _registered(graph: ir.Graph, value: ir.Value) -> ir.Value:
    graph.register_initializer(value)
    return value
