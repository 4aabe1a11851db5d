"""Judge the texts, several at a time, keeping each verdict in the journal."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from qcompile.errors import EvaluateError
from qcompile.evaluate.cases import Case
from qcompile.evaluate.checkers import check_answer
from qcompile.evaluate.interrupt import deferred_interrupt
from qcompile.evaluate.journal import Journal
from qcompile.evaluate.runner import Request
from qcompile.evaluate.sample import Judgement
from qcompile.evaluate.sandbox import Limits, stop_running
from qcompile.evaluate.settings import digest_of
from qcompile.runtime.host import default_threads

_POLL_S = 0.2
_RULES = 4  # count up when a checker changes its mind: a resumed journal must not keep verdicts by other rules


def verdict_key(request: Request, text: str, limits: Limits) -> str:
    """The journal's key of a verdict: a changed answer, test, limit or rule judges again, without generating again."""
    case = request.case
    return digest_of(_RULES, request.key, text, case.answers, case.tests, vars(limits))[:32]


def judge(case: Case, text: str, limits: Limits) -> Judgement:
    """The verdict on one text."""
    verdict = check_answer(case, text, limits)
    return Judgement(verdict.is_correct, verdict.extracted, verdict.reason, verdict.isolation)


def judges() -> int:
    """How many texts are judged at a time: what this process may compute with, for limits are in seconds.

    A container's quota of two cores on a machine of 64 would otherwise share two cores among 64 programs, and right
    ones would run out of time.
    """
    return max(2, default_threads())


def judge_all(
    requests: Sequence[Request],
    journal: Journal,
    limits: Limits,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Judge every finished text that has no verdict yet.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the verdicts reached until then are in the journal.
        EvaluateError: A checker cannot run at all, or the journal cannot be written.
    """
    open_requests = []
    for request in requests:
        sample = journal.samples.get(request.key)
        if sample is not None and verdict_key(request, sample.text, limits) not in journal.judgements:
            open_requests.append((request, sample.text))
    num_done, total = len(requests) - len(open_requests), len(requests)
    progress(num_done, total)
    with deferred_interrupt() as is_interrupted, ThreadPoolExecutor(judges()) as pool:
        keys: dict[Future[Judgement], str] = {
            pool.submit(judge, request.case, text, limits): verdict_key(request, text, limits)
            for request, text in open_requests
        }
        waiting = set(keys)
        try:
            while waiting and not is_interrupted():
                done, waiting = wait(waiting, _POLL_S, FIRST_COMPLETED)
                for future in done:
                    journal.add_judgement(keys[future], future.result())
                num_done += len(done)
                progress(num_done, total)
        finally:
            for future in waiting:
                future.cancel()
            if waiting:  # programs that wait for their time limit are not waited for
                stop_running()
        if waiting or is_interrupted():
            raise KeyboardInterrupt


def require_checkers(cases: Sequence[Case]) -> None:
    """Say at once, not after an hour of generating, that a checker cannot run here.

    Raises:
        EvaluateError: There are math cases with answers and math-verify is not installed.
    """
    from importlib.util import find_spec

    if any(case.type == "math" and case.is_checkable for case in cases) and find_spec("math_verify") is None:
        raise EvaluateError("math answers are checked by math-verify: pip install '.[eval]' in qcompile's checkout")
