"""The generator of training and scoring: what moves rows about must not change what they say."""

from itertools import islice
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models.reasoner import corpus, generate  # noqa: E402
from models.reasoner.architectures import load_model, load_tokenizer  # noqa: E402
from models.reasoner.data import problems  # noqa: E402
from models.reasoner.generate import Generator  # noqa: E402

pytestmark = pytest.mark.torch
WEIGHTS = Path(generate.__file__).with_name("weights")
MOST = 90


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at this size
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return load_model(WEIGHTS).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(WEIGHTS)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    """Thirteen problems, whose solutions differ in length."""
    asked = islice(problems(5, "train", hard_share=0.3), 13)
    return tokenizer([corpus.chat_text(tokenizer, p) for p in asked], add_special_tokens=False)["input_ids"]


@pytest.fixture
def generator(model, tokenizer) -> Generator:
    return Generator(model, {tokenizer.eos_token_id}, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def greedy(model, tokenizer, prompts) -> list[list[int]]:
    whole = Generator(model, {tokenizer.eos_token_id}, device="cpu", dtype=torch.float32)
    return whole.generate(prompts, max_new_tokens=MOST)


@pytest.mark.filterwarnings("ignore")
def test_greedy_texts_are_those_of_transformers(model, tokenizer, prompts, greedy) -> None:
    for prompt, row in list(zip(prompts, greedy, strict=True))[:4]:
        wanted = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=MOST,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert row == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("fewest", "wanted"), [(1, {13, 6}), (7, {13})])
def test_rows_that_move_together_go_on_as_before(generator, prompts, greedy, fewest, wanted, monkeypatch) -> None:
    assert len({len(row) for row in greedy}) > 5
    monkeypatch.setattr(generate, "_FEWEST_ROWS", fewest)
    monkeypatch.setattr(generate, "_CHECK_EVERY", 3)
    sizes = set()
    run = generator._run
    monkeypatch.setattr(generator, "_run", lambda batch, rows, *rest: sizes.add(rows) or run(batch, rows, *rest))
    assert generator.generate(prompts, max_new_tokens=MOST) == greedy
    assert sizes == wanted


def test_a_prompt_in_several_rows_is_read_once_and_sampled_for_each(generator, prompts, greedy, monkeypatch) -> None:
    read = []
    prefill = generate.cached_forward.prefill
    monkeypatch.setattr(
        generate.cached_forward,
        "prefill",
        lambda model, ids, caches: read.append(len(ids)) or prefill(model, ids, caches),
    )
    repeated = [prompts[0]] * 3 + [prompts[1]] + [prompts[0]]
    rows = generator.generate(repeated, max_new_tokens=MOST)
    assert read == [2]
    assert rows == [greedy[0]] * 3 + [greedy[1], greedy[0]]
    sampled = generator.generate(repeated, max_new_tokens=MOST, temperature=3.0, seed=4)
    assert len({tuple(row) for row in sampled}) == 5
    assert sampled == generator.generate(repeated, max_new_tokens=MOST, temperature=3.0, seed=4)


@pytest.mark.parametrize("new", [1, 2, 17, 33])
def test_no_more_tokens_than_asked(generator, prompts, greedy, new) -> None:
    rows = generator.generate(prompts, max_new_tokens=new, rows=4)
    assert rows == [row[:new] for row in greedy]
