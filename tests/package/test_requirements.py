"""requirements.txt as pip reads it: files of `-r`, hashes, lines that go on; what pip would refuse is found."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompile.package.findings import PIP
from tests.package.test_mistakes import checked, expect


def requirements(*lines: str, **others: str) -> Callable[[Path], None]:
    """Write requirements.txt, HASH in it being that of the wheel, and files beside it."""

    def spoil(root: Path) -> None:
        wheels = sorted((root / "dependencies").glob("*.whl"))
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest() if wheels else ""
        (root / "requirements.txt").write_text("".join(f"{line}\n" for line in lines).replace("HASH", digest))
        for name, text in others.items():
            (root / f"{name}.txt").write_text(text)

    return spoil


MISTAKES = [
    ("a file that is not there", requirements("-r gone.txt"), "requirements.txt:1", "list its lines here"),
    ("a file that is elsewhere", requirements("-r ../outside.txt"), "requirements.txt:1", "list its lines here"),
    ("a file in itself", requirements("-r requirements.txt"), "requirements.txt:1", "list its lines here"),
    (
        "a wrong line in another file",
        requirements("-r own.txt", own="tinydep==1.0\n==3\n"),
        "own.txt:2",
        "name==version",
    ),
    (
        "another wheel's hash",
        requirements("tinydep==1.0 --hash=sha256:" + "0" * 64),
        "requirements.txt:1",
        "take the --hash out",
    ),
    (
        "one hash of two",
        requirements("tinydep==1.0 --hash=sha256:HASH", "tinydep"),
        "requirements.txt:2",
        "take the --hash",
    ),
]


OPTIONS = [  # line, what the judge would say, a word of the message, the cure
    ("-c constraints.txt", "", "limits versions and installs nothing", "write the versions into requirements.txt"),
    ("--constraint=constraints.txt", "", "limits versions", "take the line out"),
    ("-e ./src", PIP, "installs from a source folder", "build its wheel, put that into dependencies/"),
    ("--editable .", PIP, "installs from a source folder", "build its wheel"),
    ("--index-url https://example.org/simple", "", "the judge looks in dependencies/ alone", "take the line out"),
    ("-f dependencies", "", "the judge looks in dependencies/ alone", "take the line out"),
    ("--no-index", "", "the judge looks in dependencies/ alone", "take the line out"),
    ("--only-binary :all:", "", "is an option of pip", "take the line out"),
    ("--platform linux", PIP, "pip takes no --platform in a requirements file", "take the line out"),
    ("tinydep==1.0 --config-settings=a=b", PIP, "has --config-settings behind", "take --config-settings out"),
    ("./dependencies/tinydep-1.0-py3-none-any.whl", PIP, "names a place, not a version", "write name==VERSION"),
    ("https://example.org/tinydep-1.0-py3-none-any.whl", PIP, "names a place, not a version", "write name==VERSION"),
]


@pytest.mark.parametrize(("line", "judge", "message", "cure"), OPTIONS, ids=[row[0] for row in OPTIONS])
def test_an_option_of_pip_is_said_for_what_it_is(
    tmp_path: Path, line: str, judge: str, message: str, cure: str
) -> None:
    spoil = requirements("tinydep==1.0", line, constraints="tinydep==1.0\n")
    (found,) = [f for f in checked(tmp_path, spoil, is_static=True).findings if f.file == "requirements.txt:2"]
    assert found.judge == judge
    assert message in found.message
    assert f"'{line}'" in found.message
    assert cure in found.cure


@pytest.mark.parametrize(
    "spoil",
    [
        requirements("-r own.txt", own="tinydep==1.0\n"),
        requirements("--requirement=own.txt  # those of ours", own="-rother.txt\n", other="tinydep==1.0\n"),
        requirements("tinydep==1.0 \\", "    --hash=sha256:" + "0" * 64 + " \\", "    --hash=sha256:HASH"),
        requirements("# one\\", "tinydep==1.0 # two"),
    ],
)
def test_what_pip_reads_is_read(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    assert checked(tmp_path, spoil, is_static=True).findings == []


@pytest.mark.parametrize(("spoil", "file", "cure"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_what_pip_would_refuse_is_found(tmp_path: Path, spoil: Callable[[Path], object], file: str, cure: str) -> None:
    expect(checked(tmp_path, spoil, is_static=True), file, PIP, cure)
