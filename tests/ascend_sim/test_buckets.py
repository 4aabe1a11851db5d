"""Which graph serves a step: by batch, by length, in groups; and a cache that moves when it grows."""

from pathlib import Path

import numpy as np
import pytest

from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.runtime.acl_session import AclSession, open_acl_session
from qcompile.runtime.errors import SessionError
from qcompile.runtime.manifest import Manifest
from tests.ascend_lowering.lowered import fused_logits
from tests.ascend_sim.simulated import compile_simulated
from tests.ascend_sim.test_end_to_end import assert_clean

BUCKETS = BucketOptions(batches=(1, 4), kv_lens=(32, 64), prefill_lens=(8, 16))
PROMPTS = [[5, 80, 31], list(range(40, 55)), [7] * 9, [300], [9, 8], list(range(100, 120))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return compile_simulated(tmp_path_factory.mktemp("buckets"), buckets=BUCKETS)


def prefilled(session: AclSession, slot: int, prompt: list[int]) -> int:
    for start in range(0, len(prompt), session.max_chunk):
        chunk = prompt[start : start + session.max_chunk]
        scores = session.forward(slot, np.array([chunk]), [start], greedy_only=True)
    assert scores is not None
    assert scores.ids is not None
    return int(scores.ids[0, 0])


@pytest.mark.parametrize("cann", ["8.1", "9.1"])
def test_six_slots_over_graphs_of_four_and_one(pair: tuple[Path, Path], cann: str) -> None:
    """Batches and lengths are those of the smallest graphs that fit; rows are what they would be alone."""
    fused, compiled = pair
    wanted, _ = fused_logits(fused, PROMPTS, 14)
    with simulated_acl(cann=cann) as machine:
        session = open_acl_session(compiled, Manifest.load(compiled))
        session.reserve(6, 30)
        assert (session.num_slots, session.capacity) == (6, 32)
        found = [[prefilled(session, slot, prompt)] for slot, prompt in enumerate(PROMPTS)]
        # prompts of 3, 15, 9, 1, 2, 20 tokens: a single token is a decode step
        assert machine.runs == {"prefill_s8_t32.om": 3, "prefill_s16_t32.om": 3, "decode_b1_t32.om": 1}
        for step in range(13):
            if step == 8:
                session.reserve(6, 33)
                assert session.capacity == 64
                machine.runs.clear()
            past = [len(prompt) + step for prompt in PROMPTS]
            scores = session.forward(0, np.array([[tokens[-1]] for tokens in found]), past, greedy_only=True)
            assert scores is not None
            assert scores.ids is not None
            for tokens, token in zip(found, scores.ids[:, 0], strict=True):
                tokens.append(int(token))
        assert machine.runs == {"decode_b4_t64.om": 2 * 5}  # six rows: four, and two in a graph of four
        session.forward(5, np.array([[1]]), [30], greedy_only=True)
        assert machine.runs["decode_b1_t64.om"] == 1
        with pytest.raises(SessionError, match="the largest compiled is 64"):
            session.reserve(6, 65)
        session.close()
    assert found == wanted
    assert_clean(machine)
