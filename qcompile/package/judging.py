"""The B-board as the organisers run it: drive a package over test files, judge its texts, count tokens per second."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.errors import PackageError
from qcompile.evaluate.asking import CASE_TYPES, MAX_SUBMITTED_SAMPLES
from qcompile.evaluate.cases import Case
from qcompile.evaluate.checkers import check_answer
from qcompile.evaluate.formats import parse_content
from qcompile.evaluate.judging import require_checkers
from qcompile.evaluate.statistics import share_of, spread_of
from qcompile.package.case_files import read_case_file
from qcompile.package.check_contest import CheckRequest, install_dependencies, question_of, unpack_package
from qcompile.package.check_layout import MODEL
from qcompile.package.check_results import check_result
from qcompile.package.clean_room import CleanRoom, open_room
from qcompile.package.compiled_in import compiled_folders
from qcompile.package.contest_zip import ContestRequest, write_contest
from qcompile.package.diagnosis import explain
from qcompile.package.findings import Report
from qcompile.package.folder import FolderWriter
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest
from qcompile.runtime.tokenizer import Tokenizer

Say = Callable[[str], None]
_LOG_LINES = 12


@dataclass(frozen=True)
class JudgeRequest:
    """What is judged.

    Attributes:
        package: The zip, its folder, or a compiled-model directory.
        cases: Case files, each a test file.
        contest: How a compiled-model directory is packed.
        is_clean: Install its wheels into a clean room; otherwise this environment runs it.
        wheels: For the clean room, a folder with wheels for this machine.
        limit_s: Seconds for everything.
    """

    package: Path
    cases: Sequence[Path]
    contest: ContestRequest
    is_clean: bool = False
    wheels: Path | None = None
    limit_s: float = 3600.0


@dataclass
class Judged:
    """What came out.

    Attributes:
        cases: With their answers, in order.
        contents: What was returned, by id.
        durations_ms: Of the package's own account, by id, where it gives one.
        file_seconds: Around every call of get_results.
        construct_s: Seconds of Competition().
        num_tokens: Of all texts, by the package's own tokenizer.
        records: Verdicts by case.
        notes: What a reader must know.
        findings: What was wrong with the form.
        log: The end of what was printed.
        simulated: Chip and CANN of the simulated device that ran it; its times are nobody's.
    """

    cases: list[Case]
    contents: dict[str, Any] = field(default_factory=dict)
    durations_ms: dict[str, float] = field(default_factory=dict)
    file_seconds: list[float] = field(default_factory=list)
    construct_s: float = 0.0
    num_tokens: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    log: str = ""
    simulated: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Over all calls, as the judge counts."""
        seconds = sum(self.file_seconds)
        return self.num_tokens / seconds if seconds > 0 else 0.0


def judge_package(request: JudgeRequest, say: Say = lambda _: None) -> Judged:
    """Run a package over its test files and judge every text.

    Raises:
        PackageError: It cannot be run at all.
        EvaluateError: A case file or checker cannot be used.
    """
    read = [read_case_file(path) for path in request.cases]
    files = [found for found, _ in read]
    cases = [case for file in files for case in file]
    if len({case.id for case in cases}) < len(cases):
        raise PackageError(f"{request.cases[-1]}: an id stands in two case files; give each case an id of its own")
    require_checkers(cases)
    judged = Judged(cases, notes=[note for _, notes in read for note in notes])
    with open_room() as room:
        _prepare(room, request, judged, say)
        tests = []
        for number, file in enumerate(files):
            path = room.folder / f"test-{number + 1}.json"
            path.write_text(json.dumps([question_of(case) for case in file], ensure_ascii=False), encoding="utf-8")
            tests.append(path)
        say(f"answering {len(cases)} questions in {len(tests)} files")
        judged.simulated = () if request.is_clean else _simulated(room.package)
        outcome = room.run_judge(tests, request.limit_s, is_isolated=request.is_clean, simulated=judged.simulated)
        judged.log = outcome.log
        judged.notes += outcome.notes
        judged.findings += [str(one) for one in explain(outcome, str(room.package), len(files), request.limit_s)]
        for number, text in enumerate(outcome.answers):
            _take(judged, text, [question_of(case) for case in files[number]], request.cases[number].name)
        judged.file_seconds = [event["seconds"] for event in outcome.events if event["event"] == "answered"]
        constructed = outcome.event("constructed")
        judged.construct_s = constructed["seconds"] if constructed else 0.0
        _count_tokens(judged, room.package)
    if judged.findings:
        judged.notes += judged.log.splitlines()[-_LOG_LINES:]
    if judged.simulated:
        judged.notes.append(f"simulated {' with CANN '.join(judged.simulated)}: it proves function, not speed")
    say(f"judging {len(cases)} answers")
    judged.records = [_verdict(case, judged.contents.get(case.id)) for case in cases]
    return judged


