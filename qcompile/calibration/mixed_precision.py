"""Let a quantization pass choose its scheme per layer: for a quality, or for a size.

    decision = decide(model, text, candidates, Goal(quality=0.01))
    options = decision.apply(options)                 layers and keep_float, for the pass that follows
    decide(model, text, candidates, goal, Given(...))     weights that the user spoke of count and are not chosen
    decision.record()                                 for the report; decision.page().write(path) for the chart

Which layers are hard comes out of the measurement; no layer is named here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.calibration.calibrate import CalibrationSettings
from qcompile.calibration.runner import Row, Say
from qcompile.calibration.sensitivity import (
    FLOAT,
    Candidates,
    Sensitivity,
    candidates_of,
    choose,
    label_of,
    measure_sensitivity,
)
from qcompile.calibration.text import BUILT_IN
from qcompile.calibration.text_source import TextSource
from qcompile.calibration.trial import Trials, tensors_of
from qcompile.errors import QuantError
from qcompile.quant.algorithms import NEEDS_HESSIAN
from qcompile.quant.allocation import Allocation
from qcompile.quantize_options import GROUP_SIZES, LinearScheme, QuantizeOptions
from qcompile.report.chart_file import ChartFile, Table

# Few rows and short ones: a hundred tensors are each a run of the model.
TRIAL_SETTINGS = CalibrationSettings(num_tokens=384, row_length=96, with_hessians=False)
_POSITIONS = 128
_SHARE_OF_ROWS = 8
_INT8_GROUP = 128
_INT4_GROUPS = (32, 16, 64, 128)
_MOST_BYTES = 2.0**62
_NOTHING_TO_CHOOSE = "every layer is kept float: there is nothing to choose"


@dataclass(frozen=True)
class Goal:
    """What to reach; exactly one of the two.

    Attributes:
        quality: Mean KL(float || quantized) in nats per token, on the calibration text.
        size_mb: Megabytes of all weights together (10^6 bytes), those that stay float among them; not what a target adds,
            such as rotary tables.

    Raises:
        QuantError: None or both are given, or one is not positive or not finite.
    """

    quality: float | None = None
    size_mb: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.quality, self.size_mb) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise QuantError(
                f"quality = {self.quality}, size = {self.size_mb}: give one of them, a positive number and not infinity: a "
                "KL in nats per token such as 0.01, or megabytes"
            )

    def describe(self) -> str:
        """Return it in words."""
        return f"KL of {self.quality:g} at most" if self.quality is not None else f"{self.size_mb:g} MB at most"


@dataclass(frozen=True)
class Given:
    """What the user said of single weights: they are not chosen any more, but count.

    Attributes:
        schemes: By `Tensor.name`; None for a weight that stays float.
        other_bytes: What is stored twice, where two readers of one weight get different things.
    """

    schemes: Mapping[str, LinearScheme | None] = field(default_factory=dict)
    other_bytes: int = 0


@dataclass(frozen=True)
class Decision:
    """What was measured and chosen.

    Attributes:
        goal: What was to be reached.
        sensitivity: What each tensor costs in each scheme.
        allocation: The scheme of each tensor.
        other_bytes: Weights that no scheme is for: norms, biases, tables.
        source: The text it was measured on.
    """

    goal: Goal
    sensitivity: Sensitivity
    allocation: Allocation
    other_bytes: int
    source: str

    @property
    def size_bytes(self) -> int:
        """Of all weights."""
        return self.allocation.size_bytes + self.other_bytes

    @property
    def made(self) -> Allocation:
        """The allocation with the names of what the pass will do; trials round with a simpler algorithm for some."""
        own = {label: label_of(scheme) for label, scheme in self.sensitivity.schemes.items()}
        chosen = {
            name: replace(choice, label=own.get(choice.label, choice.label))
            for name, choice in self.allocation.chosen.items()
        }
        return replace(self.allocation, chosen=chosen)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user would not expect."""
        return tuple(_notes(self))

    def apply(self, options: QuantizeOptions) -> QuantizeOptions:
        """Return the options of a pass with the choice in them; weights that were given a scheme are left to that."""
        free = [name for name in self.sensitivity.names if name not in self.sensitivity.fixed]
        layers, kept = self.sensitivity.layer_options(self.allocation, free)
        return replace(options, layers=(*options.layers, *layers), keep_float=(*kept, *options.keep_float))

    def record(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "goal": {"quality": self.goal.quality, "size_mb": self.goal.size_mb},
            "source": self.source,
            "size_bytes": self.size_bytes,
            **self.sensitivity.record(self.made),
        }

    def summary(self) -> str:
        """Return one line: the goal, what was reached, how many layers got what."""
        labels = list(self.made.labels().values())
        counts = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels))
        return (
            f"{self.goal.describe()}: {self.size_bytes / 1e6:.1f} MB at a measured KL of {self.allocation.measured:.2g} "
            f"({counts})"
        )

    def page(self) -> ChartFile:
        """Return the ranking and the choice as tables and a chart."""
        measured = self.allocation.measured
        cards = [
            ("Goal", self.goal.describe()),
            ("Weights", f"{self.size_bytes / 1e6:.1f} MB"),
            ("KL, measured", "" if measured is None else f"{measured:.2e}"),
            ("KL, sum of single tensors", f"{self.allocation.divergence:.2e}"),
        ]
        tables = [self.sensitivity.table(self.made), self._checks()]
        notes = [
            f"Measured on {self.sensitivity.num_tokens} tokens of '{self.source}', {self.sensitivity.num_positions} positions.",
            "'est.': from the squared error of the tensor's own outputs and its one measured KL.",
        ]
        chart = self.sensitivity.chart(self.made)
        return ChartFile("qcompile", "What quantizing each tensor costs", cards, [chart], tables, notes)

    def write_page(self, path: Path) -> None:
        """Write the page as HTML, or the chart alone as SVG.

        Raises:
            ArtifactError: It cannot be written.
        """
        self.page().write(path)

    def _checks(self) -> Table:
        rows = [[f.tensor, f.label, f"{f.estimate:.2e}", f"{f.divergence:.2e}"] for f in self.sensitivity.checks()]
        return Table("Estimates that were measured too", ["tensor", "scheme", "estimated", "measured"], rows)


