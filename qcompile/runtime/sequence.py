"""One request while it is being served."""

from time import perf_counter
from typing import Optional, Tuple, Union
from typing import Sequence as SequenceOf

from .completion import Completion, Delta, TokenLogprob
from .sampling import Sampler, SamplingParams
from .stop import StopChecker
from .tokenizer import Tokenizer


class Sequence:
    """Prompt, generated tokens, and everything that belongs to one request alone.

    Args:
        request_id: Number of the request.
        index: Position of its prompt in the caller's list.
        prompt_ids: The prompt.
        params: How to generate.
        end_ids: Tokens that end it.
        max_tokens: The most tokens, prompt included, that its context holds.
        tokenizer: For the text.
    """

    def __init__(
        self,
        request_id: int,
        index: int,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        end_ids: SequenceOf[int],
        max_tokens: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.slot = -1
        self.num_cached = 0  # entries of its slot that are valid
        self.sampler = Sampler(params, prompt_ids)
        self.completion = Completion(index, num_prompt_tokens=len(self.prompt_ids))
        if params.logprobs is not None:
            self.completion.logprobs = []
        self._end_ids = frozenset(end_ids)
        self._max_new_tokens = min(params.max_new_tokens, max_tokens - len(self.prompt_ids))
        self._detokenizer = tokenizer.detokenizer(params.skip_special_tokens)
        self._stop = StopChecker(params.stop, params.include_stop)
        self._arrival = perf_counter()

    @property
    def is_finished(self) -> bool:
        """Whether it has its finish reason."""
        return bool(self.completion.finish_reason)

    @property
    def last_token_id(self) -> int:
        """The newest token: what the next decode step feeds."""
        return self.completion.token_ids[-1]

    def append(self, token_id: int, logprob: Optional[TokenLogprob] = None) -> Delta:
        """Take the next token; returns what it adds, with the completion if it ends the sequence."""
        result = self.completion
        result.token_ids.append(token_id)
        result.duration_s = perf_counter() - self._arrival
        if len(result.token_ids) == 1:
            result.ttft_s = result.duration_s
        new: Tuple[TokenLogprob, ...] = ()
        if logprob is not None and result.logprobs is not None:
            result.logprobs.append(logprob)
            new = (logprob,)
        if token_id in self._end_ids:
            return self._finish("stop", token_id, (token_id,), new)
        text, stop = self._stop.push(self._detokenizer.push(token_id))
        result.text += text
        if stop is not None:
            return self._finish("stop", stop, (token_id,), new, text, is_flushed=True)
        if len(result.token_ids) >= self._max_new_tokens:
            return self._finish("length", None, (token_id,), new, text)
        return Delta(self.request_id, result.index, text, (token_id,), None, new)

    def end(self, reason: str, error: Optional[str] = None) -> Delta:
        """End it from outside: ``abort`` or ``error``. What was generated so far stays."""
        self.completion.error = error
        return self._finish(reason, None, ())

    def _finish(
        self,
        reason: str,
        stop_reason: Union[str, int, None],
        token_ids: SequenceOf[int],
        logprobs: Tuple[TokenLogprob, ...] = (),
        text: str = "",
        is_flushed: bool = False,
    ) -> Delta:
        result = self.completion
        if not is_flushed:
            tail, stop = self._stop.push(self._detokenizer.flush())
            tail += "" if stop is not None else self._stop.flush()
            result.text += tail
            text += tail
        result.finish_reason, result.stop_reason = reason, stop_reason
        return Delta(self.request_id, result.index, text, tuple(token_ids), result, logprobs)
