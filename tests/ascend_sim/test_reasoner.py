"""The bundled model, lowered and simulated: four problems at once, answered as on ONNX Runtime."""

from pathlib import Path

from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.lowering.lower import AscendOptions
from qcompile.ascend.sim.acl_module import simulated_acl
from qcompile.evaluate import read_cases
from qcompile.evaluate.templates import Templates
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.runtime import Engine, SamplingParams
from tests.ascend_sim.simulated import simulate
from tests.ascend_sim.test_end_to_end import assert_clean
from tests.optimized import optimize_tiny

WEIGHTS = Path(__file__).parents[2] / "models" / "reasoner" / "weights"
ASKED = ("test-math-002", "test-choice-000", "test-generic-000", "test-code-000")  # the first: 45 x 8


def test_the_reasoner_answers_as_on_onnx_runtime(tmp_path: Path) -> None:
    export_checkpoint(str(WEIGHTS), tmp_path / "exported")
    optimize_tiny(tmp_path / "exported", tmp_path / "fused", target="portable", verify="off")
    shapes = AscendOptions(buckets=BucketOptions(batches=(4,), kv_lens=(512,), prefill_lens=(64,)))
    optimize_tiny(tmp_path / "fused", tmp_path / "compiled", target="ascend910b4", ascend=shapes, verify="off")
    simulate(tmp_path / "compiled")
    cases = {case.id: case for case in read_cases(WEIGHTS.parent / "test.jsonl")[0]}
    chats = [Templates.load().messages(cases[name]) for name in ASKED]
    answers = []
    for directory in (tmp_path / "fused", tmp_path / "compiled"):
        with simulated_acl(cann="9.1") as machine, Engine(directory, threads=1, max_batch_size=4) as engine:
            prompts = [engine.encode_chat(chat) for chat in chats]
            completions = engine.generate(prompts, SamplingParams(max_new_tokens=64))
        answers.append([completion.token_ids for completion in completions])
        assert_clean(machine)
    assert answers[0] == answers[1]
    assert "\\boxed{360}" in completions[0].text
