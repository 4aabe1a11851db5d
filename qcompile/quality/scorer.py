"""Run a decoder over given tokens and return the logits of every one of them, whatever interface its graph has.

One row, a KV cache, tokens in chunks: memory follows the chunk, not the text. A graph that scores one position per call
and cannot be changed is run token by token.

Letters: S tokens of a chunk, P tokens before them, V vocabulary, D hidden, T cache entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from qcompile.errors import QualityError
from qcompile.quality.models import OpenedModel
from qcompile.quality.scoring_graph import ScoringGraph, scoring_graph
from qcompile.quant.hadamard import Rotation
from qcompile.runtime.ort_graph import BFLOAT16, FLOAT, FLOAT16, ElementType, one_line, view
from qcompile.runtime.ort_options import session_options

_PAST = "past_key_values."
_INT8 = ElementType(3, np.int8)
_UINT8 = ElementType(2, np.uint8)
_TYPES = {
    "tensor(float)": FLOAT,
    "tensor(float16)": FLOAT16,
    "tensor(bfloat16)": BFLOAT16,
    "tensor(int8)": _INT8,
    "tensor(uint8)": _UINT8,
}
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


@dataclass(frozen=True)
class Scored:
    """What came out for one chunk.

    Attributes:
        logits: float32 [S, V]. Valid until the next call.
        stream: One float32 [S, D] per name of `ScoringGraph.stream`, a rotation of the stream undone.
    """

    logits: npt.NDArray[np.float32]
    stream: list[npt.NDArray[np.float32]]


class Scorer:
    """One model, loaded.

    Args:
        model: What to load.
        capacity: The most tokens of a text that is kept in the cache.
        threads: Computing threads.
        with_stream: Also return the residual stream.

    Raises:
        QualityError: ONNX Runtime cannot load it, or it wants an input that is not known here.
        GraphError: The file cannot be read.
    """

    def __init__(self, model: OpenedModel, capacity: int, threads: int, *, with_stream: bool = True) -> None:
        self.model = model
        self.vocab_size = model.shape.vocab_size
        graph = scoring_graph(model.graph_path, model.shape.num_hidden_layers, with_stream=with_stream)
        self.graph = graph
        self.scores_all = graph.scores_all
        self.stream = graph.stream
        self.stream_reason = graph.stream_reason
        self._session = _load(graph, model.name, threads)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = {value.name: value for value in self._session.get_outputs()}
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        self._present = [name.replace(_PAST, "present.", 1) for name in self._past]
        self._check_names()
        self.is_shared = "seqlens_k" in self._inputs
        self._wanted = ["logits", *graph.stream, *self._present]
        self._rotations: dict[int, Rotation | None] = {}
        self.capacity = capacity
        self.length = 0
        self._cache = [self._empty(name) for name in self._past]

    def reset(self) -> None:
        """Forget the text so far."""
        self.length = 0
        if not self.is_shared:
            self._cache = [self._empty(name) for name in self._past]

    def extend(self, ids: npt.NDArray[np.int64]) -> Scored:
        """Append S tokens and score what follows each of them.

        Raises:
            QualityError: The cache is full or ONNX Runtime failed.
        """
        if self.length + len(ids) > self.capacity:
            raise QualityError(f"{self.model.name}: {self.length + len(ids)} tokens, room for {self.capacity}")
        if self.scores_all or len(ids) == 1:
            scored = self._run(ids)
            if len(scored.logits) == len(ids):
                return scored
            self.scores_all = False  # a graph that always gives the last position only
            self._step_back(len(ids))
        return self._token_by_token(ids)

    def close(self) -> None:
        """Release the model."""
        self._session = None
        self._cache = []

    def _token_by_token(self, ids: npt.NDArray[np.int64]) -> Scored:
        parts = [self._run(ids[i : i + 1]) for i in range(len(ids))]
        logits = np.concatenate([p.logits for p in parts])
        return Scored(logits, [np.concatenate(rows) for rows in zip(*(p.stream for p in parts), strict=True)])

    def _step_back(self, count: int) -> None:
        """Undo a run: what it wrote into the cache is not counted."""
        self.length -= count
        if not self.is_shared:
            kept = [view(value, self._type(name))[:, :, : self.length] for name, value in self._named_cache()]
            self._cache = [self._value(np.ascontiguousarray(a), n) for n, a in zip(self._past, kept, strict=True)]

    def _named_cache(self) -> list[tuple[str, Any]]:
        return list(zip(self._past, self._cache, strict=True))

    def _run(self, ids: npt.NDArray[np.int64]) -> Scored:
        binding = self._session.io_binding()
        for name, value in (*self._feeds(ids).items(), *self._named_cache()):
            binding.bind_ortvalue_input(name, value)
        for name in self._wanted[: 1 + len(self.graph.stream)]:
            binding.bind_output(name, "cpu")
        for name, value in zip(self._present, self._cache, strict=True):
            if self.is_shared:
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises classes of its own that share no public base
            raise QualityError(f"{self.model.name}: ONNX Runtime failed: {one_line(error)}") from error
        values = binding.get_outputs()
        if not self.is_shared:
            self._cache = values[1 + len(self.graph.stream) :]
        self.length += len(ids)
        logits = self._floats(values[0], "logits")
        stream = [self._floats(v, n) for v, n in zip(values[1:], self.graph.stream, strict=False)]
        return Scored(logits.reshape(-1, logits.shape[-1]), [self._unrotated(a) for a in stream])

    def _unrotated(self, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return hidden states [S, D] in the basis of the checkpoint, whatever basis the graph carries them in."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if rows.shape[-1] not in self._rotations:
            self._rotations[rows.shape[-1]] = self.model.rotation(rows.shape[-1])
        rotation = self._rotations[rows.shape[-1]]
        return rows if rotation is None else rotation.undo(rows)

    def _feeds(self, ids: npt.NDArray[np.int64]) -> dict[str, Any]:
        total = self.length + len(ids)
        arrays: dict[str, npt.ArrayLike] = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total)),
            "position_ids": np.arange(self.length, total)[None],
            "seqlens_k": [total - 1],
            "total_sequence_length": total,
            "last_token_index": [len(ids) - 1],
        }
        feeds = {}
        for name, value in self._inputs.items():
            if name in arrays:
                array = np.asarray(arrays[name], dtype=_INTEGERS.get(value.type, np.int64))
                array = array.reshape((1,) * len(value.shape)) if array.size == 1 else array
                feeds[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        return feeds

    def _empty(self, name: str) -> Any:
        """Return a cache input: a whole buffer when past and present share it, else nothing yet."""
        length = self.capacity if self.is_shared else 0
        declared = self._inputs[name].shape
        shape = [1, self.model.shape.num_key_value_heads, length, self.model.shape.head_dim]
        known = [d if isinstance(d, int) and axis in {1, 3} else shape[axis] for axis, d in enumerate(declared)]
        return self._value(np.zeros(known, self._type(name).dtype), name)

    def _value(self, array: npt.NDArray[Any], name: str) -> Any:
        element_type = self._type(name)
        if element_type is BFLOAT16:
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16.onnx_type)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def _type(self, name: str) -> ElementType:
        value = self._inputs.get(name) or self._outputs[name]
        if value.type not in _TYPES:
            raise QualityError(f"{self.model.name}: '{name}' is {value.type}, wanted one of {', '.join(_TYPES)}")
        return _TYPES[value.type]

    def _floats(self, value: Any, name: str) -> npt.NDArray[np.float32]:
        element_type = self._type(name)
        return element_type.to_float32(view(value, element_type)).copy()

    def _check_names(self) -> None:
        known = {"input_ids", "attention_mask", "position_ids", "seqlens_k", "total_sequence_length"}
        unknown = [n for n in self._inputs if n not in known | {"last_token_index"} and not n.startswith(_PAST)]
        missing = [n for n in ("logits", *self._present) if n not in self._outputs]
        if unknown or missing or "input_ids" not in self._inputs:
            odd = unknown or missing or ["input_ids"]
            raise QualityError(
                f"{self.model.name}: graph input or output '{odd[0]}' is not that of a decoder with a KV cache; "
                "export the checkpoint with `qcompile export`"
            )
        if any(len(self._inputs[name].shape) != 4 for name in self._past):
            raise QualityError(f"{self.model.name}: past_key_values inputs have 4 dimensions [B, K, T, d]")


def _load(graph: ScoringGraph, name: str, threads: int) -> Any:
    options = session_options(onnxruntime, threads)
    options.inter_op_num_threads = 1
    # two models take turns: one must not spin while the other computes
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
    try:
        return onnxruntime.InferenceSession(graph.model_bytes, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise QualityError(f"{name}: ONNX Runtime cannot load it: {one_line(error)}") from error
