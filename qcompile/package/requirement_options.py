"""Lines of requirements.txt that name no version: options of pip, files and addresses.

pip takes most of them, so each is said for what it is. Whether the judge hands the file to pip as it stands is not known,
and none of them is of use there: it installs offline, from `dependencies/`.
"""

import re

from qcompile.package.check_layout import DEPENDENCIES, REQUIREMENTS
from qcompile.package.findings import PIP, Finding

_OPTION = re.compile(r"(?P<name>--[A-Za-z][\w-]*|-[A-Za-z])")
_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2")
_SOURCES = frozenset({"-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--trusted-host", "--no-index"})
_CHOICES = frozenset({"--pre", "--prefer-binary", "--only-binary", "--no-binary", "--require-hashes", "--use-feature"})


def line_finding(where: str, line: str) -> Finding:
    """Return what is wrong with a line that is no requirement, and the cure.

    Args:
        where: File and number of the line.
        line: Its text, without comment.
    """
    shown = f"'{line[:80]}'"
    option = _OPTION.match(line)
    if option is not None:
        return _option_finding(where, shown, option["name"])
    behind = re.search(r"\s(--[A-Za-z][\w-]*)", line)
    if behind is not None:
        message = f"{shown} has {behind[1]} behind the version, which not every pip takes"
        return Finding(where, message, f"take {behind[1]} out", PIP)
    if "/" in line or "\\" in line or line.lower().endswith(_ARCHIVES):
        cure = f"write name==VERSION and put its wheel into {DEPENDENCIES}/"
        return Finding(where, f"{shown} names a place, not a version", cure, PIP)
    return Finding(where, f"{shown} is no requirement", "write name==version", PIP)


def _option_finding(where: str, shown: str, name: str) -> Finding:
    if name in {"-c", "--constraint"}:
        message = f"{shown} limits versions and installs nothing; this check does not follow it"
        return Finding(where, message, f"write the versions into {REQUIREMENTS} itself, and take the line out")
    if name in {"-e", "--editable"}:
        message = f"{shown} installs from a source folder, and building it takes packages of the network"
        cure = f"build its wheel, put that into {DEPENDENCIES}/ and write name==version"
        return Finding(where, message, cure, PIP)
    if name in _SOURCES:
        message = f"{shown} says where to look, and the judge looks in {DEPENDENCIES}/ alone"
        return Finding(where, message, "take the line out")
    if name in _CHOICES:
        return Finding(where, f"{shown} is an option of pip, which the judge calls with its own", "take the line out")
    return Finding(where, f"{shown}: pip takes no {name} in a requirements file", "take the line out", PIP)
