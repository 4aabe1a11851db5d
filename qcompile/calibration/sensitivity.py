"""What quantizing each tensor does to a model's output distribution, and a choice of schemes that follows from it.

For every tensor, KL(float || the same model with this tensor quantized) is measured in the scheme that hurts most. What
its other schemes do is estimated from it: to second order, KL = 1/2 tr(F dz dz^T) with F the Fisher information of the
logits and dz their change, and dz is linear in the change dy of the tensor's own outputs; so two schemes of one tensor
compare as the squared errors of those outputs,

    KL(scheme) = KL(measured scheme) * |dy(scheme)|^2 / |dy(measured scheme)|^2

(Molchanov et al. 2019 and Dong et al. 2019, "HAWQ", use the same expansion, with a diagonal or a trace of F instead of one
measurement.) Some estimates are measured too, so that the report can say how good they are. Where a tensor is also looked
up (a tied embedding), everything is measured.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcompile.calibration.runner import Say
from qcompile.calibration.trial import Tensor, Trials, rounded_inputs
from qcompile.errors import QuantError
from qcompile.quant.allocation import Allocation, Choice, fit_size, reach_quality
from qcompile.quant.scheme import FloatArray, InputStatistics
from qcompile.quantize_options import LayerOptions, LinearScheme
from qcompile.report.chart_file import Table
from qcompile.report.plots import Bar, bar_plot

FLOAT = "float"
Candidates = Sequence[LinearScheme] | Mapping[str, Sequence[LinearScheme]]
_ERROR_TOKENS = 128
_SHOWN = 30


@dataclass(frozen=True)
class Finding:
    """One tensor in one scheme.

    Attributes:
        tensor: Its name.
        label: The scheme in short.
        size_bytes: What it takes.
        divergence: KL in nats per token.
        is_measured: Whether by running the model, or estimated from the outputs of the one Linear.
        estimate: What was estimated, where it was measured as a check.
    """

    tensor: str
    label: str
    size_bytes: int
    divergence: float
    is_measured: bool
    estimate: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """All findings.

    Attributes:
        schemes: Label to scheme, the one that hurts most first.
        findings: Tensor to its findings, in the order of the schemes.
        float_bytes: What each tensor takes as it is.
        names: What each tensor may be called in a pattern.
        num_tokens: Tokens of the rows.
        num_positions: Positions whose distributions were compared.
        fixed: The tensors whose scheme was given: they have that one and no other choice.
    """

    schemes: Mapping[str, LinearScheme]
    findings: Mapping[str, tuple[Finding, ...]]
    float_bytes: Mapping[str, int]
    names: Mapping[str, tuple[str, ...]]
    num_tokens: int
    num_positions: int
    fixed: frozenset[str] = frozenset()

    def ranking(self) -> list[Finding]:
        """Return what its coarsest scheme does to each tensor, the worst first."""
        return sorted((own[0] for own in self.findings.values()), key=lambda f: -f.divergence)

    def checks(self) -> list[Finding]:
        """Return the findings that were both estimated and measured."""
        return [f for own in self.findings.values() for f in own if f.estimate is not None]

    def choices(self, *, with_float: bool) -> dict[str, list[Choice]]:
        """Return the choices of every tensor, to leave it float among them if wanted."""
        found = {}
        for name, own in self.findings.items():
            found[name] = [Choice(f.label, f.size_bytes, f.divergence) for f in own]
            if with_float and name not in self.fixed:
                found[name].append(Choice(FLOAT, self.float_bytes[name], 0.0))
        return found

    def layer_options(
        self, allocation: Allocation, tensors: Sequence[str]
    ) -> tuple[tuple[LayerOptions, ...], tuple[str, ...]]:
        """Return what was chosen for some tensors as the options of a quantization pass: `layers`, and `keep_float`."""
        layers, kept = [], []
        for name in tensors:
            label = allocation.chosen[name].label
            if label == FLOAT:
                kept.append(glob.escape(name))
                continue
            s = self.schemes[label]
            layers.append(
                LayerOptions(glob.escape(name), s.bits, s.group_size, s.symmetric, s.activations, s.algorithm)
            )
        return tuple(layers), tuple(kept)

    def table(self, allocation: Allocation | None = None) -> Table:
        """Return the ranking: a row per tensor, a column per scheme, and what was chosen."""
        labels = list(self.schemes)
        columns = ["tensor", *(f"KL, {label}" for label in labels), *(["chosen"] if allocation else [])]
        rows = []
        for worst in self.ranking():
            own = {
                f.label: f"{f.divergence:.2e}{'' if f.is_measured else ' est.'}" for f in self.findings[worst.tensor]
            }
            cells = [worst.tensor, *(own.get(label, "–") for label in labels)]
            if allocation:
                cells.append(allocation.chosen[worst.tensor].label)
            rows.append(cells)
        return Table("What quantizing one tensor does to the output distribution", columns, rows)

    def chart(self, allocation: Allocation | None = None) -> str:
        """Return the worst tensors as bars, SVG."""
        bars = []
        for finding in self.ranking()[:_SHOWN]:
            chosen = f" → {allocation.chosen[finding.tensor].label}" if allocation else ""
            bars.append(Bar(finding.tensor[-30:], finding.divergence, f"{finding.divergence:.1e}{chosen}"))
        return bar_plot("KL when one tensor is quantized, in its coarsest scheme", bars, unit="nats per token")

    def record(self, allocation: Allocation | None = None) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "num_tokens": self.num_tokens,
            "num_positions": self.num_positions,
            "ranking": [f.tensor for f in self.ranking()],
            "findings": [vars(f) for own in self.findings.values() for f in own],
            "allocation": None if allocation is None else allocation.record(),
        }


def candidates_of(tensors: Sequence[Tensor], candidates: Candidates) -> dict[str, Sequence[LinearScheme]]:
    """Return the candidates of each tensor by its name."""
    if isinstance(candidates, Mapping):
        return {tensor.name: candidates.get(tensor.name, ()) for tensor in tensors}
    return {tensor.name: candidates for tensor in tensors}


def measure_sensitivity(
    trials: Trials,
    schemes: Candidates,
    *,
    given: Mapping[str, LinearScheme | None] | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
    num_checks: int = 6,
    say: Say | None = None,
) -> Sensitivity:
    """Measure every tensor in one scheme and estimate the others; tensors that no scheme fits are left out.

    Args:
        trials: The float model.
        schemes: Those to choose from, for all tensors alike or by name.
        given: Tensors that have a scheme already; those with None stay float and are left out.
        statistics: Of the inputs, by tensor name, for algorithms that use them; else those of the trials' few rows.
        num_checks: Estimates to measure as well.
        say: Called with (what, done, total).

    Raises:
        QuantError: There are no schemes, two are the same, or none fits any tensor.
    """
    offered = {n: [label_of(scheme) for scheme in own] for n, own in candidates_of(trials.tensors, schemes).items()}
    if not schemes or any(len(set(labels)) != len(labels) for labels in offered.values()):
        raise QuantError("sensitivity: give different schemes to choose from, one at least")
    report = say or (lambda what, done, total: None)
    given = given or {}
    listed = [scheme for own in candidates_of(trials.tensors, schemes).values() for scheme in own]
    known = {label_of(scheme): scheme for scheme in (*filter(None, given.values()), *listed)}
    run = _Measuring(trials, _coarsest_first(known), offered, given, statistics or {})
    findings, tensors = {}, [tensor for tensor in trials.tensors if run.fitting(tensor)]
    if not tensors:
        raise QuantError(f"sensitivity: none of {', '.join(known)} fits any weight; give --group-size channel")
    for number, tensor in enumerate(tensors):
        findings[tensor.name] = run.findings(tensor)
        report("measuring each tensor", number + 1, len(tensors))
    run.check(findings, num_checks)
    return Sensitivity(
        run.schemes,
        findings,
        {tensor.name: tensor.size_bytes(None) for tensor in tensors},
        {tensor.name: tuple(name for use in tensor.uses for name in use.names) for tensor in tensors},
        sum(map(len, trials.rows)),
        trials.num_positions,
        frozenset(name for name in findings if name in given),
    )


def choose(
    sensitivity: Sensitivity,
    trials: Trials,
    *,
    quality: float | None = None,
    size_bytes: int | None = None,
    other_bytes: int = 0,
    with_float: bool = True,
    say: Say | None = None,
) -> Allocation:
    """Choose a scheme per tensor: the smallest within a KL, or the best within a size.

    Args:
        sensitivity: What was measured.
        trials: The float model, to measure the choice as a whole.
        quality: Mean KL in nats per token that the whole may reach, as measured.
        size_bytes: Bytes that all tensors together may take.
        other_bytes: Weights besides these tensors; messages count them.
        with_float: Whether a tensor may stay as it is.
        say: Called with (what, done, total).

    Raises:
        QuantError: Not exactly one of the two is given, or it cannot be reached with anything quantized; the message says
            the best found.
    """
    if (quality is None) == (size_bytes is None):
        raise QuantError("give either a quality (KL) or a size (MB) to choose bits by")
    report = say or (lambda what, done, total: None)
    choices = sensitivity.choices(with_float=with_float)
    rounds = 0

    def measure(allocation: Allocation) -> float:
        nonlocal rounds
        rounds += 1
        report("measuring a choice", rounds, 0)
        changes = {n: sensitivity.schemes[label] for n, label in allocation.labels().items() if label != FLOAT}
        return trials.compare(changes).mean if changes else 0.0

    if quality is not None:
        found = reach_quality(choices, quality, measure, other_bytes)
        return found if set(found.labels().values()) != {FLOAT} else _least_harm(choices, quality, measure)
    assert size_bytes is not None
    found = fit_size(choices, size_bytes, other_bytes)
    return replace(found, measured=measure(found))


def _least_harm(
    choices: Mapping[str, Sequence[Choice]], quality: float, measure: Callable[[Allocation], float]
) -> Allocation:
    """Return the allocation with one tensor quantized, the one that is harmed least; a float model was not asked for.

    Raises:
        QuantError: Even that is measured to diverge more; the message says how much.
    """
    quantized = [(name, choice) for name, own in choices.items() for choice in own if choice.label != FLOAT]
    name, least = min(quantized, key=lambda item: item[1].divergence)
    chosen = {other: next(c for c in own if c.label == FLOAT) for other, own in choices.items()} | {name: least}
    kl = measure(Allocation(chosen))
    if kl > quality:
        raise QuantError(
            f"a KL of {quality:.2g} cannot be reached with anything quantized: the least found is {kl:.2g}, with "
            f"'{name}' alone in {least.label}; allow more"
        )
    return Allocation(chosen, kl)


def label_of(scheme: LinearScheme) -> str:
    """Return a scheme in short: int4 g32 asym gptq, int8 a8."""
    group = "" if scheme.group_size == "channel" else f" g{scheme.group_size}"
    activations = {"float": "", "dynamic": " a8", "static": " a8 static", "norm": " a8 norm"}[scheme.activations]
    parts = ["" if scheme.symmetric else " asym", activations]
    return f"int{scheme.bits}{group}{''.join(parts)} {scheme.algorithm}"


class _Measuring:
    """The work of `measure_sensitivity`."""

    def __init__(
        self,
        trials: Trials,
        schemes: Mapping[str, LinearScheme],
        offered: Mapping[str, Collection[str]],
        given: Mapping[str, LinearScheme | None],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        self.trials, self.schemes, self.offered, self.given, self.statistics = (
            trials,
            schemes,
            offered,
            given,
            statistics,
        )
        self.tensors = {tensor.name: tensor for tensor in trials.tensors}

    def findings(self, tensor: Tensor) -> tuple[Finding, ...]:
        first, *others = self.fitting(tensor)
        is_linear = not any(use.is_lookup for use in tensor.uses)
        if not is_linear or not others:
            return tuple(self._measured(tensor, label) for label in (first, *others))
        original = self.trials.original(tensor)
        restored = self._restored(tensor, first, original)
        measured = self._measured(tensor, first, restored)
        found = [measured]
        worst = self._output_error(tensor, self.schemes[first], original, restored)
        for label in others:
            if worst <= 0:
                found.append(self._measured(tensor, label))
                continue
            restored = self._restored(tensor, label, original)
            share = self._output_error(tensor, self.schemes[label], original, restored) / worst
            size_bytes = tensor.size_bytes(self.schemes[label])
            found.append(Finding(tensor.name, label, size_bytes, measured.divergence * share, is_measured=False))
        return tuple(found)

    def fitting(self, tensor: Tensor) -> list[str]:
        """Return the labels of the schemes that a tensor can take."""
        if tensor.name in self.given:
            scheme = self.given[tensor.name]
            return [] if scheme is None else [label_of(scheme)]
        is_looked_up = any(use.is_lookup for use in tensor.uses)
        return [
            label
            for label, s in self.schemes.items()
            if label in self.offered[tensor.name]
            and (s.group_size == "channel" or tensor.shape[1] % s.group_size == 0)
            and not (is_looked_up and s.activations != "float")
        ]

    def check(self, findings: dict[str, tuple[Finding, ...]], count: int) -> None:
        """Measure some of the estimates, evenly over their sizes, and put the measurements in their place."""
        estimated = sorted(
            (f for own in findings.values() for f in own if not f.is_measured), key=lambda f: f.divergence
        )
        if not estimated or count < 1:
            return
        for index in np.unique(np.linspace(0, len(estimated) - 1, min(count, len(estimated))).astype(int)):
            old = estimated[index]
            new = replace(self._measured(self.tensors[old.tensor], old.label), estimate=old.divergence)
            findings[old.tensor] = tuple(new if f is old else f for f in findings[old.tensor])

    def _restored(self, tensor: Tensor, label: str, original: FloatArray) -> FloatArray:
        return self.trials.quantized(tensor, self.schemes[label], self.statistics.get(tensor.name), original)

    def _measured(self, tensor: Tensor, label: str, restored: FloatArray | None = None) -> Finding:
        scheme = self.schemes[label]
        known = None if restored is None else {tensor.name: restored}
        divergence = self.trials.compare({tensor.name: scheme}, self.statistics, known)
        return Finding(tensor.name, label, tensor.size_bytes(scheme), divergence.mean, is_measured=True)

    def _output_error(self, tensor: Tensor, scheme: LinearScheme, original: FloatArray, restored: FloatArray) -> float:
        """Return the squared error of the outputs of a Linear on some tokens."""
        value = tensor.reader.node.inputs[0]
        assert value is not None
        x = self.trials.inputs[value]
        x = x[np.unique(np.linspace(0, len(x) - 1, min(_ERROR_TOKENS, len(x))).astype(int))]
        if scheme.activations == "float":
            return float((((restored - original) @ x.T) ** 2).sum(dtype=np.float64))
        seen = rounded_inputs(x, scheme, self.trials.step_of(tensor, scheme))
        return float(((restored @ seen.T - original @ x.T) ** 2).sum(dtype=np.float64))


def _coarsest_first(schemes: Mapping[str, LinearScheme]) -> dict[str, LinearScheme]:
    """Order schemes by what they keep of a weight; rounded activations come before float ones."""

    def fineness(label: str) -> tuple[float, int, int]:
        scheme = schemes[label]
        group = 4096 if scheme.group_size == "channel" else scheme.group_size
        return scheme.bits, int(scheme.activations == "float"), -group

    return {label: schemes[label] for label in sorted(schemes, key=fineness)}
