"""Run a graph on rows of tokens block by block: every row through one block, then every row through the next.

Memory is the weights of one block (mapped from disk, and fed as inputs rather than loaded), the activations of one row,
and what is carried from block to block: about (D + (H + 2 K) d) numbers per token, kept in memory up to a budget and on
disk beyond. Blocks of equal structure share one ONNX Runtime session, as their weights are inputs.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from qcompile.calibration.blocks import Block, split_blocks
from qcompile.calibration.rounded_inputs import with_rounded_inputs
from qcompile.errors import QuantError
from qcompile.passes.excerpt import HALF, model_of
from qcompile.quant.mse import num_threads
from qcompile.runtime.ort_options import session_options

Array = npt.NDArray[Any]
Row = npt.NDArray[np.int64]
Say = Callable[[str, int, int], None]
# (row, value, array): called for every value that was asked for
Visitor = Callable[[int, ir.Value, Array], None]

MEMORY_BYTES = 1 << 30
_CONSTANT_ELEMENTS = 4096
# Their products are exact on every CPU only where they are known when the session is made (session_options).
_EXACT_AS_CONSTANTS = (ir.DataType.INT8,)


class BlockSession:
    """One block as an ONNX Runtime session; weights are fed with every call, but for int8 ones, which are part of it.

    Args:
        block: Nodes and what they read and write.
        imports: Operator sets of the graph.
        sessions: Sessions by content, shared between blocks.
        known: Arrays that the block will read, for values whose type the graph does not say.
        rounded: Nodes whose first input is rounded to int8, and by what step; None for a step per token.
    """

    def __init__(
        self,
        block: Block,
        imports: Mapping[str, int],
        sessions: dict[bytes, Any],
        known: Mapping[ir.Value, Array],
        rounded: Mapping[ir.Node, float | None],
    ) -> None:
        self.block = block
        outer = (*block.reads, *block.weights)
        stand_ins = {value: _stand_in(value, f"x{i}", known.get(value)) for i, value in enumerate(outer)}
        model = model_of(block.nodes, block.writes, stand_ins, imports, widens=True)
        if rounded:
            model = with_rounded_inputs(model, {i: rounded[n] for i, n in enumerate(block.nodes) if n in rounded})
        key = hashlib.blake2b(model, digest_size=16).digest()
        self.session = sessions.get(key) or _open(model, block)
        if not any(s.dtype in _EXACT_AS_CONSTANTS for s in stand_ins.values()):
            sessions[key] = self.session
        self._names = {value: s.name or "" for value, s in stand_ins.items() if s.const_value is None}

    def weights(self) -> dict[ir.Value, Array]:
        """Return the block's weights, mapped where they lie on disk; half precision as float32."""
        return {v: _as_fed(_array(v)) for v in self.block.weights if v in self._names}

    def run(self, values: Mapping[ir.Value, Array], weights: Mapping[ir.Value, Array]) -> dict[ir.Value, Array]:
        """Return what the block writes.

        Raises:
            QuantError: ONNX Runtime fails.
        """
        feeds = {name: weights[v] if v in weights else values[v] for v, name in self._names.items()}
        try:
            outputs = self.session.run(None, feeds)
        except Exception as error:  # onnxruntime raises classes of its own that share no public base
            raise QuantError(f"calibration: ONNX Runtime cannot run {_place(self.block)}: {_line(error)}") from error
        return dict(zip(self.block.writes, outputs, strict=True))


class BlockRunner:
    """The blocks of a graph that compute some of its values.

    Args:
        model: A float decoder: fused or not, portable or lowered to ort. Its weights stay where they are.
        wanted: The values to compute.
        memory_bytes: What is carried between blocks stays in memory up to this, and goes to disk beyond.
    """

    def __init__(self, model: ir.Model, wanted: Sequence[ir.Value], *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.graph = model.graph
        self.wanted = frozenset(wanted)
        self.blocks = split_blocks(model.graph, wanted)
        self.memory_bytes = memory_bytes
        self._sessions: dict[bytes, Any] = {}

    def session(
        self, index: int, values: Mapping[ir.Value, Array], rounded: Mapping[ir.Node, float | None] | None = None
    ) -> BlockSession:
        """Return the session of one block.

        Args:
            index: Of the block.
            values: What some row brings to it.
            rounded: Nodes whose inputs are rounded, and by what step; None for a step per token.
        """
        return BlockSession(self.blocks[index], self.graph.opset_imports, self._sessions, values, rounded or {})

    def run(self, rows: Sequence[Row], visit: Visitor, end_block: Callable[[int], None], say: Say) -> None:
        """Run all rows through all blocks.

        Args:
            rows: Token numbers [S] of each row; each is computed by itself, without padding.
            visit: Called for every wanted value of every row.
            end_block: Called with the number of a block when all rows are through it.
            say: Called with (what, done, total).

        Raises:
            QuantError: There are no rows, ONNX Runtime fails, or the graph cannot be fed with such rows.
        """
        if not rows:
            raise QuantError("calibration: there is no text to run the model on")
        total = len(self.blocks) * len(rows)
        with _carried(self.memory_bytes) as carried:
            for row, tokens in enumerate(rows):
                carried.put(row, dict(feeds_of(self.graph, tokens)))
            for index, block in enumerate(self.blocks):
                session = self.session(index, carried.get(0))
                weights = session.weights()
                for row in range(len(rows)):
                    values = carried.get(row)
                    written = session.run(values, weights)
                    for value, array in written.items():
                        if value in self.wanted:
                            visit(row, value, array)
                    values.update(written)
                    carried.put(row, {v: a for v, a in values.items() if v in block.kept})
                    say("calibrating", index * len(rows) + row + 1, total)
                end_block(index)


def feeds_of(graph: ir.Graph, tokens: Row) -> Iterator[tuple[ir.Value, Array]]:
    """Yield every input of a decoder graph and its array for one row of tokens without a past.

    Raises:
        QuantError: An input is unknown, or its shape is fixed to another one.
    """
    length = len(tokens)
    arrays: dict[str, Array] = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "last_token_index": np.array([length - 1], np.int64),
    }
    is_shared = any(value.name == "seqlens_k" for value in graph.inputs)
    for value in graph.inputs:
        name = value.name or ""
        if name.startswith("past_key_values."):
            yield value, _past(value, length if is_shared else 0)
        elif name in arrays:
            _check_shape(value, arrays[name].shape)
            yield value, arrays[name]
        else:
            raise QuantError(f"calibration: the graph has an input '{name}' that it does not know how to feed")


