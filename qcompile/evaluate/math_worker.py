"""The process that runs math-verify: one JSON line [expected, given] in, one line {"same": bool} out."""

import json
import logging
import resource
import sys
from typing import Any

_MEMORY_BYTES = 2 << 30


def _parse(text: str, parse: Any) -> Any:
    r"""math-verify looks for `$...$` or `\\boxed`; a bare expression is offered both as it is and between dollars."""
    found = parse(text, parsing_timeout=4)
    if "\\boxed" in text or "$" in text:
        return found
    return parse(f"${text}$", parsing_timeout=4) or found


def main() -> int:
    """Answer questions until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    try:
        from math_verify import parse, verify
    except ImportError:
        return 1
    print('"ready"', flush=True)  # noqa: T201 - the protocol of this process
    for line in sys.stdin:
        expected, given = json.loads(line)
        try:
            same = bool(verify(_parse(expected, parse), _parse(given, parse), timeout_seconds=4))
        except (Exception, RecursionError):  # SymPy raises anything at all on odd input: not the same
            same = False
        print(json.dumps({"same": same}), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
