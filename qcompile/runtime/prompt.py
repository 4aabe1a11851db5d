"""What a caller may give as prompts, checked."""

from typing import Any, List, Sequence, Union

import numpy as np

from .errors import RequestError
from .sampling import SamplingParams

Prompt = Union[str, Sequence[int]]
Params = Union[SamplingParams, Sequence[SamplingParams], None]


def as_prompts(prompts: Union[Prompt, Sequence[Prompt]]) -> List[Prompt]:
    """Return a list of prompts; one text, or one list of token ids, counts as a list of one.

    Raises:
        RequestError: There is none, or it is something else.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise RequestError("prompts: a text, or a non-empty list of texts or token id lists is wanted")
    if isinstance(prompts[0], (int, np.integer)):
        return [prompts]
    return list(prompts)


def one_each(params: Params, count: int) -> List[SamplingParams]:
    """Return sampling params for every one of `count` prompts; None is greedy.

    Raises:
        RequestError: A list of another length, or not SamplingParams.
    """
    given: List[Any] = list(params) if isinstance(params, (list, tuple)) else [params or SamplingParams()] * count
    if len(given) != count:
        raise RequestError(f"{len(given)} sampling params for {count} prompts; give one, or one per prompt")
    for one in given:
        if not isinstance(one, SamplingParams):
            raise RequestError(f"params: SamplingParams are wanted, got {type(one).__name__}")
    return given


def check_sampling(params: SamplingParams, num_candidates: int) -> None:
    """Refuse a top_k that a graph has too few tokens for, where it returns the scores of some.

    Args:
        params: What was asked for.
        num_candidates: Tokens that a row has scores of; 1 for a graph that is greedy, which says so by itself.

    Raises:
        RequestError: It has fewer.
    """
    if not params.is_greedy and params.top_k > num_candidates > 1:
        raise RequestError(
            f"top_k {params.top_k}: the graphs return their {num_candidates} most likely tokens; give at most "
            f"{num_candidates}, or lower the model again with a larger --top-k, or with --keep-logits"
        )


def check_prompt(ids: Any, vocab_size: int, max_tokens: int, index: int) -> List[int]:
    """Return a prompt's ids after checking them; messages count prompts from 1.

    Raises:
        RequestError: It is empty, names a token that does not exist, or does not fit into the context.
    """
    where = f"prompt {index + 1}"
    if not isinstance(ids, (list, tuple, np.ndarray)):
        raise RequestError(f"{where}: a text or a list of token ids is wanted, got {type(ids).__name__}")
    if len(ids) == 0:
        raise RequestError(f"{where} is empty: it has no tokens")
    if len(ids) >= max_tokens:
        raise RequestError(f"{where} has {len(ids)} tokens, the context holds {max_tokens} with the answer; shorten it")
    for token_id in ids:
        if not isinstance(token_id, (int, np.integer)) or not 0 <= token_id < vocab_size:
            raise RequestError(f"{where}: token id {token_id!r}; the model has 0 to {vocab_size - 1}")
    return [int(token_id) for token_id in ids]