def candidate_schemes(
    own: LinearScheme, num_inputs: int, smallest_group: int, *, is_group_asked: bool = False
) -> list[LinearScheme]:
    """Return what one weight is chosen from: what the pass makes of it, and blocks a step finer or coarser.

    Args:
        own: What the pass makes of it, with its algorithm.
        num_inputs: Of the weight; only blocks that divide them are offered.
        smallest_group: Smallest block that the target's kernels take.
        is_group_asked: Whether the user gave the size of its 4-bit groups, which is then the only one.
    """
    fitting = [size for size in GROUP_SIZES if num_inputs % size == 0]
    if own.bits == 4:
        groups = [group for group in _INT4_GROUPS if group >= smallest_group and group in fitting]
        found = [own] if is_group_asked else [own, *(replace(own, group_size=group) for group in groups)]
        finer = [size for size in fitting if smallest_group <= size <= _INT8_GROUP]
    else:
        found = [own]
        below = _INT8_GROUP + 1 if own.group_size == "channel" else min(own.group_size, _INT8_GROUP + 1)
        finer = [size for size in fitting if smallest_group <= size < below]
    if finer:
        found.append(LinearScheme(8, max(finer), True, "float", own.algorithm))
    return list(dict.fromkeys(found))


def decide(
    model: ir.Model,
    text: TextSource,
    candidates: Candidates,
    goal: Goal,
    given: Given | None = None,
    *,
    rounds_per_token: bool = True,
    cache: Path | None = None,
    say: Say | None = None,
) -> Decision:
    """Measure a float model tensor by tensor and choose a scheme for each.

    A tensor takes about half a pass over 384 tokens; a model of 24 layers some 120 of them.

    Args:
        model: The graph that the pass is about to change.
        text: Where the tokens come from.
        candidates: Schemes to choose from, for all tensors alike or by `Tensor.name`; to leave a tensor float is always a
            choice.
        goal: What to reach, what was given included.
        given: What the user said of single weights.
        rounds_per_token: Whether the target has kernels for activations with a scale per token.
        cache: Directory of calibrations, for texts that the model writes.
        say: Called with (what, done, total).

    Raises:
        QuantError: The goal cannot be reached; the message says the best found. Or the model cannot be run.
    """
    given = given or Given()
    if {t.name for t in tensors_of(model.graph)} <= {n for n, scheme in given.schemes.items() if scheme is None}:
        raise QuantError(_NOTHING_TO_CHOOSE)
    rows, source = _trial_rows(text, cache, say)
    trials = Trials(model, rows, num_positions=_POSITIONS, rounds_per_token=rounds_per_token, say=say)
    fixed = {name: scheme and _without_statistics(scheme) for name, scheme in given.schemes.items()}
    offered = candidates_of(trials.tensors, candidates)
    tried = {name: list(dict.fromkeys(map(_without_statistics, own))) for name, own in offered.items()}
    sensitivity = measure_sensitivity(trials, tried, given=fixed, say=say)
    everything = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    other_bytes = everything - sum(sensitivity.float_bytes.values()) + given.other_bytes
    budget = None if goal.size_mb is None else int(min(goal.size_mb * 1e6, _MOST_BYTES)) - other_bytes
    allocation = choose(sensitivity, trials, quality=goal.quality, size_bytes=budget, other_bytes=other_bytes, say=say)
    listed = (*filter(None, given.schemes.values()), *(scheme for own in offered.values() for scheme in own))
    # of two that are tried alike, the one with statistics: the pass knows that a lookup has none
    ranked = sorted(listed, key=lambda scheme: scheme.algorithm in NEEDS_HESSIAN)
    own = {label_of(_without_statistics(scheme)): scheme for scheme in ranked}
    return Decision(goal, replace(sensitivity, schemes=own), allocation, other_bytes, source)


