"""Ways in which checkpoints, prompts and options go wrong, each as a command line and what it must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from tests.damaged_models import truncate
from tests.export.tiny_gguf import gguf_config, write_gguf
from tests.runtime.test_tokenizer import rewrite
from tests.tiny_checkpoints import write_tiny_checkpoint

Command = tuple[list[object], str]


@dataclass(frozen=True)
class Workshop:
    """A place to break things in: `out` is a compiled model that a failing command must leave alone."""

    root: Path
    exported: Path
    lowered: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def checkpoint(self, **options: Any) -> Path:
        return write_tiny_checkpoint(self.root / "checkpoint", "qwen2", **options)

    def copy(self, source: Path | None = None) -> Path:
        return Path(shutil.copytree(source or self.exported, self.root / "model"))

    def export(self, source: object, *options: object) -> list[object]:
        return ["export", source, "-o", self.out, *options]

    def optimize(self, source: object, *options: object) -> list[object]:
        return ["optimize", source, "-o", self.out, *options]


BAD: dict[str, Callable[[Workshop], Command]] = {}


def bad(make: Callable[[Workshop], Command]) -> Callable[[Workshop], Command]:
    """Register a case by the name of its function."""
    BAD[make.__name__.replace("_", " ")] = make
    return make


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries; None removes one."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


# Checkpoints


def _truncated_safetensors(keep: int) -> Callable[[Workshop], Command]:
    def make(shop: Workshop) -> Command:
        source = shop.checkpoint()
        truncate(source / "model.safetensors", keep)
        return shop.export(source), r"model\.safetensors: "

    return make


for _keep in (0, 7, 100, 20_000):
    BAD[f"safetensors truncated to {_keep} bytes"] = _truncated_safetensors(_keep)


@bad
def corrupt_safetensors_header(shop: Workshop) -> Command:
    source = shop.checkpoint()
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 64 + path.read_bytes()[72:])
    return shop.export(source), r"model\.safetensors: .*header"


@bad
def missing_shard(shop: Workshop) -> Command:
    source = shop.checkpoint(shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    return shop.export(source), r"model-00002-of-00003\.safetensors"


@bad
def missing_weight(shop: Workshop) -> Command:
    source = shop.checkpoint(shards=3)
    index = source / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(record))
    return shop.export(source), "model.norm.weight"


def _config_without(key: str) -> Callable[[Workshop], Command]:
    def make(shop: Workshop) -> Command:
        source = shop.checkpoint()
        edit_json(source / "config.json", **{key: None})
        return shop.export(source), rf"config\.json: .*{key}"

    return make


for _key in (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
):
    BAD[f"config without {_key}"] = _config_without(_key)


@bad
def config_that_does_not_say_what_it_is(shop: Workshop) -> Command:
    source = shop.checkpoint()
    edit_json(source / "config.json", model_type=None, architectures=None)
    return shop.export(source), r"config\.json: .*(model_type|architecture)"


@bad
def config_that_is_not_json(shop: Workshop) -> Command:
    source = shop.checkpoint()
    (source / "config.json").write_text("{'hidden_size': 64}")
    return shop.export(source), r"config\.json: .*JSON"


@bad
def no_config(shop: Workshop) -> Command:
    source = shop.checkpoint()
    (source / "config.json").unlink()
    return shop.export(source), r"config\.json"


@bad
def another_architecture(shop: Workshop) -> Command:
    source = shop.checkpoint()
    edit_json(source / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    return shop.export(source), "LlamaForCausalLM"


@bad
def sliding_window_in_use(shop: Workshop) -> Command:
    source = shop.checkpoint(use_sliding_window=True, sliding_window=16, max_window_layers=0)
    return shop.export(source), "sliding"


@bad
def pickled_weights_only(shop: Workshop) -> Command:
    source = shop.checkpoint()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    return shop.export(source), "safetensors"


@bad
def damaged_tokenizer_in_the_checkpoint(shop: Workshop) -> Command:
    source = shop.checkpoint()
    truncate(source / "tokenizer.json", 50)
    return shop.export(source), r"tokenizer\.json"


@bad
def a_checkpoint_that_is_not_there(shop: Workshop) -> Command:
    return shop.export(shop.root / "nowhere"), "nowhere"


@bad
def an_empty_source(shop: Workshop) -> Command:
    return shop.export(""), "SOURCE is empty"


def _truncated_gguf(keep: int) -> Callable[[Workshop], Command]:
    def make(shop: Workshop) -> Command:
        path = shop.root / "model.gguf"
        write_gguf(path, gguf_config())
        truncate(path, keep if keep > 0 else path.stat().st_size + keep)
        return shop.export(path), r"model\.gguf: "

    return make


for _keep in (3, 20, 5000, -100_000, -1):
    BAD[f"gguf truncated to {_keep} bytes"] = _truncated_gguf(_keep)


@bad
def a_gguf_that_is_none(shop: Workshop) -> Command:
    (shop.root / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(4000))
    return shop.export(shop.root / "model.gguf"), r"model\.gguf: .*GGUF"


@bad
def a_file_where_the_output_goes(shop: Workshop) -> Command:
    (shop.root / "taken").write_text("mine")
    return ["export", shop.checkpoint(), "-o", shop.root / "taken"], "taken"


@bad
def a_directory_that_is_not_ours_where_the_output_goes(shop: Workshop) -> Command:
    (shop.root / "mine").mkdir()
    (shop.root / "mine" / "thesis.txt").write_text("all of it")
    return ["optimize", shop.exported, "-o", shop.root / "mine"], "mine"


# Options


@bad
def unknown_pass(shop: Workshop) -> Command:
    return shop.optimize(shop.exported, "--passes", "fuse-rmsnorm"), "did you mean 'fuse-rms-norm'"


@bad
def unknown_pass_to_skip(shop: Workshop) -> Command:
    return shop.optimize(shop.exported, "--skip", "fuse-atention"), "did you mean 'fuse-attention'"


@bad
def unknown_pass_to_explain(shop: Workshop) -> Command:
    return ["inspect", shop.exported, "--why", "fuse-swigluu"], "did you mean 'fuse-swiglu'"


@bad
def surgery_script_that_is_not_there(shop: Workshop) -> Command:
    return shop.optimize(shop.exported, "--surgery", f"{shop.root}/none.py:edit"), r"none\.py"


@bad
def surgery_function_that_is_not_there(shop: Workshop) -> Command:
    (shop.root / "edit.py").write_text("def other(graph):\n    return graph\n")
    return shop.optimize(shop.exported, "--surgery", f"{shop.root}/edit.py:edit"), "edit"


@bad
def surgery_that_raises(shop: Workshop) -> Command:
    (shop.root / "edit.py").write_text("def edit(graph):\n    raise KeyError('layers.0')\n")
    return shop.optimize(shop.exported, "--surgery", f"{shop.root}/edit.py:edit"), r"edit\.py.*layers\.0"


@bad
def surgery_with_a_syntax_error(shop: Workshop) -> Command:
    (shop.root / "edit.py").write_text("def edit(graph:\n")
    return shop.optimize(shop.exported, "--surgery", f"{shop.root}/edit.py:edit"), r"edit\.py"


@bad
def a_report_that_cannot_be_written(shop: Workshop) -> Command:
    path = shop.root / "no" / "report.json"
    return shop.optimize(shop.exported, "--report", path), "cannot be written: there is no folder .*no; make it first"


@bad
def a_report_that_is_a_folder(shop: Workshop) -> Command:
    return shop.optimize(shop.exported, "--report", shop.root), "is a folder; name a file in it"


@bad
def a_chart_of_layers_that_cannot_be_written(shop: Workshop) -> Command:
    path = shop.root / "no" / "why.html"
    return shop.optimize(
        shop.exported, "--passes", "int8", "--quality", "1", "--layer-chart", path
    ), "there is no folder"


@bad
def a_chart_of_layers_that_is_no_picture(shop: Workshop) -> Command:
    arguments = ("--passes", "int8", "--quality", "1", "--layer-chart", shop.root / "why.txt")
    return shop.optimize(shop.exported, *arguments), "why.txt: wanted a name that ends in .html or .svg"


@bad
def a_page_that_cannot_be_written(shop: Workshop) -> Command:
    return ["inspect", shop.exported, "--html", shop.root / "no" / "page.html"], "page.html"


# Prompts


def generate(model: Path, *arguments: object) -> list[object]:
    return ["generate", "--threads", "1", model, *arguments]


@bad
def prompt_longer_than_the_context(shop: Workshop) -> Command:
    return generate(shop.lowered, "word " * 400), r"prompt.* \d+ tokens.*\d+"


@bad
def empty_prompt(shop: Workshop) -> Command:
    return generate(shop.lowered, ""), "prompt 1 is empty"


@bad
def prompt_file_of_invalid_utf8(shop: Workshop) -> Command:
    (shop.root / "prompt.txt").write_bytes("élan".encode("latin-1"))
    return generate(shop.lowered, "--prompt-file", shop.root / "prompt.txt"), r"prompt\.txt: not UTF-8: byte 0xe9"


@bad
def prompt_file_that_is_a_directory(shop: Workshop) -> Command:
    return generate(shop.lowered, "--prompt-file", shop.root), "cannot be read"


@bad
def template_that_raises(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    rewrite(model, "chat_template.jinja", b"{{ raise_exception('no system role') }}")
    return generate(model, "Hello"), r"chat_template\.jinja: the template raised: no system role"


@bad
def template_with_a_syntax_error(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    rewrite(model, "chat_template.jinja", b"{% for m in messages %}{{ m.content")
    return generate(model, "Hello"), r"chat_template\.jinja"


@bad
def template_that_divides_by_zero(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    rewrite(model, "chat_template.jinja", b"{{ 1 / 0 }}")
    return generate(model, "Hello"), r"chat_template\.jinja"


@bad
def tokenizer_that_is_no_json(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    rewrite(model, "tokenizer.json", b"{")
    return generate(model, "Hello"), r"tokenizer\.json"


@bad
def tokenizer_config_that_is_a_list(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    rewrite(model, "tokenizer_config.json", b"[1, 2]")
    return generate(model, "Hello"), r"tokenizer_config\.json"


@bad
def a_file_that_is_not_what_the_manifest_says(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    truncate(model / "model.onnx.data", 1000)
    return generate(model, "Hello"), r"model\.onnx\.data"


@bad
def manifest_that_is_no_json(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    truncate(model / "qcompile.json", 100)
    return generate(model, "Hello"), r"qcompile\.json"


@bad
def manifest_of_the_future(shop: Workshop) -> Command:
    model = shop.copy(shop.lowered)
    edit_json(model / "qcompile.json", schema_version=999)
    return generate(model, "Hello"), r"qcompile\.json: .*999"


def _no_decoder(shop: Workshop) -> Path:
    model = shop.root / "plain.onnx"
    text = '<ir_version: 8, opset_import: ["" : 16]> g (float[1,8] x) => (float[1,8] y) { y = Relu (x) }'
    model.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return model


@bad
def verify_of_what_is_no_decoder(shop: Workshop) -> Command:
    return ["verify", _no_decoder(shop), shop.exported], r"plain\.onnx: graph 'g' has x, y: a decoder has"


def _meets_no_decoder(*command: object) -> Callable[[Workshop], Command]:
    def make(shop: Workshop) -> Command:
        model = shop.copy(shop.lowered)
        zeros = {"vocab_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "num_key_value_heads": 0}
        shape = {"model_type": "none", **zeros, "head_dim": 0, "max_position_embeddings": 0}
        edit_json(model / "qcompile.json", model=shape, files=[], config={})
        return [command[0], model, *command[1:]], r"/model: holds no decoder .* cannot generate tokens"

    return make


BAD["generate of what is no decoder"] = _meets_no_decoder("generate", "Hello")
BAD["plan of what is no decoder"] = _meets_no_decoder("plan", "--target", "ascend910b4")
