"""Run a directory that `qcompile atc --simulate` compiled on the simulated device, and say so; any other as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from qcompile.runtime.manifest import MANIFEST_NAME, Manifest

# What a simulation takes says nothing about a device: these figures are left out of its results.
_TIMES = ("ttft_s", "duration_s", "tokens_per_s", "load_s", "total_s", "decode_tokens_per_s")


@contextmanager
def device_for(directory: Path, threads: int | None) -> Iterator[dict[str, Any] | None]:
    """Put the simulated device in place while the block runs, where the directory was compiled for it.

    Yields:
        What JSON says of the simulation, complete after the block; None where nothing is simulated.
    """
    build = Manifest.load(directory).build if (directory / MANIFEST_NAME).is_file() else {}
    if not build.get("simulated"):
        yield None
        return
    from qcompile.ascend.sim.acl_module import simulated_acl
    from qcompile.runtime.host import default_threads

    chip, cann = str(build.get("soc_version", "")), str(build.get("cann_version", ""))
    click.echo(f"note: simulated {chip} with CANN {cann}: it proves function, not speed; no device is used", err=True)
    record: dict[str, Any] = {"soc_version": chip, "cann_version": cann}
    with simulated_acl(chip, cann=cann, threads=threads or default_threads()) as machine:
        yield record
    record.update(machine.record())
    for report in machine.reports:
        click.echo(f"simulated device: {report.kind} in {report.call} ({report.code}): {report.message}", err=True)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose times are null: they are not those of a device."""
    return {name: None if name in _TIMES else value for name, value in record.items()}
