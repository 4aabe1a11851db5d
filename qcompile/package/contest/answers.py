"""The answers of one test file: complete at every moment, an empty text for what is not there yet."""

import threading
from typing import Any, Callable, Dict, List, Optional, Sequence

from qcompile.evaluate.asking import MAX_SUBMITTED_SAMPLES
from qcompile.package.contest.questions import Question

MANY = "code-generate"  # the type whose content may be a list


class Answers:
    """Collects texts from the worker's thread; the judge's thread may ask for the result at any moment.

    Args:
        questions: Of the file, in order.
        clock: Monotonic seconds.
    """

    def __init__(self, questions: Sequence[Question], clock: Callable[[], float]) -> None:
        self.questions = questions
        self._clock = clock
        self._lock = threading.Lock()
        self._texts: List[Dict[int, str]] = [{} for _ in questions]
        self._began: List[Optional[float]] = [None for _ in questions]
        self._ended: List[Optional[float]] = [None for _ in questions]
        self._is_closed = False
        self.num_tokens = 0

    def begin(self, question: Question) -> None:
        """The question is handed to the model; only the first time counts."""
        with self._lock:
            if self._began[question.place] is None:
                self._began[question.place] = self._clock()

    def add(self, question: Question, sample: int, text: str, num_tokens: int) -> None:
        """Keep a finished text; nothing is taken any more once the file was handed back."""
        with self._lock:
            if self._is_closed:
                return
            self._texts[question.place][sample] = text
            self._ended[question.place] = self._clock()
            self.num_tokens += num_tokens

    def close(self) -> None:
        """The result is being handed back: a text that comes later belongs to no file."""
        with self._lock:
            self._is_closed = True

    @property
    def num_answered(self) -> int:
        """Questions with at least one text."""
        with self._lock:
            return sum(bool(texts) for texts in self._texts)

    def result(self) -> Dict[str, Any]:
        """The judge's form: an entry for every question, in order."""
        with self._lock:
            return {"result": {"results": [self._entry(question) for question in self.questions]}}

    def _entry(self, question: Question) -> Dict[str, Any]:
        """`duration`: wall-clock milliseconds from the question's hand-over to its last text.

        Questions of a batch overlap, so durations add up to more than the file took.
        """
        texts = self._texts[question.place]
        kept = [texts[sample] for sample in sorted(texts)][:MAX_SUBMITTED_SAMPLES]
        content: Any = kept if question.type == MANY and len(kept) > 1 else (kept or [""])[0]
        began, ended = self._began[question.place], self._ended[question.place]
        duration = 0.0 if began is None or ended is None else 1000 * (ended - began)
        return {"id": question.id, "content": content, "duration": round(duration, 3)}
