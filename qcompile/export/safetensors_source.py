"""Read a Hugging Face directory: config.json and safetensors, one file or shards, memory-mapped."""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qcompile.errors import ExportError
from qcompile.export.checkpoint import EMBEDDING, HEAD, Array, Checkpoint, SourceTensor
from qcompile.export.tokenizer_files import note_end_ids, tokenizer_files
from qcompile.model_config import ModelConfig, read_json_object
from qcompile.tensors import DataFile

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
_COMPARE_ROWS = 4096
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    # not weights of a float model: listed so that a file holding one can be read, refused when the graph
    # needs it
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}


class SafetensorsTensor:
    """A tensor of a safetensors file; `block` maps just the rows it is asked for."""

    column_multiple = 1

    def __init__(self, file: DataFile, name: str, stored_as: str, shape: tuple[int, ...], offset: int) -> None:
        self.file, self.name, self.stored_as, self.shape, self.offset = file, name, stored_as, shape, offset
        self.dtype = _DTYPES[stored_as]
        self.size_bytes = math.prod(shape) * self.dtype.itemsize

    def block(self, rows: slice, columns: slice) -> Array:
        """Return a view of the mapped file."""
        width = self.shape[-1]
        row_bytes = width * self.dtype.itemsize
        raw = self.file.map(self.offset + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)
        return raw.view(self.dtype).reshape(-1, width)[:, columns]


def open_directory(directory: Path) -> Checkpoint:
    """Open a Hugging Face checkpoint directory.

    Raises:
        ExportError: A file is missing, damaged or not supported.
    """
    config = ModelConfig.from_file(directory / "config.json")
    tensors = _read_tensors(directory)
    notes: list[str] = []
    ties_head = _ties_head(config, tensors, directory, notes)
    note_end_ids(config.eos_token_ids, config.vocab_size, str(directory / "config.json"), notes)
    return Checkpoint(
        config=config,
        tensors=tensors,
        description={
            "format": "safetensors",
            "path": str(directory),
            "stored_as": sorted({tensor.stored_as for tensor in tensors.values()}),
        },
        files=tokenizer_files(directory, notes, config.vocab_size),
        ties_head=ties_head,
        notes=notes,
    )


def _read_tensors(directory: Path) -> dict[str, SourceTensor]:
    if (directory / INDEX_NAME).is_file():
        return _read_shards(directory)
    if (directory / SINGLE_NAME).is_file():
        return dict(read_safetensors(directory / SINGLE_NAME))
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(others) == 1:
        return dict(read_safetensors(directory / others[0]))
    found = "several safetensors files and no index" if others else _other_weights(directory)
    raise ExportError(f"{directory}: {found}; {SINGLE_NAME} or {INDEX_NAME} is expected")


