"""Hugging Face directories: single and sharded, and every way they can be damaged."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.errors import ExportError
from qcompile.export.checkpoint import EMBEDDING, HEAD
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.export.safetensors_source import open_directory, read_safetensors
from tests.tiny_checkpoints import (
    CHAT_TEMPLATE,
    random_tensors,
    tiny_config,
    write_safetensors,
    write_tiny_checkpoint,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "in")


def changed_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors file's header, keeping the bytes behind it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_come_back(tmp_path: Path, shards: int, dtype: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "in", "qwen3", shards=shards, dtype=dtype)
    opened = open_directory(source)
    wanted = random_tensors(tiny_config("qwen3"), dtype=dtype)
    assert set(opened.tensors) == set(wanted)
    for name, array in wanted.items():
        tensor = opened.tensors[name]
        rows = slice(0, array.shape[0] if array.ndim == 2 else 1)
        values = tensor.block(rows, slice(0, array.shape[-1])).reshape(array.shape)
        np.testing.assert_array_equal(values, array)
    assert not opened.notes


def test_any_single_file_name_is_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    assert EMBEDDING in open_directory(checkpoint).tensors


def test_the_repositories_own_reader_agrees(checkpoint: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    for name, array in safetensors.load_file(checkpoint / "model.safetensors").items():
        ours = read_safetensors(checkpoint / "model.safetensors")[name]
        assert ours.shape == array.shape


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, 100_000])
def test_a_truncated_file(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ExportError, match=r"model\.safetensors.*(truncated|header)") as caught:
        export_checkpoint(str(checkpoint), checkpoint.parent / "out")
    assert "\n" not in str(caught.value)
    assert not (checkpoint.parent / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (struct.pack("<Q", 1 << 62) + b"{}", "header of 4611686018427387904 bytes"),
        (struct.pack("<Q", 2) + b"xx", "is not JSON"),
        (struct.pack("<Q", 2) + b"[]", "is not a JSON object"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "is not JSON"),
        (b"GGUF" + bytes(100), "header of"),
    ],
)
def test_a_corrupt_header(checkpoint: Path, content: bytes, reason: str) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(ExportError, match=reason):
        open_directory(checkpoint)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"data_offsets": [0, 10]}, "10 bytes for F32"),
        ({"data_offsets": [1 << 40, (1 << 40) + 512 * 64 * 4]}, "it is truncated"),
        ({"data_offsets": [512 * 64 * 4, 0]}, "bytes for F32"),
        ({"data_offsets": [-4, 512 * 64 * 4 - 4]}, "damaged header entry"),
        ({"data_offsets": "many"}, "damaged header entry"),
        ({"shape": [1 << 40, 1 << 40]}, "which needs"),
        ({"shape": [512.0, 64]}, "damaged header entry"),
        ({"dtype": "Q9"}, "dtype 'Q9' is unknown"),
        ({"dtype": None}, "unknown"),
    ],
)
def test_a_lying_header_entry(checkpoint: Path, entry: dict[str, Any], reason: str) -> None:
    changed_header(checkpoint / "model.safetensors", lambda header: header[EMBEDDING].update(entry))
    with pytest.raises(ExportError, match=f"'{EMBEDDING}'.*{reason}"):
        open_directory(checkpoint)


def test_tensors_that_share_bytes(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    changed_header(path, lambda header: header["model.norm.weight"].update(data_offsets=[0, 256]))
    with pytest.raises(ExportError, match=r"'model\.\S+' and 'model\.\S+' overlap \(both hold byte \d+\)"):
        open_directory(checkpoint)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 3000), value=st.integers(0, 255))
def test_no_flipped_byte_in_the_header_crashes(checkpoint: Path, position: int, value: int) -> None:
    path = checkpoint / "model.safetensors"
    pristine = path.read_bytes()
    damaged = bytearray(pristine)
    damaged[position] = value
    path.write_bytes(damaged)
    try:
        open_directory(checkpoint)
    except ExportError as error:
        line = str(error)
        assert line, "an error without a message"
    finally:
        path.write_bytes(pristine)


def test_integer_weights_are_refused(checkpoint: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    changed_header(checkpoint / "model.safetensors", lambda header: header[name].update(dtype="I32"))
    with pytest.raises(ExportError, match=f"'{name}' is stored as I32"):
        export_checkpoint(str(checkpoint), checkpoint.parent / "out")


def test_a_missing_tensor(checkpoint: Path) -> None:
    changed_header(checkpoint / "model.safetensors", lambda header: header.pop("model.norm.weight"))
    with pytest.raises(ExportError, match=r"tensor 'model\.norm\.weight' is missing"):
        export_checkpoint(str(checkpoint), checkpoint.parent / "out")


# shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "in", shards=3)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ExportError, match=r"1 of 3 shards are missing: model-00002-of-00003\.safetensors"):
        open_directory(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"model-00003-of-00003\.safetensors: tensor .* truncated"):
        open_directory(sharded)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {}}, "'weight_map' is missing or empty"),
        ({}, "'weight_map' is missing or empty"),
        ({"weight_map": {"model.norm.weight": "../outside.safetensors"}}, "not a plain file name"),
        (
            {"weight_map": {"absent": "model-00001-of-00003.safetensors"}},
            "'absent', which the index lists, is missing",
        ),
        ({"weight_map": {"a": 7}}, "shards are missing"),
    ],
)
def test_a_damaged_index(sharded: Path, index: dict[str, Any], reason: str) -> None:
    (sharded.parent / "outside.safetensors").write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=reason):
        open_directory(sharded)


def test_no_weights_and_pickled_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="no weights"):
        open_directory(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"pickled weights \(pytorch_model.bin\)"):
        open_directory(checkpoint)


# tied embeddings


def with_head(checkpoint: Path, scale: float, **config: Any) -> Path:
    values = tiny_config("qwen2", **config)
    tensors = random_tensors(tiny_config("qwen2"))
    tensors[HEAD] = tensors[EMBEDDING] * np.float32(scale)
    (checkpoint / "config.json").write_text(json.dumps(values))
    write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
    return checkpoint


def test_equal_matrices_are_tied_and_different_ones_are_not(checkpoint: Path) -> None:
    assert open_directory(with_head(checkpoint, 1.0)).ties_head
    opened = open_directory(with_head(checkpoint, 1.5))
    assert not opened.ties_head
    assert "lm_head.weight is stored and differs" in opened.notes[0]


def test_an_embedding_and_head_without_dimensions_are_told(checkpoint: Path, tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config("qwen2"))
    tensors[EMBEDDING] = tensors[HEAD] = np.ones((), np.float32)
    write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
    with pytest.raises(ExportError, match=r"'model\.embed_tokens\.weight' has shape \[\]"):
        export_checkpoint(str(checkpoint), tmp_path / "out")


def test_an_untied_config_needs_a_head(checkpoint: Path) -> None:
    assert not open_directory(with_head(checkpoint, 1.0, tie_word_embeddings=False)).ties_head
    (checkpoint / "config.json").write_text(json.dumps(tiny_config("qwen2", tie_word_embeddings=False)))
    write_safetensors(checkpoint / "model.safetensors", random_tensors(tiny_config("qwen2")), "float32")
    with pytest.raises(ExportError, match=r"'lm_head\.weight' is missing"):
        open_directory(checkpoint)


# tokenizer files


def test_the_template_gets_a_file_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(str(checkpoint), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "file", "wanted"),
    [
        ({"chat_template": "from config"}, "from file", "from file"),
        ({"chat_template": "from config"}, None, "from config"),
        (
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
            None,
            "d",
        ),
        ({}, None, None),
    ],
)
def test_where_the_template_comes_from(checkpoint: Path, config: Any, file: str | None, wanted: str | None) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    if file is not None:
        (checkpoint / "chat_template.jinja").write_text(file)
    opened = open_directory(checkpoint)
    assert opened.files.get("chat_template.jinja") == (None if wanted is None else wanted.encode())
    assert bool(opened.notes) == (wanted is None)


def test_damaged_and_missing_tokenizer_files(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(ExportError, match=r"tokenizer\.json: cannot be read as JSON"):
        open_directory(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match=r"tokenizer\.json: holds no tokenizer"):
        open_directory(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    assert "no tokenizer.json" in open_directory(checkpoint).notes[0]


@pytest.mark.parametrize("ends", [[402, "x"], [-1], True, {"id": 402}])
def test_an_end_of_text_that_is_no_token_id(checkpoint: Path, ends: Any) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ExportError, match=r"generation_config\.json: 'eos_token_id' is .*; a token id or a list"):
        open_directory(checkpoint)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ends", [512, [402, 10**30]])
def test_an_end_of_text_beyond_the_vocabulary_is_noted(checkpoint: Path, name: str, ends: Any) -> None:
    record = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(json.dumps(record | {"eos_token_id": ends}))
    (note,) = open_directory(checkpoint).notes
    assert re.search(rf"{re.escape(name)}: 'eos_token_id' has (512|1(0){{30}}), beyond the model's 512 tokens", note)
