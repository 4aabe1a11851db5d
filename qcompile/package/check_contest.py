"""Replay the judge on a contest package: unpack, install, construct, one call per test file, look at the results."""

import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from qcompile.errors import PackageError
from qcompile.evaluate.cases import Case, read_cases
from qcompile.package.case_files import read_case_file
from qcompile.package.check_dependencies import check_dependencies, read_requirements
from qcompile.package.check_layout import DEPENDENCIES, KERNELS, REQUIREMENTS, check_layout
from qcompile.package.check_results import check_result, format_score
from qcompile.package.check_source import PARAMETERS, check_source
from qcompile.package.clean_room import CleanRoom, open_room
from qcompile.package.contest_zip import MAX_PARAMETERS
from qcompile.package.diagnosis import explain
from qcompile.package.findings import INFERENCE, Finding, Report
from qcompile.package.platforms import JUDGE, this_machine
from qcompile.package.unpack import check_zip, refuse_full_disk, unpack
from qcompile.package.wheels import collect_wheels

_SAID = re.compile(rf"{PARAMETERS}:\s*(\d+(?:\.\d+)?)\s*B".encode())
_SAMPLE_FILES = 2
TestFile = tuple[Path, list[dict[str, Any]]]


@dataclass(frozen=True)
class CheckRequest:
    """What is to be checked, and how.

    Attributes:
        package: The zip, or its unpacked folder.
        cases: Case files, each a test file; empty for the built-in sample in two files.
        wheels: A folder with wheels for this machine; None asks the package index.
        is_offline: Do not ask the index.
        limit_s: Seconds for constructing and all calls.
        is_static: Do not run anything.
    """

    package: Path
    cases: Sequence[Path] = ()
    wheels: Path | None = None
    is_offline: bool = False
    limit_s: float = 3600.0
    is_static: bool = False


def check_contest(request: CheckRequest, say: Callable[[str], None] = lambda _: None) -> Report:
    """Make every check that the ones before allow.

    Raises:
        EvaluateError: A case file cannot be read.
    """
    report = Report("contest")
    with open_room() as room:
        files, notes = ([], []) if request.is_static else test_files(request.cases, room.folder)  # first: it is quick
        report.notes += notes
        say("unpacking")
        if not unpack_package(request.package, room.package, report):
            return report
        is_zip = request.package.is_file()
        report.take("layout", check_layout(room.package, request.package.name if is_zip else ""))
        say("reading the programs")
        report.take("sources: Python 3.9, relative paths, no hub, no root", check_source(room.package))
        if (room.package / REQUIREMENTS).is_file():
            say(f"resolving {DEPENDENCIES}/ for {JUDGE.name}")
            report.take(f"dependencies: complete for {JUDGE.name}", check_dependencies(room.package, JUDGE))
        if (room.package / KERNELS).is_dir():
            report.notes.append(f"{KERNELS}/*.run were not executed: they need CANN and an NPU")
        if request.is_static:
            report.notes.append("nothing was run")
        elif (room.package / "competition_model.py").is_file():
            _run(room, request, files, report, say)
    return report


def unpack_package(package: Path, folder: Path, report: Report) -> bool:
    """Unpack a zip, or copy a folder, into an empty folder."""
    if package.is_dir():
        links = [path for path in package.rglob("*") if path.is_symlink()]
        cure = "put the file itself there"
        findings = [Finding(str(path.relative_to(package)), "a symbolic link", cure) for path in links[:20]]
        return report.take("folder", findings or _copy(package, folder))
    entries, findings = check_zip(package)
    if not findings:
        findings = unpack(package, entries, folder)
    return report.take("zip", findings)


def _copy(package: Path, folder: Path) -> list[Finding]:
    """Copy a folder; what cannot be copied is found."""
    try:
        shutil.copytree(package, folder, dirs_exist_ok=True, copy_function=_copy_file)
    except shutil.Error as error:
        cure = "make a readable file of it, or take it out"
        return [Finding(os.path.relpath(source, package), str(why), cure) for source, _, why in error.args[0][:20]]
    return []


def _copy_file(source: str, target: str) -> None:
    try:
        shutil.copy2(source, target)
    except OSError as error:
        refuse_full_disk(source, error)
        raise


