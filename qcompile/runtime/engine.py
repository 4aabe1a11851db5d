"""The engine: prompts in, text out, over one compiled-model directory.

    with Engine("qwen-int8") as engine:
        print(engine.generate(["What is 2 + 2?"])[0].text)

`generate`, `chat` and `stream` serve a list of prompts and return. A server instead calls `add_request`
whenever one arrives, `step` in a loop, and `abort` when a client goes away. A step reads as the algorithm:
take arrivals, compute a piece of a prompt, compute one token for every running request, hand out what is new.
"""

import logging
import threading
from collections import deque
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Deque, Dict, Generator, Iterator, List, Mapping, Optional, Tuple, Union
from typing import Sequence as SequenceOf

import numpy as np

from .completion import Completion, Delta
from .errors import RequestError, SessionError
from .host import MAX_THREADS
from .kv_cache import KVCache
from .manifest import Manifest
from .open_session import open_session
from .prompt import Params, Prompt, as_prompts, check_prompt, check_sampling, one_each
from .sampling import Choice, SamplingParams, choose_tokens
from .scheduler import Chunk, Scheduler
from .sequence import Sequence
from .session import Session
from .stop import end_ids
from .tokenizer import Tokenizer, read_json_file

logger = logging.getLogger(__name__)


class Engine:
    """A loaded model that generates text.

    Args:
        path: The compiled-model directory.
        threads: Computing threads; by default every physical core this process may use.
        max_batch_size: The most requests computed together.
        max_model_len: The most tokens of one request, prompt and answer. By default the model's own
            max_position_embeddings, or what graphs of fixed shapes hold. Memory follows what is really used: the
            KV cache starts at 1024 tokens per slot and doubles when a request needs more; a growth beyond 4096 is
            logged.
        prefill_chunk: The most prompt tokens computed at once, and so between two tokens of running requests.
            256 by measurement (0.5B model, fp32, CPU): larger chunks are no faster, 64 takes a quarter longer.
        reuse_prefixes: Keep the KV entries of past requests for prompts that begin alike (conversations, a
            shared system prompt).
        check_hash: Compare the sha256 of graph and weights with the manifest.

    Raises:
        ManifestError: The directory is incomplete or was changed.
        TokenizerError: Its tokenizer cannot be used.
        SessionError: The back end cannot load the graph.
        RequestError: An argument is out of range.
    """

    def __init__(
        self,
        path: Union[str, Path],
        threads: Optional[int] = None,
        max_batch_size: int = 8,
        max_model_len: Optional[int] = None,
        prefill_chunk: int = 256,
        reuse_prefixes: bool = True,
        check_hash: bool = True,
    ) -> None:
        numbers = {"max_batch_size": max_batch_size, "prefill_chunk": prefill_chunk}
        optional = {"threads": threads, "max_model_len": max_model_len}
        numbers.update({name: value for name, value in optional.items() if value is not None})
        _check_numbers(numbers)
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self.manifest.require_decoder(self.path)
        self.tokenizer = Tokenizer(self.path, self.manifest)
        self.generation_config = read_json_file(self.path, self.manifest, "generation_config.json")
        self.end_ids = end_ids((self.generation_config, self.manifest.config), self.tokenizer)
        context = _context_length(self.manifest, max_model_len)
        self._session: Optional[Session] = open_session(self.path, self.manifest, threads, check_hash)
        try:
            self.max_model_len = _served_length(self._session, context, max_model_len)
        except RequestError:
            self._session.close()
            raise
        self.num_candidates = self._session.num_candidates
        self._cache = KVCache(self._session, max_batch_size, self.max_model_len, reuse_prefixes)
        chunk = min(prefill_chunk, self._session.max_chunk)
        self._prefill_budget = chunk
        self.max_batch_size = max_batch_size
        self._scheduler = Scheduler(self._cache, max_batch_size, chunk, self._session.can_extend)
        self._lock = threading.RLock()
        self._numbers = count()
        self._arrivals: Deque[Sequence] = deque()
        self._aborts: Deque[int] = deque()
        self._inboxes: Dict[int, Deque[Delta]] = {}  # deltas of the requests that generate or stream wait for
        self._unclaimed: List[Delta] = []

    def generate(
        self, prompts: Union[Prompt, SequenceOf[Prompt]], params: Params = None, raise_errors: bool = True
    ) -> List[Completion]:
        """Generate for every prompt, together, and return the completions in the prompts' order.

        Args:
            prompts: Texts (used as they are: no chat template) or lists of token ids; one text counts as a
                list of one.
            params: One for all, or one per prompt. Greedy by default.
            raise_errors: If the back end fails on a prompt, raise; else its completion has finish_reason
                ``error``.

        Raises:
            RequestError: A prompt is empty, longer than the context, or not valid; nothing has been generated
                then.
            SessionError: The back end failed.
        """
        finished = [d.completion for d in self.stream(prompts, params, raise_errors) if d.completion is not None]
        return sorted(finished, key=lambda completion: completion.index)

    def stream(
        self, prompts: Union[Prompt, SequenceOf[Prompt]], params: Params = None, raise_errors: bool = True
    ) -> Generator[Delta, None, None]:
        """Generate like `generate`, yielding what is new after every step.

        Leaving the loop aborts what is unfinished.
        """
        sequences = self._sequences(as_prompts(prompts), params)
        return self._serve(sequences, raise_errors)

    def chat(
        self,
        conversations: Union[SequenceOf[Mapping[str, Any]], SequenceOf[SequenceOf[Mapping[str, Any]]]],
        params: Params = None,
        **template_variables: Any,
    ) -> List[Completion]:
        """Answer one conversation (a list of messages) or several, through the model's chat template.

        Raises:
            TokenizerError: The model has no chat template, or the template raised.
        """
        several = conversations if conversations and not isinstance(conversations[0], Mapping) else [conversations]
        prompts = [self.encode_chat(messages, **template_variables) for messages in several]  # type: ignore[arg-type]
        return self.generate(prompts, params)

    def encode_chat(self, messages: SequenceOf[Mapping[str, Any]], **template_variables: Any) -> List[int]:
        """Return the prompt ids of a conversation, ready for the assistant's turn."""
        text = self.tokenizer.chat_template.render(messages, **template_variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sampling_params(self, **options: Any) -> SamplingParams:
        """Return sampling as the model's generation_config.json advises, as far as the graphs go; `options` win."""
        where = str(self.path / "generation_config.json")
        params = SamplingParams.from_generation_config(self.generation_config, where, **options)
        is_beyond = "top_k" not in options and params.top_k > self.num_candidates > 1
        return params.with_options(top_k=self.num_candidates) if is_beyond else params

    def add_request(self, prompt: Prompt, params: Optional[SamplingParams] = None) -> int:
        """Queue one request from any thread; `step` serves it. Returns its number.

        Raises:
            RequestError: As for `generate`.
        """
        sequence = self._sequences([prompt], params)[0]
        self._arrivals.append(sequence)
        return sequence.request_id

    def abort(self, request_id: int) -> None:
        """End a request from any thread; the next step reports finish_reason ``abort``. Unknown ids pass."""
        self._aborts.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._arrivals or self._aborts or self._unclaimed or self._scheduler.has_work)

    @property
    def num_running(self) -> int:
        """Requests that hold a KV slot."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._arrivals) + len(self._scheduler.waiting)

    @property
    def kv_usage(self) -> Tuple[int, int]:
        """KV entries that running requests fill, and entries reserved for all slots (0 before the first request)."""
        session = self._session
        return self._scheduler.num_cached, session.num_slots * session.capacity if session is not None else 0

    def step(self) -> List[Delta]:
        """Compute one step for the requests of `add_request` and return what is new.

        A failure of the back end ends the requests it hit with finish_reason ``error``; others go on.

        Raises:
            SessionError: The engine is closed.
        """
        with self._lock:
            self._advance()
            deltas, self._unclaimed = self._unclaimed, []
            return deltas

    def close(self) -> None:
        """Release the model; unfinished requests are dropped. Harmless when repeated."""
        with self._lock:
            if self._session is not None:
                self._scheduler.clear()
                self._session.close()
                self._session = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sequences(self, prompts: SequenceOf[Prompt], params: Params) -> List[Sequence]:
        if self._session is None:
            raise SessionError(f"{self.path}: the engine is closed")
        pairs = zip(prompts, one_each(params, len(prompts)))
        return [self._sequence(index, *pair) for index, pair in enumerate(pairs)]

    def _sequence(self, index: int, prompt: Prompt, params: SamplingParams) -> Sequence:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        checked = check_prompt(ids, self.manifest.model.vocab_size, self.max_model_len, index)
        check_sampling(params, self.num_candidates)
        ends = (*(() if params.ignore_eos else self.end_ids), *params.stop_token_ids)
        return Sequence(next(self._numbers), index, checked, params, ends, self.max_model_len, self.tokenizer)

    def _serve(self, sequences: List[Sequence], raise_errors: bool) -> Generator[Delta, None, None]:
        with self._inbox_for(sequences) as inbox:
            open_requests = len(sequences)
            while open_requests:
                if not inbox:
                    with self._lock:
                        if not inbox:  # another thread's step may have filled it meanwhile
                            self._advance()
                while inbox:
                    delta = inbox.popleft()
                    open_requests -= delta.completion is not None
                    if raise_errors and delta.completion is not None and delta.completion.error is not None:
                        raise SessionError(delta.completion.error)
                    yield delta

    @contextmanager
    def _inbox_for(self, sequences: List[Sequence]) -> Iterator[Deque[Delta]]:
        inbox: Deque[Delta] = deque()
        self._inboxes.update({sequence.request_id: inbox for sequence in sequences})
        self._arrivals.extend(sequences)
        try:
            yield inbox
        finally:
            with self._lock:
                for sequence in sequences:
                    if not sequence.is_finished:
                        self._aborts.append(sequence.request_id)
                self._take_arrivals()
                for sequence in sequences:
                    self._inboxes.pop(sequence.request_id, None)

    def _advance(self) -> None:
        """One step. Whatever interrupts it (Ctrl-C too) leaves an empty, usable engine."""
        if self._session is None:
            raise SessionError(f"{self.path}: the engine is closed")
        try:
            self._take_arrivals()
            self._prefill(self._session)
            self._decode(self._session)
        except BaseException:
            for sequence in self._scheduler.clear():
                self._hand_out(sequence.end("abort"))
            raise

    def _take_arrivals(self) -> None:
        # aborts first: of those seen now every sequence has arrived, whatever other threads add meanwhile
        aborts = [self._aborts.popleft() for _ in range(len(self._aborts))]
        while self._arrivals:
            self._scheduler.waiting.append(self._arrivals.popleft())
        for request_id in aborts:
            sequence = self._scheduler.find(request_id)
            if sequence is not None:
                self._finish(sequence, sequence.end("abort"))

    def _prefill(self, session: Session) -> None:
        """Compute prompt tokens, up to the budget of one step."""
        budget = self._prefill_budget
        while budget > 0:
            try:
                chunk = self._scheduler.next_chunk(budget)
            except SessionError as error:  # no memory for the first in line
                sequence = self._scheduler.waiting[0]
                self._finish(sequence, sequence.end("error", str(error)))
                continue
            if chunk is None:
                return
            budget -= chunk.end - chunk.start
            self._prefill_chunk(session, chunk)

    def _prefill_chunk(self, session: Session, chunk: Chunk) -> None:
        sequence = chunk.sequence
        ids = sequence.prompt_ids[chunk.start : chunk.end]
        try:
            token_ids, greedy = np.array([ids], np.int64), sequence.sampler.is_plain
            scores = session.forward(sequence.slot, token_ids, [chunk.start], chunk.is_last, greedy)
        except SessionError as error:
            self._finish(sequence, sequence.end("error", str(error)))
            return
        self._cache.extend(sequence.slot, ids)
        sequence.num_cached = chunk.end
        if scores is not None:
            self._scheduler.start_decoding(sequence)
            self._take_choice(sequence, choose_tokens(scores, [sequence.sampler])[0])

    def _decode(self, session: Session) -> None:
        """Compute one token for every running request."""
        self._make_room(session)
        sequences = self._scheduler.decoding
        if not sequences:
            return
        ids = [sequence.last_token_id for sequence in sequences]
        past = [sequence.num_cached for sequence in sequences]
        try:
            greedy = all(sequence.sampler.is_plain for sequence in sequences)
            scores = session.forward(0, np.array(ids, np.int64)[:, None], past, greedy_only=greedy)
        except SessionError as error:
            for sequence in sequences:
                self._finish(sequence, sequence.end("error", str(error)))
            return
        for sequence, token_id in zip(sequences, ids):
            self._cache.extend(sequence.slot, (token_id,))
            sequence.num_cached += 1
        assert scores is not None
        for sequence, choice in zip(sequences, choose_tokens(scores, [s.sampler for s in sequences])):
            self._take_choice(sequence, choice)

    def _make_room(self, session: Session) -> None:
        """Grow the KV cache for rows that have reached its end."""
        for sequence in self._scheduler.decoding:
            if sequence.num_cached < session.capacity:
                continue
            try:
                self._cache.reserve(self._scheduler.num_running, sequence.num_cached + 1)
            except SessionError as error:
                self._finish(sequence, sequence.end("error", str(error)))

    def _take_choice(self, sequence: Sequence, choice: Choice) -> None:
        if choice.error is not None:
            self._finish(sequence, sequence.end("error", choice.error))
            return
        delta = sequence.append(choice.token_id, choice.logprob)
        if delta.completion is not None:
            self._finish(sequence, delta)
        else:
            self._hand_out(delta)

    def _finish(self, sequence: Sequence, delta: Delta) -> None:
        self._scheduler.remove(sequence)
        self._hand_out(delta)

    def _hand_out(self, delta: Delta) -> None:
        inbox = self._inboxes.get(delta.request_id)
        if inbox is None:
            self._unclaimed.append(delta)
        else:
            inbox.append(delta)


def _check_numbers(numbers: Mapping[str, Any]) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise RequestError(f"{name}: a positive integer is wanted, got {value!r}")
    if numbers.get("threads", 1) > MAX_THREADS:
        raise RequestError(f"threads: at most {MAX_THREADS} are wanted, got {numbers['threads']}")


def _context_length(manifest: Manifest, wanted: Optional[int]) -> int:
    limit = manifest.model.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise RequestError(f"max_model_len {wanted} is beyond the model's {limit} positions")
    return wanted or limit


def _served_length(session: Session, context: int, wanted: Optional[int]) -> int:
    """Return the most tokens of a request: graphs of fixed shapes may hold fewer than the model."""
    if session.max_capacity >= context:
        return context
    if wanted is not None:
        raise RequestError(
            f"max_model_len {wanted} is beyond the {session.max_capacity} tokens the graphs were compiled for; compile "
            "with a larger --kv-len"
        )
    logger.info("the graphs hold %d of the model's %d tokens", session.max_capacity, context)
    return session.max_capacity
