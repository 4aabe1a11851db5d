"""Equivalence of mathematical answers: exact rationals at once, everything else through math-verify in a worker.

math-verify hands text to SymPy, which a few characters such as ``9^{9^{9^{9}}}`` can keep busy for ever inside one C
call. So it runs in a process of its own, with a memory limit, which is replaced when it does not answer in time.
"""

import json
import logging
import re
import subprocess
import sys
import threading
from fractions import Fraction
from queue import Empty, Queue

from qcompile.errors import EvaluateError
from qcompile.evaluate.math_kinds import are_of_other_kind
from qcompile.evaluate.math_writing import boxed_value, plainly_written
from qcompile.evaluate.units import has_other_unit, measure

_logger = logging.getLogger(__name__)
_MAX_CHARS = 2000
_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 60.0
# Not `-m`, which looks for modules in the working directory first: a random.py there would be run in place of Python's.
_START = (
    "import sys; sys.path.pop(0); import json; sys.path[:] = json.loads(sys.argv[1]); "
    "from qcompile.evaluate.math_worker import main; sys.exit(main())"
)
_NUMBER = r"[+-]?\d{1,200}(?:\.\d{1,200})?(?:[eE][+-]?\d{1,3})?"
_DELIMITERS = (("\\[", "\\]"), ("\\(", "\\)"), ("**", "**"))
_THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}| )+(?=\d{3}(?!\d))")  # 1\,000 and 1{,}000
_FRACTION = re.compile(rf"([+-]?)\\[dt]?frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|({_NUMBER})/({_NUMBER})")
_MIXED = re.compile(r"([+-]?)(\d{1,200}) +([1-9]\d?)/([1-9]\d{0,2})")
_TRUTH = re.compile(r"(?:\\(?:text|mathrm|textbf|mbox)\{\s*)?(true|false)\s*\}?", re.IGNORECASE)
_REPEATING = re.compile(r"([+-]?)(\d{1,200})\.(\d{0,50})\\overline\{(\d{1,50})\}")


def is_same_math(given: str, expected: str) -> bool:
    """Whether two answers are mathematically the same.

    Raises:
        EvaluateError: The answers need math-verify and it is not installed.
    """
    if not given.strip() or len(given) > _MAX_CHARS:
        return False
    given, expected = plainly_written(given), plainly_written(expected)
    left, right = plainly_written(unboxed(given)), plainly_written(unboxed(expected))
    if left == right and left:
        return True
    truths = _TRUTH.fullmatch(left), _TRUTH.fullmatch(right)
    if truths[0] is not None and truths[1] is not None:
        return truths[0][1].casefold() == truths[1][1].casefold()
    exact = as_rational(left), as_rational(right)
    if None not in exact:
        return exact[0] == exact[1]
    measured, wanted = _measure(left), _measure(right)
    if measured is not None and wanted is not None:
        return measured[0] == wanted[0] and (measured[1] == wanted[1] or not measured[1] or not wanted[1])
    if has_other_unit(left, right, as_rational) or are_of_other_kind(left, right, as_rational):
        return False
    return _worker.ask(
        given if boxed_value(given) is None else left, expected if boxed_value(expected) is None else right
    )


def _measure(text: str) -> tuple[Fraction, str] | None:
    value = as_rational(text)
    return (value, "") if value is not None else measure(text, as_rational)


def unboxed(text: str) -> str:
    r"""The content of the last `\\boxed{...}`, or the text, without math delimiters, bold, outer space, a last full stop."""
    inner = boxed_value(text)
    text = text if inner is None else inner
    text = text.strip().strip("$").strip()
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)].strip()
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


def as_rational(text: str) -> Fraction | None:
    r"""The value of an integer, a decimal (also `1.5e3`, `0.\\overline{3}`), `a/b`, `1 a/b` or `\\frac{a}{b}`, or None."""
    text = text.strip().replace("−", "-").replace(" / ", "/")
    if match := _MIXED.fullmatch(text) or _REPEATING.fullmatch(text):
        value = _mixed(match) if match.re is _MIXED else _repeating(match)
        return -value if match[1] == "-" else value
    text = _THIN_SPACE.sub("", text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d{1,200})?", text):
        text = text.replace(",", "")
    if re.fullmatch(_NUMBER, text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, over, under = match[1] or "", match[2] or match[4], match[3] or match[5]
    if Fraction(under) == 0:
        return None
    value = Fraction(over) / Fraction(under)
    return -value if sign == "-" else value


def _mixed(match: re.Match[str]) -> Fraction:
    return int(match[2]) + Fraction(int(match[3]), int(match[4]))


def _repeating(match: re.Match[str]) -> Fraction:
    whole, once, again = match[2], match[3], match[4]
    period = Fraction(int(again), int("9" * len(again)))
    return int(whole) + (int(once or "0") + period) / int("1" + "0" * len(once))


class _Worker:
    """One math-verify process, shared by all threads, replaced when it hangs or dies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._replies: Queue[str] = Queue()

    def ask(self, given: str, expected: str) -> bool:
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps([expected, given]) + "\n")
                process.stdin.flush()
                reply = self._replies.get(timeout=_TIMEOUT_S)
            except (Empty, OSError):
                self.stop()
                _logger.info("math-verify did not answer within %s s: %.80r counts as wrong", _TIMEOUT_S, given)
                return False
            if not reply:  # the process ended: out of memory, or killed
                self.stop()
                return False
            return bool(json.loads(reply)["same"])

    def stop(self) -> None:
        """End the process; the next question starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        command = [sys.executable, "-c", _START, json.dumps([str(place) for place in sys.path])]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the program, which lets a verdict under way be reached
        )
        replies: Queue[str] = Queue()
        threading.Thread(target=_forward, args=(process, replies), daemon=True).start()
        self._process, self._replies = process, replies
        try:
            greeting = replies.get(timeout=_START_TIMEOUT_S)
        except Empty:
            greeting = ""
        if greeting.strip() != '"ready"':
            self.stop()
            raise EvaluateError("math answers are checked by math-verify: pip install '.[eval]' in qcompile's checkout")
        return process


def _forward(process: "subprocess.Popen[str]", replies: "Queue[str]") -> None:
    assert process.stdout is not None
    try:
        while line := process.stdout.readline():
            replies.put(line)
    except ValueError:  # closed by stop()
        pass
    replies.put("")


_worker = _Worker()


def stop_worker() -> None:
    """End the shared process, for a clean exit; it starts again when it is needed."""
    _worker.stop()
