"""`qcompile generate` as a user types it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qcompile.cli import generate
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


def run(*arguments: object, stdin: bytes | str | None = None) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, ["generate", "--threads", "1", *words], input=stdin)


def run_json(*arguments: object, stdin: bytes | str | None = None) -> dict[str, Any]:
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def texts(record: dict[str, Any]) -> list[str]:
    return [completion["text"] for completion in record["completions"]]


def reference(model: Path, *prompts: str, system: str | None = None, **options: Any) -> list[str]:
    head = [] if system is None else [{"role": "system", "content": system}]
    params = SamplingParams(**{"max_new_tokens": 12, **options})
    with Engine(model, threads=1) as engine:
        conversations = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
        return [completion.text for completion in engine.chat(conversations, params)]


def test_one_prompt_streams(model: Path) -> None:
    result = run(model, "Hello", "--max-new-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout == reference(model, "Hello")[0] + "\n"
    assert re.fullmatch(
        r"\d+ prompt tokens, 12 new in \d+\.\d\d s; TTFT \d+ ms, decode [\d.]+ tokens/s; loaded in [\d.]+ s; "
        r"1 cut off by --max-new-tokens or the context\n",
        result.stderr,
    )


def test_without_streaming_the_text_is_the_same(model: Path) -> None:
    assert run(model, "Hello", "--no-stream", "--max-new-tokens", 12).stdout == reference(model, "Hello")[0] + "\n"


def test_text_is_shown_while_it_grows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed by the time the second piece comes is the first one."""
    shown: list[str] = []
    pieces: list[str] = []
    stream = Engine.stream
    monkeypatch.setattr(generate.click, "echo", lambda text="", nl=True, err=False: shown.append(text))

    def watched(self: Engine, *arguments: Any) -> Iterator[Delta]:
        for delta in stream(self, *arguments):
            assert "".join(shown) == "".join(pieces)
            pieces.append(delta.text)
            yield delta

    monkeypatch.setattr(Engine, "stream", watched)
    run(model, "Hello", "--max-new-tokens", 12)
    assert len(pieces) == 12


def test_several_prompts_are_one_batch(model: Path) -> None:
    expected = reference(model, "Hello", "你好", "x")
    result = run(model, "Hello", "你好", "x", "--max-new-tokens", 12)
    assert result.stdout == "".join(f"--- {i + 1}\n{text}\n" for i, text in enumerate(expected))
    assert "tokens/s together" in result.stderr


def test_json(model: Path) -> None:
    record = run_json(model, "Hello", "你好", "--max-new-tokens", 12, "--max-batch-size", 1)
    assert texts(record) == reference(model, "Hello", "你好")
    first = record["completions"][0]
    assert first["finish_reason"] == "length"
    assert len(first["token_ids"]) == first["num_new_tokens"] == 12
    assert record["stats"]["num_prompts"] == 2
    assert record["stats"]["num_new_tokens"] == 24
    assert record["stats"]["num_prompt_tokens"] == sum(c["num_prompt_tokens"] for c in record["completions"])
    assert record["stats"]["ttft_s"] > 0


def test_system_message(model: Path) -> None:
    expected = reference(model, "Hello", system="Be brief.")
    assert texts(run_json(model, "Hello", "--system", "Be brief.", "--max-new-tokens", 12)) == expected
    assert expected != reference(model, "Hello")


def test_raw(model: Path) -> None:
    with Engine(model, threads=1) as engine:
        expected = engine.generate("Hello", SamplingParams(max_new_tokens=12))[0].text
    assert texts(run_json(model, "Hello", "--raw", "--max-new-tokens", 12)) == [expected]


def test_a_base_model_takes_the_prompt_as_it_is(own_model: Path) -> None:
    edit_config(own_model, chat_template=None)
    plain, raw = (run(own_model, "Hello", "--max-new-tokens", 12, *more) for more in ((), ("--raw",)))
    assert plain.exit_code == 0
    assert plain.stdout == raw.stdout
    assert plain.stderr.startswith("note: no chat template (a base model): prompts are used as they are\n")
    assert "note:" not in raw.stderr
    result = run(own_model, "Hello", "--system", "x")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: --system: the model has no chat template (a base model)\n",
    )


