"""`qcompile chat`, driven through pipes."""

import json
import os
import re
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qcompile.cli.main import cli
from qcompile.runtime import Delta, Engine, SamplingParams
from tests.runtime.test_tokenizer import edit_config, rewrite
from tests.runtime.toy_compiler import compile_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    return compile_tiny(tmp_path)


def run(model: Path, stdin: str | bytes, *options: str) -> Result:
    arguments = ["chat", str(model), "--threads", "1", "--max-new-tokens", "10", *options]
    return CliRunner().invoke(cli, arguments, input=stdin)


def answers(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


class Reference:
    """The conversation as it should go, each turn computed from nothing."""

    def __init__(self, model: Path, system: str | None = None) -> None:
        self.engine = Engine(model, threads=1, reuse_prefixes=False)
        self.turns = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str) -> str:
        self.turns.append({"role": "user", "content": text})
        answer = self.engine.chat(self.turns, SamplingParams(max_new_tokens=10))[0].text
        self.turns.append({"role": "assistant", "content": answer})
        return answer


def test_a_conversation(model: Path) -> None:
    got = answers(run(model, "Hello\n\nAnd now?\nThe last one\n", "--greedy", "--json"))
    reference = Reference(model)
    assert [a["text"] for a in got] == [reference.ask(text) for text in ("Hello", "And now?", "The last one")]


def test_only_what_is_new_is_computed(model: Path) -> None:
    got = answers(run(model, "Hello\nAnd now?\nThe last one\n", "--greedy", "--json"))
    assert got[0]["num_reused_tokens"] == 0
    for before, after in pairwise(got):  # where a turn's texts meet, tokens may merge
        assert after["num_reused_tokens"] >= before["num_prompt_tokens"] - 2
        assert after["num_prompt_tokens"] - after["num_reused_tokens"] < 40


def test_text_and_figures(model: Path) -> None:
    result = run(model, "Hello\n", "--greedy")
    assert result.stdout == Reference(model).ask("Hello") + "\n"
    assert re.fullmatch(
        r"\[\d+ prompt tokens, 0 from the cache; 10 new, TTFT \d+ ms, [\d.]+ tokens/s, "
        r"cut off by --max-new-tokens or the context\]\n",
        result.stderr,
    )


def test_commands(model: Path) -> None:
    script = "Hello\n/system Be brief.\nAnd?\n/clear\nHello\n/system\n/what\n/exit\nnever read\n"
    result = run(model, script, "--greedy", "--json")
    first = Reference(model)
    hello = first.ask("Hello")
    second = Reference(model, "Be brief.")
    second.turns += first.turns
    assert [a["text"] for a in answers(result)] == [
        hello,
        second.ask("And?"),
        Reference(model, "Be brief.").ask("Hello"),
    ]
    assert "system message set" in result.stderr
    assert "the conversation is forgotten" in result.stderr
    assert "no system message" in result.stderr
    assert "/clear forgets the conversation" in result.stderr


def test_the_system_option(model: Path) -> None:
    got = answers(run(model, "Hello\n", "--greedy", "--json", "--system", "Be brief."))
    assert got[0]["text"] == Reference(model, "Be brief.").ask("Hello")


def test_answers_are_sampled_as_the_model_advises(model: Path) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=0.7, top_k=20, top_p=0.8, seed=3)
    with Engine(model, threads=1) as engine:
        expected = engine.chat([{"role": "user", "content": "Hello"}], params)[0].text
    assert answers(run(model, "Hello\n", "--seed", "3", "--json"))[0]["text"] == expected
    seen: set[str] = set()
    for _ in range(40):  # the likeliest answer comes up six times in ten
        seen.add(answers(run(model, "Hello\n", "--json"))[0]["text"])
        if len(seen) > 1:
            break
    assert len(seen) > 1


def test_an_interrupt_ends_the_answer_not_the_conversation(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Engine.stream
    calls = 0

    def interrupted(self: Engine, *arguments: Any) -> Iterator[Delta]:
        nonlocal calls
        calls += 1
        for position, delta in enumerate(stream(self, *arguments)):
            if calls == 1 and position == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield delta

    monkeypatch.setattr(Engine, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = run(model, "Hello\nAnd now?\n", "--greedy")
    assert result.exit_code == 0
    assert "[interrupted]" in result.stderr
    monkeypatch.undo()
    with Engine(model, threads=1) as engine:
        turns = [{"role": "user", "content": "Hello"}]
        cut = engine.chat(turns, SamplingParams(max_new_tokens=4))[0].text
        turns += [{"role": "assistant", "content": cut}, {"role": "user", "content": "And now?"}]
        then = engine.chat(turns, SamplingParams(max_new_tokens=10))[0].text
    assert result.stdout == f"{cut}\n{then}\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_question_beyond_the_context_is_not_taken(model: Path) -> None:
    result = run(model, f"Hello\n{'word ' * 3000}\nAnd now?\n", "--greedy", "--json")
    reference = Reference(model)
    assert [a["text"] for a in answers(result)] == [reference.ask("Hello"), reference.ask("And now?")]
    assert re.search(r"Error: prompt 1 has \d+ tokens, the context holds 2048", result.stderr)
    assert "/clear makes room" in result.stderr


def test_a_template_that_raises_ends_no_conversation(own_model: Path) -> None:
    template = b"{% if 'bad' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}x"
    rewrite(own_model, "chat_template.jinja", template)
    result = run(own_model, "bad\ngood\n", "--greedy", "--json")
    assert len(answers(result)) == 1
    assert "the template raised: no" in result.stderr


def test_invalid_utf8_on_stdin(model: Path) -> None:
    result = run(model, b"Hello\n\xff\xfe\n", "--greedy", "--json")
    assert "Traceback" not in result.output
    assert "not valid UTF-8" in result.stderr


def test_a_base_model_cannot_chat(own_model: Path) -> None:
    edit_config(own_model, chat_template=None)
    result = run(own_model, "Hello\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "no chat template (a base model?); `qcompile generate --raw` continues a text" in result.stderr


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    result = run(tmp_path, "Hello\n")
    assert result.exit_code == 1
    assert "no qcompile.json" in result.stderr
