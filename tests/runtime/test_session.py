"""One suite over every Session: what the engine relies on, checked number by number."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcompile.runtime.acl_session import AclSession, open_acl_session
from qcompile.runtime.errors import SessionError
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.ort_session import open_ort_session
from qcompile.runtime.session import Session
from tests.runtime.acl_directories import acl_directory

STYLES = [("shared", "last"), ("shared-plain", "last"), ("concat", "all"), ("concat", "last")]
TOKENS = np.random.default_rng(7).integers(0, 400, 40)
LIMITS = {"float32": 2e-4, "float16": 0.15}


ORT = [pytest.param(style, id="-".join(style)) for style in STYLES]
ACL = [
    pytest.param("8.1", id="acl-8.1"),
    pytest.param("9.1", id="acl-9.1"),
    pytest.param("device", id="acl-device", marks=pytest.mark.ascend),
]


@pytest.fixture(params=[*ORT, *ACL])
def session(request: pytest.FixtureRequest, compiled: Callable[..., Path]) -> Iterator[Session]:
    if isinstance(request.param, tuple):
        opened = open_session(compiled, *request.param)
        yield opened
        opened.close()
        return
    with acl_directory(request, request.param) as (directory, machine):
        acl_session = open_acl_session(directory, Manifest.load(directory))
        acl_session.reserve(4, 64)
        yield acl_session
        acl_session.close()
    if machine is not None:
        assert machine.reports == []
        assert list(machine.device.live()) == []


@pytest.fixture
def limit(session: Session) -> float:
    """What scores may differ by: float32, or float16 with sums in another order."""
    return 0.05 if isinstance(session, AclSession) else 2e-4


def open_session(
    compiled: Callable[..., Path],
    kv_cache: str,
    logits: str,
    dtype: str = "float32",
    model_type: str = "qwen2",
) -> Session:
    kv_cache, _, attention = kv_cache.partition("-")
    directory = compiled(model_type, kv_cache=kv_cache, logits=logits, dtype=dtype)
    manifest = Manifest.load(directory)
    graphs = (replace(graph, io=replace(graph.io, attention=attention)) for graph in manifest.graphs)
    opened = open_ort_session(directory, replace(manifest, graphs=tuple(graphs)), threads=1)
    opened.reserve(4, 64)
    return opened


def prefill(session: Session, slot: int, tokens: np.ndarray, past: int = 0) -> np.ndarray:
    scores = session.forward(slot, tokens[None].astype(np.int64), [past])
    assert scores is not None
    assert scores.ids is None
    return scores.values[0].copy()


def decode(session: Session, tokens: list[int], past: list[int], first_slot: int = 0) -> np.ndarray:
    scores = session.forward(first_slot, np.array(tokens, np.int64)[:, None], past)
    assert scores is not None
    return scores.values.copy()


@pytest.fixture
def expected(session: Session) -> np.ndarray:
    """Scores behind every prefix of TOKENS, each computed whole, in a slot of its own."""
    return np.stack([prefill(session, 3, TOKENS[: n + 1]) for n in range(len(TOKENS))])


def test_scores_are_float32_of_the_last_position(session: Session) -> None:
    scores = session.forward(0, TOKENS[None, :5].astype(np.int64), [0])
    assert scores is not None
    assert scores.values.shape == (1, session.vocab_size)
    assert scores.values.dtype == np.float32
    assert np.ptp(scores.values) > 1


def test_chunks_equal_the_whole(session: Session, expected: np.ndarray, limit: float) -> None:
    past = 0
    for size in (1, 7, 2, 16, 3, 1, 1):
        got = prefill(session, 0, TOKENS[past : past + size], past)
        past += size
        np.testing.assert_allclose(got, expected[past - 1], atol=limit)


def test_a_chunk_without_scores_still_fills_the_cache(session: Session, expected: np.ndarray, limit: float) -> None:
    assert session.forward(1, TOKENS[None, :10].astype(np.int64), [0], need_scores=False) is None
    np.testing.assert_allclose(prefill(session, 1, TOKENS[10:12], 10), expected[11], atol=limit)


def test_ragged_rows_decode_together(session: Session, expected: np.ndarray, limit: float) -> None:
    lengths = [9, 3, 20]
    for slot, length in enumerate(lengths):
        prefill(session, slot, TOKENS[:length])
    for step in range(6):
        past = [length + step for length in lengths]
        got = decode(session, [int(TOKENS[p]) for p in past], past)
        np.testing.assert_allclose(got, expected[past], atol=limit)


def test_rows_join_and_leave_between_steps(session: Session, expected: np.ndarray, limit: float) -> None:
    prefill(session, 0, TOKENS[:8])
    decode(session, [int(TOKENS[8])], [8])
    prefill(session, 1, TOKENS[:4])
    got = decode(session, [int(TOKENS[9]), int(TOKENS[4])], [9, 4])
    np.testing.assert_allclose(got, expected[[9, 4]], atol=limit)
    got = decode(session, [int(TOKENS[5])], [5], first_slot=1)
    np.testing.assert_allclose(got, expected[[5]], atol=limit)
    got = decode(session, [int(TOKENS[10]), int(TOKENS[6])], [10, 6])
    np.testing.assert_allclose(got, expected[[10, 6]], atol=limit)


def test_a_row_can_be_cut_back(session: Session, expected: np.ndarray, limit: float) -> None:
    """What lies beyond `past` is garbage of an earlier request and must not be read."""
    prefill(session, 0, TOKENS[::-1].copy())
    prefill(session, 0, TOKENS[:6])
    prefill(session, 0, TOKENS[20:30], 6)
    np.testing.assert_allclose(prefill(session, 0, TOKENS[6:15], 6), expected[14], atol=limit)
    np.testing.assert_allclose(decode(session, [int(TOKENS[4])], [4]), expected[[4]], atol=limit)


def test_copy_and_swap(session: Session, expected: np.ndarray, limit: float) -> None:
    prefill(session, 0, TOKENS[:12])
    prefill(session, 1, TOKENS[:5])
    session.copy_slot(0, 2, 10)
    session.swap_slots(0, 1, 12)
    past = [5, 12, 10]
    got = decode(session, [int(TOKENS[p]) for p in past], past)
    np.testing.assert_allclose(got, expected[past], atol=limit)
    session.swap_slots(2, 3, 11)
    np.testing.assert_allclose(decode(session, [int(TOKENS[11])], [11], 3), expected[[11]], atol=limit)


def test_reserve_keeps_what_is_cached(session: Session, expected: np.ndarray, limit: float) -> None:
    prefill(session, 0, TOKENS[:12])
    prefill(session, 1, TOKENS[:7])
    session.reserve(6, 200)
    assert (session.num_slots, session.capacity) == (6, 200)
    session.reserve(1, 10)
    assert (session.num_slots, session.capacity) == (6, 200)
    got = decode(session, [int(TOKENS[12]), int(TOKENS[7])], [12, 7])
    np.testing.assert_allclose(got, expected[[12, 7]], atol=limit)


def test_the_last_entry_of_a_slot_can_be_used(session: Session, limit: float) -> None:
    tokens = np.resize(TOKENS, 64)
    whole = prefill(session, 0, tokens)
    prefill(session, 1, tokens[:63])
    np.testing.assert_allclose(decode(session, [int(tokens[63])], [63], 1)[0], whole, atol=limit)


def test_beyond_the_reservation_is_an_error(session: Session) -> None:
    for slot, length in ((0, 65), (4, 3)):
        with pytest.raises(SessionError, match="reserved"):
            session.forward(slot, np.zeros((1, length), np.int64), [0])


def test_close_twice(session: Session) -> None:
    for _ in range(2):
        session.close()
        assert (session.num_slots, session.capacity) == (0, 0)
        with pytest.raises(SessionError):
            session.forward(0, TOKENS[None, :5].astype(np.int64), [0])


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_both_cache_styles_give_the_same_scores(compiled: Callable[..., Path], model_type: str, dtype: str) -> None:
    sessions = [open_session(compiled, *style, dtype, model_type) for style in STYLES]
    rows = []
    for session in sessions:
        prefill(session, 0, TOKENS[:20])
        prefill(session, 1, TOKENS[:3])
        rows.append(decode(session, [5, 6], [20, 3]))
        session.close()
    for other in rows[1:]:
        np.testing.assert_allclose(other, rows[0], atol=LIMITS[dtype])


def test_bfloat16_says_what_to_do(compiled: Callable[..., Path]) -> None:
    with pytest.raises(SessionError, match=r"no bfloat16 kernel.*--dtype fp32 or fp16"):
        open_session(compiled, "shared", "last", "bfloat16")
