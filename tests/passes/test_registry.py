"""Every registered pass has its six tests, or tests of its own kind."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import tests.passes
from qcompile.errors import PassError
from qcompile.passes.registry import GROUPS, PASSES, expand
from tests.passes.six_tests import all_six_tests

TESTS = Path(tests.passes.__path__[0]).parent


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_tested(name):
    for module in pkgutil.iter_modules(tests.passes.__path__):
        if module.name.startswith("test_"):
            importlib.import_module(f"tests.passes.{module.name}")
    tested = [c for c in all_six_tests() if c.pass_class is PASSES[name]]
    if not tested:
        # What needs calibration data, or changes every weight at once, has tests of its own kind.
        assert any(
            PASSES[name].__name__ in path.read_text() or f'"{name}"' in path.read_text()
            for path in TESTS.rglob("test_*.py")
        )
    for tests_of_pass in tested:
        assert tests_of_pass.examples
        assert tests_of_pass.near_misses
        assert tests_of_pass.counts


def test_names_and_summaries_are_for_people():
    for name, pass_class in PASSES.items():
        assert name == pass_class.name
        assert name == name.lower()
        assert 0 < len(pass_class.summary) <= 90


def test_groups_name_passes_in_running_order():
    order = list(PASSES)
    for group in GROUPS.values():
        assert [order.index(name) for name in group] == sorted(order.index(name) for name in group)


@pytest.mark.parametrize("wrong", ["fuse-rmsnorm", "fusse", "int-8", "fuse_swiglu", "Fuse"])
def test_a_near_name_is_suggested(wrong):
    with pytest.raises(PassError, match=rf"unknown pass '{wrong}'; did you mean '"):
        expand([wrong])


def test_a_name_like_none_lists_all():
    with pytest.raises(PassError, match=r"there are: .*fuse-attention.*root-shapes"):
        expand(["xyzzy"])
