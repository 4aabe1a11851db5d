"""No option that is a number with a fraction takes NaN, infinity, or a time that no timeout can have."""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from qcompile.cli.finite_range import FiniteRange
from qcompile.cli.main import cli


def options(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Option]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from options(command, (*path, name))
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield " ".join((*path, name, parameter.opts[0])), parameter


def test_every_range_of_fractions_is_finite() -> None:
    ranges = {name: option.type for name, option in options() if isinstance(option.type, click.FloatRange)}
    assert {"kernels check --time-limit", "serve --deadline", "generate --temperature"} <= set(ranges)
    assert [name for name, kind in ranges.items() if not isinstance(kind, FiniteRange)] == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_what_is_not_finite_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a finite number|is not in the range"):
        FiniteRange(0).convert(value, None, None)
    assert FiniteRange(0).convert("0.5", None, None) == 0.5


@pytest.mark.parametrize("value", ["nan", "inf", "1e12", "0"])
def test_a_time_limit_that_no_timeout_can_have_is_a_usage_error(value: str) -> None:
    done = CliRunner().invoke(cli, ["kernels", "check", "--time-limit", value])
    assert done.exit_code == 2
    assert "'--time-limit'" in done.output