def _other_weights(directory: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        return f"only pickled weights ({pickled[0]}), which can run code and are not read: convert them"
    return "no weights"


def _read_shards(directory: Path) -> dict[str, SourceTensor]:
    weight_map = read_json_object(directory / INDEX_NAME, max_bytes=_MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{directory / INDEX_NAME}: 'weight_map' is missing or empty")
    files = {str(name) for name in weight_map.values()}
    missing = sorted(name for name in files if not (directory / name).is_file())
    if missing:
        raise ExportError(
            f"{directory}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}; download the checkpoint again"
        )
    shards = {}
    for name in sorted(files):
        if Path(name).name != name:
            raise ExportError(f"{directory / INDEX_NAME}: shard '{name}' is not a plain file name")
        shards[name] = read_safetensors(directory / name)
    tensors: dict[str, SourceTensor] = {}
    for tensor_name, file_name in weight_map.items():
        if tensor_name not in shards[str(file_name)]:
            raise ExportError(
                f"{directory / str(file_name)}: tensor '{tensor_name}', which the index lists, is missing"
            )
        tensors[tensor_name] = shards[str(file_name)][tensor_name]
    return tensors


def read_safetensors(path: Path) -> Mapping[str, SafetensorsTensor]:
    """Read the header of one safetensors file and check every tensor against the file's size.

    Raises:
        ExportError: The file is truncated, its header is damaged, or a tensor has a dtype that is not a
            float.
    """
    try:
        file = DataFile(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be opened: {error.strerror or error}") from None
    if file.size_bytes < 8:
        raise ExportError(f"{path}: {file.size_bytes} bytes; a safetensors file starts with its header's length")
    header_bytes = int(file.read(0, 8).view("<u8")[0])
    if header_bytes > min(_MAX_HEADER_BYTES, file.size_bytes - 8):
        raise ExportError(
            f"{path}: header of {header_bytes} bytes in a file of {file.size_bytes}; the file is "
            "truncated or is not "
            "safetensors; download it again"
        )
    try:
        header = json.loads(file.read(8, header_bytes).tobytes())
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: the safetensors header is not JSON ({error}); download the file again") from None
    if not isinstance(header, dict):
        raise ExportError(f"{path}: the safetensors header is not a JSON object; download the file again")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, name, entry, 8 + header_bytes) for name, entry in header.items()}
    _check_apart(file, tensors)
    return tensors


def _check_apart(file: DataFile, tensors: Mapping[str, SafetensorsTensor]) -> None:
    """Refuse tensors that share bytes, which the format forbids: one of them has another's values."""
    filled = sorted((tensor for tensor in tensors.values() if tensor.size_bytes), key=lambda tensor: tensor.offset)
    for one, other in itertools.pairwise(filled):
        if one.offset + one.size_bytes > other.offset:
            raise ExportError(
                f"{file.path}: tensors '{one.name}' and '{other.name}' overlap (both hold byte {other.offset}); "
                "the header is damaged; download the file again"
            )


def _tensor(file: DataFile, name: str, entry: Any, start: int) -> SafetensorsTensor:
    where = f"{file.path}: tensor '{name}'"
    try:
        stored_as = str(entry["dtype"])
        shape = tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ExportError(f"{where}: damaged header entry; download the file again") from None
    if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise ExportError(f"{where}: damaged header entry; download the file again")
    if stored_as not in _DTYPES:
        raise ExportError(f"{where}: dtype {stored_as!r} is unknown; {', '.join(_DTYPES)} are known")
    size_bytes = _DTYPES[stored_as].itemsize
    for dim in shape:
        size_bytes *= dim
    if last - first != size_bytes:
        raise ExportError(f"{where}: {last - first} bytes for {stored_as} {list(shape)}, which needs {size_bytes}")
    if start + last > file.size_bytes:
        raise ExportError(
            f"{where} ends at byte {start + last}, the file has {file.size_bytes}: it is truncated; download it again"
        )
    return SafetensorsTensor(file, name, stored_as, shape, start + first)


def _ties_head(config: ModelConfig, tensors: Mapping[str, SourceTensor], directory: Path, notes: list[str]) -> bool:
    """Decide as transformers does: tied when the config says so, unless both are stored and differ."""
    if not config.tie_word_embeddings:
        if HEAD not in tensors:
            raise ExportError(
                f"{directory}: tensor '{HEAD}' is missing and config.json does not set "
                "tie_word_embeddings; the "
                "checkpoint is incomplete"
            )
        return False
    if HEAD not in tensors or EMBEDDING not in tensors:
        return True
    if _same_values(tensors[EMBEDDING], tensors[HEAD]):
        return True
    notes.append("config.json ties the embeddings, but lm_head.weight is stored and differs: both are kept")
    return False


def _same_values(a: SourceTensor, b: SourceTensor) -> bool:
    if a.shape != b.shape or a.stored_as != b.stored_as or len(a.shape) != 2:
        return False
    rows, columns = a.shape[0], slice(0, a.shape[-1])
    bands = (slice(start, min(start + _COMPARE_ROWS, rows)) for start in range(0, rows, _COMPARE_ROWS))
    return all(np.array_equal(a.block(band, columns), b.block(band, columns)) for band in bands)
