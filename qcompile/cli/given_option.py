"""Whether the user gave an option, or it has its default."""

import click
from click.core import ParameterSource


def is_given(name: str) -> bool:
    """Whether the parameter of that name stands on the present command's line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
