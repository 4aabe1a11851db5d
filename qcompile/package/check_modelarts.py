"""Replay ModelArts on a package: its files, its configuration, and requests through the service."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from qcompile.errors import PackageError
from qcompile.package.check_contest import CheckRequest, install_for_here, unpack_package
from qcompile.package.check_engine import check_engine_files, run_engine
from qcompile.package.check_source import source_findings
from qcompile.package.clean_room import CleanRoom, open_room
from qcompile.package.diagnosis import explain
from qcompile.package.findings import Finding, Report
from qcompile.package.modelarts_config import NAME, check_config
from qcompile.text_file import read_bounded

_CHILD = Path(__file__).with_name("modelarts_child.py")
_SERVICE = "customize_service.py"
_GATEWAY_S = 40.0
_MAX_CONFIG_BYTES = 1 << 20
_NEEDED = {"PyTorch": ((".pth", ".pt"),), "MindSpore": ((".ckpt",), (".om",)), "TensorFlow": ((".pb",),)}
BODY = {"prompt": "What is 2 + 3?", "max_new_tokens": 48}
_IMPORT = "ModelArts refuses the import"


def kind_of(package: Path) -> str:
    """Which sort of package a path is; a zip is the contest's."""
    if package.is_dir():
        if (package / "Dockerfile").is_file() or (package / "run.sh").is_file():
            return "modelarts-engine"
        if (package / "model").is_dir() and not (package / "competition_model.py").is_file():
            return "modelarts"
        if package.resolve().name == "model":
            return "modelarts"
    return "contest"


def check_modelarts(request: CheckRequest, kind: str, say: Callable[[str], None] = lambda _: None) -> Report:
    """Make every check that the ones before allow."""
    report = Report(kind)
    with open_room() as room:
        say("copying")
        source = request.package
        if (source / "model").is_dir() or kind == "modelarts-engine":
            is_copied = unpack_package(source, room.package, report)
        else:
            (room.package / "model").mkdir()
            is_copied = unpack_package(source, room.package / "model", report)
        if not is_copied:
            return report
        config, findings = _read_config(room.package / "model")
        report.take("config.json", findings)
        if kind == "modelarts-engine":
            report.take("Dockerfile and run.sh", check_engine_files(room.package))
            run = run_engine
        else:
            report.take("files", _files(room.package / "model", config))
            report.take("sources: Python 3.9", source_findings(room.package / "model"))
            run = _run_service
        if request.is_static or report.findings:
            report.notes.append("nothing was run")
        else:
            run(room, request, config, report, say)
    return report


def _read_config(folder: Path) -> tuple[dict[str, Any], list[Finding]]:
    path, name = folder / NAME, f"model/{NAME}"
    if not folder.is_dir():
        return {}, [Finding("model/", "missing; the folder's name is fixed", "name it model", _IMPORT)]
    if not path.is_file():
        return {}, [Finding(name, "missing", "make the package with `qcompile package --target modelarts`", _IMPORT)]
    try:
        config = json.loads(read_bounded(path, _MAX_CONFIG_BYTES, "mend it", PackageError))
    except (ValueError, RecursionError, PackageError) as error:
        return {}, [Finding(name, f"not JSON in UTF-8: {error}", "mend it", "ModelArts.3015")]
    return (config if isinstance(config, dict) else {}), check_config(config, name)


def _files(folder: Path, config: dict[str, Any]) -> list[Finding]:
    """What a preset engine wants to find in the folder."""
    findings = []
    engine = str(config.get("model_type"))
    for name in (NAME, _SERVICE):
        copies = [path.relative_to(folder).as_posix() for path in folder.rglob(name) if path.parent != folder]
        copies = [copy for copy in copies if not copy.startswith("compiled/")]
        if copies and name == _SERVICE:
            findings.append(Finding(f"model/{copies[0]}", f"a second {name}", "exactly one is allowed", _IMPORT))
    if not (folder / _SERVICE).is_file():
        findings.append(Finding(f"model/{_SERVICE}", "missing", "put it beside config.json", _IMPORT))
    for endings in _NEEDED.get(engine, ()):
        if not any(path.suffix in endings for path in folder.iterdir()):
            wanted = " or ".join(endings)
            cure = f"an empty placeholder{endings[0]} will do when the service loads the model itself"
            findings.append(Finding("model/", f"the {engine} engine wants a {wanted} file here", cure, _IMPORT))
    findings += [
        Finding(f"model/{path.name}", "its name holds a space", "rename it: OBS paths must not", _IMPORT)
        for path in folder.iterdir()
        if " " in path.name
    ]
    return findings


def _run_service(
    room: CleanRoom, request: CheckRequest, config: dict[str, Any], report: Report, say: Callable[[str], None]
) -> None:
    packages = [p for group in config.get("dependencies", []) for p in group["packages"]]
    signs = {"EXACT": "==", "ATLEAST": ">=", "ATMOST": "<="}
    lines = [
        p["package_name"] + (signs[p["restraint"]] + p["package_version"] if "package_version" in p else "")
        for p in packages
    ]
    say("installing into a clean environment")
    try:
        requirements = [Requirement(line) for line in lines]
    except ValueError as error:
        report.findings.append(Finding(f"model/{NAME}", f"dependencies: {error}", "name and version as pip has them"))
        return
    if not report.take("installed", install_for_here(room, requirements, request, report, say)):
        return
    body = room.folder / "body.json"
    body.write_text(json.dumps(BODY), encoding="utf-8")
    engine = str(config.get("model_type"))
    if engine not in _NEEDED or engine == "TensorFlow":
        raise PackageError(f"model_type {engine}: only services of PyTorch and MindSpore can be run here")
    say("sending requests through the service")
    outcome = room.run(_CHILD, [str(room.package / "model"), engine, str(body)], request.limit_s)
    report.notes += outcome.notes
    root = str(room.package)
    report.take("loaded, dict, bytes and str bodies answered", explain(outcome, root, 3, request.limit_s, _SERVICE))
    report.take(f"every request within {_GATEWAY_S:g} s", _slow(outcome.events))
    report.take("answers", [f for text in outcome.answers for f in _answer(text)])
    report.figures["seconds"] = [event["seconds"] for event in outcome.events if event["event"] == "answered"]
    if report.findings:
        report.figures["log"] = outcome.log[-4000:]


def _slow(events: list[dict[str, Any]]) -> list[Finding]:
    cure = "limit max_new_tokens, or stop at a deadline, or deploy asynchronously"
    return [
        Finding(f"model/{_SERVICE}", f"a request took {event['seconds']:.1f} s; the gateway cuts off at 40", cure)
        for event in events
        if event["event"] == "answered" and event["seconds"] > _GATEWAY_S
    ]


def _answer(text: str) -> list[Finding]:
    record = json.loads(text)
    if not isinstance(record, dict) or "error" in record:
        message = f"a request was answered with {text[:200]}"
        return [Finding(f"model/{_SERVICE}", message, "the service takes dict, bytes and str; see the log")]
    return []
