"""The options that `generate` and `chat` share: how to sample, when to stop, what to compute with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qcompile.cli.finite_range import FiniteRange
from qcompile.runtime.host import MAX_THREADS

if TYPE_CHECKING:
    from qcompile.runtime import Engine, SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])

_TAKEN = ("self", "messages")  # parameters of what renders the template
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
_OPTIONS = (
    click.option(
        "--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens to generate."
    ),
    click.option(
        "--temperature",
        type=FiniteRange(0),
        help="Flatten (>1) or sharpen (<1) the distribution; 0: greedy.",
    ),
    click.option("--top-k", type=click.IntRange(-1), help="Sample from the K most likely tokens; 0: all."),
    click.option(
        "--top-p",
        type=FiniteRange(0, 1, min_open=True),
        help="Sample from the most likely tokens that hold this probability.",
    ),
    click.option("--min-p", type=FiniteRange(0, 1), help="Drop tokens below this fraction of the most likely one."),
    click.option(
        "--repetition-penalty",
        type=FiniteRange(0, min_open=True),
        help="Above 1: tokens already seen become less likely.",
    ),
    click.option("--seed", type=click.IntRange(0), help="Make sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End at this text (repeatable)."),
    click.option(
        "--stop-id",
        multiple=True,
        type=click.IntRange(0),
        metavar="ID",
        help="End at this token id (repeatable).",
    ),
    click.option("--include-stop", is_flag=True, help="Keep the stop text in the output."),
    click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Computing threads [default: physical cores]."),
    click.option("--max-model-len", type=click.IntRange(2), help="Most tokens, prompt and answer together."),
    click.option(
        "--template-arg",
        "template_args",
        multiple=True,
        metavar="NAME=VALUE",
        help="A variable for the chat template, VALUE as JSON or text (enable_thinking=false).",
    ),
)


def sampling_options(command: Command) -> Command:
    """Add the shared options to a command function; it gets them as keyword arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sampling_params(engine: Engine, options: dict[str, Any], *, sample: bool) -> SamplingParams:
    """Return what the options ask for.

    Args:
        engine: For the model's generation_config.json.
        options: The shared options, None where not given.
        sample: Sample even if no sampling option is given.

    Returns:
        Greedy, or sampling as soon as a sampling option is given; what is not given comes from the model's
        generation_config.json.
    """
    from qcompile.runtime import SamplingParams

    asked = {name: options[name] for name in _SAMPLING if options[name] is not None}
    fixed = {
        "max_new_tokens": options["max_new_tokens"],
        "stop": options["stop"],
        "stop_token_ids": options["stop_id"],
        "include_stop": options["include_stop"],
    }
    if options["repetition_penalty"] is not None:
        fixed["repetition_penalty"] = options["repetition_penalty"]
    if sample or asked:
        return engine.sampling_params(**asked, **fixed)
    return SamplingParams(**fixed)


def template_variables(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Parse `--template-arg NAME=VALUE`; a VALUE that is not JSON is taken as text.

    Raises:
        click.UsageError: No '=', or NAME is not an identifier or one that the template gets anyway.
    """
    variables = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"--template-arg {argument!r}: NAME=VALUE is wanted")
        if name in _TAKEN:
            raise click.UsageError(f"--template-arg {argument!r}: {name!r} is set by the program; take another NAME")
        try:
            variables[name] = json.loads(text)
        except ValueError:
            variables[name] = text
    return variables
