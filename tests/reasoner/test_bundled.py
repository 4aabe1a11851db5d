"""The bundled weights: what they are, that they are whole, and that they stop by themselves."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from models.reasoner import data
from models.reasoner.problem import TYPES
from qcompile.evaluate import check_answer, read_cases
from qcompile.evaluate.formats import OFFICIAL_GATE

WEIGHTS = Path(data.__file__).parent / "weights"
RUNS = WEIGHTS.parent / "runs"


def test_the_architecture_is_the_one_that_was_promised() -> None:
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    with safe_open(WEIGHTS / "model.safetensors", framework="numpy") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        dtypes = {weights.get_slice(name).get_dtype() for name in shapes}
    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values()]
    assert 10e6 < sum(sizes) < 20e6
    assert dtypes == {"BF16"}
    assert "lm_head.weight" not in shapes
    assert "model.layers.0.self_attn.q_norm.weight" in shapes


def test_the_repository_carries_at_most_32_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 32e6


def test_the_tokenizer_has_qwens_special_tokens_and_takes_tags_as_one() -> None:
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    assert 4096 <= tokenizer.get_vocab_size() <= 8192
    for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>"):
        assert tokenizer.encode(text).ids == [tokenizer.token_to_id(text)]
    text = "中文 and 12.5\n\tdef f(x): return x ** 2"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    generation = json.loads((WEIGHTS / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_it_solves_problems_and_stops_by_itself() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from models.reasoner.architectures import load_model, load_tokenizer
    from models.reasoner.generate import Generator
    from models.reasoner.prompts import messages

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at this size
    cases, _ = read_cases(WEIGHTS.parent / "test.jsonl")
    asked = [case for kind in TYPES for case in [case for case in cases if case.type == kind][5:6]]
    tokenizer = load_tokenizer(WEIGHTS)
    generator = Generator(load_model(WEIGHTS), {tokenizer.eos_token_id}, device="cpu", dtype=torch.float32)
    texts = [tokenizer.apply_chat_template(messages(c), tokenize=False, add_generation_prompt=True) for c in asked]
    answers = generator.generate(tokenizer(texts, add_special_tokens=False)["input_ids"], max_new_tokens=128)
    torch.set_num_threads(before)
    assert all(answer[-1] == tokenizer.eos_token_id for answer in answers)
    contents = tokenizer.batch_decode(answers, skip_special_tokens=True)
    assert all(OFFICIAL_GATE.match(content) for content in contents)
    right = [check_answer(case, content).is_correct for case, content in zip(asked, contents, strict=True)]
    assert sum(right) >= 3


def test_the_card_tells_what_the_scores_say() -> None:
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    scores = json.loads((RUNS / "scores.json").read_text())
    assert set(scores) == {"sft", "teacher", "distill", "grpo"}
    rounds = json.loads((RUNS / "grpo_rounds.json").read_text())
    assert len(rounds) == 35
    for entries in [*scores.values(), *(run["scores"] for run in rounds)]:
        for entry in (one for one in entries if one["set"] != "validation"):
            low, high = (round(100 * bound, 1) for bound in entry["interval"])
            assert f"{low:.1f}-{high:.1f}" in card
            assert f"{entry['correct']} ({entry['correct'] / 2:.1f} %)" in card
