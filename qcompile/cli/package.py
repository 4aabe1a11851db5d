"""`qcompile package`: make a contest zip or a ModelArts package, or check one as the judge would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qcompile.cli.finite_range import WEEK_S, FiniteRange
from qcompile.cli.given_option import is_given
from qcompile.cli.given_path import GivenPath, OutputPath
from qcompile.cli.package_check import check
from qcompile.cli.sampling_options import template_variables
from qcompile.errors import PackageError
from qcompile.evaluate.settings import token_limits
from qcompile.evaluate.templates import Templates
from qcompile.runtime.host import MAX_THREADS

_DEFAULT_MAX_NEW_TOKENS = 1024
_TARGETS = ("contest", "modelarts", "modelarts-engine")
_CHECK = "--check"
# what an option is for; elsewhere it would change nothing, and whoever gave it would not know
_USES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("checkpoint", "cpu_model", "kernels", "parameters", "budget", "questions"), ("contest",)),
    **dict.fromkeys(("batch_size", "samples", "max_new_tokens", "temperature", "sample_temperature"), ("contest",)),
    **dict.fromkeys(("seed", "templates", "template_args", "max_model_len", "threads"), ("contest",)),
    "engine": ("modelarts",),
    "image": ("modelarts", "modelarts-engine"),
    "swr": ("modelarts-engine",),
    "pins": _TARGETS,
    **dict.fromkeys(("cases", "time_limit", "is_static"), (_CHECK,)),
}


@click.command("package")
@click.argument("directory", metavar="[DIR]", required=False, type=GivenPath())
@click.option("--target", type=click.Choice(_TARGETS), help="What to make.")
@click.option("-o", "--output", type=OutputPath(), help="The zip, or the folder.")
@click.option("--checkpoint", type=GivenPath(), help="contest: a rung for torch_npu and transformers.")
@click.option("--cpu-model", type=GivenPath(), help="contest: the last rung, for ONNX Runtime.")
@click.option("--kernels", type=GivenPath(), help="contest: a folder of operators' .run files.")
@click.option("--parameters", type=click.IntRange(1), help="contest: where the manifest does not tell.")
@click.option(
    "--budget",
    type=FiniteRange(0, WEEK_S / 60, min_open=True),
    default=55.0,
    show_default=True,
    help="contest: minutes.",
)
@click.option("--questions", type=click.IntRange(1), default=200, show_default=True, help="contest: of all files.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="contest: texts computed together."
)
@click.option(
    "--samples", type=click.IntRange(1, 3), default=3, show_default=True, help="contest: texts per code question."
)
@click.option(
    "--max-new-tokens", multiple=True, metavar="N|TYPE=N", help="contest: tokens of an answer  [default: 1024]"
)
@click.option(
    "--temperature", type=FiniteRange(0, 1e4), default=0.0, show_default=True, help="contest: of first texts."
)
@click.option(
    "--sample-temperature",
    type=FiniteRange(0, 1e4, min_open=True),
    default=0.8,
    show_default=True,
    help="contest: of further ones.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="contest: of draws.")
@click.option("--templates", metavar="FILE.toml", type=GivenPath(), help="contest: your own prompt templates.")
@click.option(
    "--template-arg", "template_args", multiple=True, metavar="NAME=VALUE", help="contest: for the chat template."
)
@click.option("--max-model-len", type=click.IntRange(2), help="contest: most tokens, prompt and answer together.")
@click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), help="contest: computing threads  [default: physical cores]."
)
@click.option(
    "--engine", type=click.Choice(["PyTorch", "MindSpore"]), default="PyTorch", help="modelarts: the preset engine."
)
@click.option("--image", help="modelarts: the runtime's tag; modelarts-engine: the base image.")
@click.option("--swr", help="modelarts-engine: address of the finished image, for an import from OBS.")
@click.option("--pin", "pins", multiple=True, metavar="NAME==VERSION", help="Another version of a dependency.")
@click.option("--wheels", type=GivenPath(exists=True, file_okay=False), help="Wheels from this folder.")
@click.option("--offline", is_flag=True, help="Do not ask the package index.")
@click.option("--check", "checked", metavar="FILE", type=GivenPath(), help="Replay the judge on a package.")
@click.option("--cases", multiple=True, metavar="FILE.jsonl", type=GivenPath(), help="check: test files.")
@click.option(
    "--time-limit",
    type=FiniteRange(0, WEEK_S / 60, min_open=True),
    default=60.0,
    show_default=True,
    help="check: minutes.",
)
@click.option("--static", "is_static", is_flag=True, help="check: run nothing of the package.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    directory: Path | None,
    *,
    target: str | None,
    output: Path | None,
    checked: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Pack the compiled model in DIR for the contest or for ModelArts, or check a package."""
    if checked is not None:
        if directory is not None or output is not None or target is not None:
            raise click.UsageError("--check FILE goes with neither DIR, --target nor -o")
        _refuse_what_is_for_others(_CHECK)
        check(checked, options, as_json=as_json)
        return
    if directory is None or target is None or output is None:
        raise click.UsageError("give DIR, --target and -o FILE, or --check FILE")
    _refuse_what_is_for_others(target)
    if target == "contest":
        _package_contest(directory, output, options, as_json=as_json)
    else:
        _package_modelarts(directory, output, target, options, as_json=as_json)


