"""GGUF files: values, config and tokenizer out of them, the embedding stored twice, and damaged files."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qcompile.artifact import load_model
from qcompile.errors import ExportError, QCompileError
from qcompile.export.checkpoint import EMBEDDING, HEAD
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.export.gguf_header import read_header
from qcompile.export.gguf_source import open_gguf
from qcompile.tensors import DataFile
from tests.export.onnx_decoder import OnnxDecoder, steps_of
from tests.export.tiny_gguf import gguf_config, write_gguf
from tests.tiny_checkpoints import CHAT_TEMPLATE, build_tokenizer, write_tiny_checkpoint

KINDS = ("F32", "F16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
TEXTS = (
    "What is the capital of France? <|im_start|>user\nhi<|im_end|>",
    "你好，世界！ 12+30=42\n\n\tdef f(x):\n        return x\r\n",
    "I'll don't WE'RE  é e\u0301 ﬁ 🙂 \u200d <tool_call>{}</tool_call>   ",
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", gguf_config("qwen2", num_hidden_layers=1), kinds={"proj.weight": "Q8_0"})
    return tmp_path / "tiny.gguf"


def whole(tensor: Any) -> np.ndarray:
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    return np.asarray(tensor.block(slice(0, rows), slice(0, tensor.shape[-1])).reshape(tensor.shape))


# values


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_what_the_gguf_package_dequantizes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, gguf_config("qwen2"), kinds={"proj.weight": kind, "embed_tokens.weight": kind})
    opened = open_gguf(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.k_proj", "attn_k")):
        tensor = opened.tensors[f"model.layers.1.{name}.weight"]
        reference = stored[f"blk.1.{theirs}.weight"]
        wanted = gguf.quants.dequantize(reference.data, reference.tensor_type)
        assert tensor.stored_as == kind
        np.testing.assert_array_equal(whole(tensor), wanted)
        multiple = tensor.column_multiple
        part = tensor.block(slice(3, 20), slice(multiple, 64 + multiple))
        np.testing.assert_array_equal(part, wanted[3:20, multiple : 64 + multiple])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"])
def test_block_formats_the_package_cannot_write(tmp_path: Path, kind: str) -> None:
    """Random blocks (finite scales) of formats that llama.cpp writes and the package only reads."""
    path = tmp_path / "tiny.gguf"
    code = gguf.GGMLQuantizationType[kind]
    length, size_bytes = gguf.GGML_QUANT_SIZES[code]
    blocks = np.random.default_rng(0).integers(0, 60, (160, 512 // length * size_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tensor("blk.0.ffn_down.weight", blocks, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from qcompile.export.gguf_source import GgufTensor

    file = DataFile(path)
    tensor = GgufTensor(file, "w", read_header(file).entries["blk.0.ffn_down.weight"])
    wanted = gguf.quants.dequantize(blocks, code)
    assert tensor.shape == (160, 512)
    np.testing.assert_array_equal(whole(tensor), wanted)
    np.testing.assert_array_equal(tensor.block(slice(7, 9), slice(256, 512)), wanted[7:9, 256:])


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_the_same_logits_as_the_hugging_face_directory(tmp_path: Path, model_type: str) -> None:
    config = gguf_config(model_type)
    write_gguf(tmp_path / "tiny.gguf", config)
    source = write_tiny_checkpoint(tmp_path / "hf", **config, tokenizer=False)
    decoders = []
    for name, path in (("a", tmp_path / "tiny.gguf"), ("b", source)):
        export_checkpoint(str(path), tmp_path / name)
        decoders.append(OnnxDecoder(tmp_path / name / "model.onnx", open_gguf(tmp_path / "tiny.gguf").config))
    for step in steps_of([[1] * 5, [0, 1, 1, 1, 1]], (1,), vocab=512):
        np.testing.assert_array_equal(decoders[0].step(*step), decoders[1].step(*step))


# config


def test_config_out_of_metadata(tmp_path: Path) -> None:
    for model_type in ("qwen2", "qwen3"):
        write_gguf(tmp_path / "tiny.gguf", gguf_config(model_type))
        config = open_gguf(tmp_path / "tiny.gguf").config
        assert config.model_type == model_type
        assert config.rms_norm_eps == 1e-6
        assert config.rope_parameters.rope_theta == 1e6
        assert config.head_dim == {"qwen2": 64, "qwen3": 32}[model_type]
        assert config.attention_bias == (model_type == "qwen2")
        assert config.tie_word_embeddings == (model_type == "qwen2")
        assert config.eos_token_ids == (402,)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"qwen2.rope.scaling.type": "none"}, ("default", None)),
        ({"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 2.0}, ("linear", 2.0)),
        (
            {
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 4.0,
                "qwen2.rope.scaling.original_context_length": 512,
            },
            ("yarn", 4.0),
        ),
    ],
)
def test_rope_scaling_out_of_metadata(tmp_path: Path, fields: dict[str, Any], wanted: tuple[str, Any]) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), fields=fields)
    rope = open_gguf(tmp_path / "tiny.gguf").config.rope_parameters
    assert (rope.rope_type, rope.factor) == wanted


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"general.architecture": "llama"}, "architecture 'llama'"),
        ({"qwen2.block_count": None}, r"'qwen2\.block_count' is missing"),
        ({"qwen2.attention.layer_norm_rms_epsilon": None}, "'rms_norm_eps' is missing"),
        ({"qwen2.expert_count": 8}, "mixture of experts"),
        ({"qwen2.attention.sliding_window": 128}, "sliding_attention"),
        ({"qwen2.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"qwen2.block_count": 3}, "is missing"),
        ({"qwen2.attention.head_count": "four"}, "'num_attention_heads' is 'four'"),
        ({"split.count": 3}, "is one part of 3"),
        ({"general.architecture": ["qwen2"]}, r"architecture \['qwen2'\]"),
        ({"split.count": [1, 2]}, r"is one part of \[1, 2\]"),
        ({"tokenizer.ggml.pre": ["qwen2"]}, r"pre-tokenizer \['qwen2'\] is not known"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe' is not known"),
        ({"tokenizer.ggml.tokens": ["a"]}, "one entry per token"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "not two tokens"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_config("qwen2"), fields=fields)
    with pytest.raises(ExportError, match=reason):
        export_checkpoint(str(tmp_path / "tiny.gguf"), tmp_path / "out")


# tokenizer


def test_the_tokenizer_is_the_one_it_was_made_from(small: Path, tmp_path: Path) -> None:
    export_checkpoint(str(small), tmp_path / "out")
    ours, original = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), build_tokenizer()
    for text in TEXTS:
        encoded = ours.encode(text)
        assert encoded.ids == original.encode(text).ids
        assert ours.decode(encoded.ids, skip_special_tokens=False) == original.decode(
            encoded.ids, skip_special_tokens=False
        )
        assert ours.decode(encoded.ids) == original.decode(encoded.ids)
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 400, "eos_token_id": [402, 400], "pad_token_id": 400}
    record = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert record["eos_token"] == "<|im_end|>"
    assert record["added_tokens_decoder"]["403"]["special"] is False
    assert "[PAD405]" not in ours.get_vocab()


@pytest.mark.torch
def test_transformers_reads_the_tokenizer(small: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_checkpoint(str(small), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == build_tokenizer().encode(text).ids
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_a_bos_token_is_put_in_front_where_the_model_wants_it(tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.pre": "deepseek-r1-qwen"}
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), fields=fields)
    export_checkpoint(str(tmp_path / "tiny.gguf"), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("hi").ids == [400, *build_tokenizer().encode("hi").ids]
    assert tokenizer.encode("hi", add_special_tokens=False).ids == build_tokenizer().encode("hi").ids


def test_a_file_without_tokenizer_or_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), tokenizer=False)
    opened = open_gguf(tmp_path / "tiny.gguf")
    assert opened.files == {}
    assert "holds no tokenizer" in opened.notes[0]
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), fields={"tokenizer.chat_template": None})
    assert "no chat template" in open_gguf(tmp_path / "tiny.gguf").notes[0]


def test_an_end_of_text_beyond_the_vocabulary_is_noted(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), fields={"tokenizer.ggml.eos_token_id": 512})
    assert "'eos_token_id' has 512, beyond the model's 512 tokens" in open_gguf(tmp_path / "tiny.gguf").notes[0]


# the embedding stored twice


@pytest.mark.parametrize(("embedding", "head", "kept"), [("Q5_0", "Q8_0", HEAD), ("F16", "Q8_0", EMBEDDING)])
def test_the_finer_copy_is_kept_for_both(tmp_path: Path, embedding: str, head: str, kept: str) -> None:
    config = gguf_config()
    matrix = write_gguf(tmp_path / "tiny.gguf", config)[EMBEDDING]
    kinds = {"embed_tokens.weight": embedding, "lm_head.weight": head}
    write_gguf(tmp_path / "tiny.gguf", config, kinds=kinds, head=matrix)
    result = export_checkpoint(str(tmp_path / "tiny.gguf"), tmp_path / "out")
    finer = {HEAD: head, EMBEDDING: embedding}[kept]
    assert f"the {finer} copy is used for both" in result.notes[0]
    assert result.manifest.source["embeddings"] == "tied"
    assert result.manifest.config["tie_word_embeddings"] is True
    initializers = load_model(tmp_path / "out" / "model.onnx").graph.initializers
    assert HEAD not in initializers
    stored = initializers[EMBEDDING].const_value
    assert stored is not None
    kind = gguf.GGMLQuantizationType[finer]
    wanted = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
    np.testing.assert_array_equal(stored.numpy(), wanted)


def test_no_tie_keeps_both(tmp_path: Path) -> None:
    matrix = write_gguf(tmp_path / "tiny.gguf", gguf_config())[EMBEDDING]
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), kinds={"embed_tokens.weight": "Q5_0"}, head=matrix)
    result = export_checkpoint(str(tmp_path / "tiny.gguf"), tmp_path / "out", tie=False)
    assert result.notes == ()
    assert result.manifest.config["tie_word_embeddings"] is False
    initializers = load_model(tmp_path / "out" / "model.onnx").graph.initializers
    head, embedding = initializers[HEAD].const_value, initializers[EMBEDDING].const_value
    assert head is not None
    assert embedding is not None
    np.testing.assert_array_equal(head.numpy().T, matrix)
    assert 0 < np.abs(embedding.numpy() - matrix).max() < 0.5


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    head = np.random.default_rng(9).standard_normal((512, 256), np.float32)
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), head=head)
    opened = open_gguf(tmp_path / "tiny.gguf")
    assert not opened.ties_head
    np.testing.assert_array_equal(whole(opened.head()), head)


def test_a_head_with_a_nan_is_not_tied(tmp_path: Path) -> None:
    head = np.random.default_rng(9).standard_normal((512, 256), np.float32)
    head[0, 0] = np.nan
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), head=head)
    assert not open_gguf(tmp_path / "tiny.gguf").ties_head


def test_an_embedding_and_head_of_rank_1_are_told(tmp_path: Path) -> None:
    flat = np.ones(512 * 256, np.float32)
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), tokenizer=False, head=flat, others={EMBEDDING: flat})
    with pytest.raises(ExportError, match=r"'model\.embed_tokens\.weight' has shape \[131072\]"):
        export_checkpoint(str(tmp_path / "tiny.gguf"), tmp_path / "out")


def test_two_names_of_one_tensor_are_told(tmp_path: Path) -> None:
    zeros = {"blk.00.attn_q.weight": np.zeros((256, 256), np.float32)}
    write_gguf(tmp_path / "tiny.gguf", gguf_config(), others=zeros)
    with pytest.raises(ExportError, match=r"'blk\.00\.attn_q\.weight' is a second 'model\.layers\.0\."):
        open_gguf(tmp_path / "tiny.gguf")


# the header, and damage


def test_the_header_equals_the_package_reader(small: Path) -> None:
    header = read_header(DataFile(small))
    theirs = gguf.GGUFReader(small)
    for key, value in header.fields.items():
        assert theirs.fields[key].contents() == value
    assert {name for name in theirs.fields if not name.startswith("GGUF.")} == set(header.fields)
    for tensor in theirs.tensors:
        entry = header.entries[tensor.name]
        assert entry.offset == tensor.data_offset
        assert entry.size_bytes == tensor.n_bytes
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))


def test_every_truncation_is_told(small: Path, tmp_path: Path) -> None:
    raw = small.read_bytes()
    header_end = min(entry.offset for entry in read_header(DataFile(small)).entries.values())
    lengths = [*range(64), *range(64, header_end, 997), header_end, len(raw) // 2, len(raw) - 1]
    for length in lengths:
        small.write_bytes(raw[:length])
        with pytest.raises(ExportError, match=r"tiny\.gguf.*(truncated|is not a GGUF file|can hold)") as caught:
            export_checkpoint(str(small), tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"GGML", "is not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1 GGUF is not read"),
        (4, struct.pack(">I", 3), "big-endian GGUF is not read"),
        (8, struct.pack("<Q", 1 << 60), "more than the file"),
        (16, struct.pack("<Q", 1 << 60), "more than the file"),
        (24, struct.pack("<Q", 1 << 40), "text of 1099511627776 bytes"),
        (24 + 8, b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_corrupt_header(small: Path, offset: int, content: bytes, reason: str) -> None:
    raw = bytearray(small.read_bytes())
    raw[offset : offset + len(content)] = content
    small.write_bytes(raw)
    with pytest.raises(ExportError, match=reason):
        open_gguf(small)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 24_000), value=st.binary(min_size=1, max_size=8))
def test_no_damage_in_the_header_crashes(small: Path, position: int, value: bytes) -> None:
    pristine = small.read_bytes()
    damaged = bytearray(pristine)
    damaged[position : position + len(value)] = value
    small.write_bytes(damaged[: len(pristine)])
    try:
        open_gguf(small)
    except QCompileError as error:
        line = str(error)
        assert line, "an error without a message"
    finally:
        small.write_bytes(pristine)
