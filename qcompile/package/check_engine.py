"""ModelArts' custom engine: what the image must be, read from its files, and the service itself, started here."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcompile.package.check_contest import CheckRequest, install_for_here
from qcompile.package.check_dependencies import check_dependencies, read_requirements
from qcompile.package.clean_room import CleanRoom
from qcompile.package.findings import Finding, Report
from qcompile.package.platforms import JUDGE

_BODY = {"prompt": "What is 2 + 3?", "max_new_tokens": 48}
_LOADING_S = 120.0
_LIMIT_S = 60.0
_END_S = 30.0
# what a line of the Dockerfile must say, and why
_WANTED: tuple[tuple[str, str, str], ...] = (
    (r"groupadd\b.*(-g|--gid)[\s=]*100\b|getent group 100", "no group with gid 100", "groupadd -g 100 ma-group"),
    (
        r"useradd\b.*(-u|--uid)[\s=]*1000\b",
        "no user with uid 1000",
        "useradd -d /home/ma-user -m -u 1000 -g 100 -s /bin/bash ma-user",
    ),
    (r"useradd\b.*\bma-user\b", "the user is not called ma-user", "name it ma-user"),
    (r"(?mi)^\s*(CMD|ENTRYPOINT)\b.*run\.sh", "it does not start run.sh", "CMD sh /home/mind/run.sh"),
    (r"(?mi)^\s*EXPOSE\b.*\b8080\b", "port 8080 is not exposed", "EXPOSE 8080"),
)


def check_engine_files(root: Path) -> list[Finding]:
    """Judge Dockerfile and run.sh."""
    findings = []
    dockerfile = root / "Dockerfile"
    if not dockerfile.is_file():
        return [Finding("Dockerfile", "missing", "make the package with `qcompile package --target modelarts-engine`")]
    text = re.sub(r"\\\n", " ", dockerfile.read_text(encoding="utf-8", errors="replace"))
    findings += [
        Finding("Dockerfile", message, cure, "the image does not start")
        for pattern, message, cure in _WANTED
        if not re.search(pattern, text)
    ]
    users = re.findall(r"(?mi)^\s*USER\s+(\S+)", text)
    if users and not re.fullmatch(r"(1000|ma-user)(:(100|ma-group))?", users[-1]):
        findings.append(
            Finding("Dockerfile", f"it ends as user {users[-1]}", "USER 1000:100", "the image does not start")
        )
    script = root / "run.sh"
    if not script.is_file():
        findings.append(Finding("run.sh", "missing", "a script that starts the service on 0.0.0.0:8080"))
    elif b"\r\n" in script.read_bytes():
        findings.append(Finding("run.sh", "has the line ends of Windows", "save it with \\n"))
    return findings + (check_dependencies(root, JUDGE) if (root / "requirements.txt").is_file() else [])


def run_engine(
    room: CleanRoom, request: CheckRequest, config: dict[str, Any], report: Report, say: Callable[[str], None]
) -> None:
    """Start run.sh as the image would, probe it, ask it, and end it."""
    del config
    requirements, findings = read_requirements(room.package)
    say("installing into a clean environment")
    findings = findings or install_for_here(room, requirements, request, report, say)
    if not report.take("installed", findings):
        return
    report.notes.append("no image was built; run.sh was started here, with the network and as this user")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = room.folder / "log.txt"
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(room.folder), "PYTHON": str(room.python)}
    environment |= {"MODEL_DIR": str(room.package / "model"), "PORT": str(port)}
    say("starting run.sh")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["sh", str(room.package / "run.sh")],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _probe(process, f"http://127.0.0.1:{port}", report)
        finally:
            _kill(process)
    if report.findings:
        report.figures["log"] = log.read_text(encoding="utf-8", errors="replace")[-4000:]


def _probe(process: "subprocess.Popen[bytes]", address: str, report: Report) -> None:
    start = time.monotonic()
    status = 0
    while status != 200 and time.monotonic() < start + _LOADING_S and process.poll() is None:
        status, _ = _ask(f"{address}/health", None)
        time.sleep(0.1)
    message = f"GET /health was {status or 'not answered'} after {time.monotonic() - start:.0f} s"
    cure = "answer 200 on port 8080 once the model is loaded; see the log"
    if not report.take("GET /health is 200", [] if status == 200 else [Finding("run.sh", message, cure)]):
        return
    report.figures["ready_seconds"] = round(time.monotonic() - start, 2)
    start = time.monotonic()
    status, answer = _ask(address + "/", json.dumps(_BODY).encode())
    report.figures["seconds"] = [time.monotonic() - start]
    wrong = (
        []
        if status == 200 and "text" in answer
        else [Finding("run.sh", f"POST / was {status}: {answer}", "see the log")]
    )
    report.take("POST / answers", wrong)
    status, answer = _ask(address + "/", b"{not json")
    wrong = [] if 400 <= status < 500 else [Finding("run.sh", f"a body that is not JSON got {status}", "answer 400")]
    report.take("a wrong body is refused", wrong)
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(_END_S)
        wrong = (
            [] if code in (0, -signal.SIGTERM, 143) else [Finding("run.sh", f"ended with {code} on SIGTERM", "exit 0")]
        )
    except subprocess.TimeoutExpired:
        wrong = [Finding("run.sh", f"still runs {_END_S:g} s after SIGTERM", "start the service with exec")]
    report.take("SIGTERM ends it", wrong)


def _ask(url: str, body: bytes | None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_LIMIT_S) as answer:
            return answer.status, _record(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, _record(error.read())
    except OSError:
        return 0, {}


def _record(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
