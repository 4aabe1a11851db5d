"""What a failure inside the clean room means, and its cure."""

import re
from typing import Any

from qcompile.package.check_layout import MODEL
from qcompile.package.clean_room import Outcome
from qcompile.package.findings import INFERENCE, NO_SUCCESS, TIMEOUT, Finding

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_STAGES = {
    "import": "importing competition_model",
    "construct": "Competition()",
    "get_results": "get_results",
    "result": "the result of get_results",
    "service": "importing customize_service",
    "load": "the service's __init__",
    "request": "a request",
}
_NETWORK = re.compile(
    r"Network is unreachable|Name or service not known|name resolution|NameResolution|ConnectionError|getaddrinfo"
    r"|huggingface\.co|Connection refused|MaxRetryError|URLError|not a valid model identifier|HFValidationError",
    re.IGNORECASE,
)
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"TypeError: (?:Competition\.)?(?:__init__|get_results)\(\).*argument"),
        "the judge calls Competition() and get_results(list)",
    ),
    (_NETWORK, "the judge has no network: put everything into the zip and name it './...'"),
    (
        re.compile(r"PermissionError|Permission denied|Operation not permitted|superuser|must be root", re.IGNORECASE),
        "the judge gives no root: write only beside competition_model.py or into a temporary folder",
    ),
    (
        re.compile(r"ModuleNotFoundError|ImportError|No module named"),
        "add its wheel to dependencies/ and requirements.txt",
    ),
    (
        re.compile(r"FileNotFoundError|No such file|missing"),
        "put the file into the zip and name it relative to the program",
    ),
    (re.compile(r"MemoryError|out of memory|Cannot allocate", re.IGNORECASE), "load the model in a smaller type"),
    (re.compile(r"not JSON serializable"), "return strings, numbers, lists and dicts only"),
)


def explain(outcome: Outcome, package: str, num_tests: int, limit_s: float, program: str = MODEL) -> list[Finding]:
    """Findings for what did not go well: a time-out, an exception, a process that died."""
    error = outcome.event("error")
    if error is not None:
        return [_from_error(error, package, program)]
    if outcome.has_timed_out:
        stage = "get_results" if outcome.event("constructed") else "Competition()"
        message = f"{stage} was not done within {limit_s:g} s"
        cure = "answer in batches, and stop before the limit (`qcompile package --budget MINUTES`)"
        return [Finding(program, message, cure, TIMEOUT)]
    if outcome.event("done") is None:
        message = f"the process died after {len(outcome.answers)} of {num_tests} test files{_last_words(outcome.log)}"
        return [Finding(program, message, "it must not exit; see the log", INFERENCE)]
    return []


def _from_error(error: dict[str, Any], package: str, program: str) -> Finding:
    text = f"{error['type']}: {error['message']}"
    file = _place(str(error["traceback"]), package, program)
    whole = f"{text}\n{error['traceback']}"
    cure = next((cure for pattern, cure in _RULES if pattern.search(text) or pattern.search(whole)), "mend the line")
    judge = NO_SUCCESS if error["stage"] == "result" else INFERENCE
    if error["stage"] == "result":
        cure = 'return {"result": {"results": [{"id": ..., "content": ...}]}}'
    return Finding(file, f"{_STAGES.get(error['stage'], error['stage'])} failed: {text[:300]}", cure, judge)


def _place(trace: str, package: str, program: str) -> str:
    """The innermost line of the package's own that the traceback names."""
    for path, line in reversed(_FRAME.findall(trace)):
        if path.startswith(package):
            return f"{path[len(package) :].lstrip('/')}:{line}"
    return program


def _last_words(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"; its last words: {lines[-1][:200]}" if lines else ""
