"""`qcompile serve`: a compiled model behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.cli.finite_range import WEEK_S, FiniteRange
from qcompile.cli.given_path import GivenPath
from qcompile.cli.runtime_notes import runtime_notes
from qcompile.cli.simulated_device import device_for
from qcompile.errors import ServeError
from qcompile.runtime.host import MAX_THREADS

if TYPE_CHECKING:
    from qcompile.serve.settings import ServeSettings

_ENVIRONMENT = "QCOMPILE_API_KEY"
_MAX_KEY_BYTES = 4096


@click.command("serve")
@click.argument("directory", metavar="DIR", type=GivenPath())
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than loopback need a token."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--model-name", help="What requests call the model [default: the directory's name].")
@click.option("--api-key-file", type=GivenPath(), help=f"File with the bearer token [default: ${_ENVIRONMENT}].")
@click.option(
    "--reasoning",
    type=click.Choice(("none", "think", "think-answer")),
    default="none",
    show_default=True,
    help="Give what stands in <think> as reasoning_content; think-answer also drops the <answer> tags.",
)
@click.option(
    "--max-batch-size", type=click.IntRange(1), default=16, show_default=True, help="Answers computed together."
)
@click.option(
    "--max-queue", type=click.IntRange(0), default=64, show_default=True, help="Answers that may wait; then 429."
)
@click.option(
    "--max-wait",
    type=FiniteRange(0, WEEK_S, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds to a first token; then 503.",
)
@click.option(
    "--deadline",
    type=FiniteRange(0, WEEK_S, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds to the end of an answer; then 504.",
)
@click.option(
    "--grace",
    type=FiniteRange(0, WEEK_S),
    default=60.0,
    show_default=True,
    help="Seconds to finish what was taken after SIGTERM.",
)
@click.option(
    "--max-body", type=click.IntRange(1), default=2 << 20, show_default=True, help="Bytes of a request; then 413."
)
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Computing threads [default: physical cores].")
@click.option("--max-model-len", type=click.IntRange(2), help="Most tokens, prompt and answer together.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when requests are taken.")
def command(directory: Path, host: str, port: int, *, as_json: bool, **options: Any) -> None:
    """Serve the compiled model in DIR over HTTP, as OpenAI's clients expect it.

    /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. Requests join and leave the running
    batch between two tokens. SIGTERM or Ctrl-C ends the server when the answers under way are complete; a second
    one ends it at once.
    """
    try:
        import qcompile.serve.server as serving
    except ImportError as error:
        raise ServeError(f"{error.name} is not installed: pip install '.[serve]' in qcompile's checkout") from None
    from qcompile.runtime import Engine

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time; the cores are the engine's
    settings = _settings(directory, options)
    threads = options["threads"]
    with serving.bind(host, port, settings) as listener:
        url = serving.url_of(listener)

        def ready() -> None:
            if as_json:
                click.echo(
                    json.dumps({"url": url, "model": settings.model_name, "max_model_len": engine.max_model_len})
                )
            else:
                click.echo(
                    f"{settings.model_name} at {url}, up to {engine.max_model_len} tokens; Ctrl-C ends it", err=True
                )

        with (
            runtime_notes(),
            device_for(directory, threads),
            Engine(directory, threads, options["max_batch_size"], options["max_model_len"]) as engine,
        ):
            serving.Server(engine, settings, options["grace"], ready).run(listener)


def _settings(directory: Path, options: dict[str, Any]) -> ServeSettings:
    from qcompile.serve.settings import ServeSettings

    if options["model_name"] == "":
        raise click.UsageError("--model-name is empty: requests need a name to call the model by")
    return ServeSettings(
        model_name=options["model_name"] or directory.resolve().name,
        api_key=_api_key(options["api_key_file"]),
        reasoning=options["reasoning"],
        max_queue=options["max_queue"],
        max_wait_s=options["max_wait"],
        deadline_s=options["deadline"],
        max_body_bytes=options["max_body"],
    )


def _api_key(path: Path | None) -> str | None:
    """Return the token from the file or the environment; not an option, which every user of the machine could read."""
    if path is None:
        return os.environ.get(_ENVIRONMENT) or None
    with path.open("rb") as stream:
        key = stream.read(_MAX_KEY_BYTES + 1).strip()
    if not 0 < len(key) <= _MAX_KEY_BYTES:
        raise ServeError(f"{path}: a token of 1 to {_MAX_KEY_BYTES} bytes is wanted")
    return key.decode("utf-8", errors="replace")
