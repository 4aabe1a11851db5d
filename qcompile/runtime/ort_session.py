"""Open a compiled-model directory's decoder graph with ONNX Runtime."""

from pathlib import Path
from typing import Callable, Dict, Optional

from .errors import SessionError
from .host import default_threads
from .manifest import Manifest, check_file
from .ort_concat import ConcatCacheSession
from .ort_graph import OrtGraph
from .ort_shared import SharedCacheSession
from .session import Session

_SESSIONS: Dict[str, Callable[[OrtGraph], Session]] = {
    "shared": SharedCacheSession,
    "concat": ConcatCacheSession,
}
_KNOWN_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "seqlens_k",
    "total_sequence_length",
    "last_token_index",
}


def open_ort_session(
    directory: Path, manifest: Manifest, threads: Optional[int] = None, check_hash: bool = True
) -> Session:
    """Load the `decoder` graph, in the cache style that the manifest declares.

    Args:
        directory: The compiled-model directory.
        manifest: What `qcompile.json` in it says.
        threads: Computing threads; None takes every physical core this process may use.
        check_hash: Compare the sha256 of graph and weights with the manifest first.

    Raises:
        ManifestError: A file is missing or was changed.
        SessionError: The graph cannot be loaded or wants an input this runtime does not know.
    """
    entry = manifest.graph("decoder")
    if entry.io.kv_cache not in _SESSIONS:
        raise SessionError(f"{directory}: kv_cache is '{entry.io.kv_cache}'; this runtime knows {', '.join(_SESSIONS)}")
    unknown = [n for n in entry.io.inputs if n not in _KNOWN_INPUTS and not n.startswith("past_key_values.")]
    if unknown:
        raise SessionError(f"{directory}: graph input '{unknown[0]}' is unknown to this runtime; update qcompile")
    path = check_file(directory, entry.file, check_hash=check_hash)
    for data in entry.data:
        check_file(directory, data, check_hash=check_hash)
    graph = OrtGraph(path, threads or default_threads(), manifest.model, entry.io)
    return _SESSIONS[entry.io.kv_cache](graph)
