"""A `Session` over the static graphs of an Ascend target, run through the reference bodies on ONNX Runtime.

For comparing what goes to ATC with what it came from (`qcompile verify`, `optimize --verify full`). It proves function;
its speed says nothing about a chip.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from qcompile.artifact import load_model
from qcompile.ascend.reference import WideWeights, reference_model
from qcompile.runtime.errors import SessionError
from qcompile.runtime.manifest import GraphEntry, Manifest
from qcompile.runtime.ort_options import session_options
from qcompile.runtime.session import Scores
from qcompile.runtime.static_buckets import StaticBuckets
from qcompile.weights_writer import save_models


class ReferenceSession:
    """See `qcompile.runtime.session.Session`; scores are whole rows of logits.

    Args:
        directory: A compiled-model directory of static ONNX graphs.
        manifest: Its manifest.
        threads: Computing threads.
    """

    def __init__(self, directory: Path, manifest: Manifest, threads: int) -> None:
        compiled = [entry.file.name for entry in manifest.graphs if not entry.file.name.endswith(".onnx")]
        if compiled:
            raise SessionError(
                f"{directory / compiled[0]}: is compiled; give the directory of .onnx graphs it came from"
            )
        self.directory, self.shape, self._threads = directory, manifest.model, threads
        self.buckets = StaticBuckets(manifest)
        self.vocab_size = self.num_candidates = manifest.model.vocab_size
        self.can_extend = True
        self.max_chunk, self.max_capacity = self.buckets.max_chunk, self.buckets.max_capacity
        self.num_slots = self.capacity = 0
        self._names = [name for name in manifest.graphs[0].io.inputs if name.startswith("past_key_values.")]
        self._cache: dict[str, np.ndarray] = {}
        self._loaded: dict[str, ort.InferenceSession] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="qcompile-reference-")
        self._save_references(manifest)

    def reserve(self, num_slots: int, capacity: int) -> None:
        """See Session; the capacity is that of the smallest bucket that holds it."""
        num_slots = max(num_slots, self.num_slots)
        capacity = self.buckets.capacity(max(capacity, self.capacity))
        shape = (num_slots, self.shape.num_key_value_heads, capacity, self.shape.head_dim)
        for name in self._names:
            grown = np.zeros(shape, np.float32)
            if name in self._cache:
                grown[: self.num_slots, :, : self.capacity] = self._cache[name]
            self._cache[name] = grown
        self.num_slots, self.capacity = num_slots, capacity

    def forward(
        self,
        first_slot: int,
        input_ids: np.ndarray,
        past: Sequence[int],
        need_scores: bool = True,
        greedy_only: bool = False,
    ) -> Scores | None:
        """See Session."""
        n, s = input_ids.shape
        rows = []
        for start, stop in self.buckets.groups(n) if s == 1 else [(0, 1)]:
            group = range(first_slot + start, first_slot + stop)
            rows.append(self._run(group, input_ids[start:stop], list(past[start:stop])))
        return Scores(np.concatenate(rows)) if need_scores else None

    def _run(self, slots: range, input_ids: np.ndarray, past: list[int]) -> np.ndarray:
        n, s = input_ids.shape
        entry = self.buckets.choose(n, s, max(past))
        assert entry.bucket is not None
        batch, query_len, kv_len = entry.bucket
        ids = np.zeros((batch, query_len), np.int64)
        ids[:n, :s] = input_ids
        lengths = np.zeros(batch, np.int32)
        lengths[:n] = past
        feeds: dict[str, np.ndarray] = {"input_ids": ids, "past_lengths": lengths}
        if "last_token_index" in entry.io.inputs:
            feeds["last_token_index"] = np.array([s - 1], np.int32)
        for name in self._names:
            rows = np.zeros((batch, self.shape.num_key_value_heads, kv_len, self.shape.head_dim), np.float32)
            width = min(kv_len, self.capacity)
            rows[:n, :, :width] = self._cache[name][slots.start : slots.stop, :, :width]
            feeds[name] = rows
        present = [name.replace("past_key_values", "present") for name in self._names]
        logits, *new = self._session(entry).run(["logits", *present], feeds)
        for name, rows in zip(self._names, new, strict=True):
            for row, slot in enumerate(slots):
                self._cache[name][slot, :, past[row] : past[row] + s] = rows[row, :, :s]
        scores: np.ndarray = logits[:n, 0].astype(np.float32)
        return scores

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See Session."""
        for buffer in self._cache.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def swap_slots(self, first: int, second: int, length: int) -> None:
        """See Session."""
        for buffer in self._cache.values():
            buffer[[first, second], :, :length] = buffer[[second, first], :, :length]

    def close(self) -> None:
        """See Session."""
        self._loaded.clear()
        self._cache.clear()
        self._scratch.cleanup()

    def _save_references(self, manifest: Manifest) -> None:
        """Write every graph's reference; they share their weights, which a runtime maps and does not copy."""
        shared: WideWeights = {}
        models = {
            entry.file.name: reference_model(
                load_model(self.directory / entry.file.name), keep_logits=True, shared=shared
            )
            for entry in manifest.graphs
        }
        save_models(models, Path(self._scratch.name), "weights.data")

    def _session(self, entry: GraphEntry) -> ort.InferenceSession:
        name = entry.file.name
        if name not in self._loaded:
            options = session_options(ort, self._threads)
            try:
                path = str(Path(self._scratch.name) / name)
                self._loaded[name] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:
                raise SessionError(f"{self.directory / name}: cannot be run by its definitions: {error}") from None
        return self._loaded[name]
