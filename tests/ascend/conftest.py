"""A lowered directory, and machines with and without CANN."""

import json
from pathlib import Path

import onnx
import pytest

from tests.ascend.fake_cann import sourced, toolkit
from tests.ascend.graphs import norm_model, saved

LOGS = Path(__file__).parents[1] / "data" / "atc_logs"


@pytest.fixture
def model(tmp_path):
    """A lowered directory: two graphs with shared weights, tokenizer, manifest."""
    directory = tmp_path / "model"
    directory.mkdir()
    entries = []
    for name, role in (("decode_b4_t1024", "decode"), ("prefill_s128_t1024", "prefill")):
        proto = norm_model()
        tensor = proto.graph.initializer[0]
        (directory / "weights.data").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.data")
        saved(proto, directory, f"{name}.onnx")
        file = {"name": f"{name}.onnx", "size_bytes": 1, "sha256": ""}
        io = {"kv_cache": "appended", "logits": "chosen", "inputs": ["x"], "outputs": ["y"], "dtype": "float16"}
        entries.append({"role": role, "file": file, "data": [], "io": io})
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 99}}, "added_tokens": []}))
    shape = {"model_type": "qwen2", "vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048}
    files = [{"name": "tokenizer.json", "size_bytes": 1, "sha256": ""}]
    record = {"schema_version": 1, "target": "ascend910b4", "model": shape, "graphs": entries, "files": files}
    (directory / "qcompile.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def cann(tmp_path, monkeypatch):
    """CANN 8.1 with the stand-in, its environment set in this process; returns what the stand-in was called with."""
    home = toolkit(tmp_path / "system")
    for name, value in sourced(home, tmp_path / "tools").items():
        monkeypatch.setenv(name, value)
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("FAKE_ATC", "weights")
    monkeypatch.setenv("FAKE_ATC_CALLS", str(calls))
    monkeypatch.setenv("FAKE_ATC_LOG", str(LOGS / "EZ3003.log"))
    monkeypatch.delenv("TE_PARALLEL_COMPILER", raising=False)
    return calls


@pytest.fixture
def no_cann(tmp_path, monkeypatch):
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
