"""What a failed run of ATC says: code, meaning, the node it stopped at, the layer of the source model, the cure."""

from __future__ import annotations

import functools
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from qcompile.ascend.legality.view import GraphView, Node
from qcompile.errors import AtcError
from qcompile.report.numbers import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CODE = re.compile(r"\b(?:E[1-4]\d{4}|E[A-Z]\d{4}|W\d{5})\b")
_GEAR_SUFFIX = re.compile(r"_ascend_mbatch_batch_\d+$")
_TAIL_LINES = 20
_QUOTED = 200
_OOM_CURE = (
    "build one bucket at a time with TE_PARALLEL_COMPILER=1 and MAX_COMPILE_CORE_NUMBER=1, add swap, or use a machine "
    "with more memory"
)
# Where a node's name or type stands in a line of the log; tried in order.
_NODE_PATTERNS = (
    re.compile(r"Failed to compile Op \[(?P<node>[^\]\n]+)\]\.?\s*(?:\(optype: \[(?P<op>[^\]\n]+)\]\))?"),
    re.compile(r"engine are found for \[?(?P<node>[^\],\n]+)\]?, optype \[?(?P<op>[^\].\n]+)"),
    re.compile(r"No parser is registered for Op \[?(?P<node>[^\],\n]+)[\],]*\s*optype \[?(?P<op>[^\]\n]+)\]"),
    re.compile(r"No ONNX parser is registered for optype \[?(?P<op>[^\]\s]+)"),
    re.compile(r"IR for Op \[?(?P<node>[^\],\n]+)\]?, optype \[?(?P<op>[^\],\n]+)\]*,? is not registered"),
    re.compile(r"Optype \[(?P<op>[^\]\n]+)\] of Ops kernel"),
    re.compile(r"Failed to pre-compile node (?P<node>[^\s.]\S*?)\.? "),
    re.compile(
        r"(?:parse params of|verify|infer shape of|InferShape of) node[: ]+\[?(?P<node>[^\]\s(]+)\]?", re.IGNORECASE
    ),
    re.compile(r"\bOpname \[?(?P<node>[^\]\s]+)\]? specified"),
    re.compile(r"\b(?:op|node|Node|opname|op_name)\s*(?:name)?\s*[:\[]\s*(?P<node>[^\]\s,(]+)\]?(?:\((?P<op>\w+)\))?"),
)


@dataclass(frozen=True)
class AtcFailure:
    """One failed run.

    Attributes:
        code: ATC's error code; ``OOM``, ``SIGNAL`` or "" where there is none.
        meaning: What it means.
        line: The line of the log that says it.
        node: The node it stopped at, or "".
        op: That node's op type, or "".
        layer: Layer of the source model, or "".
        cure: What to do.
        warnings: W codes seen on the way.
    """

    code: str
    meaning: str
    line: str
    node: str
    op: str
    layer: str
    cure: str
    warnings: tuple[str, ...] = ()


class AtcRunError(AtcError):
    """ATC ran and failed.

    Attributes:
        failure: What the log says.
        argv: The command.
        returncode: Its exit code; negative for a signal.
        tail: The last 20 lines of the log.
        log: Where the log is.
    """

    def __init__(
        self, name: str, failure: AtcFailure, argv: Iterable[str], returncode: int, tail: str, log: str
    ) -> None:
        self.failure, self.argv, self.returncode = failure, tuple(argv), returncode
        self.tail, self.log = tail, log
        code = f" with {failure.code}" if failure.code else ""
        at = " ".join(filter(None, (failure.op, failure.node and f"'{failure.node}'")))
        where = f" at {at}" if at else ""
        layer = f" (layer {failure.layer})" if failure.layer and failure.layer != failure.node else ""
        said = f"; seen: {printable(failure.line[:_QUOTED])}" if failure.line else ""
        super().__init__(
            f"{name}: ATC failed{code} (exit code {returncode}): {failure.meaning}{where}{layer}; {failure.cure}{said}; "
            f"log: {log}"
        )


