"""ModelConfig and rope parameters: both spellings, defaults, and everything that must be refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.errors import ExportError
from qcompile.model_config import ModelConfig, read_json_object
from qcompile.rope import RopeParameters
from tests.tiny_checkpoints import tiny_config

WHERE = "some/config.json"
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    YARN,
    YARN | {"attention_factor": 0.7},
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    YARN | {"mscale": 0.707, "mscale_all_dim": 1.1},
    YARN | {"truncate": False},
    {"rope_type": "yarn", "factor": 1.0},
]


def parse(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(config, WHERE)


def test_qwen2_in_its_own_words() -> None:
    config = parse(tiny_config("qwen2"))
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (64, 2, 16)
    assert config.attention_bias
    assert not config.output_bias
    assert not config.qk_norm
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (402,)
    assert config.rope_parameters == RopeParameters("default", 1e6)


def test_qwen3_has_its_own_head_dim_and_no_bias() -> None:
    config = parse(tiny_config("qwen3"))
    assert config.head_dim == 32
    assert config.qk_norm
    assert not config.attention_bias
    assert parse(tiny_config("qwen3", attention_bias=True)).output_bias
    assert parse(tiny_config("qwen3", head_dim=None)).head_dim == 128


def test_deepseek_distill_is_a_qwen2() -> None:
    config = tiny_config("qwen2", tie_word_embeddings=False, num_attention_heads=4, torch_dtype="bfloat16")
    config |= {"attention_dropout": 0.0, "use_mrope": False, "max_window_layers": 21, "sliding_window": 4096}
    parsed = parse(config)
    assert parsed.model_type == "qwen2"
    assert parsed.torch_dtype == "bfloat16"


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_names_key_and_file(key: str) -> None:
    with pytest.raises(ExportError, match=f"{WHERE}.*'{key}' is missing"):
        parse(tiny_config("qwen2", **{key: None}))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"])
@pytest.mark.parametrize("value", [0, -1, "64", 1.5e400, True, [64], float("nan")])
def test_a_wrong_value_names_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ExportError, match=f"{WHERE}: '{key}' is"):
        parse(tiny_config("qwen2") | {key: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, "mixture of experts"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
        ({"num_experts": 8}, "mixture of experts"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "more than text"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "no language-model head"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM.*--via torch"),
        ({"architectures": None, "model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": None, "model_type": None}, "neither 'architectures' nor 'model_type'"),
        ({"architectures": "Qwen2ForCausalLM"}, "a list of one class name"),
        ({"model_type": "qwen3"}, "'model_type' is 'qwen3'"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"hidden_act": ["silu"]}, "'hidden_act'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "'num_key_value_heads' is 2"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "multiple of num_attention_heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "'use_sliding_window' is true"),
        ({"use_sliding_window": "yes"}, "'use_sliding_window' is 'yes'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1"),
        ({"eos_token_id": ["a"]}, "'eos_token_id'"),
    ],
)
def test_refused_with_what_and_why(change: dict[str, Any], reason: str) -> None:
    config = {key: value for key, value in (tiny_config("qwen2") | change).items() if value is not None}
    with pytest.raises(ExportError, match=reason) as caught:
        parse(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 128},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2},
        {"layer_types": ["full_attention", "full_attention"], "use_sliding_window": False},
        {"num_key_value_heads": None, "num_attention_heads": 4},
    ],
)
def test_a_sliding_window_that_is_not_in_use_is_fine(change: dict[str, Any]) -> None:
    assert parse(tiny_config("qwen2") | change).num_hidden_layers == 2


@pytest.mark.parametrize("rope", ROPES)
def test_both_rope_spellings_mean_the_same(rope: dict[str, Any]) -> None:
    old = {key: value for key, value in rope.items() if key != "rope_type"} | {"type": rope["rope_type"]}
    spelled_old = parse(tiny_config("qwen2", rope_theta=5e5) | {"rope_scaling": old})
    spelled_new = parse(tiny_config("qwen2", rope_theta=None) | {"rope_parameters": rope | {"rope_theta": 5e5}})
    per_layer = {"full_attention": rope | {"rope_theta": 5e5}}
    spelled_nested = parse(tiny_config("qwen2", rope_theta=None) | {"rope_parameters": per_layer})
    assert spelled_old == spelled_new == spelled_nested
    assert spelled_old.rope_parameters.rope_theta == 5e5


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_to_dict_reads_back_equal(rope: dict[str, Any], model_type: str) -> None:
    config = parse(tiny_config(model_type) | {"rope_scaling": rope})
    assert parse(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "rope type 'llama3' is not supported"),
        ({"rope_type": "longrope", "factor": 8.0}, "'longrope'"),
        ({"rope_type": ["yarn"]}, "not supported"),
        ({"rope_type": "linear"}, "no key 'factor'"),
        ({"rope_type": "dynamic"}, "no key 'factor'"),
        ({"rope_type": "linear", "factor": 0}, "'factor' is 0"),
        ({"rope_type": "linear", "factor": "2"}, "'factor' is '2'"),
        ({"rope_type": "yarn", "factor": float("inf")}, "'factor' is inf"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "multimodal rope"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial"),
        ({"rope_type": "default", "rope_theta": 0.5}, "'rope_theta' is 0.5"),
        (
            {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0.5},
            "'original_max_position_embeddings' is 0.5; an integer of at least 1",
        ),
        ({"rope_type": "yarn", "factor": 4, "truncate": "false"}, "'truncate' is 'false'; true or false is expected"),
        ("yarn", "an object is expected"),
    ],
)
def test_rope_parameters_refused(rope: Any, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        parse(tiny_config("qwen2") | {"rope_scaling": rope})


def test_yarn_without_factor_takes_the_ratio_of_lengths() -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    config = parse(tiny_config("qwen2", max_position_embeddings=2048) | {"rope_scaling": rope})
    assert config.rope_parameters.factor == 4.0
    assert math.isclose(config.rope_parameters.attention_scaling(), 0.1 * math.log(4) + 1)


@pytest.mark.torch
@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope["rope_type"] != "default"])
@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 64), (1e6, 128), (5e6, 80)])
def test_frequencies_equal_transformers(rope: dict[str, Any], theta: float, head_dim: int) -> None:
    pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    values = tiny_config("qwen3", head_dim=head_dim, rope_theta=theta) | {"rope_scaling": dict(rope)}
    ours = parse(values).rope_parameters
    theirs = transformers.Qwen3Config(**values)
    inv_freq, scaling = rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)
    # one unit in the last place: torch's vectorized pow is not correctly rounded
    np.testing.assert_allclose(ours.inv_freq(head_dim), inv_freq.numpy(), rtol=2e-7)
    assert math.isclose(ours.attention_scaling(), scaling, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b"[1]", "a JSON object is expected, got list"),
    ],
)
def test_a_damaged_config_file(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=f"config.json: {reason}"):
        ModelConfig.from_file(path)


def test_a_missing_or_huge_config_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json: missing"):
        ModelConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    with pytest.raises(ExportError, match="larger than 50 bytes"):
        read_json_object(tmp_path / "config.json", max_bytes=50)
