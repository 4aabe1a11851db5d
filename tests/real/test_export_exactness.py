"""The real 0.5B model: the exported float32 graph against transformers on the same weights."""

from pathlib import Path

import numpy as np
import pytest

from qcompile.model_config import ModelConfig
from tests.export.onnx_decoder import OnnxDecoder, TorchDecoder
from tests.real.real_model import PROMPTS, Measured, Trace, stepped

pytestmark = [pytest.mark.real, pytest.mark.torch]

LIMIT = 1e-3


@pytest.fixture(scope="module")
def decoder(exported: tuple[Path, Measured], checkpoint: Path) -> OnnxDecoder:
    config = ModelConfig.from_file(checkpoint / "config.json")
    return OnnxDecoder(exported[0] / "model.onnx", config, threads=0)


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens(
    name: str, decoder: OnnxDecoder, prompts: dict[str, list[int]], wanted: dict[str, Trace]
) -> None:
    """Prefill and decode with the cache: 128 greedy tokens, and the logits each was chosen from."""
    decoder.reset()
    seen = stepped(decoder, prompts[name])
    worst = float(np.abs(seen.logits - wanted[name].logits).max())
    print(f"\n{name}: max logit difference over the greedy tokens {worst:.2e}")
    assert seen.tokens == wanted[name].tokens
    assert worst <= LIMIT


def test_every_position_of_the_prompts(decoder: OnnxDecoder, checkpoint: Path, prompts: dict[str, list[int]]) -> None:
    theirs = TorchDecoder(checkpoint)
    worst = {}
    for name, ids in prompts.items():
        feeds = (np.array([ids]), np.ones((1, len(ids)), np.int64), np.arange(len(ids))[None])
        decoder.reset()
        theirs.reset()
        worst[name] = float(np.abs(decoder.step(*feeds) - theirs.step(*feeds)).max())
    print(f"\nmax logit difference over all prompt positions: {worst}")
    assert max(worst.values()) <= LIMIT


def test_a_batch_of_two_lengths(decoder: OnnxDecoder, checkpoint: Path, prompts: dict[str, list[int]]) -> None:
    """Left-padded, as transformers generates batches: the padded row must not feel its padding."""
    short, long = sorted((prompts["english"], prompts["code"]), key=len)
    padding = len(long) - len(short)
    ids = np.array([[0] * padding + short, long])
    mask = np.array([[0] * padding + [1] * len(short), [1] * len(long)])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    decoder.reset()
    seen = decoder.step(ids, mask, positions)
    reference = TorchDecoder(checkpoint).step(ids, mask, positions)
    assert np.abs(seen - reference)[mask.astype(bool)].max() <= LIMIT
