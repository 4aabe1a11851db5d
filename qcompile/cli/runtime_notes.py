"""Show on stderr what the runtime logs as worth knowing, such as a KV cache that grows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"note: {record.getMessage()}", err=True)


@contextmanager
def runtime_notes() -> Iterator[None]:
    """Print the runtime's log messages as notes while the block runs."""
    logger, handler = logging.getLogger("qcompile.runtime"), _Notes(logging.INFO)
    previous = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous)
