"""Read the package's programs without running them: what would fail on the judge's machine, line by line."""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from qcompile.package.check_layout import MODEL
from qcompile.package.findings import INFERENCE, Finding
from qcompile.package.newer_python import newer_features

_MAX_SOURCE_BYTES = 2 << 20
_MAX_FILES = 500
_SKIPPED = ("dependencies", "custom_kernels")
_PYTHON = (3, 9)
PARAMETERS = "Total parameters"
_ABSOLUTE = re.compile(r"^(?:/(?:home|root|cache|mnt|data|opt|Users|work)/[\w.-]|[A-Za-z]:[\\/]|~/)")
_HUB_ID = re.compile(r"^[A-Za-z][\w.-]*/[\w.-]+$")
_BARE = re.compile(r"^[\w.-]+$")
_MODEL_WORDS = ("model", "tokenizer", "checkpoint", "pretrained")
_LOADERS = frozenset({"from_pretrained", "LLM", "pipeline", "SentenceTransformer"})
_DOWNLOADS = frozenset({"snapshot_download", "hf_hub_download", "model_file_download"})
_ROOT_CALLS = frozenset({"setuid", "seteuid", "chroot", "setgid"})
_ROOT_WORDS = re.compile(r"^\s*(?:sudo|apt|apt-get|yum|dnf)\b")


def check_source(root: Path) -> list[Finding]:
    """Judge every Python file outside `dependencies/`."""
    findings = source_findings(root)
    texts = (path.read_bytes() for path in _sources(root))
    if (root / MODEL).is_file() and not any(PARAMETERS.encode() in text for text in texts):
        cure = 'print(f"Total parameters: {model.num_parameters() / 1e9:.2f}B") in __init__'
        findings.append(Finding(MODEL, f"nowhere prints '{PARAMETERS}: ...B'; the judge looks for it", cure, INFERENCE))
    return findings


def source_findings(root: Path) -> list[Finding]:
    """What is wrong with the programs, whoever runs them on Python 3.9 without network and root."""
    findings: list[Finding] = []
    for path in _sources(root):
        name = path.relative_to(root).as_posix()
        text = path.read_bytes().decode("utf-8-sig", "replace")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text, feature_version=_PYTHON)
        except (SyntaxError, ValueError, RecursionError) as error:
            line = getattr(error, "lineno", None) or 1
            message = f"not Python 3.9: {getattr(error, 'msg', error)}"
            findings.append(Finding(f"{name}:{line}", message, "write it in the syntax of Python 3.9", INFERENCE))
            continue
        findings += _newer_annotations(tree, name)
        findings += [
            Finding(f"{name}:{line}", f"{what} is new in Python {since}", "write it for Python 3.9", INFERENCE)
            for line, what, since in newer_features(tree)
        ]
        findings += _strings(tree, root, name)
        findings += _calls(tree, name)
        if name == MODEL:
            findings += _contract(tree)
    return findings


def _sources(root: Path) -> Iterator[Path]:
    paths = (p for p in sorted(root.rglob("*.py")) if p.relative_to(root).parts[0] not in _SKIPPED)
    for number, path in enumerate(paths):
        if number < _MAX_FILES and path.is_file() and path.stat().st_size <= _MAX_SOURCE_BYTES:
            yield path


