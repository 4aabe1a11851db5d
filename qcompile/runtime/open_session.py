"""Open the back end that a compiled-model directory was made for."""

from pathlib import Path
from typing import Optional

from .errors import SessionError
from .manifest import Manifest
from .session import Session

_ORT_TARGETS = ("portable", "ort")


def open_session(path: Path, manifest: Manifest, threads: Optional[int], check_hash: bool) -> Session:
    """Return a session on ONNX Runtime, or through ACL on an Ascend NPU; only what is used is imported.

    Raises:
        ManifestError: A file is missing or was changed.
        SessionError: The back end cannot load the graphs, or the target is unknown.
    """
    if manifest.target in _ORT_TARGETS:
        from .ort_session import open_ort_session

        return open_ort_session(path, manifest, threads, check_hash)
    if manifest.target.startswith("ascend"):
        from .acl_session import open_acl_session

        return open_acl_session(path, manifest, check_hash)
    targets = ", ".join(_ORT_TARGETS)
    raise SessionError(f"{path}: compiled for '{manifest.target}'; this runtime runs {targets} and ascend chips")
