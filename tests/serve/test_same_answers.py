"""What the optimizer makes for ONNX Runtime gives a request the same numbers, to the bit, whatever is computed beside it."""

from pathlib import Path

import pytest

from qcompile.quantize_options import LayerOptions, QuantizeOptions
from qcompile.runtime import Completion, Engine, SamplingParams
from tests.optimized import export_tiny, optimize_tiny

# In larger blocks ONNX Runtime's kernels add in an order that depends on the number of rows.
SMALL_BLOCKS = {
    "int8": tuple(LayerOptions(name, group_size=64) for name in ("*down_proj*", "lm_head", "o_proj")),
    "int4": (LayerOptions("lm_head", group_size=32),),
}
WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
SYSTEM = "You are a helpful assistant who answers in one line. "
PROMPTS = [SYSTEM + "12 + 30", "def add(a, b):", SYSTEM + "7 * 8 = 56", "Paris", SYSTEM + "The quick brown fox"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("wide"), **WIDTHS)


def numbers(completions: list[Completion]) -> list[object]:
    return [(completion.token_ids, completion.logprobs) for completion in completions]


@pytest.mark.parametrize("scheme", ["", "int8", "int8-weight", "int4"])
def test_batch_chunks_and_reuse_change_no_bit(wide: Path, tmp_path: Path, scheme: str) -> None:
    options = QuantizeOptions(layers=SMALL_BLOCKS.get(scheme, ()))
    optimize_tiny(wide, tmp_path / "m", "fuse", *scheme.split(), quantize=options)
    with Engine(tmp_path / "m", threads=1, max_batch_size=1, reuse_prefixes=False) as engine:
        alone = numbers([engine.generate([prompt], PARAMS)[0] for prompt in PROMPTS])
    for batch, chunk in ((2, 256), (3, 7), (5, 16)):
        with Engine(tmp_path / "m", threads=1, max_batch_size=batch, prefill_chunk=chunk) as engine:
            assert numbers(engine.generate(PROMPTS, PARAMS)) == alone
            assert numbers(engine.generate(PROMPTS[::-1], PARAMS))[::-1] == alone
