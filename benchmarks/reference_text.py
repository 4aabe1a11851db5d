"""Assemble the reference text that quantization is measured on: Python, English and Chinese, some 45,000 tokens.

    python benchmarks/reference_text.py out/reference.jsonl
    qcompile quality A B --data out/reference.jsonl --tokens 20000
    python benchmarks/reference_text.py --calibration out/calibration.jsonl       33,000 tokens that share nothing with it

Code is the source of standard library modules, by name, of the interpreter that runs this. Prose is the Debian Reference,
English and Chinese, out of two Debian packages of a pinned version and sha256, fetched with `apt-get download` (nothing is
installed or run) or taken from --packages DIR. One document per module and per chapter of prose; beside the text a
.sources.json says what it was made of. The text's sha256 is printed: two machines with the same Python patch release get
the same.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MODULES = (
    "argparse", "bisect", "calendar", "collections", "contextlib", "copy", "csv", "dataclasses", "fractions",
    "functools", "heapq", "json.decoder", "queue", "random", "sched", "shlex", "statistics", "string", "textwrap",
)  # fmt: skip
CALIBRATION_MODULES = (
    "ast", "asyncio.queues", "bdb", "cmd", "configparser", "difflib", "enum", "glob", "hmac", "ipaddress", "inspect",
    "numbers", "pathlib", "tempfile", "types", "weakref",
)  # fmt: skip
MODULE_CHARACTERS = 4_000
_MAX_MEMBER_BYTES = 64 << 20


class Prose(NamedTuple):
    """A Debian package and the text in it."""

    group: str
    package: str
    version: str
    sha256: str
    member: str
    characters: int


PROSE = (
    Prose(
        "english",
        "debian-reference-en",
        "2.100",
        "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
        "usr/share/debian-reference/debian-reference.en.txt.gz",
        60_000,
    ),
    Prose(
        "chinese",
        "debian-reference-zh-cn",
        "2.100",
        "6d2d8d9a646397e28b04cdff23d2e4374101ebf9be348e35961af62c8a2d0977",
        "usr/share/debian-reference/debian-reference.zh-cn.txt.gz",
        24_000,
    ),
)
CALIBRATION_PROSE = (
    Prose(
        "english",
        "debian-faq",
        "11.1",
        "427426e0cfa6888622fc1d72631071cb4b5a1f86ccde722e7820bcef284de5d0",
        "usr/share/doc/debian/FAQ/debian-faq.en.txt.gz",
        45_000,
    ),
    Prose(
        "chinese",
        "maint-guide-zh-cn",
        "1.2.53",
        "d605b60a034f63857bc44205aed5ad7ba6e17d0d2b1ba5e79179b4e7ec4ee4bc",
        "usr/share/doc/maint-guide-zh-cn/maint-guide.zh-cn.txt.gz",
        16_000,
    ),
)
_PIECE_CHARACTERS = 6_000
_CJK = re.compile(r"[\u3400-\u9fff]")


def main() -> int:
    """Write the text and say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("out/reference.jsonl"))
    parser.add_argument("--packages", type=Path, help="Directory with the .deb files, instead of apt-get download.")
    parser.add_argument("--calibration", action="store_true", help="Other modules and other books, to calibrate on.")
    arguments = parser.parse_args()
    modules, books = (CALIBRATION_MODULES, CALIBRATION_PROSE) if arguments.calibration else (MODULES, PROSE)
    documents, sources = [], []
    for name in modules:
        document, source = module_document(name)
        documents.append(document)
        sources.append(source)
    try:
        with tempfile.TemporaryDirectory() as directory:
            for prose in books:
                content = package_bytes(prose, arguments.packages, Path(directory))
                paragraphs = prose_paragraphs(text_of(content, prose.member), prose.group)
                documents += pieces(paragraphs, prose)
                sources.append({"group": prose.group, "package": prose.package, "version": prose.version})
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        print(f"reference_text: {error}", file=sys.stderr)
        return 1
    text = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    record = {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "characters": len(text),
        "documents": len(documents),
        "python": platform.python_version(),
        "sources": sources,
    }
    write(arguments.output, text)
    write(arguments.output.with_suffix(".sources.json"), json.dumps(record, indent=1) + "\n")
    print(f"{arguments.output}: {len(documents)} documents, {len(text)} characters, sha256 {record['sha256']}")
    return 0


