"""Read 10,000 mutated .om files; print how many were read, how many refused, and the longest and largest.

    python benchmarks/fuzz_om.py [FILES] [SEED]

Wanted: no crash, no hang; each at most 1 s and 200 MB.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from qcompile.ascend.om_reader import read_om
from qcompile.ascend.om_report import om_record, render_om
from qcompile.errors import GraphError
from tests.ascend.om_files import decode_om, gear_om, mutated


def main(files: int = 10_000, seed: int = 1) -> dict[str, float]:
    """Return the figures."""
    rng, read, refused, longest = random.Random(seed), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        originals = [decode_om(Path(folder)).read_bytes(), gear_om(Path(folder)).read_bytes()]
        path = Path(folder) / "mutated.om"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for index in range(files):
            path.write_bytes(mutated(originals[index % len(originals)], rng))
            start = time.perf_counter()
            try:
                om = read_om(path)
                om_record(om)
                render_om(om)
                read += 1
            except GraphError:
                refused += 1
            longest = max(longest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "files": files,
        "read": read,
        "refused": refused,
        "longest_s": round(longest, 4),
        "grown_mib": round(grown, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(*(int(argument) for argument in sys.argv[1:]))))
