"""qcompile.report.page: one self-contained page in two languages, every name escaped."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.errors import ArtifactError, GraphError
from qcompile.report import panel as panels
from qcompile.report import summarize
from qcompile.report.page import index_ranges, write_page
from qcompile.report.words import ROLE_WORDS
from tests.report.fused_graphs import GRAPHS, exported, fused

VOID = {"meta", "rect", "path"}


class _Checked(HTMLParser):
    """Collects elements and text; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, tag
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] not in {"style", "script"}:
            self.text.append((self.open[-1][0], data))

    def classes(self, wanted):
        return [attrs for _, attrs in self.elements if wanted in (attrs.get("class") or "").split()]


def _page(tmp_path, *models, names=("before.onnx", "after.onnx"), **extra):
    read = [
        (m, summarize(m, Path(name)).__class__(**(vars(summarize(m, Path(name))) | extra)))
        for m, name in zip(models, names, strict=False)
    ]
    write_page(read, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    parser = _Checked()
    parser.feed(text)
    assert parser.open == []
    return text, parser


def _data(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))


def test_two_models_side_by_side(tmp_path):
    before, after = exported("qwen2-builder"), fused("qwen2-builder")
    _, page = _page(tmp_path, before, after)
    assert len(page.classes("panel")) == 2
    # before: prelude, 2 layers alike, end; after: prelude, layer 0, layer 1, end
    assert [e["class"].split()[1] for e in page.classes("card")] == [
        *("before", "layer", "after"),
        *("before", "layer", "layer", "after"),
    ]
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 7
    assert "×2" in [data for _, data in page.text]
    assert [e["data-layer"] for e in page.classes("cell")] == ["0", "1", "0", "0"]
    words = "".join(data for _, data in page.text)
    for word in ("AddRmsNorm", "SwiGlu", "Softmax", "before.onnx", "after.onnx", "hidden states"):
        assert word in words
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    text, page = _page(tmp_path, exported("qwen3-optimum"))
    assert "://" not in text
    assert not [attrs for _, attrs in page.elements if {"src", "href", "srcset", "action"} & set(attrs)]
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_every_word_is_there_in_both_languages(tmp_path):
    _, page = _page(tmp_path, exported("qwen2-dynamo-sdpa"), fused("qwen2-builder"))
    languages = [attrs["lang"] for tag, attrs in page.elements if "lang" in attrs and tag != "html"]
    assert languages.count("zh") >= languages.count("en") > 100
    words = "".join(data for _, data in page.text)
    for stage in ("norm", "qkv", "rotary", "cache", "attention", "mlp", "residual"):
        assert all(word in words for word in ROLE_WORDS[stage])


def test_every_box_has_a_tooltip_for_every_layer(tmp_path):
    text, page = _page(tmp_path, exported("qwen2-dynamo-sdpa"))
    data = _data(text)
    assert [d["layers"] for d in data] == [[], [0, 1], []]
    layer = data[1]
    assert len(layer["ops"]) == len(layer["names"][0]) == len(layer["names"][1]) == 70
    softmax = next(i for i, op in enumerate(layer["ops"]) if op["op"] == "Softmax")
    assert layer["names"][0][softmax][0] != layer["names"][1][softmax][0]
    assert layer["ops"][softmax]["attrs"] == [["axis", "-1"]]
    gate = next(
        i
        for i, names in enumerate(layer["names"][0])
        if layer["ops"][i]["in"][-1] == ["w", "float32 [64, 128] · 32.0 KiB"]
    )
    assert layer["ops"][gate]["op"] == "MatMul"
    assert layer["ops"][gate]["out"] == [
        "float32 [batch_size, sequence_length, 128] · 512 B × batch_size × sequence_length"
    ]
    drawn = [int(e["data-n"]) for e in page.classes("box") if "data-n" in e]
    assert max(drawn) == 69


