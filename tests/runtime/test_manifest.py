"""Reading qcompile.json: whatever is wrong with it is one ManifestError."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.runtime.errors import ManifestError
from qcompile.runtime.manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest, check_file, find_file


def load(directory: Path, record: Any) -> Manifest:
    content = record if isinstance(record, bytes) else json.dumps(record).encode()
    (directory / MANIFEST_NAME).write_bytes(content)
    return Manifest.load(directory)


@pytest.fixture
def record(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / MANIFEST_NAME).read_text(encoding="utf-8")))


def test_what_is_written_is_read(tmp_path: Path, record: dict[str, Any]) -> None:
    manifest = load(tmp_path, record)
    assert manifest.target == "ort"
    assert manifest.graph().io.kv_cache == "shared"
    assert manifest.model.head_dim == 16
    entry = find_file(manifest, "tokenizer.json")
    assert entry is not None
    assert entry.size_bytes > 0
    assert find_file(manifest, "nothing") is None


def test_fields_of_later_versions_are_passed_over(tmp_path: Path, record: dict[str, Any]) -> None:
    assert load(tmp_path, {**record, "new_field": 1}).target == "ort"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xff", b'{"schema_version": 1}', b"[" * 100_000])
def test_what_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ManifestError, match=r"qcompile\.json: "):
        load(tmp_path, content)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_schema(tmp_path: Path, record: dict[str, Any], version: object) -> None:
    with pytest.raises(ManifestError, match=r"schema_version is .*, this qcompile reads 1; compile"):
        load(tmp_path, {**record, "schema_version": version})


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no qcompile\.json; a compiled-model directory is what `qcompile export`"):
        Manifest.load(tmp_path)


CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("model",), None),
    (("model", "head_dim"), "16"),
    (("model", "head_dim"), 0),
    (("model", "vocab_size"), True),
    (("model", "num_hidden_layers"), 2.0),
    (("model", "max_position_embeddings"), 1 << 40),
    (("model", "extra"), 1),
    (("graphs",), None),
    (("graphs",), {"a": 1}),
    (("graphs", 0, "io"), "shared"),
    (("graphs", 0, "io"), {}),
    (("graphs", 0, "io", "kv_cache"), []),
    (("graphs", 0, "io", "dtype"), 1),
    (("graphs", 0, "io", "inputs"), "input_ids"),
    (("graphs", 0, "io", "inputs"), [1]),
    (("graphs", 0, "io", "outputs"), [["logits"]]),
    (("graphs", 0, "role"), None),
    (("graphs", 0, "file"), "model.onnx"),
    (("graphs", 0, "data"), [1]),
    (("files",), [{"name": 1, "size_bytes": 2, "sha256": ""}]),
    (("files",), [{"name": "a", "size_bytes": "2", "sha256": ""}]),
    (("files",), 5),
]


@pytest.mark.parametrize(("where", "value"), CHANGES)
def test_fields_of_the_wrong_kind(tmp_path: Path, record: dict[str, Any], where: Any, value: Any) -> None:
    place: Any = record
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    with pytest.raises(ManifestError, match="a field is missing or of the wrong kind"):
        load(tmp_path, record)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(
    model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    record = json.loads((model / MANIFEST_NAME).read_text(encoding="utf-8"))
    keys = ("target", "model", "graphs", "files", "passes", "config", "verification", "schema_version")
    key, value = data.draw(st.sampled_from(keys)), data.draw(JSON)
    record[key] = value
    try:
        manifest = load(tmp_path_factory.mktemp("m"), record)
    except ManifestError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert MANIFEST_NAME in refusal
        assert "\n" not in refusal
        return
    # What was taken is what was written, and of the kind that was promised.
    assert key != "model"
    if key == "schema_version":
        assert value == SCHEMA_VERSION
    elif key in {"graphs", "files", "passes"}:
        assert isinstance(value, list)
        assert len(getattr(manifest, key)) == len(value)
    else:
        assert getattr(manifest, key) == value
        assert isinstance(value, str if key == "target" else dict)


def test_an_unknown_role(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match=r"no graph of role 'prefill' .it has: decoder."):
        load(tmp_path, record).graph("prefill")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", "..", "."])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match="only plain file names are allowed"):
        check_file(tmp_path, FileEntry(name, 1, ""))