def _trial_rows(text: TextSource, cache: Path | None, say: Say | None) -> tuple[list[Row], str]:
    """Return the rows that trials run on, and where they come from."""
    # Rows of many texts say more than a few long ones: take every n-th of eight times as many.
    wide = replace(TRIAL_SETTINGS, num_tokens=TRIAL_SETTINGS.num_tokens * _SHARE_OF_ROWS)
    found = text.rows(wide, say, cache)
    count = max(1, TRIAL_SETTINGS.num_tokens // TRIAL_SETTINGS.row_length)
    full = sorted(found.rows, key=len, reverse=True)[: max(count, len(found.rows) // 2)]
    return full[:: max(1, len(full) // count)][:count], found.source


def _notes(decision: Decision) -> Iterator[str]:
    num_tokens = decision.sensitivity.num_tokens
    if num_tokens < TRIAL_SETTINGS.num_tokens and decision.source != BUILT_IN:
        yield (
            f"{decision.source}: bits were chosen on {num_tokens} tokens, {TRIAL_SETTINGS.num_tokens} are wanted; "
            "give a longer text"
        )
    if set(decision.allocation.labels().values()) == {FLOAT}:
        yield (
            f"{decision.goal.describe()}: all weights as they are take {decision.size_bytes / 1e6:.1f} MB, so nothing "
            "was quantized; give a smaller size"
        )


def _without_statistics(scheme: LinearScheme) -> LinearScheme:
    """Return what a trial does for a scheme.

    An algorithm that fits a weight to second moments would fit it to the few hundred tokens on which the trial is judged;
    trials take the searched scales instead, and what is chosen is then at least as good as what was measured.
    """
    return replace(scheme, algorithm="mse") if scheme.algorithm in NEEDS_HESSIAN else scheme
