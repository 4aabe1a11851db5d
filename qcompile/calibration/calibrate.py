"""Calibrate a model: run it on text once, and keep statistics of the inputs of its Linears.

    rows = text_rows(source, tokenizer, settings)                       qcompile.calibration.text
    names = [p.node.inputs[0].name for p in find_projections(graph)]    qcompile.passes.quantize_projections
    calibration = calibrate(model, rows, settings, names)
    statistics = calibration.statistics(node.inputs[0].name)            for quantize_weight, search_scale, ...

The model is the float graph at the moment of the call; what it is called in the graph is the key, so a pass calibrates
the graph it is about to change. A calibration of the same graph, weights, rows and settings is found in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx_ir as ir

from qcompile.calibration.accumulate import InputAccumulator, KeyValueStatistics
from qcompile.calibration.fingerprint import model_fingerprint
from qcompile.calibration.runner import MEMORY_BYTES, Array, BlockRunner, Say
from qcompile.calibration.second_moments import packed_bytes
from qcompile.calibration.store import Calibration, CalibrationWriter, open_calibration
from qcompile.calibration.text import TokenRows
from qcompile.errors import QuantError
from qcompile.fetch import cache_directory

_FORMAT = "calibration 1"


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    Attributes:
        num_tokens: Tokens to run, at most; fewer when the text has fewer.
        row_length: Longest row; a text is cut there, so that memory and the cost of attention stay bounded.
        num_sampled: Tokens of each activation that are kept as they are.
        with_hessians: Whether to sum x x^T (GPTQ, clipping and AWQ need it; it is most of the bytes and a third of the
            time).
        num_first: Tokens of each row that the statistics of keys and values count apart.
    """

    num_tokens: int = 32768
    row_length: int = 512
    num_sampled: int = 512
    with_hessians: bool = True
    num_first: int = 4

    def __post_init__(self) -> None:
        for name in ("num_tokens", "row_length"):
            if getattr(self, name) < 1:
                raise QuantError(f"calibration: {name} = {getattr(self, name)}: a positive number is wanted")


def calibrate(
    model: ir.Model,
    rows: TokenRows,
    settings: CalibrationSettings,
    names: Iterable[str],
    *,
    cache: Path | None = None,
    say: Say | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> Calibration:
    """Run the model on rows of tokens and keep the statistics of some activations and of the KV cache.

    Args:
        model: A float decoder graph; nothing in it is changed.
        rows: Text as token numbers.
        settings: What to keep.
        names: The activations: the first inputs of the Linears.
        cache: Directory of calibrations; by default under qcompile's cache directory.
        say: Called with (what, done, total).
        memory_bytes: What is carried between blocks stays in memory up to this.

    Raises:
        QuantError: A name is not a value of the graph, an activation is NaN or infinite, ONNX Runtime cannot run the
            graph, or the cache has no room.
    """
    report = say or (lambda what, done, total: None)
    values = _values(model.graph, dict.fromkeys(names))
    place = (cache_directory() / "calibration" if cache is None else cache) / _key(model, rows, settings, list(values))
    found = open_calibration(place)
    if found is not None:  # the same tokens, perhaps of another file, and perhaps not all that this one has
        return replace(found, source=rows.source, notes=rows.notes)
    matrix_bytes = sum(packed_bytes(_width(v)) for v in values.values()) if settings.with_hessians else 0
    with CalibrationWriter(place, matrix_bytes) as writer:
        _Gathering(model, rows, settings, list(values.values()), writer).run(report, memory_bytes)
        return writer.commit(rows.source, rows.num_tokens, len(rows.rows), rows.notes)


class _Gathering:
    """One run: accumulators for the block at hand, written out when all rows are through it."""

    def __init__(
        self,
        model: ir.Model,
        rows: TokenRows,
        settings: CalibrationSettings,
        values: Sequence[ir.Value],
        writer: CalibrationWriter,
    ) -> None:
        self.model, self.rows, self.settings, self.writer = model, rows, settings, writer
        self.caches = _cache_outputs(model.graph)
        self.inputs = frozenset(values)
        self.wanted = list(dict.fromkeys([*values, *self.caches]))
        self.open_inputs: dict[ir.Value, InputAccumulator] = {}
        self.open_caches: dict[int, KeyValueStatistics] = {}

    def run(self, say: Say, memory_bytes: int) -> None:
        runner = BlockRunner(self.model, self.wanted, memory_bytes=memory_bytes)
        runner.run(self.rows.rows, self._visit, self._end_block, say)

    def _visit(self, row: int, value: ir.Value, array: Array) -> None:
        del row
        if value in self.caches:
            layer, kind = self.caches[value]
            statistics = self.open_caches.get(layer)
            if statistics is None:
                statistics = KeyValueStatistics.empty(array.shape[1], array.shape[3], self.settings.num_first)
                self.open_caches[layer] = statistics
            statistics.add(array, kind, value.name or "")
        if value in self.inputs:
            self._accumulator(value).add(array)

    def _accumulator(self, value: ir.Value) -> InputAccumulator:
        if value not in self.open_inputs:
            s = self.settings
            name = _readers(value)
            self.open_inputs[value] = InputAccumulator(name, self.rows.num_tokens, s.with_hessians, s.num_sampled)
        return self.open_inputs[value]

    def _end_block(self, index: int) -> None:
        del index
        for value, accumulator in self.open_inputs.items():
            self.writer.add(value.name or "", accumulator.statistics())
        for layer, statistics in self.open_caches.items():
            self.writer.add_key_values(layer, statistics)
        self.open_inputs, self.open_caches = {}, {}


def _values(graph: ir.Graph, names: Iterable[str]) -> dict[str, ir.Value]:
    known = {value.name: value for node in graph for value in node.outputs}
    missing = [name for name in names if name not in known]
    if missing:
        raise QuantError(f"calibration: the graph computes no value '{missing[0]}'")
    return {name: known[name] for name in names}


def _cache_outputs(graph: ir.Graph) -> dict[ir.Value, tuple[int, str]]:
    """Return the cache outputs with their layer and whether they are the key or the value."""
    found: dict[ir.Value, tuple[int, str]] = {}
    for value in graph.outputs:
        parts = (value.name or "").split(".")
        if len(parts) == 3 and parts[0] == "present" and parts[1].isdecimal() and parts[2] in {"key", "value"}:
            found[value] = (int(parts[1]), parts[2])
    return found


def _readers(value: ir.Value) -> str:
    """Name an activation by who reads it: what a person knows is the layer."""
    names = [node.name for node in value.consumers() if node.name]
    return f"input of {' and '.join(names[:3])}" if names else value.name or ""


def _width(value: ir.Value) -> int:
    """Return K of an activation [.., K], or 0 when the graph does not say."""
    last = list(value.shape)[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else 0


def _key(model: ir.Model, rows: TokenRows, settings: CalibrationSettings, names: Sequence[str]) -> str:
    digest = hashlib.blake2b(_FORMAT.encode(), digest_size=16)
    digest.update(repr((model_fingerprint(model), sorted(asdict(settings).items()), list(names))).encode())
    for row in rows.rows:
        digest.update(b"row" + row.tobytes())
    return digest.hexdigest()
