"""ONNX Runtime is asked for its plain attention kernel where that is the faster one, and only while a session is opened."""

import os
from dataclasses import replace

import onnxruntime
import pytest

from qcompile.artifact import graph_io_of
from qcompile.runtime.attention_kernel import attention_kernel
from qcompile.runtime.manifest import GraphIO, Manifest
from qcompile.runtime.ort_session import open_ort_session
from tests.passes.graph_text import read_graph

SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"


def io(attention):
    return GraphIO("shared", "last", ("input_ids",), ("logits",), "float32", attention)


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)


def test_the_switch_is_set_within_and_gone_behind():
    with attention_kernel(io("plain")):
        assert os.environ[SWITCH] == "1"
    assert SWITCH not in os.environ


def test_a_session_that_fails_leaves_nothing_behind():
    with pytest.raises(ValueError, match="broken"), attention_kernel(io("plain")):
        raise ValueError("broken")
    assert SWITCH not in os.environ


def test_other_graphs_have_the_choice_of_onnx_runtime():
    with attention_kernel(io("")):
        assert SWITCH not in os.environ


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_users_own_setting_stands(monkeypatch, value):
    monkeypatch.setenv(SWITCH, value)
    for attention in ("plain", ""):
        with attention_kernel(io(attention)):
            assert os.environ[SWITCH] == value
    assert os.environ[SWITCH] == value


def test_a_graph_that_multiplies_queries_as_they_are_is_opened_with_it(monkeypatch, compiled):
    seen, open_it = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: seen.append(os.environ.get(SWITCH)) or open_it(*a, **k)
    )
    directory = compiled("qwen2", kv_cache="shared", logits="last")
    manifest = Manifest.load(directory)
    for attention in ("", "plain"):
        graphs = tuple(replace(graph, io=replace(graph.io, attention=attention)) for graph in manifest.graphs)
        open_ort_session(directory, replace(manifest, graphs=graphs), threads=1).close()
    assert seen == [None, "1"]


@pytest.mark.parametrize(
    ("scales", "cache", "attention"),
    [
        ((1.0, 1.0), "float", "plain"),
        ((1.0, 0.25), "float", ""),
        ((1.0,), "float16", ""),
        ((1.0,), "int8", ""),
        ((), "float", ""),
    ],
)
def test_what_the_manifest_says_of_a_graph(scales, cache, attention):
    calls = " ".join(
        f"y{i}, k{i}, v{i} = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1, scale = {scale}>"
        "(q, q, q, past_key_values__0__key, past_key_values__0__value, n, n)"
        for i, scale in enumerate(scales)
    )
    past = ", ".join(f"{cache}[1, 1, 8, 16] past_key_values__0__{kind}" for kind in ("key", "value"))
    text = f"(float[1, 1, 32] q, {past}, int32 n) => (float[1, 1, 32] logits) {{ {calls} logits = Identity(q) }}"
    assert graph_io_of(read_graph(text)).attention == attention


def test_a_kernel_without_a_cache_is_left_to_onnx_runtime():
    call = "com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1, scale = 1.0>(q, q, q)"
    text = f"(float[1, 1, 32] q) => (float[1, 1, 32] logits) {{ y = {call} logits = Identity(q) }}"
    assert graph_io_of(read_graph(text)).attention == ""