def _past(value: ir.Value, length: int) -> Array:
    dims = list(value.shape or ())
    if len(dims) != 4 or not isinstance(dims[1], int) or not isinstance(dims[3], int):
        raise QuantError(f"calibration: '{value.name}' has shape {value.shape}, wanted [batch, heads, length, size]")
    shape = (1, dims[1], length, dims[3])
    _check_shape(value, shape)
    dtype = np.float32 if value.dtype in HALF or value.dtype is None else value.dtype.numpy()
    return np.zeros(shape, dtype)


def _check_shape(value: ir.Value, shape: tuple[int, ...]) -> None:
    declared = list(value.shape or ())
    if len(declared) == len(shape) and all(
        not isinstance(d, int) or d == s for d, s in zip(declared, shape, strict=True)
    ):
        return
    raise QuantError(
        f"calibration: input '{value.name}' is fixed to {list(map(str, declared))} and would be fed {list(shape)}; "
        "calibrate the graph with free batch and sequence lengths, before they are fixed"
    )


class _Carried:
    """What is carried from block to block, per row: in memory up to a budget, on disk beyond."""

    def __init__(self, memory_bytes: int, directory: Path) -> None:
        self.budget, self.directory = memory_bytes, directory
        self.used = 0
        self._memory: dict[int, dict[ir.Value, Array]] = {}
        self._on_disk: dict[int, list[ir.Value]] = {}

    def put(self, row: int, values: dict[ir.Value, Array]) -> None:
        size_bytes = sum(array.nbytes for array in values.values())
        self._drop(row)
        if self.used + size_bytes <= self.budget:
            self._memory[row] = values
            self.used += size_bytes
            return
        self._on_disk[row] = list(values)
        named: dict[str, Any] = {str(i): array for i, array in enumerate(values.values())}
        np.savez(self._path(row), **named)

    def get(self, row: int) -> dict[ir.Value, Array]:
        if row in self._memory:
            return dict(self._memory[row])
        with np.load(self._path(row), allow_pickle=False) as stored:
            return {value: stored[str(i)] for i, value in enumerate(self._on_disk[row])}

    def _drop(self, row: int) -> None:
        old = self._memory.pop(row, None)
        if old is not None:
            self.used -= sum(array.nbytes for array in old.values())

    def _path(self, row: int) -> Path:
        return self.directory / f"{row}.npz"


@contextmanager
def _carried(memory_bytes: int) -> Iterator[_Carried]:
    with tempfile.TemporaryDirectory(prefix="qcompile-calibration-") as directory:
        yield _Carried(memory_bytes, Path(directory))


def _stand_in(value: ir.Value, name: str, known: Array | None) -> ir.Value:
    """Return a constant for small integers (shapes, axes) and int8 weights, else an input of the same type."""
    tensor = value.const_value
    is_small = tensor is not None and tensor.dtype.is_integer() and tensor.size <= _CONSTANT_ELEMENTS
    if tensor is not None and (is_small or tensor.dtype in _EXACT_AS_CONSTANTS):
        constant = ir.tensor(np.asarray(tensor.numpy()), name=name)
        shape = ir.Shape(tensor.shape.numpy())
        return ir.Value(name=name, type=ir.TensorType(constant.dtype), shape=shape, const_value=constant)
    dtype = value.dtype if known is None else ir.DataType.from_numpy(known.dtype)
    if dtype is None:
        raise QuantError(f"calibration: the graph does not say of what type '{value.name}' is")
    dtype = ir.DataType.FLOAT if dtype in HALF else dtype
    fixed = None if tensor is None else ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=fixed)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _as_fed(array: Array) -> Array:
    """Return an array that ONNX Runtime takes: contiguous, native, half precision widened."""
    if array.dtype.itemsize == 2 and array.dtype.kind in "fV":
        return array.astype(np.float32)
    return np.ascontiguousarray(array)


def _open(model: bytes, block: Block) -> Any:
    options = session_options(onnxruntime, num_threads())
    # the least that makes such products exact
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        raise QuantError(f"calibration: ONNX Runtime cannot load {_place(block)}: {_line(error)}") from error


def _place(block: Block) -> str:
    names = [node.name for node in block.nodes if node.name]
    return f"the block from '{names[0]}' to '{names[-1]}'" if names else "a block"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
