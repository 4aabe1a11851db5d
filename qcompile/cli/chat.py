"""`qcompile chat`: talk with a compiled model."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from qcompile.cli.given_path import GivenPath
from qcompile.cli.runtime_notes import runtime_notes
from qcompile.cli.sampling_options import sampling_options, sampling_params, template_variables
from qcompile.cli.simulated_device import device_for, without_times
from qcompile.runtime.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from qcompile.runtime import Completion, Engine, SamplingParams

_HELP = "/clear forgets the conversation, /system TEXT sets the system message, /exit leaves (so does Ctrl-D)"


@click.command("chat")
@click.argument("directory", metavar="DIR", type=GivenPath())
@click.option("--system", help="System message of the conversation.")
@click.option("--greedy", is_flag=True, help="Always take the most likely token.")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per answer.")
def command(directory: Path, system: str | None, *, greedy: bool, as_json: bool, **options: Any) -> None:
    """Talk with the compiled model in DIR.

    Answers are sampled as the model's generation_config.json advises, unless --greedy or --temperature 0 is
    given. Ctrl-C interrupts an answer, Ctrl-D leaves. /clear, /system TEXT and /exit are commands. The
    conversation stays in the KV cache: each turn computes only what is new.
    """
    variables = template_variables(options["template_args"])
    if greedy:
        options["temperature"] = 0.0
    from qcompile.runtime import Engine

    with (
        runtime_notes(),
        device_for(directory, options["threads"]) as simulated,
        Engine(directory, options["threads"], 1, options["max_model_len"]) as engine,
    ):
        if not engine.tokenizer.has_chat_template:
            raise TokenizerError(
                f"{directory}: no chat template (a base model?); `qcompile generate --raw` continues a text"
            )
        params = sampling_params(engine, options, sample=True)
        _Chat(engine, params, system, variables, as_json=as_json, is_simulated=simulated is not None).run()


class _Chat:
    """One conversation on the terminal (or on pipes, when stdin is not one)."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None,
        variables: dict[str, Any],
        *,
        as_json: bool,
        is_simulated: bool = False,
    ) -> None:
        self._engine = engine
        self._params = params
        self._system = system
        self._variables = variables
        self._as_json = as_json
        self._is_simulated = is_simulated
        self._turns: list[dict[str, str]] = []
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def run(self) -> None:
        """Read lines and answer them until the input ends."""
        if sys.stdin.isatty():
            self._say(_HELP)
        while True:
            line = self._read()
            if line is None:
                return
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line.strip():
                self._answer(line)

    def _read(self) -> str | None:
        try:
            if sys.stdin.isatty():
                import readline  # noqa: F401  (gives input() history and editing)

                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo()
            return ""
        except UnicodeDecodeError as error:
            self._say(f"Error: stdin is not valid UTF-8: byte {error.object[error.start]:#04x}")
            return None

    def _obey(self, line: str) -> bool:
        """Carry out a command; False means leave."""
        name, _, argument = line.partition(" ")
        if name in {"/exit", "/quit", "/bye"}:
            return False
        if name == "/clear":
            self._turns.clear()
            self._say("the conversation is forgotten")
        elif name == "/system":
            self._system = argument.strip() or None
            self._say("system message set" if self._system else "no system message")
        else:
            self._say(_HELP)
        return True

    def _answer(self, line: str) -> None:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        question = {"role": "user", "content": line}
        try:
            ids = self._engine.encode_chat([*system, *self._turns, question], **self._variables)
            text, completion = self._stream(ids)
        except (RequestError, TokenizerError) as error:
            self._say(f"Error: {error}")
            if self._turns:
                self._say("the question was not taken; /clear makes room")
            return
        self._turns += [question, {"role": "assistant", "content": text}]
        self._report(text, completion)

    def _stream(self, ids: list[int]) -> tuple[str, Completion | None]:
        """Generate and show one answer; None for the completion if Ctrl-C cut it short."""
        pieces: list[str] = []
        with _interruptible() as interrupted:
            deltas = self._engine.stream([ids], self._params)
            for delta in deltas:
                pieces.append(delta.text)
                if not self._as_json:
                    click.echo(delta.text, nl=False)
                if delta.completion is not None:
                    return "".join(pieces), delta.completion
                if interrupted:
                    break
            deltas.close()
        return "".join(pieces), None

    def _report(self, text: str, completion: Completion | None) -> None:
        if self._as_json:
            record = completion.as_dict() if completion else {"text": text, "finish_reason": "abort"}
            if self._is_simulated:
                record = {**without_times(record), "simulated": True}
            click.echo(json.dumps(record, ensure_ascii=False))
            return
        click.echo()
        if completion is None:
            self._say("[interrupted]")
            return
        cut = ", cut off by --max-new-tokens or the context" if completion.finish_reason == "length" else ""
        speed = f"TTFT {completion.ttft_s * 1e3:.0f} ms, {completion.tokens_per_s:.1f} tokens/s"
        self._say(
            f"[{completion.num_prompt_tokens} prompt tokens, {completion.num_reused_tokens} from the cache; "
            f"{len(completion.token_ids)} new, {'simulated' if self._is_simulated else speed}{cut}]"
        )

    def _say(self, text: str) -> None:
        self._errors.print(text, style="dim", markup=False)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Let the first Ctrl-C only fill the list that is yielded, so that a step ends in order."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: Ctrl-C does not come here
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)
