"""What generation gives back: pieces while it runs, and the whole at the end."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple, Union


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of one generated token in the model's own distribution (before temperature).

    Attributes:
        token_id: The token that was chosen.
        logprob: Its natural log probability.
        top: The most likely tokens and theirs, best first.
    """

    token_id: int
    logprob: float
    top: Tuple[Tuple[int, float], ...] = ()


@dataclass
class Completion:
    """One finished generation.

    Attributes:
        index: Position of its prompt in the list that was given.
        text: The generated text, without special tokens.
        token_ids: Every generated token, the ending one included.
        finish_reason: ``stop`` (end token or stop string), ``length`` (max_new_tokens or the context is
            full), ``abort`` or ``error``.
        stop_reason: The stop string or token id that ended it.
        num_prompt_tokens: Tokens of the prompt, after the chat template.
        num_reused_tokens: How many of them were still in the KV cache.
        ttft_s: Seconds from the request to its first token.
        duration_s: Seconds from the request to its last token.
        logprobs: One per token, if asked for.
        error: What went wrong, when finish_reason is ``error``.
    """

    index: int
    text: str = ""
    token_ids: List[int] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: Union[str, int, None] = None
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    logprobs: Optional[List[TokenLogprob]] = None
    error: Optional[str] = None

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first, per second after the first (0 when there is only one)."""
        seconds = self.duration_s - self.ttft_s
        return (len(self.token_ids) - 1) / seconds if len(self.token_ids) > 1 and seconds > 0 else 0.0

    def as_dict(self) -> Dict[str, Any]:
        """Return the fields for JSON."""
        record: Dict[str, Any] = {
            "index": self.index,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_reused_tokens": self.num_reused_tokens,
            "num_new_tokens": len(self.token_ids),
            "ttft_s": round(self.ttft_s, 6),
            "duration_s": round(self.duration_s, 6),
            "tokens_per_s": round(self.tokens_per_s, 3),
        }
        if self.logprobs is not None:
            record["logprobs"] = [
                {"token_id": t.token_id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]}
                for t in self.logprobs
            ]
        return record


@dataclass(frozen=True)
class Delta:
    """What one step added to one request.

    Attributes:
        request_id: As `Engine.add_request` returned it.
        index: Position of its prompt in the list that was given.
        text: New text; may be empty while a character or a possible stop string is unfinished.
        token_ids: New tokens.
        completion: The whole result, on the last delta of the request.
        logprobs: One per new token, if asked for.
    """

    request_id: int
    index: int
    text: str
    token_ids: Tuple[int, ...]
    completion: Optional[Completion] = None
    logprobs: Tuple[TokenLogprob, ...] = ()