@functools.cache
def _tables() -> dict[str, Any]:
    text = resources.files("qcompile.ascend").joinpath("atc_errors.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def known_codes() -> dict[str, tuple[str, str]]:
    """Return meaning and cure of every listed code."""
    return {code: (meaning, cure) for code, (meaning, cure) in _tables()["codes"].items()}


def log_tail(text: str) -> str:
    """Return the last 20 lines of a log."""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def explain_failure(text: str, returncode: int, view: GraphView | None = None) -> AtcFailure:
    """Read the log of a failed run.

    Args:
        text: What ATC printed.
        returncode: Its exit code, negative when a signal ended it.
        view: The graph it compiled, to name node and layer.
    """
    codes = list(dict.fromkeys(_CODE.findall(text)))
    errors = [code for code in codes if not code.startswith("W")]
    warnings = tuple(code for code in codes if code.startswith("W"))
    if _is_out_of_memory(text, returncode):
        return AtcFailure("OOM", "the machine ran out of memory", _oom_line(text), "", "", "", _OOM_CURE, warnings)
    if not errors:
        return _without_code(text, returncode, warnings)
    generic = set(_tables()["generic"]["codes"])
    code = next((code for code in errors if code not in generic), errors[0])
    meaning, cure = _meaning(code)
    at = text.index(code)
    line = text[text.rfind("\n", 0, at) + 1 :].split("\n", 1)[0].strip()
    node, op = _node_in(text[text.rfind("\n", 0, at) + 1 :]) if code not in generic else _node_in(text)
    node, op, layer = _in_graph(node, op, view)
    return AtcFailure(code, meaning, line[:500], node, op, layer, _python_package(text, code, cure), warnings)


def _meaning(code: str) -> tuple[str, str]:
    listed = known_codes()
    if code in listed:
        return listed[code]
    for prefix, (meaning, cure) in _tables()["families"].items():
        if code.startswith(prefix):
            return meaning, cure
    return "an error this table does not know", "read the log"


def _is_out_of_memory(text: str, returncode: int) -> bool:
    """The kernel's killer leaves no message of its own: SIGKILL, or 137 from a shell."""
    if returncode in {-signal.SIGKILL, 137}:
        return True
    return any(words in text for words in _tables()["out_of_memory"]["matches"])


def _oom_line(text: str) -> str:
    words = _tables()["out_of_memory"]["matches"]
    return next(
        (line.strip()[:500] for line in text.splitlines() if any(w in line for w in words)), "killed (signal 9)"
    )


def _without_code(text: str, returncode: int, warnings: tuple[str, ...]) -> AtcFailure:
    for entry in _tables()["without_code"]:
        for line in text.splitlines():
            if entry["match"] in line:
                cure = _python_package(text, "", entry["cure"])
                return AtcFailure("", entry["meaning"], line.strip()[:500], "", "", "", cure, warnings)
    if returncode < 0 or 128 < returncode < 160:
        number = -returncode if returncode < 0 else returncode - 128
        meaning = f"ended by signal {number}"
        return AtcFailure("SIGNAL", meaning, "", "", "", "", "run it again with --log=debug", warnings)
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "the log is empty")
    return AtcFailure("", "no error code in the log", last[:500], "", "", "", "run it again with --log=debug", warnings)


def _python_package(text: str, code: str, cure: str) -> str:
    found = re.search(r"No module named '?([\w.]+)'?", text)
    if found and (code in {"", "EC0010"} or code.startswith("E4") or code == "E19999"):
        return f"pip install {found.group(1).split('.')[0]} into the python3 that CANN uses, or all of them: " + cure
    return cure


def _node_in(text: str) -> tuple[str, str]:
    """Return name and type of the first node a log names, after the line with the code."""
    for pattern in _NODE_PATTERNS:
        found = pattern.search(text)
        if found:
            groups = found.groupdict()
            node = _GEAR_SUFFIX.sub("", (groups.get("node") or "").strip().rstrip(".,"))
            return node, (groups.get("op") or "").strip().rstrip(".,")
    return "", ""


def _in_graph(node: str, op: str, view: GraphView | None) -> tuple[str, str, str]:
    """Find the node in the graph: by name, or by an op type such as ai.onnx::16::NPUSwiGlu that it alone has."""
    bare = op.rpartition("::")[2] or op
    if view is None:
        return node, bare, ""
    found = _by_name(view.nodes, node) or next((n for n in view.nodes if bare and n.op == bare), None)
    if found is None:
        return node, bare, ""
    same = sum(n.op == found.op for n in view.nodes)
    is_one_of_many = not node and same > 1
    name = f"{found.name} (one of {same})" if is_one_of_many else found.name
    return name, found.op, found.layer


def _by_name(nodes: list[Node], name: str) -> Node | None:
    """Fusions lengthen names and parsers add suffixes: the longest node name that starts the reported one."""
    if not name:
        return None
    exact = next((node for node in nodes if node.name == name), None)
    if exact is not None:
        return exact
    starts = [node for node in nodes if node.name and name.startswith(node.name)]
    return max(starts, key=lambda node: len(node.name), default=None)