def _contract(tree: ast.Module) -> list[Finding]:
    """Class Competition, constructed without arguments, with get_results(self, jsondata_list)."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    if "Competition" not in classes:
        if "Competition" in imported:
            return []
        there = f"; there is class {next(iter(classes))}" if classes else ""
        return [Finding(MODEL, f"has no class Competition{there}", "name the class Competition", INFERENCE)]
    found = classes["Competition"]
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    findings = []
    init = methods.get("__init__")
    if init is not None and not _takes(init, 1):
        where = f"{MODEL}:{init.lineno}"
        cure = "the judge calls Competition(): give every argument a default"
        findings.append(Finding(where, "Competition.__init__ wants arguments", cure, INFERENCE))
    method = methods.get("get_results")
    if method is None:
        if not found.bases:
            cure = "define get_results(self, jsondata_list)"
            findings.append(
                Finding(f"{MODEL}:{found.lineno}", "Competition has no method get_results", cure, INFERENCE)
            )
    elif not _takes(method, 2):
        cure = "define get_results(self, jsondata_list)"
        findings.append(Finding(f"{MODEL}:{method.lineno}", "get_results must take exactly one list", cure, INFERENCE))
    return findings


def _takes(method: ast.FunctionDef, count: int) -> bool:
    """Whether a method can be called with that many arguments by place, `self` among them."""
    arguments = method.args
    places = len(arguments.posonlyargs) + len(arguments.args)
    count -= any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in method.decorator_list)
    is_enough = places - len(arguments.defaults) <= count and None not in arguments.kw_defaults
    return is_enough and (count <= places or arguments.vararg is not None)


def _newer_annotations(tree: ast.Module, name: str) -> list[Finding]:
    """`int | None` in an annotation that is evaluated fails before Python 3.10."""
    futures = {
        alias.name for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__" for alias in n.names
    }
    if "annotations" in futures:
        return []
    notes: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            every = (*node.args.args, *node.args.posonlyargs, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
            notes += [node.returns, *(argument.annotation for argument in every if argument is not None)]
    notes += [node.annotation for node in _outside_functions(tree) if isinstance(node, ast.AnnAssign)]
    for note in notes:
        if note is not None and any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.BitOr) for n in ast.walk(note)):
            message = f"'{ast.unparse(note)}' is evaluated, and Python 3.9 has no | between types"
            cure = "write Optional[...] or Union[...], or `from __future__ import annotations`"
            return [Finding(f"{name}:{note.lineno}", message, cure, INFERENCE)]
    return []


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What is evaluated when a module is imported: annotations of variables in functions are not."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside_functions(child)


def _strings(tree: ast.Module, root: Path, name: str) -> list[Finding]:
    findings = []
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in documentation:
            continue
        where, shown = f"{name}:{node.lineno}", repr(node.value[:80])
        if _ABSOLUTE.match(node.value):
            cure = "put the file into the zip and name it relative to the program: ./model"
            findings.append(Finding(where, f"absolute path {shown}", cure, INFERENCE))
        elif _ROOT_WORDS.match(node.value):
            cure = "the judge gives no root: bring wheels in dependencies/ or operators in custom_kernels/"
            findings.append(Finding(where, f"command that needs root: {shown}", cure, INFERENCE))
    has_loader = any(isinstance(node, ast.Call) and _called(node) in _LOADERS for node in ast.walk(tree))
    for node in _model_names(tree):
        findings += _hub_name(str(node.value), root, f"{name}:{node.lineno}", has_loader=has_loader)
    return findings


def _hub_name(value: str, root: Path, where: str, *, has_loader: bool) -> list[Finding]:
    is_here = (root / value).exists()
    if _HUB_ID.match(value) and not is_here:
        cure = f"put the model into the zip and name it './{value.rpartition('/')[2]}': there is no network"
        return [Finding(where, f"'{value}' is not in the package: it is an id of the hub", cure, INFERENCE)]
    if has_loader and _BARE.match(value) and (root / value).is_dir():
        message = f"'{value}' has no slash, so transformers looks for it on the hub"
        return [Finding(where, message, f"write './{value}'", INFERENCE)]
    return []


def _model_names(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants that name a model: given to a loader, or to a variable or argument called so."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call) and _called(node) in _LOADERS:
            values = [*node.args[:2], *(k.value for k in node.keywords if _is_model_word(k.arg or ""))]
        elif isinstance(node, ast.Assign) and any(_is_model_word(ast.unparse(target)) for target in node.targets):
            values = [node.value]
        yield from (v for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))


def _is_model_word(text: str) -> bool:
    return any(word in text.lower() for word in _MODEL_WORDS)


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _calls(tree: ast.Module, name: str) -> list[Finding]:
    findings = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, where = _called(node), f"{name}:{node.lineno}"
        if called in _DOWNLOADS:
            cure = "download it now and put it into the zip: there is no network"
            findings.append(Finding(where, f"{called} needs a network", cure, INFERENCE))
        elif called in _ROOT_CALLS:
            findings.append(Finding(where, f"{called} needs root", "the judge gives no root: leave it out", INFERENCE))
    return findings
