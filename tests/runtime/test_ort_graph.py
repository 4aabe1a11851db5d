"""Loading: what is wrong with a graph is said in one line."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from qcompile.runtime.errors import ManifestError, SessionError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest, sha256_of
from qcompile.runtime.ort_concat import ConcatCacheSession
from qcompile.runtime.ort_graph import BFLOAT16, FLOAT16, one_line, view
from qcompile.runtime.ort_session import open_ort_session
from tests.runtime.toy_compiler import compile_tiny


def open_model(directory: Path) -> None:
    open_ort_session(directory, Manifest.load(directory), threads=1).close()


def edit_manifest(directory: Path, change: Any) -> None:
    path = directory / MANIFEST_NAME
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def accept_graph(directory: Path) -> None:
    """Make the manifest agree with a changed model.onnx."""

    def change(record: dict[str, Any]) -> None:
        path = directory / "model.onnx"
        entry = {"name": path.name, "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        record["graphs"][0]["file"] = entry

    edit_manifest(directory, change)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_missing_file(own_model: Path, name: str) -> None:
    (own_model / name).unlink()
    with pytest.raises(ManifestError, match=f"{name}: missing; copy the whole directory"):
        open_model(own_model)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_changed_file(own_model: Path, name: str) -> None:
    content = bytearray((own_model / name).read_bytes())
    content[len(content) // 2] ^= 1
    (own_model / name).write_bytes(content)
    with pytest.raises(ManifestError, match=f"{name}: sha256 differs"):
        open_model(own_model)


def test_a_truncated_file(own_model: Path) -> None:
    path = own_model / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match="bytes, the manifest says"):
        open_model(own_model)


def test_not_an_onnx_file(own_model: Path) -> None:
    (own_model / "model.onnx").write_bytes(b"this is not a protobuf")
    accept_graph(own_model)
    with pytest.raises(SessionError, match=r"model\.onnx: ONNX Runtime \S+ cannot load it: ") as caught:
        open_model(own_model)
    assert "\n" not in str(caught.value)


def test_external_data_outside_the_directory(own_model: Path) -> None:
    content = (own_model / "model.onnx").read_bytes()
    content = content.replace(b"model.onnx.data", b"../model.onnx.d")
    (own_model / "model.onnx").write_bytes(content)
    (own_model.parent / "model.onnx.d").write_bytes((own_model / "model.onnx.data").read_bytes())
    accept_graph(own_model)
    with pytest.raises(SessionError, match=r"cannot load it.*escape"):
        open_model(own_model)


def test_an_unknown_cache_style(own_model: Path) -> None:
    edit_manifest(own_model, lambda record: record["graphs"][0]["io"].update(kv_cache="paged"))
    with pytest.raises(SessionError, match="kv_cache is 'paged'; this runtime knows shared, concat"):
        open_model(own_model)


def test_an_unknown_input(own_model: Path) -> None:
    edit_manifest(own_model, lambda record: record["graphs"][0]["io"]["inputs"].append("beam_indices"))
    with pytest.raises(SessionError, match="graph input 'beam_indices' is unknown to this runtime"):
        open_model(own_model)


def test_another_interface_than_the_manifest_says(own_model: Path) -> None:
    edit_manifest(own_model, lambda record: record["graphs"][0]["io"]["inputs"].remove("seqlens_k"))
    with pytest.raises(SessionError, match=r"inputs differ from the manifest's \(seqlens_k\)"):
        open_model(own_model)


def test_another_number_of_layers(own_model: Path) -> None:
    edit_manifest(own_model, lambda record: record["model"].update(num_hidden_layers=3))
    with pytest.raises(SessionError, match=r"4 past_key_values inputs .* wanted 6 for 3 layers"):
        open_model(own_model)


def test_another_head_dim(own_model: Path) -> None:
    edit_manifest(own_model, lambda record: record["model"].update(head_dim=32))
    with pytest.raises(SessionError, match=r"wanted \[B, 2, T, 32\]"):
        open_model(own_model)


def test_a_failing_step_is_one_line_and_leaves_the_session_usable(tmp_path: Path) -> None:
    directory = compile_tiny(tmp_path, max_position_embeddings=16)
    session = open_ort_session(directory, Manifest.load(directory), threads=1)
    session.reserve(1, 64)
    with pytest.raises(SessionError, match=r"ONNX Runtime failed: .*cos_cache") as caught:
        session.forward(0, np.zeros((1, 20), np.int64), [0])
    assert "\n" not in str(caught.value)
    assert session.forward(0, np.zeros((1, 8), np.int64), [0]) is not None
    session.close()


def test_one_line() -> None:
    raw = RuntimeError(
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : /onnxruntime_src/onnxruntime/core/a.cc:12 void f()\n bad  thing"
    )
    assert one_line(raw) == "void f() bad thing"
    assert one_line(RuntimeError()) == "RuntimeError"


def test_view_does_not_copy() -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    seen = view(value, FLOAT16)
    array[1, 2] = 9
    assert seen[1, 2] == 9
    empty = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((2, 0, 3), np.float16))
    assert view(empty, FLOAT16).shape == (2, 0, 3)


def test_bfloat16_numbers() -> None:
    numbers = np.array([[1.5, -2.0, 3e38, 0.0]], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(BFLOAT16.to_float32(numbers.view(np.uint16)), numbers.astype(np.float32))


def test_a_bfloat16_cache_passes_through(tmp_path: Path) -> None:
    """ONNX Runtime's CPU concatenates bfloat16; such a graph runs, its cache never meets NumPy's dtypes."""
    directory = compile_tiny(tmp_path, kv_cache="concat")
    graph = _CacheOnly(directory)
    session = ConcatCacheSession(graph)  # type: ignore[arg-type]
    session.reserve(2, 32)
    session.forward(0, np.array([[1, 2, 3]]), [0])
    session.forward(1, np.array([[4]]), [0])
    scores = session.forward(0, np.array([[5], [6]]), [3, 1])
    assert scores is not None
    np.testing.assert_array_equal(scores.values, [[1 + 2 + 3 + 5], [4 + 6]])


class _CacheOnly:
    """An OrtGraph stand-in: logits are the sum of the row's valid cache entries, everything in bfloat16."""

    def __init__(self, directory: Path) -> None:
        self.shape = Manifest.load(directory).model
        self.ort = onnxruntime
        self.path = directory
        self.inputs = ("input_ids", "attention_mask", "last_token_index")
        self.past, self.present = ("past_key_values.0.key",), ("present.0.key",)
        self.cache_type = self.logits_type = BFLOAT16

    def value(self, array: np.ndarray, element_type: Any) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type.onnx_type)

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        ids, mask = feeds["input_ids"].numpy(), feeds["attention_mask"].numpy()
        past = view(feeds["past_key_values.0.key"], BFLOAT16)
        new = np.broadcast_to(
            ids[:, None, :, None].astype(ml_dtypes.bfloat16), (*past.shape[:2], ids.shape[1], past.shape[3])
        )
        present = np.concatenate([past, new.view(np.uint16)], axis=2)
        entries = present[:, 0, :, 0].copy().view(ml_dtypes.bfloat16).astype(np.float32)
        logits = np.where(mask == 1, entries, 0).sum(axis=1)[:, None, None].astype(ml_dtypes.bfloat16)
        return {
            "present.0.key": self.value(np.ascontiguousarray(present), BFLOAT16),
            "logits": self.value(logits.view(np.uint16), BFLOAT16),
        }
