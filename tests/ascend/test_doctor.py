"""`qcompile doctor` on trees that stand for machines: nothing, CANN not sourced, CANN with gaps, a full NPU host."""

import json
import time

import pytest
from click.testing import CliRunner

from qcompile.ascend.cann_install import find_cann, scan_parsers
from qcompile.ascend.doctor import Status, diagnose
from qcompile.cli.doctor import command
from tests.ascend.fake_cann import PYTHON_WITHOUT, script, sourced, toolkit


def status_of(diagnosis):
    return {check.name: check.status for check in diagnosis.checks}


def test_a_machine_without_cann(tmp_path):
    diagnosis = diagnose({"PATH": str(tmp_path), "HOME": str(tmp_path)}, tmp_path)
    found = status_of(diagnosis)
    assert found["onnxruntime"] is Status.OK
    assert {name for name, status in found.items() if status is Status.GAP} == {
        "CANN",
        "atc",
        "driver",
        "npu-smi",
        "acl",
    }
    assert all(check.cure for check in diagnosis.checks if check.status is Status.GAP)
    assert diagnosis.abilities == {
        "check and lower for Ascend": True,
        "run on the CPU": True,
        "simulate an Ascend device": True,
        "compile .om files": False,
        "run .om files": False,
    }


def test_cann_that_was_not_sourced(tmp_path):
    toolkit(tmp_path)
    diagnosis = diagnose({"PATH": str(tmp_path), "HOME": str(tmp_path)}, tmp_path)
    by_name = {check.name: check for check in diagnosis.checks}
    assert by_name["CANN"].found.startswith("8.1.RC1")
    assert by_name["environment"].status is Status.GAP
    assert "ascend-toolkit/set_env.sh" in by_name["environment"].cure
    assert not diagnosis.abilities["compile .om files"]
    assert "devlib" in by_name["driver"].cure


def test_a_full_host(tmp_path):
    home = toolkit(tmp_path)
    (tmp_path / "usr/local/Ascend/driver/lib64").mkdir(parents=True)
    (tmp_path / "usr/local/Ascend/driver/version.info").write_text("Version=24.1.rc2\nascendhal_version=7.35.23\n")
    diagnosis = diagnose(sourced(home, tmp_path / "tools", smi=True), tmp_path)
    found = status_of(diagnosis)
    assert all(
        found[name] is Status.OK for name in ("CANN", "atc", "environment", "python of CANN", "kernels", "driver")
    )
    assert diagnosis.soc_versions == ("Ascend910B4",)
    assert diagnosis.abilities["compile .om files"]
    assert diagnosis.abilities["run .om files"]
    assert diagnosis.parsers["NPURmsNorm"] == {("", 11), ("npu", 1)}
    missing = next(check for check in diagnosis.checks if check.name == "not registered")
    assert "NPUDynamicQuant" in missing.found
    assert "NPURotaryMul" in missing.found.split("promised")[1]
    record = json.loads(json.dumps(diagnosis.record()))
    assert record["parsers"]["QuantBatchMatMul"] == [["", 16]]


def test_missing_python_packages_are_named(tmp_path):
    diagnosis = diagnose(sourced(toolkit(tmp_path), tmp_path / "tools", python=PYTHON_WITHOUT), tmp_path)
    check = next(check for check in diagnosis.checks if check.name == "python of CANN")
    assert check.status is Status.GAP
    assert "pip install decorator absl-py" in check.cure


@pytest.mark.parametrize(
    ("layout", "version", "status"),
    [("cann", "9.1.0", Status.OK), ("cann-8.5.0", "8.5.0", Status.OK), ("cann", "7.0.RC1", Status.NOTE)],
)
def test_other_layouts_and_releases(layout, version, status, tmp_path):
    toolkit(tmp_path, version, layout)
    by_name = {c.name: c for c in diagnose({"PATH": "", "HOME": str(tmp_path)}, tmp_path).checks}
    assert by_name["CANN"].status is status
    assert by_name["CANN"].found.startswith(version)


def test_the_release_from_a_directory_name(tmp_path):
    home = toolkit(tmp_path, layout="cann-8.5.0")
    (home / "aarch64-linux/ascend_toolkit_install.info").write_text("nothing useful\n")
    install = find_cann({"PATH": "", "HOME": str(tmp_path)}, tmp_path)
    assert install is not None
    assert install.version == "8.5.0"


def test_npu_smi_without_rights(tmp_path):
    tools = tmp_path / "tools"
    environ = sourced(toolkit(tmp_path), tools, smi=True)
    script(tools / "npu-smi", "#!/bin/sh\necho 'dcmi model initialized failed' >&2\nexit 1\n")
    check = next(c for c in diagnose(environ, tmp_path).checks if c.name == "npu-smi")
    assert check.status is Status.GAP
    assert "initialized failed" in check.found
    assert "davinci" in check.cure


def test_a_large_parser_library_is_scanned_in_place(tmp_path):
    """64 MiB, sparse: the scan is bounded, and what lies early is found."""
    home = toolkit(tmp_path)
    library = home / "opp/built-in/framework/onnx/libops_all_onnx_plugin.so"
    with library.open("r+b") as stream:
        stream.truncate(64 << 20)
    vendor = home / "opp/vendors/mine/framework/onnx"
    vendor.mkdir(parents=True)
    (vendor / "libmine.so").write_bytes(b"ai.onnx::16::NPUSwiGlu\0")
    install = find_cann(sourced(home, tmp_path / "tools"), tmp_path)
    assert install is not None
    start = time.perf_counter()
    scan = scan_parsers(install)
    assert time.perf_counter() - start < 10
    assert {"NPURmsNorm", "NPUSwiGlu"} <= set(scan.operators)
    assert scan.is_complete
    assert len(scan.libraries) == 2


def test_the_command(tmp_path, monkeypatch):
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)
    shown = CliRunner().invoke(command, [])
    assert shown.exit_code == 0, shown.output
    assert "onnxruntime" in shown.output
    assert "can run on the CPU" in shown.output
    record = json.loads(CliRunner().invoke(command, ["--json"]).stdout)
    assert {check["status"] for check in record["checks"]} <= {"ok", "gap", "note"}
