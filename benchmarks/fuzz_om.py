"""Read 10,000 mutated .om files; print how many were read, how many refused, and the longest and largest.

    python benchmarks/fuzz_om.py [FILES] [SEED]

Wanted: no crash, no hang; each at most 1 s and 200 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from qcompile.ascend.om_reader import read_om
from qcompile.ascend.om_report import om_record, render_om
from qcompile.ascend.sim.model_file import compile_graph, open_simulated
from qcompile.errors import GraphError
from tests.ascend.graphs import norm_model, saved
from tests.ascend.om_files import decode_om, gear_om, mutated


def fuzz(files: int, seed: int) -> dict[str, float]:
    """Return the figures."""
    warnings.simplefilter("ignore")  # of the ONNX reader, about keys it does not know
    rng, read, refused, longest = random.Random(seed), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        originals = [
            made.read_bytes() for made in (decode_om(Path(folder)), gear_om(Path(folder)), _simulated(Path(folder)))
        ]
        path = Path(folder) / "mutated.om"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for index in range(files):
            path.write_bytes(mutated(originals[index % len(originals)], rng))
            start = time.perf_counter()
            try:
                om = read_om(path)
                om_record(om)
                render_om(om)
                if index % len(originals) == 2:
                    open_simulated(path)
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


def _simulated(folder: Path) -> Path:
    """A file of the simulated compiler, whose reader takes the graph out of it as well."""
    path = folder / "simulated.om"
    compile_graph(saved(norm_model(), folder), path, "Ascend910B4", "atc", outside=False)
    return path


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="?", type=int, default=10_000)
    parser.add_argument("seed", nargs="?", type=int, default=1)
    print(json.dumps(fuzz(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