def module_document(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the beginning of a standard library module, cut at a line, and its origin."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"this Python has no source of the module {name}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    text = source[:MODULE_CHARACTERS].rpartition("\n")[0] + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"group": "code", "text": text}, {"group": "code", "module": name, "sha256": digest}


def package_bytes(prose: Prose, packages: Path | None, directory: Path) -> bytes:
    """Return a .deb whose sha256 is the pinned one.

    Raises:
        ValueError: It is not there, or it is another file.
    """
    if packages is None:
        apt = shutil.which("apt-get")
        if apt is None:
            raise ValueError(f"no apt-get here; download {prose.package} {prose.version} and give --packages DIR")
        command = [apt, "-qq", "-o", "APT::Sandbox::User=root", "download", f"{prose.package}={prose.version}"]
        subprocess.run(command, cwd=directory, check=True, stdout=sys.stderr)
        packages = directory
    path = packages / f"{prose.package}_{prose.version}_all.deb"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != prose.sha256:
        raise ValueError(f"{path}: sha256 {digest}, wanted {prose.sha256}")
    return content


def text_of(deb: bytes, member: str) -> str:
    """Return a gzipped text out of a Debian package (an ar archive with a data.tar inside)."""
    for name, content in ar_members(deb):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                stream = archive.extractfile(f"./{member}")
                if stream is None:
                    break
                with gzip.open(stream) as unpacked:
                    return unpacked.read(_MAX_MEMBER_BYTES).decode("utf-8")
    raise ValueError(f"the package holds no {member}")


def ar_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the members of an ar archive."""
    if archive[:8] != b"!<arch>\n":
        raise ValueError("not a Debian package: no ar archive")
    offset = 8
    while offset + 60 <= len(archive):
        header = archive[offset : offset + 60]
        size = int(header[48:58])
        yield header[:16].decode("ascii").rstrip(" /"), archive[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2


def prose_paragraphs(text: str, group: str) -> list[str]:
    """Return the paragraphs that are running text, their line breaks undone; lists, tables and commands are left out."""
    found = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.split("\n")]
        joined = lines[0]
        for line in lines[1:]:
            between_cjk = bool(_CJK.match(line[:1])) or bool(joined and _CJK.match(joined[-1:]))
            joined += line if between_cjk else f" {line}"
        if is_prose(joined, group):
            found.append(joined)
    return found


def is_prose(paragraph: str, group: str) -> bool:
    """Whether a paragraph is sentences of its language."""
    if group == "chinese":
        return len(_CJK.findall(paragraph)) >= max(20, 0.5 * len(paragraph)) and "。" in paragraph
    words = re.findall(r"[A-Za-z]+", paragraph)
    return len(words) >= 20 and paragraph.rstrip().endswith((".", "!", "?", ":")) and "│" not in paragraph


def pieces(paragraphs: list[str], prose: Prose) -> list[dict[str, str]]:
    """Return documents of some 6,000 characters, up to the package's share."""
    documents, current, total = [], "", 0
    for paragraph in paragraphs:
        if total + len(paragraph) > prose.characters:
            break
        current += paragraph + "\n\n"
        total += len(paragraph)
        if len(current) >= _PIECE_CHARACTERS:
            documents.append({"group": prose.group, "text": current})
            current = ""
    if current:
        documents.append({"group": prose.group, "text": current})
    if total < prose.characters // 2:
        raise ValueError(f"{prose.package}: only {total} characters of prose found")
    return documents


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
