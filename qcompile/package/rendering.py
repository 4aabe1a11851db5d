"""The files of a package that are not copies: small templates in `files/`."""

from importlib import resources
from typing import Any

import jinja2


def render(name: str, **values: Any) -> str:
    """Return the text of `files/NAME.jinja` with its blanks filled."""
    text = resources.files("qcompile").joinpath("package", "files", f"{name}.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text).render(values)