def score_of(judged: Judged) -> dict[str, Any]:
    """Accuracy, format and tokens per second; accuracy counts code right when one of three texts is, as the contest."""

    def shares(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        known = [record for record in records if record["is_right"] is not None]
        return {
            "cases": len(records),
            "format": share_of(sum(record["is_format_ok"] for record in records), len(records)),
            "accuracy": share_of(sum(record["is_right"] for record in known), len(known)),
            "accuracy_first_text": share_of(sum(record["is_first_right"] for record in known), len(known)),
            "answered": sum(record["is_answered"] for record in records),
        }

    types = [name for name in CASE_TYPES if any(case.type == name for case in judged.cases)]
    return {
        "all": shares(judged.records),
        "by_type": {name: shares([r for r in judged.records if r["type"] == name]) for name in types},
        "speed": _speed(judged),
    }


def _speed(judged: Judged) -> dict[str, Any]:
    """Tokens and seconds; without seconds where the device was simulated."""
    speed: dict[str, Any] = {
        "tokens": judged.num_tokens,
        "seconds": round(sum(judged.file_seconds), 3),
        "seconds_per_file": [round(seconds, 3) for seconds in judged.file_seconds],
        "construct_seconds": round(judged.construct_s, 3),
        "tokens_per_s": round(judged.tokens_per_s, 2),
        "duration_ms": spread_of(list(judged.durations_ms.values()), 1) if judged.durations_ms else None,
    }
    if judged.simulated:
        return {name: value if name == "tokens" else None for name, value in speed.items()}
    return speed


def _simulated(package: Path) -> tuple[str, ...]:
    """Chip and CANN when the package's first rung was compiled for the simulated device."""
    folders = compiled_folders(package)
    build = Manifest.load(folders[0]).build if folders else {}
    return (str(build.get("soc_version")), str(build.get("cann_version"))) if build.get("simulated") else ()


def _prepare(room: CleanRoom, request: JudgeRequest, judged: Judged, say: Say) -> None:
    """Put the package into the room, and a Python that can run it."""
    report = Report("contest")
    if (request.package / MANIFEST_NAME).is_file():
        say("packing")
        write_contest(FolderWriter(room.package), request.contest, wheels=())
        judged.notes.append("packed for this run, without wheels")
    elif not unpack_package(request.package, room.package, report):
        raise PackageError(f"{request.package}: {report.findings[0]}")
    if not (room.package / MODEL).is_file():
        raise PackageError(f"{request.package}: no {MODEL} in it; `qcompile package --check` tells more")
    if not request.is_clean:
        room.use_this_environment()
        judged.notes.append("run in this environment, not in the package's own wheels (--clean does that)")
        return
    say("installing into a clean environment")
    findings = install_dependencies(room, CheckRequest(request.package, wheels=request.wheels), report, say)
    judged.notes += report.notes
    if findings:
        raise PackageError(f"{request.package}: {findings[0]}")


def _take(judged: Judged, text: str, questions: list[dict[str, Any]], name: str) -> None:
    results, findings = check_result(text, questions, name)
    judged.findings += [str(finding) for finding in findings]
    for result in results:
        judged.contents[result["id"]] = result["content"]
        if isinstance(result.get("duration"), (int, float)):
            judged.durations_ms[result["id"]] = float(result["duration"])


def _count_tokens(judged: Judged, package: Path) -> None:
    """Count with the tokenizer in the package; without one, a word is taken for a token."""
    texts = [text for content in judged.contents.values() for text in texts_of(content) if text]
    folders = compiled_folders(package)
    if not folders:
        judged.num_tokens = sum(len(text.split()) for text in texts)
        judged.notes.append("no tokenizer in the package: tokens are counted as words")
        return
    tokenizer = Tokenizer(folders[0], Manifest.load(folders[0]))
    judged.num_tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def texts_of(content: Any) -> list[str]:
    """The texts of one answer that count."""
    texts = content if isinstance(content, list) else [content]
    return [str(text) for text in texts if text is not None][:MAX_SUBMITTED_SAMPLES]


def _verdict(case: Case, content: Any) -> dict[str, Any]:
    texts = texts_of(content) or [""]
    verdicts = [check_answer(case, text) for text in texts] if texts[0] else []
    right = [verdict.is_correct is True for verdict in verdicts]
    return {
        "id": case.id,
        "type": case.type,
        "is_answered": bool(texts[0]),
        "is_format_ok": parse_content(texts[0]).is_format_ok,
        "is_right": any(right) if case.is_checkable else None,
        "is_first_right": (right[0] if right else False) if case.is_checkable else None,
        "reason": verdicts[0].reason if verdicts else "not answered",
    }
