"""A model whose graphs have fixed shapes and choose their tokens themselves (Ascend), scored through a runtime session.

Its static ONNX graphs run by the definitions of their operators, one token per call: slow, and the very numbers of the
definitions, not of a chip.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.ascend.reference_session import ReferenceSession
from qcompile.errors import SessionError
from qcompile.quality.models import OpenedModel
from qcompile.quality.scorer import Scored

STREAM_REASON = "graphs of fixed shapes do not show their hidden states"


class SessionScorer:
    """Scores like `Scorer`; the residual stream is not known.

    Args:
        model: What to load.
        capacity: The most tokens of a text.
        threads: Computing threads.

    Raises:
        SessionError: The graphs cannot be run, or hold fewer tokens.
    """

    def __init__(self, model: OpenedModel, capacity: int, threads: int) -> None:
        self.model = model
        self.vocab_size = model.shape.vocab_size
        self.scores_all = False
        self.stream: tuple[str, ...] = ()
        self.stream_reason = STREAM_REASON
        self._session = ReferenceSession(model.graph_path.parent, model.manifest, threads)
        try:
            self._session.reserve(1, capacity)
        except SessionError:
            self._session.close()
            raise
        self.length = 0

    def reset(self) -> None:
        """Forget the text so far: nothing beyond `length` is ever read."""
        self.length = 0

    def extend(self, ids: npt.NDArray[np.int64]) -> Scored:
        """Append S tokens and score what follows each of them."""
        rows = []
        for token in ids:
            scores = self._session.forward(0, np.array([[token]], np.int64), [self.length])
            assert scores is not None
            rows.append(scores.values[0].copy())
            self.length += 1
        return Scored(np.stack(rows), [])

    def close(self) -> None:
        """Release the model."""
        self._session.close()
