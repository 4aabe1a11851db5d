"""What a program takes from a Python newer than 3.9: the clean room's own Python may have it, the judge's has not."""

import ast
from collections.abc import Iterator

_MODULES = {"tomllib": "3.11"}
_NAMES = {
    "itertools": {"pairwise": "3.10", "batched": "3.12"},
    "typing": dict.fromkeys(("Concatenate", "ParamSpec", "TypeAlias", "TypeGuard", "is_typeddict"), "3.10")
    | dict.fromkeys(("Self", "Never", "LiteralString", "NotRequired", "Required", "TypeVarTuple", "Unpack"), "3.11")
    | {"assert_never": "3.11", "reveal_type": "3.11", "override": "3.12"},
    "types": dict.fromkeys(("NoneType", "UnionType", "EllipsisType"), "3.10"),
    "dataclasses": {"KW_ONLY": "3.10"},
    "contextlib": {"aclosing": "3.10", "chdir": "3.11"},
    "asyncio": {"TaskGroup": "3.11", "Runner": "3.11", "timeout": "3.11"},
    "enum": {"StrEnum": "3.11"},
    "datetime": {"UTC": "3.11"},
}
_KEYWORDS = {
    "zip": {"strict": "3.10"},
    "dataclass": {"slots": "3.10", "kw_only": "3.10"},
    "field": {"kw_only": "3.10"},
    "bisect": {"key": "3.10"},
}
_GUARDS = ("ImportError", "ModuleNotFoundError", "AttributeError", "Exception", "version_info", "TYPE_CHECKING")


def newer_features(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield (line, what, since which Python); what is tried or stands under a condition on the version is not."""
    for node in _unguarded(tree):
        for what, since in _of_node(node):
            yield getattr(node, "lineno", 1), what, since


def _unguarded(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not _is_guard(child):
            yield child
            yield from _unguarded(child)


def _is_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Try):
        caught = [handler.type for handler in node.handlers]
        return any(one is None or any(name in ast.unparse(one) for name in _GUARDS) for one in caught)
    return isinstance(node, ast.If | ast.IfExp) and any(name in ast.unparse(node.test) for name in _GUARDS)


def _of_node(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, _MODULES[alias.name]) for alias in node.names if alias.name in _MODULES)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        module = node.module or ""
        if module in _MODULES:
            yield module, _MODULES[module]
        names = _NAMES.get(module, {})
        yield from ((f"{module}.{alias.name}", names[alias.name]) for alias in node.names if alias.name in names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        names = _NAMES.get(node.value.id, {})
        if node.attr in names:
            yield f"{node.value.id}.{node.attr}", names[node.attr]
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[tuple[str, str]]:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    keywords = _KEYWORDS.get(called, {})
    yield from ((f"{called}({one.arg}=...)", keywords[one.arg]) for one in node.keywords if one.arg in keywords)
    if called in ("isinstance", "issubclass") and len(node.args) == 2:
        kind = node.args[1]
        if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
            yield f"{called}(..., {ast.unparse(kind)})", "3.10"
