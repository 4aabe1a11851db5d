"""The ladder: the ways to run the model, best first; a rung that fails is left for the next, and says so.

A rung that fails while it runs is opened afresh once: after a device's hiccup that is better than the next rung.
"""

import time
from pathlib import Path
from typing import Any, List, Mapping, Optional, Protocol, Sequence

from qcompile.package.contest.record import Record, say
from qcompile.package.contest.settings import ContestSettings, Rung
from qcompile.runtime.tokenizer import Tokenizer

_NAMES = {
    "acl": "the .om model on the NPU (CANN's acl)",
    "torch_npu": "the checkpoint on the NPU (torch_npu, transformers)",
    "onnxruntime": "ONNX Runtime on the CPU",
}


class Backend(Protocol):
    """What the loop asks of a rung; `qcompile.runtime.Engine` is one."""

    tokenizer: Tokenizer

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_variables: Any) -> List[int]:
        """Return the prompt ids of a conversation."""

    def add_request(self, prompt: Any, params: Any) -> int:
        """Queue one text; returns its number."""

    def abort(self, request_id: int) -> None:
        """End one text."""

    def step(self) -> Sequence[Any]:
        """Compute something and return what is new."""

    def close(self) -> None:
        """Release the model."""


class Ladder:
    """Opens one rung at a time.

    Args:
        root: The package's folder.
        settings: Of the package.
        record: The log.
    """

    def __init__(self, root: Path, settings: ContestSettings, record: Record) -> None:
        self._root = root
        self._settings = settings
        self._record = record
        self._rungs = list(settings.ladder)
        self.backend: Optional[Backend] = None
        self.name = "none"
        self._open: Optional[Rung] = None
        self._reopened: List[Rung] = []

    def climb(self) -> Optional[Backend]:
        """Return the open rung; open the best one left when none is. None: no rung is left."""
        while self.backend is None and self._rungs:
            rung = self._rungs.pop(0)
            start = time.monotonic()
            try:
                self.backend = open_rung(self._root / rung.path, rung, self._settings)
            except Exception as error:
                self._fell(rung, f"cannot be used: {type(error).__name__}: {error}")
                continue
            self._open, self.name = rung, rung.kind
            seconds = round(time.monotonic() - start, 3)
            self._record.note("opened", backend=rung.kind, path=rung.path, seconds=seconds)
            say(f"running on {_NAMES[rung.kind]}, loaded in {seconds} s")
        return self.backend

    def leave(self, reason: str) -> None:
        """Give up the open rung."""
        failed, rung = self.backend, self._open
        self.backend, self._open, self.name = None, None, "none"
        if failed is None or rung is None:
            return
        if rung not in self._reopened:
            self._reopened.append(rung)
            self._rungs.insert(0, rung)
        self._fell(rung, f"failed: {reason}")
        try:
            failed.close()
        except Exception as error:
            self._record.note("close failed", error=repr(error))

    def below(self) -> "Ladder":
        """Return a ladder of the rungs that are left, for when the open one hangs and cannot even be closed."""
        lower = Ladder(self._root, self._settings, self._record)
        lower._rungs = list(self._rungs)
        return lower

    def _fell(self, rung: Rung, what: str) -> None:
        left = _NAMES[self._rungs[0].kind] if self._rungs else "nothing left: what is not answered stays empty"
        message = f"{_NAMES.get(rung.kind, rung.kind)} {what} -> {left}"
        self._record.warn("fallback", message, backend=rung.kind)


def encode_question(backend: Backend, messages: Sequence[Mapping[str, Any]], **template_variables: Any) -> List[int]:
    """Return a question's prompt ids: through the chat template, or as plain text where there is none, as `eval`."""
    if backend.tokenizer.has_chat_template:
        return backend.encode_chat(messages, **template_variables)
    return backend.tokenizer.encode("\n\n".join(message["content"] for message in messages))


def open_rung(path: Path, rung: Rung, settings: ContestSettings) -> Backend:
    """Load the model of a rung; raises whatever its back end raises."""
    if rung.kind == "torch_npu":
        from qcompile.package.contest.transformers_backend import TransformersBackend

        return TransformersBackend(path, settings.batch_size)
    from qcompile.runtime import Engine

    engine: Backend = Engine(path, settings.threads, settings.batch_size, settings.max_model_len)
    return engine