class TestPromptSources:
    """Arguments, files, stdin."""

    def test_stdin(self, model: Path) -> None:
        expected = reference(model, "Hello\nworld")
        for arguments in ((), ("-",)):
            record = run_json(model, *arguments, "--max-new-tokens", 12, stdin="Hello\nworld\n")
            assert texts(record) == expected

    def test_a_text_file_is_one_prompt(self, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "prompt.txt"
        path.write_bytes("\ufeffHello\r\n\r\nworld\r\n".encode())
        record = run_json(model, "--prompt-file", path, "--max-new-tokens", 12)
        assert texts(record) == reference(model, "Hello\r\n\r\nworld")

    @pytest.mark.parametrize("name", ["prompts.jsonl", "PROMPTS.JSONL"])
    def test_a_jsonl_file_holds_one_prompt_per_line(self, model: Path, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        lines: list[Any] = [
            "Hello",
            {"prompt": "你好\u2028x", "id": 7},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}]},
            [{"role": "user", "content": "x"}],
        ]
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", "utf-8")
        record = run_json(model, "first", "--prompt-file", path, "--max-new-tokens", 12)
        assert texts(record) == [
            *reference(model, "first", "Hello", "你好\u2028x"),
            *reference(model, "Hello", system="s"),
            *reference(model, "x"),
        ]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": ', "not JSON: "),
            ("7", 'a string, {"prompt": text} or {"messages": [...]} is wanted'),
            ('{"text": "x"}', "is wanted"),
            ('{"messages": []}', "is wanted"),
            ('{"messages": ["x"]}', "is wanted"),
        ],
    )
    def test_a_bad_line_is_named(self, model: Path, tmp_path: Path, line: str, message: str) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(f'"fine"\n{line}\n', encoding="utf-8")
        result = run(model, "--prompt-file", path)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {path}:2: ")
        assert message in result.stderr

    def test_messages_need_a_chat_template(self, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text('[{"role": "user", "content": "x"}]', encoding="utf-8")
        result = run(model, "--raw", "--prompt-file", path)
        assert result.stderr == "Error: prompt 1 is a list of messages: that needs a chat template\n"

    def test_invalid_utf8(self, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "latin1.txt"
        path.write_bytes("héllo".encode("latin-1"))
        for arguments, stdin, name in (
            (["--prompt-file", path], None, path),
            (["-"], path.read_bytes(), "stdin"),
        ):
            result = run(model, *arguments, stdin=stdin)
            assert result.exit_code == 1
            assert result.stderr == (
                f"Error: {name}: not UTF-8: byte 0xe9 at offset 1; convert it first (iconv -t utf-8)\n"
            )

    @pytest.mark.parametrize("raw", [[], ["--raw"]])
    def test_an_argument_that_was_no_utf8(self, model: Path, raw: list[str]) -> None:
        result = run(model, "a\udce9", *raw)
        assert result.exit_code == 1
        assert re.match(r"Error: the prompt is not valid UTF-8: character \d+ is the stray byte", result.stderr)

    def test_files_that_are_not_there_or_empty(self, model: Path, tmp_path: Path) -> None:
        result = run(model, "--prompt-file", tmp_path / "nothing.txt")
        assert result.exit_code == 1
        assert "nothing.txt: cannot be read: No such file" in result.stderr
        (tmp_path / "empty.jsonl").write_text("\n")
        assert "no prompt in it" in run(model, "--prompt-file", tmp_path / "empty.jsonl").stderr

    def test_a_huge_file(self, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "huge.txt"
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
        result = run(model, "--prompt-file", path)
        assert result.exit_code == 1
        assert "that is no prompt" in result.stderr

    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_empty(self, model: Path, prompt: str) -> None:
        result = run(model, "x", prompt)
        assert (result.exit_code, result.stderr) == (1, "Error: prompt 2 is empty\n")
        assert run(model, stdin=b"").stderr == "Error: prompt 1 is empty\n"

    def test_no_prompt_on_a_terminal(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import io

        terminal = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("qcompile.cli.prompt_source.sys", type("sys", (), {"stdin": terminal}))
        result = run(model)
        assert result.exit_code == 2
        assert "no prompt: give a text" in result.stderr


class TestSampling:
    """Which options mean what."""

    def test_greedy_is_the_default_and_temperature_0(self, model: Path) -> None:
        expected = reference(model, "Hello")
        for options in ((), ("--temperature", 0), ("--temperature", 0, "--seed", 3)):
            assert texts(run_json(model, "Hello", "--max-new-tokens", 12, *options)) == expected

    def test_what_is_not_given_comes_from_the_model(self, model: Path) -> None:
        """tests/tiny_checkpoints writes temperature 0.7, top_k 20, top_p 0.8."""
        for options, changes in (
            (("--seed", 5), {"seed": 5}),
            (("--seed", 5, "--temperature", 1.5), {"seed": 5, "temperature": 1.5}),
            (("--seed", 5, "--top-k", 0, "--top-p", 1, "--min-p", 0.05), {"top_k": 0, "top_p": 1.0, "min_p": 0.05}),
            (("--sample", "--seed", 5, "--repetition-penalty", 1.2), {"repetition_penalty": 1.2}),
        ):
            params = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "seed": 5, **changes}
            expected = reference(model, "Hello", **params)
            assert texts(run_json(model, "Hello", "--max-new-tokens", 12, *options)) == expected

    def test_sample_alone_samples(self, model: Path) -> None:
        prompt = "def add(a, b):"  # after which no answer of the tiny model has more than a third of the draws
        runs = {texts(run_json(model, prompt, "--max-new-tokens", 12, "--sample"))[0] for _ in range(12)}
        assert len(runs) > 1

    def test_repetition_penalty_alone_stays_greedy(self, model: Path) -> None:
        expected = reference(model, "Hello", repetition_penalty=1.5)
        got = run_json(model, "Hello", "--max-new-tokens", 12, "--repetition-penalty", 1.5)
        assert texts(got) == expected
        assert expected != reference(model, "Hello")

    @pytest.mark.parametrize(
        "options",
        [
            ("--temperature", -1),
            ("--temperature", "nan"),
            ("--top-p", 0),
            ("--top-p", 1.2),
            ("--min-p", 2),
            ("--top-k", -2),
            ("--seed", -1),
            ("--repetition-penalty", 0),
            ("--max-new-tokens", 0),
            ("--max-new-tokens", "many"),
            ("--stop-id", -1),
            ("--threads", 0),
            ("--max-batch-size", 0),
            ("--template-arg", "novalue"),
            ("--template-arg", "1x=2"),
            ("--unknown",),
        ],
    )
    def test_usage_errors(self, model: Path, options: tuple[object, ...]) -> None:
        assert run(model, "Hello", *options).exit_code == 2

    def test_a_value_the_engine_refuses(self, model: Path) -> None:
        result = run(model, "Hello", "--stop", "")
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1

    def test_raw_and_system_exclude_each_other(self, model: Path) -> None:
        assert run(model, "Hello", "--raw", "--system", "x").exit_code == 2


class TestStopping:
    """Stop strings and ids."""

    def test_stop_strings(self, model: Path) -> None:
        whole = reference(model, "Hello", max_new_tokens=40, ignore_eos=False)[0]
        stop = whole[8:11]
        for more, end in (((), 0), (("--include-stop",), len(stop))):
            record = run_json(model, "Hello", "--max-new-tokens", 40, "--stop", stop, "--stop", "never\0", *more)
            assert texts(record) == [whole[: whole.find(stop) + end]]
            assert record["completions"][0]["stop_reason"] == stop

    def test_stop_ids(self, model: Path) -> None:
        ids = run_json(model, "Hello", "--max-new-tokens", 12)["completions"][0]["token_ids"]
        record = run_json(model, "Hello", "--stop-id", ids[4], "--max-new-tokens", 12)
        assert record["completions"][0]["token_ids"] == ids[: ids.index(ids[4]) + 1]
        assert record["completions"][0]["finish_reason"] == "stop"


def test_the_context(model: Path) -> None:
    result = run(model, "word " * 3000)
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: prompt 1 has \d+ tokens, the context holds 2048 with the answer; shorten it\n", result.stderr
    )
    result = run(model, "word " * 30, "--max-model-len", 20)
    assert "the context holds 20" in result.stderr
    assert "beyond the model's 2048 positions" in run(model, "x", "--max-model-len", 9999).stderr


def test_a_cache_that_grows_is_said(tmp_path: Path) -> None:
    directory = compile_tiny(tmp_path, max_position_embeddings=16384)
    result = run(directory, "word " * 2500, "--max-new-tokens", 3)
    assert result.exit_code == 0
    assert "note: KV cache grows to 16384 tokens per slot (up to 16384)\n" in result.stderr


def test_template_variables(own_model: Path) -> None:
    rewrite(own_model, "chat_template.jinja", b"{{ messages[0].content }}{{ 'on' if think else 'off' }}{{ style }}")
    with Engine(own_model, threads=1) as engine:
        expected = engine.generate("Helloonloud", SamplingParams(max_new_tokens=12))[0].text
    record = run_json(
        own_model, "Hello", "--template-arg", "think=true", "--template-arg", "style=loud", "--max-new-tokens", 12
    )
    assert texts(record) == [expected]


def test_a_template_that_raises(own_model: Path) -> None:
    rewrite(own_model, "chat_template.jinja", b"{{ raise_exception('no system role') }}")
    result = run(own_model, "Hello")
    assert result.exit_code == 1
    path = own_model / "chat_template.jinja"
    assert result.stderr == f"Error: {path}: the template raised: no system role\n"


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    result = run(tmp_path, "Hello")
    assert result.exit_code == 1
    assert "no qcompile.json" in result.stderr
    assert "Traceback" not in result.output
