import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import QualityError
from qcompile.quality.windows import shares, windows_of


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_every_token_but_the_first_is_scored_once_with_context(num_tokens, context, data):
    stride = data.draw(st.integers(1, context - 1))
    windows = windows_of(num_tokens, context, stride)
    scored = [i for w in windows for i in range(w.first_scored, w.stop)]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        assert window.stop - window.start <= context
        assert window.start < window.first_scored
        assert window.first_scored - window.start >= min(context - stride, window.first_scored)


def test_windows_by_hand():
    windows = [(w.start, w.stop, w.first_scored) for w in windows_of(20, 8, 4)]
    assert windows == [(0, 8, 1), (4, 12, 8), (8, 16, 12), (12, 20, 16)]


def test_without_overlap_a_window_cannot_score_its_first_token():
    assert [(w.start, w.stop, w.first_scored) for w in windows_of(7, 3, 3)] == [(0, 3, 1), (3, 6, 4)]


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (8, 0), (8, 9), (8, -1)])
def test_impossible_windows(context, stride):
    with pytest.raises(QualityError, match="wanted 2 <= context and 1 <= stride <= context"):
        windows_of(100, context, stride)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(1, 4000))
def test_shares_use_up_the_limit_and_nothing_else(lengths, limit):
    kept = shares(lengths, limit)
    available = sum(max(n - 1, 0) for n in lengths)
    assert all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))
    assert sum(max(k - 1, 0) for k in kept) == min(limit, available)
    for k, n in zip(kept, lengths, strict=True):
        exact = max(n - 1, 0) * min(1, limit / max(available, 1))
        assert abs(max(k - 1, 0) - exact) <= 1


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.integers(1, 9000))
def test_shares_of_many_documents_use_up_the_limit(lengths, limit):
    kept = shares(lengths, limit)
    assert all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))
    assert sum(max(k - 1, 0) for k in kept) == min(limit, sum(max(n - 1, 0) for n in lengths))


def test_a_small_limit_takes_longer_pieces_of_fewer_documents():
    kept = shares([1001] * 34, 400)
    assert [i for i, k in enumerate(kept) if k] == [0, 4, 8, 12, 17, 21, 25, 29]
    assert all(k == 51 for k in kept if k)
    assert sum(k > 0 for k in shares([1001] * 34, 20_000)) == 34
    assert sum(k > 0 for k in shares([1001] * 34, 5_120)) == 20
    assert sum(k > 0 for k in shares([3] * 34, 40)) == 20


def test_no_limit_keeps_everything():
    assert shares([5, 1, 0, 3], None) == [5, 0, 0, 3]