def test_attributes_in_tooltips_are_short_and_of_any_kind(tmp_path):
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18, "c" : 1]>
        g (float[N] x, bool b) => (float[N] y) {
          a = c.Op <text = "t", many = [1, 2, 3], small = float[2] {1.0, 2.0}> (x)
          n = c.Op2 (a, "")
          y = If (b) < then_branch = t () => (float[N] p) { p = Identity (n) },
                       else_branch = e () => (float[N] q) { q = Neg (n) } >
        }
    """)
    model.graph[0].attributes["long"] = ir.AttrInt64s("long", list(range(200)))
    model.graph[0].attributes["large"] = ir.AttrTensor("large", ir.Tensor(np.zeros(100, np.float32)))
    model.graph[0].attributes["other"] = ir.RefAttr("other", "outer", ir.AttributeType.INT)
    text, _ = _page(tmp_path, model)
    ops = {op["op"]: op for op in _data(text)[0]["ops"]}
    attributes = dict(ops["c::Op"]["attrs"])
    assert attributes["text"] == "t"
    assert attributes["small"] == "[1.0, 2.0]"
    assert attributes["large"] == "tensor [100]"
    assert attributes["other"] == "@outer"
    assert attributes["long"].endswith("…")
    assert len(attributes["long"]) == 80
    assert ops["c::Op2"]["in"][1] == ["-", ""]
    assert dict(ops["If"]["attrs"])["then_branch"] == "graph"


def test_names_from_the_file_are_escaped_everywhere(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>&\"'\u2028\x1b"
    model = exported("qwen2-builder")
    for node in list(model.graph)[::7]:
        node.name = f"layers.0.{evil}"
    model.graph.inputs[0].name = evil
    model.producer_name = evil
    model.graph[5].domain = evil
    model.graph[5].attributes[evil] = ir.AttrString(evil, evil)
    model.graph.opset_imports[evil] = 1
    next(iter(model.graph.initializers.values())).name = evil
    rejected = [{"node": evil, "reason": evil}, "not a record"]
    passes = (
        {"name": evil, "matches": 3, "rewrites": 2, "proved": 2, "max_error": 1e-7, "rejected": rejected},
        {},
    )
    text, page = _page(tmp_path, model, names=(evil.replace("/", "|"),), passes=passes)
    assert "<img" not in text
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert "\x1b" not in text
    assert "\u2028" not in text
    assert any(evil[:9] in data for _, data in page.text)
    assert len(re.findall("<script", text)) == 2
    names = [name for section in _data(text) for layer in section["names"] for op in layer for name in op]
    assert any("</script><img" in name for name in names)


def test_the_passes_of_the_manifest_are_listed(tmp_path):
    passes = (
        {
            "name": "fuse-rms-norm",
            "matches": 5,
            "rewrites": 5,
            "proved": 5,
            "max_error": 2.5e-7,
            "rejected": [],
        },
        {"name": "fuse-gelu", "matches": 1, "rewrites": 0, "rejected": [{"node": "n1", "reason": "because"}]},
    )
    text, page = _page(tmp_path, fused("qwen2-builder"), passes=passes)
    words = [data for _, data in page.text]
    assert "2.5e-07" in words
    assert "n1: because" in words
    assert 'class="idle"' in text


def test_a_graph_too_large_to_draw_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(panels, "MAX_DRAWN_BOXES", 20)
    _, page = _page(tmp_path, exported("qwen2-dynamo-sdpa"))
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 2
    words = "".join(data for _, data in page.text)
    assert "Too large to draw" in words
    assert re.search(r"MatMul ×\d", words)


def test_an_empty_graph_and_one_without_weights(tmp_path):
    empty = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 18]> g (float[1] x) => () {}')
    _, page = _page(tmp_path, empty)
    assert not [tag for tag, _ in page.elements if tag == "svg"]
    constant = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        g () => (float y) { y = Constant <value_float = 1.0> () }
    """)
    _, page = _page(tmp_path, constant)
    assert "Constant" in "".join(data for _, data in page.text)


def test_an_unsorted_graph_is_drawn_and_a_cycle_refused(tmp_path):
    text = """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1] x) => (float[1] y) { a = Neg (x) y = Abs (a) }
    """
    model = ir.from_onnx_text(text)
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)
    _, page = _page(tmp_path, model)
    assert len(page.classes("box")) == 4
    model = ir.from_onnx_text(text)
    model.graph[0].replace_input_with(0, model.graph[1].outputs[0])
    with pytest.raises(GraphError, match="graph 'g' has a cycle"):
        _page(tmp_path, model)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    model = exported("qwen2-builder")
    summary = summarize(model, GRAPHS / "qwen2-builder.onnx")
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(ArtifactError, match=r"cannot be written: No such file or directory"):
        write_page([(model, summary)], tmp_path / "missing" / "page.html")

    def full(self, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArtifactError, match=r"page\.html: cannot be written: No space left.*free some space"):
        write_page([(model, summary)], page)
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_the_same_page_twice(tmp_path):
    first, _ = _page(tmp_path, exported("qwen2-optimum"))
    second, _ = _page(tmp_path, exported("qwen2-optimum"))
    assert first == second


@pytest.mark.parametrize(
    ("indices", "text"), [((0,), "0"), ((0, 1, 2), "0–2"), ((0, 2, 3, 23), "0, 2–3, 23"), ((), "")]
)
def test_index_ranges(indices, text):
    assert index_ranges(indices) == text
