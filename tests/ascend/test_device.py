"""On a machine with CANN (`make test-ascend`): what the check promises, held against the real compiler.

Not run on the development machines. A clean graph must compile and be read back; a graph that the check refuses with
certainty must be refused with that code.
"""

import os
import shutil

import pytest

from qcompile.ascend.atc_build import build_oms, find_compiler, target_chip
from qcompile.ascend.atc_errors import AtcRunError
from qcompile.ascend.atc_jobs import plan_build
from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.cann_install import find_cann
from qcompile.ascend.chips import cann_version
from qcompile.ascend.doctor import diagnose, machine_chips
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.legality.finding import Effect
from qcompile.ascend.om_reader import read_om
from qcompile.runtime import Engine, SamplingParams
from tests.ascend.faults_model import MODEL_FAULTS
from tests.ascend.faults_nodes import NODE_FAULTS
from tests.ascend.graphs import CLEAN, saved
from tests.ascend_lowering.lowered import fuse_tiny, lower_tiny
from tests.runtime.acl_directories import compile_on_device

pytestmark = [
    pytest.mark.ascend,
    pytest.mark.skipif(shutil.which("atc") is None, reason="atc is not on PATH: source set_env.sh of CANN"),
]
FAULTS = {
    fault.name: fault for fault in (*MODEL_FAULTS, *NODE_FAULTS) if fault.options is None and fault.chip == "910b4"
}
ON_DEVICE = {name: fault for name, fault in FAULTS.items() if fault.code in {"E16002", "E16005", "EZ3002", "E20001"}}


def compiled(path):
    install = find_cann()
    assert install is not None
    build = plan_build(path, target_chip(path, "Ascend910B4"), {})
    atc, _ = find_compiler(install, os.environ)
    return build_oms(build, atc, install, os.environ, lambda *_: None)


def test_the_doctor_says_it_can_compile():
    assert diagnose().abilities["compile .om files"]


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_graph_compiles_and_is_read_back(name, tmp_path):
    model = CLEAN[name]()
    outcome = compiled(saved(model, tmp_path))
    (om,) = (read_om(tmp_path / file) for file in outcome.oms.values())
    assert [port.name for port in om.models[0].inputs] == [value.name for value in model.graph.input]
    assert len(om.models[0].outputs) == len(model.graph.output)
    assert om.models[0].ops


@pytest.mark.parametrize("name", ON_DEVICE)
def test_what_the_check_refuses_the_compiler_refuses(name, tmp_path):
    install = find_cann()
    assert install is not None
    path = saved(ON_DEVICE[name].build(), tmp_path)
    report = check_model(path, target_chip(path, "Ascend910B4"), cann_version(install.version))
    expected = {f.code for f in report.findings if f.effect is Effect.REFUSED and f.certain}
    if not expected:
        pytest.skip(f"CANN {install.version} is not expected to refuse it")
    with pytest.raises(AtcRunError) as error:
        compiled(path)
    assert error.value.failure.code in expected


def test_the_runtime_on_the_device_gives_the_tokens_of_the_ort_session(tmp_path):
    """Four slots of different lengths, through the same code that the simulated device runs."""
    chips = machine_chips(os.environ)
    if not chips:
        pytest.skip("npu-smi lists no chip: this machine only compiles")
    fused = fuse_tiny(tmp_path)
    buckets = BucketOptions(batches=(4,), kv_lens=(128,), prefill_lens=(16,))
    lower_tiny(fused, tmp_path / "compiled", chips[0].lower(), buckets)
    compile_on_device(tmp_path / "compiled")
    prompts = [[5, 80, 31], list(range(40, 61)), [7] * 17, [300]]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    answers = []
    for directory in (fused, tmp_path / "compiled"):
        with Engine(directory, max_batch_size=4) as engine:
            answers.append([completion.token_ids for completion in engine.generate(prompts, params)])
    assert answers[0] == answers[1]
