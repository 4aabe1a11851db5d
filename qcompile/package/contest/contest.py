"""The contest as the judge sees it: construct once, then one call per test file.

The model lives in one worker thread; the judge's thread only waits, so it hands back a complete result in time even
when a step hangs, when the machine asks the process to end, or when everything fails.
"""

import queue
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Union

from qcompile.package.contest.answers import Answers
from qcompile.package.contest.clock import Budget
from qcompile.package.contest.ladder import Ladder
from qcompile.package.contest.loop import Loop
from qcompile.package.contest.questions import read_questions
from qcompile.package.contest.record import Record, say
from qcompile.package.contest.settings import ContestSettings

_LOADING_S = 1200.0  # of the two hours for everything; a device that hangs longer will not come
_ENDING_S = 5.0  # after SIGTERM; whoever sends it kills before long
_POLL_S = 0.2


class Contest:
    """Loads the model and answers test files.

    Args:
        root: The package's folder.
        clock: Monotonic seconds.
    """

    def __init__(self, root: Union[str, Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.settings = ContestSettings.load(root)
        self._record = Record(Path(root))
        self._budget = Budget(self.settings.budget_s, self.settings.expected_questions, clock)
        self._ladder = Ladder(Path(root), self.settings, self._record)
        self._worker = Worker()
        self._num_files = 0
        self._stopped_at: Optional[float] = None  # when SIGTERM came
        self._wait_for(self._ladder.climb, clock() + _LOADING_S, "the model is still loading")

    def get_results(self, entries: Any) -> Dict[str, Any]:
        """Answer one test file: an entry for every id, an empty text where there is none."""
        self._num_files += 1
        answers = Answers(read_questions(entries, self.settings), self._clock)
        deadline = self._budget.start(len(answers.questions))
        stop = threading.Event()
        if self._stopped_at is not None:
            stop.set()
        loop = Loop(self._ladder, answers, self.settings, self._record, self._clock, deadline, stop)
        why = "failed"
        try:
            with self._ending_on_sigterm(stop):
                late = deadline + self.settings.grace_s
                why = self._wait_for(loop.run, late, "the back end hangs") or "failed"
        except BaseException as error:
            stop.set()  # what the worker still does for this file would hold up the next one
            self._record.warn("interrupted", f"{type(error).__name__}: {error}")
        answers.close()
        self._report(answers, why, self._budget.stop())
        return answers.result()

    def _wait_for(self, work: Callable[[], Any], until: float, hang: str) -> Any:
        """Have the worker do something; give up the worker when it is not done in time."""
        done = self._worker.start(work)
        while not done.wait(_POLL_S):
            ends = until if self._stopped_at is None else min(until, self._stopped_at + _ENDING_S)
            if self._clock() >= ends:
                self._record.warn("hang", f"{hang}: it is given up")
                self._ladder, self._worker = self._ladder.below(), Worker()
                return None
        if self._worker.error is not None:
            error = self._worker.error
            self._record.warn("failed", f"{type(error).__name__}: {error}")
            return None
        return self._worker.value

    @contextmanager
    def _ending_on_sigterm(self, stop: threading.Event) -> Iterator[None]:
        """While a file is answered SIGTERM ends the answering, not the process; the judge still gets its result."""

        def end(number: int, frame: Any) -> None:
            del number, frame
            self._stopped_at = self._clock()
            stop.set()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _report(self, answers: Answers, why: str, seconds: float) -> None:
        total, answered = len(answers.questions), answers.num_answered
        speed = answers.num_tokens / seconds if seconds > 0 else 0.0
        facts: Dict[str, Any] = {"questions": total, "answered": answered, "seconds": round(seconds, 3)}
        facts.update(new_tokens=answers.num_tokens, tokens_per_s=round(speed, 2), backend=self._ladder.name, ended=why)
        self._record.note("file", number=self._num_files, **facts)
        say(f"file {self._num_files}: {answered} of {total} answered in {seconds:.1f} s, {speed:.1f} tokens/s ({why})")
        if answered < total:
            message = f"{total - answered} of {total} questions have no answer ({why})"
            self._record.warn("incomplete", message, number=self._num_files)
        self._record.keep(f"results-{self._num_files}.json", answers.result())


class Worker:
    """A thread that does one thing after the other; a device context belongs to the thread that made it."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: Optional[BaseException] = None
        self._tasks: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._serve, name="qcompile-contest", daemon=True).start()

    def start(self, work: Callable[[], Any]) -> threading.Event:
        """Begin; the event is set when it is done and `value` or `error` says how it went."""
        done = threading.Event()
        self._tasks.put((work, done))
        return done

    def _serve(self) -> None:
        while True:
            work, done = self._tasks.get()
            self.value, self.error = None, None
            try:
                self.value = work()
            except BaseException as error:
                self.error = error
            done.set()
