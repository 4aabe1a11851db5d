"""Calibrations on disk: one directory each, complete or absent, found again by a hash of what they came from.

    index.json                    settings, source, notes, and per activation its channels and tokens
    <n>.npz                       abs_max, abs_mean, sample
    <n>.hessian.npy               upper triangle of the second moments, panel by panel: half the bytes of the matrix
    kv.<layer>.npz                largest keys and values

The matrices are the bulk (45 MiB for a down_proj of 4,864 inputs), so they are read one at a time, when asked for.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.calibration.accumulate import KeyValueStatistics
from qcompile.calibration.second_moments import pack_symmetric, unpack_symmetric
from qcompile.errors import QuantError
from qcompile.quant.scheme import FloatArray, InputStatistics
from qcompile.staging import claim_staging, discard_stale, release_staging

INDEX_NAME = "index.json"
_VERSION = 1
_SLACK = 1.05
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Calibration:
    """Statistics of a model's activations, read from disk as they are needed.

    Attributes:
        directory: Where they lie.
        source: What text it was: a file, ``builtin`` or ``self``.
        num_tokens: Tokens the model was run on.
        num_rows: Rows they came in.
        notes: What was not as asked: too little text, prompts cut short.
        was_cached: Nothing had to be computed.
    """

    directory: Path
    source: str
    num_tokens: int
    num_rows: int
    notes: tuple[str, ...]
    was_cached: bool
    _files: Mapping[str, dict[str, Any]]
    _layers: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The activations it knows, by the names of their values in the graph."""
        return tuple(self._files)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose keys and values it knows."""
        return self._layers

    def statistics(self, name: str) -> InputStatistics:
        """Return the statistics of one activation: `node.inputs[0].name` of the Linear that reads it.

        Raises:
            QuantError: It was not calibrated, or its file is damaged.
        """
        record = self._files.get(name)
        if record is None:
            raise QuantError(
                f"the calibration has nothing about '{name}'; it knows {len(self._files)} activations of another graph: "
                "calibrate this one"
            )
        try:
            number = record["number"]
            with (self.directory / f"{number}.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                abs_max, abs_mean, sample = (arrays[key] for key in ("abs_max", "abs_mean", "sample"))
            hessian = _read_hessian(self.directory / f"{number}.hessian.npy", len(abs_max), record["has_hessian"])
            return InputStatistics(record["count"], abs_max, abs_mean, hessian, sample if len(sample) else None)
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def key_values(self, layer: int) -> KeyValueStatistics:
        """Return how large the cache of one layer gets.

        Raises:
            QuantError: It was not calibrated, or its file is damaged.
        """
        if layer not in self._layers:
            raise QuantError(f"the calibration has nothing about the KV cache of layer {layer}")
        try:
            with (self.directory / f"kv.{layer}.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found = {field.name: arrays[field.name] for field in fields(KeyValueStatistics)}
        except _DAMAGE as error:
            raise self._damaged(error) from error
        return KeyValueStatistics(**found | {"num_first": int(found["num_first"])})

    def record(self) -> dict[str, Any]:
        """Return what a manifest should say of it, JSON-ready."""
        return {
            "source": self.source,
            "num_tokens": self.num_tokens,
            "num_rows": self.num_rows,
            "hash": self.directory.name,
            "notes": list(self.notes),
        }

    def _damaged(self, error: Exception) -> QuantError:
        return QuantError(f"{self.directory}: the kept calibration is damaged ({error}); delete it and run again")


class CalibrationWriter:
    """Writes a calibration beside its final place; nothing is there before `commit`.

    Args:
        directory: The final place.
        matrix_bytes: Bytes the Hessians will take, to refuse before the work and not after.

    Raises:
        QuantError: The disk has too little room, or cannot be written to.
    """

    def __init__(self, directory: Path, matrix_bytes: int) -> None:
        self.directory = directory
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            discard_stale(directory)
            free = shutil.disk_usage(directory.parent).free
            if matrix_bytes * _SLACK > free:
                raise QuantError(
                    f"{directory.parent}: the calibration needs {matrix_bytes >> 20} MiB, {free >> 20} MiB are free; make "
                    "room or set QCOMPILE_CACHE to another disk"
                )
            self._staging, self._lock = claim_staging(directory)
        except OSError as error:
            raise _cannot_write(directory, error) from error
        self._files: dict[str, dict[str, Any]] = {}
        self._layers: list[int] = []

    def __enter__(self) -> CalibrationWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        release_staging(self._lock)
        if self._staging.exists():
            shutil.rmtree(self._staging, ignore_errors=True)

    def add(self, name: str, statistics: InputStatistics) -> None:
        """Write the statistics of one activation."""
        number = len(self._files)
        sample = statistics.sample
        sample = np.zeros((0, statistics.num_inputs), np.float32) if sample is None else sample
        try:
            np.savez(
                self._staging / f"{number}.npz",
                abs_max=statistics.abs_max,
                abs_mean=statistics.abs_mean,
                sample=sample,
            )
            if statistics.hessian is not None:
                np.save(self._staging / f"{number}.hessian.npy", pack_symmetric(statistics.hessian))
        except OSError as error:
            raise _cannot_write(self.directory, error) from error
        has_hessian = statistics.hessian is not None
        self._files[name] = {"number": number, "count": statistics.count, "has_hessian": has_hessian}

    def add_key_values(self, layer: int, statistics: KeyValueStatistics) -> None:
        """Write what one layer's cache holds."""
        arrays = {field.name: np.asarray(getattr(statistics, field.name)) for field in fields(statistics)}
        try:
            np.savez(self._staging / f"kv.{layer}.npz", allow_pickle=False, **arrays)
        except OSError as error:
            raise _cannot_write(self.directory, error) from error
        self._layers.append(layer)

    def commit(self, source: str, num_tokens: int, num_rows: int, notes: tuple[str, ...]) -> Calibration:
        """Move the directory into place and return what is in it."""
        index = {
            "version": _VERSION,
            "source": source,
            "num_tokens": num_tokens,
            "num_rows": num_rows,
            "notes": list(notes),
            "files": self._files,
            "layers": self._layers,
        }
        try:
            (self._staging / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
            if open_calibration(self.directory) is None:  # else of a run beside this one, which may be reading it
                if self.directory.exists():
                    shutil.rmtree(self.directory)
                self._staging.rename(self.directory)
        except OSError as error:
            if open_calibration(self.directory) is None:
                raise _cannot_write(self.directory, error) from error
        found = open_calibration(self.directory, was_cached=False)
        assert found is not None
        return replace(found, source=source, notes=notes)


def open_calibration(directory: Path, *, was_cached: bool = True) -> Calibration | None:
    """Return the calibration in a directory, or None when there is none of this version."""
    try:
        index = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
        if index["version"] != _VERSION:
            return None
        return Calibration(
            directory,
            index["source"],
            index["num_tokens"],
            index["num_rows"],
            tuple(index["notes"]),
            was_cached,
            dict(index["files"]),
            tuple(index["layers"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_hessian(path: Path, size: int, is_there: bool) -> FloatArray | None:
    if not is_there:
        return None
    packed: npt.NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return unpack_symmetric(packed, size)


def _cannot_write(directory: Path, error: OSError) -> QuantError:
    return QuantError(f"{directory}: the calibration cannot be kept: {error.strerror or error}")
