"""Make the contest's zip, exactly in the judge's form.

competition_submission.zip
├ competition_model.py     class Competition
├ contest_settings.json    templates, limits, budget, ladder
├ requirements.txt         every wheel, pinned
├ dependencies/            the wheels, for the judge's machine
├ custom_kernels/          optional .run files
├ qcompile_runtime/        a copy of qcompile/runtime
├ qcompile_contest/        the loop
└ model/, model_cpu/, checkpoint/   the rungs of the ladder
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.errors import ExportError, PackageError
from qcompile.evaluate.templates import Templates
from qcompile.model_config import ModelConfig
from qcompile.package.archive import PackageWriter, open_package
from qcompile.package.contest.settings import SETTINGS_NAME, ContestSettings
from qcompile.package.folder import FolderWriter
from qcompile.package.ladder_plan import PackedRung, checkpoint_rung, compiled_rung
from qcompile.package.platforms import JUDGE
from qcompile.package.rendering import render
from qcompile.package.requirements import contest_requirements
from qcompile.package.vendor import contest_files, runtime_files
from qcompile.package.wheels import Wheel, collect_wheels
from qcompile.runtime.manifest import Manifest

MAX_ZIP_BYTES = 10 << 30
MAX_PARAMETERS = 3.1e9  # "3B"; the contest's own example, Qwen2.5-3B, has 3.09 billion
ZIP_NAME = "competition_submission.zip"


@dataclass(frozen=True)
class ContestRequest:
    """What is to be packed.

    Attributes:
        model: The compiled-model directory.
        output: The zip.
        templates: How questions are asked.
        options: Further fields of `ContestSettings`.
        cpu_model: A compiled-model directory for ONNX Runtime, the last rung of a model for the NPU.
        checkpoint: A Hugging Face directory for the rung of torch_npu.
        kernels: A folder whose `.run` files install operators.
        pins: Requirements that replace the built-in ones.
        wheels: Take wheels from this folder alone.
        is_offline: Do not ask the package index.
        num_parameters: Where the manifest does not tell.
    """

    model: Path
    output: Path
    templates: Templates
    options: Mapping[str, Any] = field(default_factory=dict)
    cpu_model: Path | None = None
    checkpoint: Path | None = None
    kernels: Path | None = None
    pins: Sequence[str] = ()
    wheels: Path | None = None
    is_offline: bool = False
    num_parameters: int | None = None


@dataclass(frozen=True)
class Packed:
    """What was packed."""

    output: Path
    settings: ContestSettings
    wheels: Sequence[Wheel]
    size_bytes: int
    notes: Sequence[str]


def package_contest(request: ContestRequest, say: Callable[[str], None] = lambda _: None) -> Packed:
    """Write the zip.

    Raises:
        PackageError: The model cannot be packed, no complete set of wheels is found, or the zip cannot be written
            or is over the judge's limit.
        ManifestError: A compiled-model directory is not whole.
    """
    rungs = _ladder(request)
    kinds = [packed.rung.kind for packed in rungs]
    _kernels(request)
    wheels = collect_wheels(
        contest_requirements(kinds, request.pins), JUDGE, request.wheels, is_offline=request.is_offline, say=say
    )
    with open_package(request.output, MAX_ZIP_BYTES) as package:
        settings = write_contest(package, request, wheels)
    size_bytes = request.output.stat().st_size
    return Packed(request.output, settings, wheels, size_bytes, _notes(request, rungs))


def write_contest(
    package: PackageWriter | FolderWriter, request: ContestRequest, wheels: Sequence[Wheel]
) -> ContestSettings:
    """Put everything into a zip or a folder; returns the settings it runs with.

    Raises:
        PackageError: The model cannot be packed.
    """
    rungs = _ladder(request)
    settings = ContestSettings(
        total_parameters=request.num_parameters or _num_parameters(request.model),
        ladder=tuple(packed.rung for packed in rungs),
        templates=_by_type(request.templates),
        system=request.templates.system,
        **request.options,
    )
    if settings.total_parameters > MAX_PARAMETERS:
        raise PackageError(
            f"{request.model}: {settings.total_parameters / 1e9:.2f}B parameters; the contest takes 3B or fewer"
        )
    _write(package, request, rungs, settings, wheels)
    return settings


def _ladder(request: ContestRequest) -> list[PackedRung]:
    longest = request.options.get("max_model_len")
    rungs = [compiled_rung(request.model, "model", longest)]
    if request.checkpoint is not None:
        rungs.append(checkpoint_rung(request.checkpoint, "checkpoint"))
    if request.cpu_model is not None:
        cpu = compiled_rung(request.cpu_model, "model_cpu", longest)
        if cpu.rung.kind != "onnxruntime":
            raise PackageError(f"{request.cpu_model}: compiled for an NPU; --cpu-model takes one for ONNX Runtime")
        rungs.append(cpu)
    # best first; a model for the CPU is the last resort even when it is the only one compiled
    rungs.sort(key=lambda packed: ("acl", "torch_npu", "onnxruntime").index(packed.rung.kind))
    return rungs


def _kernels(request: ContestRequest) -> list[Path]:
    """The operators' files that are packed."""
    if request.kernels is None:
        return []
    found = sorted(request.kernels.glob("*.run"))
    if not found:
        raise PackageError(f"{request.kernels}: no .run file in it; --kernels takes a folder of operators' .run files")
    return found


def _num_parameters(model: Path) -> int:
    config = Manifest.load(model).config
    try:
        return ModelConfig.from_dict(config, str(model)).num_parameters
    except ExportError as error:
        raise PackageError(
            f"{model}: its manifest does not tell how many parameters ({error}); give --parameters N"
        ) from None


def _by_type(templates: Templates) -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = {}
    for (case_type, language), text in templates.texts.items():
        texts.setdefault(case_type, {})[language] = text
    return texts


def _write(
    package: PackageWriter | FolderWriter,
    request: ContestRequest,
    rungs: Sequence[PackedRung],
    settings: ContestSettings,
    wheels: Sequence[Wheel],
) -> None:
    package.add_text("competition_model.py", render("competition_model.py"))
    package.add_text(SETTINGS_NAME, settings.dump())
    package.add_text("requirements.txt", "".join(f"{wheel.pin}\n" for wheel in wheels))
    for name, text in {**runtime_files(), **contest_files()}.items():
        package.add_text(name, text)
    for wheel in wheels:
        package.add_file(f"dependencies/{wheel.path.name}", wheel.path)
    for path in _kernels(request):
        package.add_file(f"custom_kernels/{path.name}", path)
    for packed in rungs:
        for name in packed.files:
            package.add_file(f"{packed.rung.path}/{name}", packed.source / name)


def _notes(request: ContestRequest, rungs: Sequence[PackedRung]) -> list[str]:
    notes = []
    kinds = [packed.rung.kind for packed in rungs]
    notes += [
        f"{packed.source}: no chat template (a base model): questions are asked as plain text, as `eval` asks them"
        for packed in rungs
        if not packed.has_chat_template
    ]
    if request.output.name != ZIP_NAME:
        notes.append(f"the judge takes the name {ZIP_NAME}; rename {request.output.name} before you upload it")
    if Manifest.load(request.model).build.get("simulated"):
        notes.append("its .om files are for the simulated device, which `judge` uses; no NPU runs them")
    if kinds == ["acl"]:
        notes.append("no fallback: where the .om does not run every answer is empty; add --cpu-model DIR")
    if kinds == ["onnxruntime"]:
        notes.append("the only way to run it is ONNX Runtime on the judge's CPU; the NPU stays idle")
    return notes
