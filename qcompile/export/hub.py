"""Download a checkpoint from the Hugging Face hub: only the files the builder reads."""

import importlib
import re
from pathlib import Path

from qcompile.errors import ExportError

PREFIX = "hf://"
# what the builder reads: no pickled weights, no other formats, no code
WANTED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def source_path(source: str) -> Path:
    """Return a source as a path, whether or not there is one.

    Raises:
        ExportError: The source is empty (an unset variable of a script), which as a path is the current directory.
    """
    if not source:
        raise ExportError(
            "SOURCE is empty; a checkpoint directory, a .gguf file or a hub id (owner/name) is expected; "
            "the current directory is '.'"
        )
    return Path(source)


def is_hub_id(source: str) -> bool:
    """Tell whether a source that is not a local path can be a hub id (owner/name, or hf://owner/name)."""
    if source.startswith(PREFIX):
        return _HUB_ID.fullmatch(source.removeprefix(PREFIX)) is not None
    if not _HUB_ID.fullmatch(source) or source.lower().endswith((".gguf", ".safetensors", ".json", ".onnx")):
        return False
    return not Path(source).parent.is_dir()


def download_checkpoint(source: str) -> Path:
    """Return the local snapshot of a hub id, downloading what is not in the hub's own cache.

    Raises:
        ExportError: Offline and not cached, not found, not permitted, or the download broke off.
    """
    # imported here: half a second that no other command needs
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    repo_id = source.removeprefix(PREFIX)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(WANTED_FILES)))
    except GatedRepoError:
        raise ExportError(
            f"{repo_id}: the hub wants its licence accepted first; do so on the model's page and log "
            "in with `hf auth "
            "login`"
        ) from None
    except RepositoryNotFoundError:
        raise ExportError(
            f"{repo_id}: no such model on the hub (or it is private), and no such local directory"
        ) from None
    except (HfHubHTTPError, OSError, ValueError, RuntimeError, *_transport_errors()) as error:
        raise ExportError(
            f"{repo_id}: cannot be downloaded from the hub and is not in its cache "
            f"({_reason(error)}); connect to the "
            "network, set HF_ENDPOINT to a mirror, or give the path of a local checkpoint"
        ) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return the base error of whichever HTTP client this huggingface_hub uses."""
    found: list[type[Exception]] = []
    for module_name, error_name in (("httpx", "HTTPError"), ("requests", "RequestException")):
        try:
            found.append(getattr(importlib.import_module(module_name), error_name))
        except ImportError:
            continue
    return tuple(found)


def _reason(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return (first[0] if first else type(error).__name__)[:200]
