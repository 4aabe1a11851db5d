import pytest

pytest.register_assert_rewrite("tests.passes.six_tests")