def _run(
    room: CleanRoom, request: CheckRequest, files: Sequence[TestFile], report: Report, say: Callable[[str], None]
) -> None:
    say("installing into a clean environment")
    if not report.take("installed offline", install_dependencies(room, request, report, say)):
        return
    say(f"running {len(files)} test files")
    outcome = room.run_judge([path for path, _ in files], request.limit_s)
    report.notes += outcome.notes
    findings = explain(outcome, str(room.package), len(files), request.limit_s)
    report.take("constructed and called once per test file", findings)
    report.take(f"printed '{PARAMETERS}'", _parameters(room.log) if not findings else [])
    passed, total = 0, 0
    results: list[Finding] = []
    for (path, questions), text in zip(files, outcome.answers, strict=False):
        answers, wrong = check_result(text, questions, path.name)
        results += wrong
        right, of = format_score(answers, questions)
        passed, total = passed + right, total + of
    if outcome.answers:
        report.take("results: schema, ids, contents", results)
        report.figures["format"] = {"passed": passed, "total": total}
    report.figures["seconds"] = [event["seconds"] for event in outcome.events if event["event"] == "answered"]
    constructed = outcome.event("constructed")
    report.figures["construct_seconds"] = constructed["seconds"] if constructed else None
    if report.findings:
        report.figures["log"] = outcome.log[-4000:]
    report.notes += [line for line in outcome.log.splitlines() if line.startswith("[qcompile] ")][:20]


def install_dependencies(
    room: CleanRoom, request: CheckRequest, report: Report, say: Callable[[str], None]
) -> list[Finding]:
    """Install from the package's wheels; where they are for another machine, the same versions for this one."""
    requirements, findings = read_requirements(room.package)
    if findings:
        return findings
    here = this_machine()
    if requirements and (here.python, here.machine) == (JUDGE.python, JUDGE.machine):
        return room.install(room.package / DEPENDENCIES, room.package / REQUIREMENTS, request.limit_s)
    return install_for_here(room, requirements, request, report, say)


def install_for_here(
    room: CleanRoom,
    requirements: Sequence[Requirement],
    request: CheckRequest,
    report: Report,
    say: Callable[[str], None],
) -> list[Finding]:
    """Install a second set: the same versions for this machine, or where there are none, others."""
    here = this_machine()
    if not requirements:
        return room.install(None, room.package / REQUIREMENTS, request.limit_s)
    reason = ""
    pins = [str(requirement) for requirement in requirements]
    for wanted in (pins, [requirement.name for requirement in requirements]):
        try:
            wheels = collect_wheels(wanted, here, request.wheels, is_offline=request.is_offline, say=say)
        except PackageError as error:
            reason = reason or str(error)
            continue
        second = room.folder / "requirements.txt"
        second.write_text("".join(f"{wheel.pin}\n" for wheel in wheels), encoding="utf-8")
        same = "the same versions" if wanted is pins else "OTHER VERSIONS"
        report.notes.append(f"run with {same} of its dependencies for this machine ({here.name})")
        return room.install(wheels[0].path.parent, second, request.limit_s)
    cure = "give a folder with the same versions for this machine: --wheels DIR"
    return [Finding(REQUIREMENTS, f"no second set of wheels for this machine: {reason}", cure)]


def test_files(cases: Sequence[Path], folder: Path) -> tuple[list[TestFile], list[str]]:
    """Write the test files as the judge would hand them over, without answers.

    Returns:
        Paths and questions, and what is wrong with which line of the case files.

    Raises:
        EvaluateError: A case file cannot be read, or none of its lines is a case.
    """
    files, notes = [], []
    for path in cases:
        found, wrong = read_case_file(path)
        files.append([question_of(case) for case in found])
        notes += wrong
    written = []
    for number, questions in enumerate(files or _sample()):
        path = folder / f"test-{number + 1}.json"
        path.write_text(json.dumps(questions, ensure_ascii=False), encoding="utf-8")
        written.append((path, questions))
    return written, notes


def _sample() -> list[list[dict[str, Any]]]:
    with resources.as_file(resources.files("qcompile.package").joinpath("sample_cases.jsonl")) as path:
        sample = [question_of(case) for case in read_cases(path)[0]]
    half = len(sample) // _SAMPLE_FILES
    return [sample[:half], sample[half:]]


def question_of(case: Case) -> dict[str, Any]:
    """A case as the judge hands it over."""
    question: dict[str, Any] = {"id": case.id, "type": case.type, "prompt": case.prompt}
    if case.type == "choice":
        question["choices"] = dict(case.choices)
    return question


def _parameters(log: Path) -> list[Finding]:
    """Look for the size in everything that was printed: loading a model can print more than is kept for reading."""
    with log.open("rb") as stream:
        printed = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if log.stat().st_size else b""
        said = _SAID.search(printed)
    if said is None:
        cure = 'print(f"Total parameters: {n / 1e9:.2f}B") in __init__'
        return [Finding("competition_model.py", f"did not print '{PARAMETERS}: ...B'", cure, INFERENCE)]
    if float(said[1]) > MAX_PARAMETERS / 1e9:
        return [Finding("competition_model.py", f"{said[1].decode()}B parameters", "the contest takes 3B or fewer")]
    return []