def _refuse_what_is_for_others(use: str) -> None:
    for parameter in click.get_current_context().command.params:
        name = str(parameter.name)
        uses = _USES.get(name, (use,))
        if use not in uses and is_given(name):
            shown = " or ".join(one if one == _CHECK else f"--target {one}" for one in uses)
            raise click.UsageError(f"{parameter.opts[0]} is for {shown}, and changes nothing here: leave it out")


def _package_modelarts(directory: Path, output: Path, target: str, options: dict[str, Any], *, as_json: bool) -> None:
    from qcompile.package.modelarts import IMAGE, ModelArtsRequest, package_engine, package_preset

    for name in ("image", "swr"):
        address = options[name]
        if address is not None and (not address or any(character.isspace() for character in address)):
            raise click.UsageError(f"--{name} {address!r}: an image's address is wanted, without spaces")
    request = ModelArtsRequest(
        model=directory,
        output=output,
        engine=options["engine"],
        image=options["image"] or IMAGE,
        swr=options["swr"],
        pins=options["pins"],
        wheels=options["wheels"],
        is_offline=options["offline"],
    )
    make = package_preset if target == "modelarts" else package_engine
    notes = make(request, lambda text: click.echo(text, err=True))
    for note in notes:
        click.echo(f"note: {note}", err=True)
    size_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if as_json:
        click.echo(json.dumps({"output": str(output), "size_bytes": size_bytes, "notes": notes}, indent=2))
    else:
        click.echo(f"{output}: {size_bytes / 1e6:.1f} MB, check it with `qcompile package --check {output}`")


def _package_contest(directory: Path, output: Path, options: dict[str, Any], *, as_json: bool) -> None:
    from qcompile.package.contest_zip import ContestRequest, package_contest

    if output.is_dir():
        raise PackageError(f"{output}: is a folder; name a file in it")
    request = ContestRequest(
        model=directory,
        output=output,
        templates=Templates.load(options["templates"]),
        options=_settings(options),
        cpu_model=options["cpu_model"],
        checkpoint=options["checkpoint"],
        kernels=options["kernels"],
        pins=options["pins"],
        wheels=options["wheels"],
        is_offline=options["offline"],
        num_parameters=options["parameters"],
    )
    packed = package_contest(request, lambda text: click.echo(text, err=True))
    for note in packed.notes:
        click.echo(f"note: {note}", err=True)
    ladder = " -> ".join(rung.kind for rung in packed.settings.ladder)
    total = packed.settings.total_parameters
    if as_json:
        record = {
            "output": str(output),
            "size_bytes": packed.size_bytes,
            "total_parameters": total,
            "ladder": [rung.kind for rung in packed.settings.ladder],
            "wheels": [wheel.pin for wheel in packed.wheels],
            "notes": list(packed.notes),
        }
        click.echo(json.dumps(record, indent=2))
        return
    click.echo(f"Total parameters: {total / 1e9:.2f}B")
    click.echo(f"{output}: {packed.size_bytes / 1e6:.1f} MB, {len(packed.wheels)} wheels, runs on {ladder}")


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ContestSettings` that the command line decides."""
    same = ("batch_size", "samples", "temperature", "sample_temperature", "seed", "max_model_len", "threads")
    return {
        **{name: options[name] for name in same},
        "max_new_tokens": token_limits(options["max_new_tokens"], _DEFAULT_MAX_NEW_TOKENS),
        "budget_s": options["budget"] * 60,
        "expected_questions": options["questions"],
        "template_arguments": template_variables(options["template_args"]),
    }
