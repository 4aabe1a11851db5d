"""Answer a request with the model within the time that ModelArts gives it."""

import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from qcompile.package.service.bodies import Body, Job, read_body
from qcompile.runtime import Engine, QCompileError, RequestError, SamplingParams

TIME_LIMIT_S = 35.0  # the gateway cuts a prediction off after 40 s
COMPILED = "compiled"


class Answering:
    """A model that is loaded in the background, and the three steps of a request.

    Args:
        root: The package's folder; the model lies in `compiled` under it.
        time_limit_s: Seconds for one request; what is generated until then is the answer.
        max_batch_size: The most texts computed together.
    """

    def __init__(self, root: Union[str, Path], time_limit_s: float = TIME_LIMIT_S, max_batch_size: int = 8) -> None:
        self._path = Path(root) / COMPILED
        self._time_limit_s = time_limit_s
        self._max_batch_size = max_batch_size
        self._places = threading.BoundedSemaphore(max_batch_size)  # one who waits must not wait past the limit
        self._is_loaded = threading.Event()
        self._engine: Optional[Engine] = None
        self._failure = ""
        threading.Thread(target=self._load, name="qcompile-load", daemon=True).start()

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self._engine is not None

    @property
    def failure(self) -> str:
        """Why it could not be loaded; empty while it is loading and when it is loaded."""
        return self._failure

    def read(self, body: Any) -> Union[Body, Dict[str, Any]]:
        """Read a request's body; a wrong one becomes the answer that says so."""
        try:
            return read_body(body)
        except RequestError as error:
            return _error(str(error), "invalid_request")

    def answer(self, body: Union[Body, Dict[str, Any]]) -> Dict[str, Any]:
        """Generate; the answers stand under `data.resp_data` if the request's texts stood in a list."""
        if isinstance(body, dict):
            return body
        deadline = time.monotonic() + self._time_limit_s
        if not self._is_loaded.wait(self._time_limit_s) or self._engine is None:
            return _error(self._failure or "the model is still loading; ask again", "not_ready")
        if not self._places.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return _error(f"no place became free within {self._time_limit_s:g} s; ask again", "not_ready")
        try:
            answers = self._generate(self._engine, body.jobs, deadline)
        except RequestError as error:
            return _error(str(error), "invalid_request")
        except QCompileError as error:
            return _error(str(error), "failed")
        finally:
            self._places.release()
        return {"data": {"resp_data": answers}} if body.is_list else answers[0]

    def _load(self) -> None:
        try:
            self._engine = Engine(self._path, max_batch_size=self._max_batch_size)
        except Exception as error:  # whatever it is, requests are told
            self._failure = f"the model cannot be loaded: {type(error).__name__}: {error}"
        self._is_loaded.set()

    def _generate(self, engine: Engine, jobs: List[Job], deadline: float) -> List[Dict[str, Any]]:
        prompts = [_prompt(engine, job) for job in jobs]
        params = [SamplingParams(**job.options) for job in jobs]
        texts, counts, reasons = [""] * len(jobs), [0] * len(jobs), ["time"] * len(jobs)
        for delta in engine.stream(prompts, params, raise_errors=False):
            texts[delta.index] += delta.text
            counts[delta.index] += len(delta.token_ids)
            if delta.completion is not None:
                reasons[delta.index] = delta.completion.finish_reason
            if time.monotonic() >= deadline:
                break
        return [_answer(*one) for one in zip(texts, reasons, map(len, prompts), counts)]


def _prompt(engine: Engine, job: Job) -> List[int]:
    if job.messages is not None:
        return engine.encode_chat(job.messages)
    if engine.tokenizer.has_chat_template:
        return engine.encode_chat([{"role": "user", "content": job.prompt}])
    return engine.tokenizer.encode(job.prompt)


def _answer(text: str, finish_reason: str, prompt_tokens: int, new_tokens: int) -> Dict[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens}
    return {"text": text, "finish_reason": finish_reason, "usage": usage}


def _error(message: str, kind: str) -> Dict[str, Any]:
    return {"error": {"message": message, "type": kind}}
