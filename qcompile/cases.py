"""The handful of ways of calling a decoder on which a graph is studied and every rewrite is proved.

Dim letters: B batch, S query length, P past length, T = P + S. The numbers are distinct, so that a dimension seen equal
in all cases is equal by construction and not by coincidence. A graph with fixed dimensions (a batch of 1, a decode
graph with S = 1, no KV cache) gets the cases that it can be called with.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile.errors import GraphError

# Above this many cache columns, over all rows, a case is only for shapes and masks: nothing is computed on it.
_MAX_PROVED_COLUMNS = 16384
# Cache columns over all rows: a long case of many rows is shortened to the one, more than the other is refused.
_MAX_LONG_COLUMNS = 1 << 19
_MAX_COLUMNS = 1 << 24
_PAST_PREFIX = "past_key_values."


@dataclass(frozen=True)
class Case:
    """One way of calling a decoder: B rows of S new tokens each, after a past of P cache columns.

    Attributes:
        name: Short name for reports.
        batch_size: B.
        sequence_length: S.
        past_length: P.
        lengths: Valid tokens per row among T = P + S, padded on the left; None means all T.
        magnitude: Standard deviation of random activations. Tiny ones show a wrong epsilon, large ones a wrong curve.
    """

    name: str
    batch_size: int
    sequence_length: int
    past_length: int
    lengths: tuple[int, ...] | None = None
    magnitude: float = 1.0

    @property
    def total_length(self) -> int:
        """T = P + S."""
        return self.past_length + self.sequence_length

    @property
    def is_proved(self) -> bool:
        """Whether rewrites are run on this case; otherwise it is only looked at."""
        return self.batch_size * self.total_length <= _MAX_PROVED_COLUMNS

    def attention_mask(self) -> np.ndarray:
        """Return the padding mask, int64 [B, T]: 1 for a token, 0 for padding on the left."""
        lengths = self.lengths or (self.total_length,) * self.batch_size
        columns = np.arange(self.total_length)
        return (columns[None, :] >= self.total_length - np.array(lengths)[:, None]).astype(np.int64)

    def position_ids(self) -> np.ndarray:
        """Return positions as Hugging Face counts them, int64 [B, S]: tokens before, padding clipped to 0."""
        positions = np.maximum(self.attention_mask().cumsum(axis=1) - 1, 0)
        return np.asarray(positions[:, self.past_length :], dtype=np.int64)

    def causal_mask(self) -> np.ndarray:
        """Return which key column each query may see, bool [B, S, T]."""
        rows = np.arange(self.sequence_length)[:, None] + self.past_length
        causal = np.arange(self.total_length)[None, :] <= rows
        return np.asarray(causal[None] & (self.attention_mask()[:, None, :] == 1))

    def query_is_token(self) -> np.ndarray:
        """Return which of the new positions are tokens and not padding, bool [B, S]."""
        return np.asarray(self.attention_mask()[:, self.past_length :] == 1)


CASES: tuple[Case, ...] = (
    Case("prefill", 1, 7, 0),
    Case("prefill, batch 2 of different lengths", 2, 5, 0, (5, 3)),
    Case("decode with past", 1, 1, 11, magnitude=1e-6),
    Case("decode, batch 3 of different lengths", 3, 1, 13, (14, 6, 9)),
    Case("chunk after a past, batch 2", 2, 3, 17, (20, 16), magnitude=3.0),
)
# Longer than any context of a Qwen: where a sliding window or a length-dependent branch shows.
LONG_DECODE = Case("decode after 131072 tokens", 1, 1, 131072)
LONG_PREFILL = Case("prefill of 131072 tokens", 1, 131072, 0)


def cases_for(graph: ir.Graph) -> tuple[Case, ...]:
    """Return the cases that a graph can be called with, given the dimensions its inputs fix.

    Raises:
        GraphError: These dimensions are too large to look at.
    """
    fixed = _FixedDims.of(graph)
    long_case = LONG_DECODE if fixed.has_past else LONG_PREFILL
    found: dict[Case, Case] = {}
    for case in (*CASES, long_case):
        adapted = fixed.adapt(case)
        if adapted.batch_size * adapted.total_length > _MAX_COLUMNS:
            raise GraphError(
                f"graph '{graph.name}' has inputs of fixed dimensions, batch {adapted.batch_size} and length "
                f"{adapted.total_length}: too large to study; export it with dynamic dimensions"
            )
        found.setdefault(replace(adapted, name=""), adapted)
    return tuple(found.values())


@dataclass(frozen=True)
class _FixedDims:
    """The dimensions that a graph's inputs fix to a number; None where they are free."""

    batch_size: int | None
    sequence_length: int | None
    past_length: int | None
    total_length: int | None
    has_past: bool

    @classmethod
    def of(cls, graph: ir.Graph) -> _FixedDims:
        past = [v for v in graph.inputs if _is_past(v)]
        ids, mask = _input(graph, "input_ids", 2), _input(graph, "attention_mask", 2)
        batches = [_number(v, 0) for v in (ids, mask, *past)]
        return cls(
            next((n for n in batches if n is not None), None),
            _number(ids, 1),
            next((n for n in (_number(v, 2) for v in past) if n is not None), None),
            _number(mask, 1),
            bool(past) or any(_names_past(v) for v in graph.inputs),
        )

    def adapt(self, case: Case) -> Case:
        """Return the case with the fixed dimensions in place of its own; padding stays where it was."""
        batch = self.batch_size or case.batch_size
        longest = max(_MAX_LONG_COLUMNS // batch, 1)
        length = self.sequence_length or min(case.sequence_length, longest)
        past = min(case.past_length, longest) if self.past_length is None else self.past_length
        past = past if self.has_past else 0
        if self.total_length is not None and self.has_past and self.past_length is None:
            past = max(self.total_length - length, 0)
        elif self.total_length is not None and self.sequence_length is None:
            length = max(self.total_length - past, 1)
        lengths = None
        if case.lengths is not None:
            # A fixed batch of 1 keeps the padded row, which says more than the full one.
            missing = itertools.islice(itertools.cycle(case.total_length - n for n in reversed(case.lengths)), batch)
            lengths = tuple(max(1, past + length - n) for n in missing)[::-1]
        return replace(case, batch_size=batch, sequence_length=length, past_length=past, lengths=lengths)


def input_shape(value: ir.Value, case: Case, dims: DimBinding) -> tuple[int, ...] | None:
    """Return the concrete shape of a graph input in one case, or None when its rank is unknown."""
    if value.shape is None:
        return None
    declared = tuple(value.shape)
    wanted: tuple[int | None, ...] = (None,) * len(declared)
    if value.name in {"input_ids", "position_ids"} and len(declared) == 2:
        wanted = (case.batch_size, case.sequence_length)
    elif value.name == "attention_mask" and len(declared) == 2:
        wanted = (case.batch_size, case.total_length)
    elif _is_past(value) and len(declared) == 4:
        wanted = (case.batch_size, None, case.past_length, None)
    return tuple(
        dim if isinstance(dim, int) and dim >= 0 else (want if want is not None else dims.bind(dim))
        for dim, want in zip(declared, wanted, strict=True)
    )


def input_array(value: ir.Value, case: Case, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return what a control input holds in one case, or None for any other input."""
    if value.dtype is None:
        return None
    arrays = {"attention_mask": case.attention_mask, "position_ids": case.position_ids}
    if value.name not in arrays:
        return None
    array = arrays[value.name]()
    array = array[: shape[0]] if shape else array
    return array.astype(value.dtype.numpy()) if array.shape == shape else None


class DimBinding:
    """Numbers for the symbolic dimensions of other inputs: by what their names say, else distinct ones."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._bound: dict[str, int] = {}
        self._meanings: set[str] = set()

    def bind(self, dim: ir.SymbolicDim | int) -> int:
        """Return the number of a free dimension; the same name has the same number, an unnamed one (or -1) its own."""
        is_named = isinstance(dim, ir.SymbolicDim) and dim.value is not None
        name = str(dim) if is_named else f"unnamed {len(self._bound)}"
        if name not in self._bound:
            meaning = _meaning(name.lower())
            # Two names for one thing may be two things: only the first gets the case's number.
            known = {} if meaning in self._meanings else self._case_sizes()
            self._bound[name] = known.get(meaning, self._case.batch_size + 2 * len(self._bound) + 1)
            self._meanings.add(meaning)
        return self._bound[name]

    def _case_sizes(self) -> dict[str, int]:
        case = self._case
        return {"B": case.batch_size, "S": case.sequence_length, "P": case.past_length, "T": case.total_length}


def _meaning(name: str) -> str:
    """Return the dim letter that the name of a symbolic dimension stands for, or the name."""
    if "total" in name or ("past" in name and "+" in name):
        return "T"
    for part, letter in (("past", "P"), ("batch", "B"), ("seq", "S")):
        if part in name:
            return letter
    return name


def _is_past(value: ir.Value) -> bool:
    if (value.name or "").startswith(_PAST_PREFIX):
        return True
    return len(value.shape or ()) == 4 and _names_past(value)


def _names_past(value: ir.Value) -> bool:
    names = [str(d.value).lower() for d in value.shape or () if isinstance(d, ir.SymbolicDim)]
    return any("past" in name and "+" not in name for name in names)


def _input(graph: ir.Graph, name: str, rank: int) -> ir.Value | None:
    found = next((v for v in graph.inputs if v.name == name), None)
    return found if found is not None and found.shape is not None and len(found.shape) == rank else None


def _number(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or axis >= len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) and dim > 0 else None
