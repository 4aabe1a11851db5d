"""`qcompile atc` throws no compiled work away: two runs at once, and a folder that is prepared again."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcompile.ascend import atc_manifest
from tests.ascend.test_atc import calls_of, machine_with_cann, run


def test_a_second_run_leaves_the_first_alone(model, cann, monkeypatch):
    """It would empty the folders that the first one's compilers write to, and both would fail."""
    environ = dict(os.environ) | {"FAKE_ATC": "slow", "PYTHONPATH": str(Path(__file__).parents[2])}
    code = f"from qcompile.cli.main import main; import sys; sys.argv = ['qcompile', 'atc', {str(model)!r}]; main()"
    first = subprocess.Popen([sys.executable, "-c", code], env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while not calls_of(cann) and time.monotonic() < deadline:
            time.sleep(0.1)
        log = model / "atc_build" / "decode_b4_t1024" / "atc.log"
        before = log.stat().st_ino
        second = run(model)
        assert second.exit_code == 1
        assert "another run is compiling decode_b4_t1024 here" in str(second.exception)
        assert log.stat().st_ino == before
    finally:
        first.terminate()
        first.communicate(timeout=20)
    monkeypatch.setenv("FAKE_ATC", "ok")
    assert run(model).exit_code == 0


@pytest.fixture
def built_folder(model, no_cann, tmp_path):
    """The folder for another machine, and its script having run there."""
    assert run(model, "--host-cpu", "aarch64").exit_code == 3
    environ = machine_with_cann(tmp_path)
    folder = tmp_path / "model-for-atc"

    def build():
        done = subprocess.run(["/bin/bash", folder / "build_om.sh"], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    build()
    return folder, build


def test_a_folder_prepared_again_keeps_what_was_compiled_in_it(model, built_folder):
    folder, build = built_folder
    made = (folder / "decode_b4_t1024.om").read_bytes()
    assert run(model, "--host-cpu", "aarch64").exit_code == 3
    assert (folder / "decode_b4_t1024.om").read_bytes() == made
    assert build().count("finished before, kept") == 2


def test_work_of_other_flags_is_not_kept(model, built_folder):
    folder, build = built_folder
    assert run(model, "--host-cpu", "x86_64").exit_code == 3
    assert not list(folder.glob("*.om"))
    assert "kept" not in build()


def test_a_damaged_record_is_no_obstacle(model, built_folder):
    folder, _ = built_folder
    record = folder / atc_manifest.WORK_FOLDER / "decode_b4_t1024" / atc_manifest.RECORD_NAME
    record.write_text("[1]")
    shutil.rmtree(folder / "weight")
    assert run(model, "--host-cpu", "aarch64").exit_code == 3
    assert not list(folder.glob("*.om"))
