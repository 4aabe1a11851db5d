"""Run the first examples of every pass once and print a digest of what came out; started twice by the tests."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil

import tests.passes
from tests.passes.graph_text import model_bytes
from tests.passes.six_tests import all_six_tests


def main() -> None:
    """Print `pass example` to digest as JSON."""
    for module in pkgutil.iter_modules(tests.passes.__path__):
        if module.name.startswith("test_"):
            importlib.import_module(f"tests.passes.{module.name}")
    digests = {}
    for tests_of_pass in all_six_tests():
        for example in tests_of_pass.examples[:3]:
            dtype = example.dtypes[0] if example.dtypes else "float"
            context = tests_of_pass.prepared(example.before, example.weights, dtype, example.opset)
            tests_of_pass.run(context)
            name = f"{tests_of_pass.pass_class.name} {tests_of_pass.__name__} {example.name}"
            digests[name] = hashlib.sha256(model_bytes(context.model)).hexdigest()
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
