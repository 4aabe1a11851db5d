"""`qcompile kernels bench`: the kernels on a GPU, each against its floor and its rivals, and whole decode steps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qcompile.cli.given_option import is_given
from qcompile.cli.output_file import OutputFile
from qcompile.errors import ArtifactError, KernelError
from qcompile.kernels import OPERATORS
from qcompile.kernels.bench.shapes import MODELS, PHASES, TINY, TINY_PHASES
from qcompile.text_file import decode_utf8, read_bounded
from qcompile.weights_writer import write_failure

_LIMIT_BYTES = 16 << 20
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
_DECODE_MODELS = ("0.5B", "3B")
_DECODE_BATCHES = (1, 16)
_ONLY_MEASURED = ("models", "phases", "compile_mode", "new_tokens", "resume", "markdown")  # a dry run has none of them


@click.command("bench")
@click.argument("operators", nargs=-1, metavar="[OPERATOR...]")
@click.option("--models", multiple=True, type=click.Choice(list(MODELS)), help="Sizes of Qwen2.5; all when not given.")
@click.option("--phases", multiple=True, type=click.Choice(list(PHASES)), help="All when not given.")
@click.option("--dtype", type=click.Choice(tuple(_DTYPES)), default="fp16", show_default=True, help="Of activations.")
@click.option(
    "--compile-mode",
    type=click.Choice(_COMPILE_MODES),
    default=_COMPILE_MODES[0],
    show_default=True,
    help="Of torch.compile; max-autotune searches for minutes at each matrix product.",
)
@click.option("--decode/--no-decode", default=True, show_default=True, help="Also tokens/s of whole models.")
@click.option("--new-tokens", type=click.IntRange(16, 2048), default=136, show_default=True, help="Of the decode runs.")
@click.option("--dry-run", is_flag=True, help="Every case once at tiny sizes, on any device: numbers right? No times.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the --output of a run that was cut off: what it has is not measured again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--output", type=OutputFile(), help="Write the JSON to this file too.")
@click.option("--markdown", type=OutputFile(), help="Write the page with all tables to this file.")
def command(**options: Any) -> None:
    """Measure the kernels on an NVIDIA GPU: against PyTorch, torch.compile, the library's operator, and their floor."""
    unknown = [name for name in options["operators"] if name not in OPERATORS]
    if unknown:
        raise click.BadParameter(f"'{unknown[0]}' is no operator; there are {', '.join(OPERATORS)}")
    _check_combination(options)
    results = _dry_run(options) if options["dry_run"] else _measure(options)
    text = json.dumps(results, indent=1)
    if options["output"] is not None:
        _write(options["output"], text + "\n")
    if options["as_json"]:
        click.echo(text)
    if options["dry_run"] and results["wrong"]:
        raise KernelError(f"{len(results['wrong'])} cases differ from float64: {', '.join(results['wrong'])}")


def _check_combination(options: dict[str, Any]) -> None:
    given = [name for name in _ONLY_MEASURED if is_given(name)]
    if options["dry_run"] and given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"--dry-run checks every case at tiny sizes and times nothing: leave out {named}")
    if options["resume"] and options["output"] is None:
        raise click.UsageError("--resume goes on with the file of --output; name it")


def _settings(options: dict[str, Any], device: Any) -> Iterator[Any]:
    import torch

    from qcompile.kernels.bench.cases import Setting

    dtype = getattr(torch, _DTYPES[options["dtype"]])
    if options["dry_run"]:
        for phase in TINY_PHASES.values():
            yield Setting("tiny", TINY, phase, device, dtype)
        return
    for model in options["models"] or MODELS:
        for phase in options["phases"] or PHASES:
            yield Setting(model, MODELS[model], PHASES[phase], device, dtype)


def _cases(options: dict[str, Any], device: Any) -> Iterator[Any]:
    from qcompile.kernels.bench.runner import cases

    for setting in _settings(options, device):
        for case in cases(setting):
            if not options["operators"] or case.operator in options["operators"]:
                yield setting, case


