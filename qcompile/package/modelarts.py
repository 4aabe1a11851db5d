"""Make ModelArts packages: a model folder for a preset engine, or an engine of one's own.

modelarts                               modelarts-engine
└ model/                                ├ Dockerfile, run.sh, requirements.txt, dependencies/
  ├ config.json                         ├ qcompile_runtime/, qcompile_service/
  ├ customize_service.py                └ model/            (ModelArts mounts it at /home/mind/model)
  ├ placeholder.pth, or .ckpt + tmp.om    ├ config.json
  ├ *.whl                                 └ compiled/
  ├ qcompile_runtime/, qcompile_service/
  └ compiled/                           the compiled-model directory
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.package.folder import FolderWriter, open_folder
from qcompile.package.ladder_plan import PackedRung, compiled_rung
from qcompile.package.modelarts_config import NAME, engine_config, preset_config
from qcompile.package.platforms import JUDGE
from qcompile.package.rendering import render
from qcompile.package.requirements import contest_requirements
from qcompile.package.service.answering import COMPILED, TIME_LIMIT_S
from qcompile.package.vendor import runtime_files, service_files
from qcompile.package.wheels import collect_wheels

# the image's tag; ModelArts wants its full name as GET /v1/{project_id}/models/ai-engine-runtimes tells it
IMAGE = "pytorch_2.1.0-cann_8.0.rc2-py_3.9-euler_2.10.7-aarch64-snt9b"
ENGINES = ("PyTorch", "MindSpore")
# files without which a preset engine refuses the import; nothing reads them
_PLACEHOLDERS = {"PyTorch": ("placeholder.pth",), "MindSpore": ("placeholder.ckpt", "tmp.om")}


@dataclass(frozen=True)
class ModelArtsRequest:
    """What is to be packed.

    Attributes:
        model: The compiled-model directory.
        output: The folder.
        engine: The preset engine: PyTorch or MindSpore.
        image: The runtime's tag, or for an engine of one's own the base image.
        swr: Address of the finished image, for an import from OBS.
        pins: Requirements that replace the built-in ones.
        wheels: Take wheels from this folder alone.
        is_offline: Do not ask the package index.
    """

    model: Path
    output: Path
    engine: str = "PyTorch"
    image: str = IMAGE
    swr: str | None = None
    pins: Sequence[str] = ()
    wheels: Path | None = None
    is_offline: bool = False


def package_preset(request: ModelArtsRequest, say: Callable[[str], None] = lambda _: None) -> list[str]:
    """Write the folder for a preset engine; returns what a user must know.

    Raises:
        PackageError: The model cannot be packed, no complete set of wheels is found, or it cannot be written.
    """
    rung = compiled_rung(request.model, COMPILED)
    wheels = collect_wheels(
        contest_requirements([rung.rung.kind], request.pins),
        JUDGE,
        request.wheels,
        is_offline=request.is_offline,
        say=say,
    )
    with open_folder(request.output) as folder:
        config = preset_config(request.engine, request.image, wheels)
        folder.add_text(f"model/{NAME}", json.dumps(config, indent=2) + "\n")
        folder.add_text("model/customize_service.py", render("customize_service.py", time_limit_s=TIME_LIMIT_S))
        for name in _PLACEHOLDERS[request.engine]:
            folder.add_text(f"model/{name}", "")
        for wheel in wheels:
            folder.add_file(f"model/{wheel.path.name}", wheel.path)
        _add_programs(folder, "model/")
        _add_model(folder, rung)
    return [
        f"the runtime is {request.image}; take the tag your region offers with --image",
        "upload the folder `model` to OBS and import it from there; its path must hold no space",
    ]


def package_engine(request: ModelArtsRequest, say: Callable[[str], None] = lambda _: None) -> list[str]:
    """Write the folder for an engine of one's own; returns what a user must know.

    Raises:
        PackageError: The model cannot be packed, no complete set of wheels is found, or it cannot be written.
    """
    rung = compiled_rung(request.model, COMPILED)
    wheels = collect_wheels(
        contest_requirements([rung.rung.kind], request.pins),
        JUDGE,
        request.wheels,
        is_offline=request.is_offline,
        say=say,
    )
    with open_folder(request.output) as folder:
        folder.add_text("Dockerfile", render("Dockerfile", base_image=request.image))
        folder.add_text("run.sh", render("run.sh"))
        folder.add_text("requirements.txt", "".join(f"{wheel.pin}\n" for wheel in wheels))
        for wheel in wheels:
            folder.add_file(f"dependencies/{wheel.path.name}", wheel.path)
        _add_programs(folder, "")
        folder.add_text(f"model/{NAME}", json.dumps(engine_config(request.swr), indent=2) + "\n")
        _add_model(folder, rung)
    return [
        f"the base image is {request.image}; name the one of your registry with --image (Python 3.9, aarch64)",
        "docker build the folder, push it to SWR, upload `model` to OBS; the service speaks HTTP on 8080, HTTPS=1 changes that",
    ]


def _add_programs(folder: FolderWriter, prefix: str) -> None:
    for name, text in {**runtime_files(), **service_files()}.items():
        folder.add_text(prefix + name, text)


def _add_model(folder: FolderWriter, rung: PackedRung) -> None:
    for name in rung.files:
        folder.add_file(f"model/{rung.rung.path}/{name}", rung.source / name)
