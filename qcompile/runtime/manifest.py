"""The manifest `qcompile.json`: what a compiled-model directory holds and how its graphs are to be fed.

The compiler writes it (`qcompile.artifact`), the runtime reads it; this module is the one definition of its
fields.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

from .errors import ManifestError

MANIFEST_NAME = "qcompile.json"
SCHEMA_VERSION = 1
_MAX_MANIFEST_BYTES = 64 << 20
_HASH_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of the directory: a relative name without path, its size in bytes and its sha256 (hex)."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class GraphIO:
    """How a graph takes its inputs.

    Attributes:
        kv_cache: ``concat``: `past_key_values.{i}.*` [B,K,P,d] in, `present.{i}.*` [B,K,P+S,d] out, padding
            told by `attention_mask` [B,T]. ``shared``: past and present are one buffer [B,K,T_max,d], written
            in place; row b holds `seqlens_k[b] + 1` valid entries after the step (int32 [B]) and
            `total_sequence_length` (int32 scalar) is the largest of them. ``appended``: all shapes are fixed,
            `past_key_values.{i}.*` [B,K,T,d] in, of which `past_lengths[b]` (int32 [B]) rows are filled, and
            only the new rows out, `present.{i}.*` [B,K,S,d], for the runtime to append.
        logits: ``all``: [B,S,V]. ``last``: [B,1,V] at position `last_token_index[b]` (int64 [B]) of the S
            given. ``chosen``: `next_token` int64 [B,1], the greedy choice, and where the graph has them
            `top_logits` and `top_ids` [B,1,k]; a prefill graph chooses at `last_token_index` (int32 [1]).
        inputs: Input names in graph order.
        outputs: Output names in graph order.
        dtype: Element type of the KV cache and of the logits: float32, float16 or bfloat16.
        attention: ``plain`` where ONNX Runtime's plain kernel is the faster one (see `attention_kernel`), else empty.
    """

    kv_cache: str
    logits: str
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    dtype: str
    attention: str = ""


@dataclass(frozen=True)
class GraphEntry:
    """One graph: its role, files and interface.

    The role is ``decoder``, or ``model`` for one that cannot generate, or on Ascend ``prefill`` or ``decode``.

    Attributes:
        bucket: Batch B, new tokens S and cache length T of a graph of fixed shapes; None for any other.
    """

    role: str
    file: FileEntry
    data: Tuple[FileEntry, ...]
    io: GraphIO
    bucket: Optional[Tuple[int, int, int]] = None


@dataclass(frozen=True)
class ModelShape:
    """The few config words the runtime needs; names as in Hugging Face's config.json.

    A graph that is no decoder has `model_type` ``none`` and zeros.
    """

    model_type: str
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int


@dataclass(frozen=True)
class Manifest:
    """Everything `qcompile.json` says.

    Attributes:
        target: ``portable``, ``ort`` or an Ascend chip such as ``ascend910b4``.
        passes: One record per pass: name, matches, rewrites, rejected (with reasons), seconds, checks.
        quantization: Per tensor group: scheme, bits, granularity, algorithm. Empty when nothing is quantized.
        build: For .om files: soc_version, cann_version and host_cpu they were compiled for.
        source: Where the weights came from (path or hub id, format, dtype, tie decision).
        files: Tokenizer, template and generation config.
    """

    target: str
    model: ModelShape
    graphs: Tuple[GraphEntry, ...]
    files: Tuple[FileEntry, ...] = ()
    passes: Tuple[Dict[str, Any], ...] = ()
    quantization: Dict[str, Any] = field(default_factory=dict)
    source: Dict[str, Any] = field(default_factory=dict)
    config: Dict[str, Any] = field(default_factory=dict)
    verification: Dict[str, Any] = field(default_factory=dict)
    build: Dict[str, Any] = field(default_factory=dict)
    qcompile_version: str = ""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def load(cls, directory: Union[str, Path]) -> "Manifest":
        """Read `directory/qcompile.json`.

        Raises:
            ManifestError: The file is missing, not JSON, of another schema version, or a field is missing or
                wrong.
        """
        path = Path(directory) / MANIFEST_NAME
        try:
            if path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise ManifestError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes; not a qcompile manifest")
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ManifestError(
                f"{directory}: no {MANIFEST_NAME}; a compiled-model directory is what `qcompile export` "
                "or `qcompile optimize -o` writes"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ManifestError(f"{path}: cannot be read: {error}") from None
        return _manifest_from(record, path)

    def require_decoder(self, directory: Union[str, Path]) -> None:
        """Raise ManifestError for a graph that cannot generate."""
        if self.model.model_type == "none":
            raise ManifestError(
                f"{directory}: holds no decoder (past_key_values in, logits out) and cannot generate tokens; "
                "`qcompile inspect` and `qcompile optimize` take it"
            )

    def graph(self, role: str = "decoder") -> GraphEntry:
        """Return the graph of that role, or raise ManifestError naming the roles there are."""
        for entry in self.graphs:
            if entry.role == role:
                return entry
        roles = ", ".join(entry.role for entry in self.graphs) or "none"
        raise ManifestError(f"the manifest has no graph of role '{role}' (it has: {roles})")


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(_HASH_CHUNK_BYTES)
            if not chunk:
                return digest.hexdigest()
            digest.update(chunk)


def check_file(directory: Path, entry: FileEntry, *, check_hash: bool = True) -> Path:
    """Return the path of a listed file, once it is known to lie inside and to have its size and sha256.

    Raises:
        ManifestError: The name leaves the directory, the file is missing, or size or hash changed.
    """
    # CANN looks for the weights of an .om in a folder `weight` beside it
    name = entry.name[len("weight/") :] if entry.name.startswith("weight/") else entry.name
    if Path(name).name != name or name in {"", ".", ".."}:
        raise ManifestError(f"{directory}: the manifest names '{entry.name}'; only plain file names are allowed")
    path = directory / entry.name
    if not path.is_file():
        raise ManifestError(f"{path}: missing; copy the whole directory, or compile the model again")
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        raise ManifestError(f"{path}: {size_bytes} bytes, the manifest says {entry.size_bytes}; compile it again")
    if check_hash and sha256_of(path) != entry.sha256:
        raise ManifestError(f"{path}: sha256 differs from the manifest; the file was changed, compile it again")
    return path


def _manifest_from(record: Any, path: Path) -> Manifest:
    if not isinstance(record, dict):
        raise ManifestError(f"{path}: a JSON object is expected, got {type(record).__name__}")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"{path}: schema_version is {version!r}, this qcompile reads {SCHEMA_VERSION}; compile the model again"
        )
    try:
        _require_kinds(record)
        values = {f.name: record[f.name] for f in fields(Manifest) if f.name in record}
        values["model"] = _shape_from(record["model"])
        values["graphs"] = tuple(_graph_from(entry) for entry in record["graphs"])
        values["files"] = tuple(_file_from(entry) for entry in record.get("files", []))
        values["passes"] = tuple(record.get("passes", []))
        return Manifest(**values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(f"{path}: a field is missing or of the wrong kind: {error}") from None


def _require_kinds(record: Dict[str, Any]) -> None:
    kinds: Dict[str, type] = {"target": str, "graphs": list, "files": list, "passes": list}
    kinds.update(dict.fromkeys(("quantization", "source", "config", "verification", "build"), dict))
    for name, kind in kinds.items():
        if name in record and not isinstance(record[name], kind):
            raise TypeError(f"{name} is {record[name]!r}")


def _shape_from(record: Dict[str, Any]) -> ModelShape:
    shape = ModelShape(**record)
    for f in fields(ModelShape):
        value = getattr(shape, f.name)
        smallest = 0 if shape.model_type == "none" else 1
        is_size = isinstance(value, int) and not isinstance(value, bool) and smallest <= value < 1 << 31
        if not (isinstance(value, str) if f.name == "model_type" else is_size):
            raise TypeError(f"model.{f.name} is {value!r}")
    return shape


def _file_from(record: Dict[str, Any]) -> FileEntry:
    entry = FileEntry(**record)
    if not (isinstance(entry.name, str) and isinstance(entry.size_bytes, int) and isinstance(entry.sha256, str)):
        raise TypeError(f"file entry {record!r}")
    return entry


def _graph_from(record: Dict[str, Any]) -> GraphEntry:
    io = dict(record["io"])
    inputs, outputs = _names_from(io.pop("inputs")), _names_from(io.pop("outputs"))
    for name, text in {"role": record["role"], **io}.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} of a graph is {text!r}")
    return GraphEntry(
        role=record["role"],
        file=_file_from(record["file"]),
        data=tuple(_file_from(entry) for entry in record["data"]),
        io=GraphIO(inputs=inputs, outputs=outputs, **io),
        bucket=_bucket_from(record.get("bucket")),
    )


def _names_from(record: Any) -> Tuple[str, ...]:
    if not (isinstance(record, list) and all(isinstance(name, str) for name in record)):
        raise TypeError(f"inputs or outputs are {record!r}; a list of names is wanted")
    return tuple(record)


def _bucket_from(record: Any) -> Optional[Tuple[int, int, int]]:
    if record is None:
        return None
    sizes = [n for n in record if isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 31]
    if len(sizes) != 3 or len(record) != 3:
        raise TypeError(f"bucket {record!r}; three positive numbers are wanted: batch, new tokens, cache length")
    return sizes[0], sizes[1], sizes[2]


def find_file(manifest: Manifest, name: str) -> Optional[FileEntry]:
    """Return the entry of an auxiliary file (tokenizer.json, chat_template.jinja, …), or None."""
    for entry in manifest.files:
        if entry.name == name:
            return entry
    return None
