"""The reference text's own rules, without network: packages are read as archives, prose is told from tables."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest

from benchmarks import reference_text
from benchmarks.reference_text import Prose, ar_members, is_prose, pieces, prose_paragraphs, text_of

ENGLISH = (
    "This is one sentence of a book that goes on for a good while, and here it ends\nafter a line break, as books do.\n"
)


def deb(member, text):
    """A Debian package with one gzipped text."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        content = gzip.compress(text.encode())
        entry = tarfile.TarInfo(f"./{member}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    parts = [("debian-binary", b"2.0\n"), ("data.tar.xz", data.getvalue())]
    packed = b"!<arch>\n"
    for name, content in parts:
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        packed += b"\n" * (len(content) % 2)
    return packed


def test_a_text_comes_out_of_a_package():
    package = deb("usr/share/a.txt.gz", "你好\n")
    assert [name for name, _ in ar_members(package)] == ["debian-binary", "data.tar.xz"]
    assert text_of(package, "usr/share/a.txt.gz") == "你好\n"
    with pytest.raises(ValueError, match="not a Debian package"):
        text_of(b"PK\3\4", "a")


def test_line_breaks_are_undone():
    assert prose_paragraphs(ENGLISH, "english") == [ENGLISH.replace("\n", " ").strip()]
    chinese = "这是一本讲系统管理的书，它的句子在印刷的时候被断\n成两行，拼起来以后应该没有空格。"
    assert prose_paragraphs(f"{chinese}\n\n表 1.1. 目录\n", "chinese") == [chinese.replace("\n", "")]


@pytest.mark.parametrize("text", ["1.1. Contents", "$ ls -l /usr", "| a | b |", "表 1.1. 重要目录的用途列表"])
def test_tables_and_commands_are_not_prose(text):
    assert not is_prose(text, "english")
    assert not is_prose(text, "chinese")


def test_pieces_stop_at_the_share():
    prose = Prose("english", "p", "1", "", "m", 1000)
    documents = pieces(["x" * 300] * 10, prose)
    assert sum(len(d["text"].replace("\n", "")) for d in documents) == 900
    with pytest.raises(ValueError, match="only 300 characters"):
        pieces(["x" * 300], prose)


def test_the_whole_text_is_the_same_every_time(tmp_path, monkeypatch, capsys):
    shares = []
    for prose in reference_text.PROSE:
        sentence = ENGLISH if prose.group == "english" else "这是一本讲系统管理的书，它有很多很多很多很多句子。\n"
        package = deb(prose.member, (sentence + "\n") * 40)
        (tmp_path / f"{prose.package}_{prose.version}_all.deb").write_bytes(package)
        shares.append(prose._replace(sha256=hashlib.sha256(package).hexdigest(), characters=900))
    monkeypatch.setattr(reference_text, "PROSE", tuple(shares))
    texts = []
    for name in ("a.jsonl", "b.jsonl"):
        monkeypatch.setattr("sys.argv", ["reference_text", str(tmp_path / name), "--packages", str(tmp_path)])
        assert reference_text.main() == 0
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]
    groups = {json.loads(line)["group"] for line in texts[0].decode().splitlines()}
    assert groups == {"code", "english", "chinese"}
    assert hashlib.sha256(texts[0]).hexdigest() in capsys.readouterr().out
    record = json.loads((tmp_path / "a.sources.json").read_text(encoding="utf-8"))
    assert len(record["sources"]) == len(reference_text.MODULES) + 2


def test_another_package_is_refused(tmp_path, monkeypatch, capsys):
    prose = reference_text.PROSE[0]
    (tmp_path / f"{prose.package}_{prose.version}_all.deb").write_bytes(deb(prose.member, ENGLISH))
    monkeypatch.setattr("sys.argv", ["reference_text", str(tmp_path / "a.jsonl"), "--packages", str(tmp_path)])
    assert reference_text.main() == 1
    assert "wanted 9f31d3a1" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_calibration_shares_nothing_with_the_reference():
    assert not set(reference_text.MODULES) & set(reference_text.CALIBRATION_MODULES)
    packages = [{p.package for p in books} for books in (reference_text.PROSE, reference_text.CALIBRATION_PROSE)]
    assert not packages[0] & packages[1]
    assert {p.group for p in reference_text.CALIBRATION_PROSE} == {"english", "chinese"}
