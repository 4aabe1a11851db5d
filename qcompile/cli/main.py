"""The `qcompile` command: finds the subcommand's module, runs it, and turns our errors into one line and an exit code."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
import warnings
from typing import NoReturn

import click

from qcompile import __version__
from qcompile.errors import QCompileError

COMMANDS: dict[str, str] = {
    "export": "From a checkpoint to ONNX in a compiled-model directory.",
    "fetch": "Download a recipe's checkpoint.",
    "optimize": "Fuse, quantize and lower a model; every rewrite is proved.",
    "verify": "Compare two models: logits and greedy tokens.",
    "inspect": "Operators, parameters, inputs and outputs; two models side by side.",
    "check": "Would ATC take this graph? Decided offline, with code and cure.",
    "atc": "Compile the graphs with CANN's ATC, or prepare that for another machine.",
    "kernels": "Fused Ascend operators: list them, compile them ahead of time, measure them.",
    "plan": "What a model will cost on an Ascend chip, estimated.",
    "doctor": "What this machine can do for Ascend, and what is missing.",
    "quality": "Perplexity, KL and agreement of two models, and where they part.",
    "bench": "Speed, memory and load time, and what this machine would allow.",
    "eval": "Answer a case file, judge the answers, write submission and scoreboard.",
    "package": "Make a contest zip or a ModelArts package, or check one as the judge would.",
    "serve": "Serve a model over HTTP, as OpenAI's clients expect it.",
    "judge": "Judge a package as the contest does: accuracy, format, tokens/s, step by step.",
    "generate": "Generate text from prompts.",
    "chat": "Talk with a model.",
}


_INTERRUPTED = "interrupted; nothing half-written was left"


class _LazyGroup(click.Group):
    """Imports a command's module when it is asked for: `--help` and `generate` stay fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of a command, or return None for an unknown name."""
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"qcompile.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; QCompileError becomes one line and exit code 1."""
        try:
            return super().invoke(ctx)
        except QCompileError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise click.ClickException(" ".join(str(error).split())) from error
        except BrokenPipeError:
            raise  # click knows what to do
        except OSError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            where = f"{error.filename}: " if error.filename is not None else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from error
        except KeyboardInterrupt:
            click.echo(_INTERRUPTED, err=True)
            raise click.exceptions.Exit(130) from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qcompile")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Bring a trained Qwen onto Huawei Ascend, and onto any CPU with the same commands."""
    if not debug:
        warnings.simplefilter("ignore")


def _terminate(number: int, frame: object) -> NoReturn:
    """SIGTERM and SIGHUP unwind like an error: what was being written is removed, what was started is ended."""
    del frame
    click.echo(_INTERRUPTED, err=True)
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the `qcompile` script."""
    signal.signal(signal.SIGTERM, _terminate)
    hangup = getattr(signal, "SIGHUP", None)  # a terminal was closed; nohup ignores it
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        signal.signal(hangup, _terminate)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    cli(prog_name="qcompile")


if __name__ == "__main__":
    main()
