"""Render a checkpoint's chat template as transformers' `apply_chat_template` does, in a metered sandbox."""

import json
from typing import Any, Dict, List, Mapping, Optional, Sequence

from .errors import RequestError, TokenizerError

_MAX_TEMPLATE_CHARS = 1_000_000


class ChatTemplate:
    """One template with the special tokens it may name.

    Args:
        source: The jinja2 text.
        special_tokens: `bos_token`, `eos_token`, … as the tokenizer's configuration has them.
        origin: Where the text came from, for messages.

    Raises:
        TokenizerError: The text is no jinja2 template.
    """

    def __init__(self, source: str, special_tokens: Optional[Mapping[str, str]] = None, origin: str = "") -> None:
        from jinja2 import TemplateError

        from .template_sandbox import GenerationTag, MeteredSandbox

        self.source = source
        self.origin = origin or "chat template"
        self._special_tokens = dict(special_tokens or {})
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise TokenizerError(f"{self.origin}: {len(source)} characters; this is not a chat template")
        self._environment = MeteredSandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
        )
        self._environment.filters["tojson"] = self._environment.guard("tojson", _tojson)
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = self._environment.compile_metered(source)
        except (TemplateError, RecursionError, ValueError, OverflowError, MemoryError) as error:
            raise TokenizerError(f"{self.origin}: not a valid jinja2 template: {_one_line(error)}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the prompt text for a conversation.

        Args:
            messages: `{"role": …, "content": …}` in order; further keys are the template's business.
            add_generation_prompt: End with the opening of the assistant's turn.
            variables: More for the template, such as `tools` or `enable_thinking`.

        Raises:
            RequestError: The conversation is not a list of messages.
            TokenizerError: The template raised, loops without end, or its output grows beyond bounds.
        """
        from jinja2 import TemplateError

        conversation = check_messages(messages)
        names: Dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **variables}
        names.update(messages=conversation, add_generation_prompt=add_generation_prompt)
        try:
            return self._environment.render(self._template, names)
        except (TemplateError, RecursionError, MemoryError) as error:
            raise TokenizerError(f"{self.origin}: the template raised: {_one_line(error)}") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {_one_line(error)}"
            raise TokenizerError(f"{self.origin}: the template failed on these messages: {reason}") from None


def check_messages(messages: Any) -> List[Dict[str, Any]]:
    """Return the conversation as plain dicts, or raise RequestError saying which message is wrong."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("a conversation is a non-empty list of {'role': ..., 'content': ...} messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {i}: a dict with a 'role' is wanted, got {str(message)[:80]!r}")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"message {i} (role '{message['role']}'): no 'content'")
        if not isinstance(message.get("content"), (str, list, type(None))):  # templates would leave it out
            kind = type(message["content"]).__name__
            raise RequestError(
                f"message {i} (role '{message['role']}'): 'content' is of type {kind}, a string is wanted"
            )
    return [dict(message) for message in messages]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Optional[int] = None,
    separators: Optional[Any] = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own tojson escapes HTML characters; models were trained on plain JSON
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
