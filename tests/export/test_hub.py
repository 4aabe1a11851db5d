"""Hub ids: what counts as one, what is downloaded, and what is said when it cannot be."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from qcompile.errors import ExportError
from qcompile.export.export_checkpoint import export_checkpoint, open_checkpoint
from qcompile.export.hub import is_hub_id
from tests.tiny_checkpoints import write_tiny_checkpoint


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub/x"))


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", True),
        ("hf://Qwen/Qwen3-8B", True),
        ("hf://nonsense", False),
        ("./Qwen/Qwen3-8B", False),
        ("/models/Qwen3-8B", False),
        ("~/models", False),
        ("a/b/c", False),
        ("qwen", False),
        ("models/qwen.gguf", False),
        ("folder/model", False),
        ("../model", False),
        ("a\\b", False),
    ],
)
def test_what_counts_as_a_hub_id(source: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_hub_id(source) == is_id


@pytest.mark.parametrize("source", ["./absent", "absent.gguf", "/absent/model", "folder/absent", "absent"])
def test_a_path_that_is_not_there_never_reaches_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ExportError, match=f"{source}: no such file or directory"):
        open_checkpoint(source)


def test_a_snapshot_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(write_tiny_checkpoint(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    export_checkpoint("Qwen/tiny", tmp_path / "out")
    assert (tmp_path / "out" / "qcompile.json").is_file()
    assert asked["repo_id"] == "Qwen/tiny"
    assert "model.safetensors" in asked["patterns"]
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["patterns"])


def test_a_local_directory_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    write_tiny_checkpoint(tmp_path / "Qwen" / "tiny")
    assert open_checkpoint("Qwen/tiny").config.model_type == "qwen2"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            errors.LocalEntryNotFoundError("no connection\nsecond line"),
            r"cannot be downloaded .*\(no connection\)",
        ),
        (errors.OfflineModeIsEnabled("offline mode is enabled"), "offline mode is enabled"),
        (httpx.ConnectError("name resolution failed"), "name resolution failed"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
        (errors.HfHubHTTPError("500 server error", response=response(500)), "500 server error"),
        (errors.RepositoryNotFoundError("404", response=response(404)), "no such model on the hub"),
        (errors.GatedRepoError("403", response=response(403)), "licence accepted"),
    ],
)
def test_failures_are_one_clear_line(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ExportError, match=f"^Qwen/Qwen3-8B: .*{reason}") as caught:
        export_checkpoint("Qwen/Qwen3-8B", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
