"""`qcompile kernels`: the fused Ascend operators. Finds the subcommand's module."""

from __future__ import annotations

import importlib

import click

SUBCOMMANDS: dict[str, str] = {
    "list": "Operators, their kernels, types and tiles.",
    "check": "Compile ahead of time for an Ascend chip; no CANN, no NPU.",
    "bench": "Measure them on an NVIDIA GPU: against PyTorch, torch.compile and their floor.",
}


class _LazySubcommands(click.Group):
    """Imports a subcommand's module, `kernels_<name>`, when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands in the order of use."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of a subcommand, or return None for an unknown name."""
        if name not in SUBCOMMANDS:
            return None
        command = importlib.import_module(f"qcompile.cli.kernels_{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


@click.group("kernels", cls=_LazySubcommands)
def command() -> None:
    """Fused operators for Ascend chips, written in Triton (docs/kernels.md)."""
