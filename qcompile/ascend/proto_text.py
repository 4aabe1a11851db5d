"""Message classes from the text of a small proto3 file, made when they are asked for: no protoc, no generated code.

The subset: messages, nested messages, `repeated`, `oneof`, `map`, scalar types. That is all `om.proto` needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "double": _Field.TYPE_DOUBLE, "float": _Field.TYPE_FLOAT, "int32": _Field.TYPE_INT32, "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32, "uint64": _Field.TYPE_UINT64, "bool": _Field.TYPE_BOOL, "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}  # fmt: skip
_TOKEN = re.compile(r'"[^"]*"|[A-Za-z_][\w.]*|\d+|[{}<>=;,]')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def message_classes(text: str, name: str) -> dict[str, type[Any]]:
    """Return the message classes of a proto3 text by their name within its package.

    Args:
        text: The file.
        name: What to call it in the descriptor pool.

    Raises:
        ValueError: The text is outside the subset.
    """
    tokens = _Tokens(_COMMENT.sub(" ", text))
    file = descriptor_pb2.FileDescriptorProto(name=name, syntax="proto3")
    while not tokens.is_done:
        word = tokens.take()
        if word == "syntax":
            tokens.expect("=", '"proto3"', ";")
        elif word == "package":
            file.package = tokens.take()
            tokens.expect(";")
        elif word == "message":
            _message(tokens, file.message_type.add())
        else:
            raise ValueError(f"{name}: '{word}' is not expected at the top level")
    _resolve(file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClassesForFiles([name], pool)
    return {full.removeprefix(f"{file.package}."): kind for full, kind in found.items()}


class _Tokens:
    """The words of the text, taken one by one."""

    def __init__(self, text: str) -> None:
        self._words = _TOKEN.findall(text)
        self._at = 0

    @property
    def is_done(self) -> bool:
        return self._at >= len(self._words)

    def peek(self) -> str:
        if self.is_done:
            raise ValueError("the text ends within a definition")
        return str(self._words[self._at])

    def take(self) -> str:
        word = self.peek()
        self._at += 1
        return word

    def expect(self, *words: str) -> None:
        for word in words:
            seen = self.take()
            if seen != word:
                raise ValueError(f"'{word}' is expected, '{seen}' found")


def _message(tokens: _Tokens, message: descriptor_pb2.DescriptorProto) -> None:
    message.name = tokens.take()
    tokens.expect("{")
    while tokens.peek() != "}":
        word = tokens.take()
        if word == "message":
            _message(tokens, message.nested_type.add())
        elif word == "oneof":
            message.oneof_decl.add(name=tokens.take())
            tokens.expect("{")
            while tokens.peek() != "}":
                _field(tokens, message, tokens.take(), oneof_index=len(message.oneof_decl) - 1)
            tokens.expect("}")
        elif word == "map":
            _map(tokens, message)
        elif word == "repeated":
            _field(tokens, message, tokens.take(), label=_Field.LABEL_REPEATED)
        else:
            _field(tokens, message, word)
    tokens.expect("}")


def _field(
    tokens: _Tokens,
    message: descriptor_pb2.DescriptorProto,
    kind: str,
    *,
    label: int = _Field.LABEL_OPTIONAL,
    oneof_index: int | None = None,
) -> None:
    name = tokens.take()
    tokens.expect("=")
    field = message.field.add(name=name, number=int(tokens.take()), label=label)
    tokens.expect(";")
    _set_type(field, kind)
    if oneof_index is not None:
        field.oneof_index = oneof_index


def _map(tokens: _Tokens, message: descriptor_pb2.DescriptorProto) -> None:
    """A map is a repeated nested entry of key and value."""
    tokens.expect("<")
    key = tokens.take()
    tokens.expect(",")
    value = tokens.take()
    tokens.expect(">")
    name = tokens.peek()
    entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    _set_type(entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL), key)
    _set_type(entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL), value)
    _field(tokens, message, f"{message.name}.{entry.name}", label=_Field.LABEL_REPEATED)


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = kind


def _resolve(file: descriptor_pb2.FileDescriptorProto) -> None:
    """Give every message type its full name: nested ones first, then those of the file."""
    known = dict(_walk(file.message_type, f".{file.package}"))
    for path, message in known.items():
        for field in message.field:
            if field.type == _Field.TYPE_MESSAGE:
                candidates = (f"{path}.{field.type_name}", f"{path.rpartition('.')[0]}.{field.type_name}",
                              f".{file.package}.{field.type_name}")  # fmt: skip
                field.type_name = next((c for c in candidates if c in known), "")
                if not field.type_name:
                    raise ValueError(f"{path}.{field.name} has an unknown type")


def _walk(messages: Any, prefix: str) -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    for message in messages:
        path = f"{prefix}.{message.name}"
        yield path, message
        yield from _walk(message.nested_type, path)