def _dry_run(options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from qcompile.kernels.bench.decode import measure_variants, random_model
    from qcompile.kernels.bench.runner import LIMITS, check

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(highlight=False, stderr=options["as_json"])
    rows = []
    for setting, case in _cases(options, device):
        errors = check(case)
        rows.append({"operator": case.operator, "case": case.label, "errors": errors})
        is_right = errors["kernel"] <= LIMITS[setting.dtype]
        console.print(f"{'right' if is_right else 'WRONG'}  {case.operator:22} {case.label:28} {errors['kernel']:.1e}")
        rows[-1]["is_right"] = is_right
    wrong = [f"{row['operator']} ({row['case']})" for row in rows if not row["is_right"]]
    variants = {}
    if options["decode"]:
        variants = measure_variants(random_model(TINY, device, torch.float32), 2, 16, is_timed=False)
        for name, result in variants.items():
            console.print(f"{name}: {result['agree']:.0%} of the tokens are those of eager")
        wrong += [f"decode ({name})" for name, result in variants.items() if result["agree"] < 1]
    console.print(f"{len(rows)} cases on {device.type}, nothing was timed")
    return {"is_dry_run": True, "device": device.type, "kernels": rows, "decode": variants, "wrong": wrong}


def _gpu() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise KernelError("kernels bench: no CUDA device here; --dry-run checks every case at tiny sizes on the CPU")
    return torch.device("cuda")


def _measure(options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from qcompile.kernels.bench import report
    from qcompile.kernels.bench.runner import measure_ceilings

    device = _gpu()
    dtype = getattr(torch, _DTYPES[options["dtype"]])
    ceilings = measure_ceilings(dtype)
    console = Console(highlight=False, stderr=options["as_json"])
    results: dict[str, Any] = {
        "machine": report.machine(),
        "dtype": options["dtype"],
        "compile_mode": options["compile_mode"],
        "ceilings": {
            "copy_gb_per_s": ceilings.copy / 1e3,
            "rates_t_per_s": {name: rate / 1e6 for name, rate in ceilings.rates.items()},
        },
        "kernels": [],
        "decode": [],
    }
    if options["resume"]:
        results = _resumed(options["output"], results)
    if options["decode"]:  # first: a run that is cut off has these, and some of the many cases
        _measure_decode(options, results, device, dtype, console)
    _measure_cases(options, results, device, ceilings, console)
    return results


def _measure_cases(
    options: dict[str, Any], results: dict[str, Any], device: Any, ceilings: Any, console: Console
) -> None:
    from qcompile.kernels.bench.runner import measure

    there = {(row["operator"], row["case"]) for row in results["kernels"]}
    for setting, case in _cases(options, device):
        if (case.operator, case.label) in there:
            continue
        row = measure(case, ceilings, setting.dtype, options["compile_mode"])
        results["kernels"].append(row)
        console.print(
            f"{row['operator']:22} {row['case']:28} {row['us']['kernel']:9.1f} us  {row['fraction']:4.0%} of the floor  "
            f"torch.compile {row['us']['compile']:9.1f} us{'' if row['is_right'] else '  WRONG'}"
        )
        _save(options, results)


def _resumed(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The results in a file, to be added to; its ceilings stay, as every row has the floor that it was measured with.

    Raises:
        ArtifactError: No such file, or what is in it was measured otherwise or elsewhere.
    """
    text = decode_utf8(
        read_bounded(path, _LIMIT_BYTES, "that is no result of this command", ArtifactError), str(path), ArtifactError
    )
    try:
        earlier = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: nothing to resume: {error}") from error
    for name in ("machine", "dtype", "compile_mode"):
        seen, wanted = (dict(one[name], date="") if name == "machine" else one[name] for one in (earlier, fresh))
        if seen != wanted:
            raise ArtifactError(f"{path}: measured with {name} {seen}, this is {wanted}; measure into another file")
    return dict(earlier)


def _measure_decode(
    options: dict[str, Any], results: dict[str, Any], device: Any, dtype: Any, console: Console
) -> None:
    from qcompile.kernels.bench.decode import measure_variants, parameter_bytes, random_model

    for name in (one for one in _DECODE_MODELS if not options["models"] or one in options["models"]):
        model = random_model(MODELS[name], device, dtype)
        for batch in _DECODE_BATCHES:
            if (name, batch) in {(row["model"], row["batch"]) for row in results["decode"]}:
                continue
            variants = measure_variants(model, batch, options["new_tokens"])
            row = {"model": name, "batch": batch, "weight_bytes": parameter_bytes(model), "variants": variants}
            results["decode"].append(row)
            _save(options, results)
            for variant, result in variants.items():
                console.print(f"{name} b{batch} {variant:16} {result['tokens_per_s']:8.0f} tokens/s")


def _write(path: Path, text: str) -> None:
    """Write a file, or leave the older one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(write_failure(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _save(options: dict[str, Any], results: dict[str, Any]) -> None:
    """Write what there is so far: a run that is cut off leaves its measurements."""
    from qcompile.kernels.bench import report

    if options["output"] is not None:
        _write(options["output"], json.dumps(results, indent=1) + "\n")
    if options["markdown"] is not None:
        _write(options["markdown"], report.markdown(results))
