import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.errors import QualityError
from qcompile.quality.divergence import RowScorer, Summary
from tests.quality.numpy_qwen import kl_per_row, nll

LOGITS = hnp.arrays(np.float32, (11, 17), elements=st.floats(-30, 30, width=32))
TOKENS = hnp.arrays(np.int64, 11, elements=st.integers(0, 16))


@settings(deadline=None)
@given(LOGITS, LOGITS, TOKENS)
def test_kl_and_nll_follow_their_definitions(a, b, tokens):
    scores = RowScorer(("a", "b")).score(a, b, tokens)
    wide = [x.astype(np.float64) for x in (a, b)]
    np.testing.assert_allclose(scores.kl, kl_per_row(*wide), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scores.reference_nll, nll(wide[0], tokens), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scores.other_nll, nll(wide[1], tokens), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(scores.same_top, a.argmax(axis=1) == b.argmax(axis=1))


@settings(deadline=None)
@given(LOGITS, TOKENS)
def test_a_model_differs_from_itself_by_exactly_nothing(a, tokens):
    scores = RowScorer(("a", "a")).score(a, a.copy(), tokens)
    assert scores.kl.max() == 0.0
    assert scores.same_top.all()


def test_threads_change_nothing():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50, 300)).astype(np.float32)
    tokens = rng.integers(0, 300, 50)
    one, two = RowScorer(("a", "b")), RowScorer(("a", "b"), threads=2)
    np.testing.assert_array_equal(one.score(a, b, tokens).kl, two.score(a, b, tokens).kl)
    two.close()


def test_large_logits_do_not_overflow():
    a = np.array([[1e4, 1e4 - 1, 0.0]], np.float32)
    scores = RowScorer(("a", "b")).score(a, a - 5e3, np.array([1]))
    assert scores.kl[0] == pytest.approx(0, abs=1e-9)
    assert scores.reference_nll[0] == pytest.approx(1 + np.log1p(np.exp(-1)))


def test_masked_logits_count_as_impossible():
    a = np.array([[0.0, -np.inf, 1.0]], np.float32)
    b = np.array([[0.0, -np.inf, 0.0]], np.float32)
    assert RowScorer(("a", "b")).score(a, b, np.array([0])).kl[0] == pytest.approx(
        kl_per_row(np.array([[0.0, 1.0]]), np.array([[0.0, 0.0]]))[0]
    )


def test_what_the_other_excludes_is_infinitely_far():
    a = np.zeros((1, 2), np.float32)
    b = np.array([[0.0, -np.inf]], np.float32)
    assert RowScorer(("a", "b")).score(a, b, np.array([0])).kl[0] == np.inf
    assert np.isfinite(RowScorer(("b", "a")).score(b, a, np.array([0])).kl[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits_name_the_model(bad):
    a = np.zeros((3, 4), np.float32)
    b = a.copy()
    b[1, 2] = bad
    with pytest.raises(QualityError, match=r"^broken: its logits hold (nan|inf)"):
        RowScorer(("good", "broken")).score(a, b, np.zeros(3, np.int64))


def test_summary():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 200, 30)).astype(np.float32)
    tokens = rng.integers(0, 30, 200)
    summary = Summary.of(RowScorer(("a", "b")).score(a, b, tokens))
    kl = kl_per_row(a.astype(np.float64), b.astype(np.float64))
    assert summary.num_tokens == 200
    assert summary.mean_kl == pytest.approx(kl.mean())
    assert summary.median_kl == pytest.approx(np.sort(kl)[99:101].mean())
    assert summary.p99_kl == pytest.approx(np.quantile(kl, 0.99))
    assert summary.max_kl == pytest.approx(kl.max())
    assert summary.kl_standard_error == pytest.approx(np.sqrt(((kl - kl.mean()) ** 2).sum() / 199 / 200))
    assert summary.reference_perplexity == pytest.approx(np.exp(nll(a.astype(np.float64), tokens).mean()))
    assert summary.top1_agreement == (a.argmax(1) == b.argmax(1)).mean()
