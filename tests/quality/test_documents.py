import json

import pytest

from qcompile.errors import QualityError
from qcompile.quality.documents import BUILT_IN, Document, built_in_documents, read_documents, tokenize


def test_the_built_in_set_has_four_kinds():
    documents = built_in_documents()
    assert tuple(d.group for d in documents) == BUILT_IN
    assert all(len(d.text) > 1000 or d.group == "chinese" for d in documents)
    chinese = next(d.text for d in documents if d.group == "chinese")
    assert sum("一" <= c <= "鿿" for c in chinese) > 500
    compile(next(d.text for d in documents if d.group == "code"), "code.txt", "exec")


def test_a_text_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffline one\nline two\n", encoding="utf-8")
    assert read_documents(path) == [Document("a.txt", str(path), text="line one\nline two\n")]


def test_jsonl_forms(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps("plain"),
        json.dumps({"text": "t", "group": "g"}),
        json.dumps({"prompt": "p", "answer": "a", "type": "math"}),
        "",
        json.dumps({"messages": [{"role": "user", "content": "hi"}]}),
        json.dumps({"ids": [1, 2, 3]}),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    seen = read_documents(path)
    assert [d.text for d in seen] == ["plain", "t", "p\na", None, None]
    assert [d.group for d in seen] == ["a.jsonl", "g", "math", "a.jsonl", "a.jsonl"]
    assert seen[3].messages == ({"role": "user", "content": "hi"},)
    assert seen[4].ids == (1, 2, 3)
    assert seen[4].where.endswith("a.jsonl:6")
    assert read_documents(path, with_answers=False)[2].text == "p"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"ok \xff\xfe", "not UTF-8: byte 0xff at offset 3"),
        (b'{"text": "a"}\n{"text"', r"a\.jsonl:2: not JSON"),
        (b"[1]", "a string or an object"),
        (b"{}", "no 'text', 'prompt', 'messages' or 'ids'"),
        (b'{"ids": [1, true]}', r"a\.jsonl:1: 'ids' is not a list of token numbers, one at least"),
        (b'{"messages": []}', r"a\.jsonl:1: 'messages' is not a list of messages, one at least"),
        (b'{"text": 5}', r"a\.jsonl:1: 'text' is not a string"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(QualityError, match=message) as seen:
        read_documents(path)
    assert "\n" not in str(seen.value)


def test_the_ending_counts_in_any_case_and_json_is_refused(tmp_path):
    for name in ("a.JSONL", "a.json", "b.Json"):
        (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [document.text for document in read_documents(tmp_path / "a.JSONL")] == ["one", "two"]
    for name in ("a.json", "b.Json"):
        with pytest.raises(
            QualityError, match=f"{name}: .json is not read; write one document a line and name it .jsonl"
        ):
            read_documents(tmp_path / name)


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(QualityError, match="cannot be read"):
            read_documents(path)


def test_ids_beyond_the_vocabulary():
    with pytest.raises(QualityError, match=r"^here: token id 9, the models have 9"):
        tokenize([Document("g", "here", ids=(1, 9))], list, list, 9)


def test_nothing_to_predict():
    with pytest.raises(QualityError, match="less than 2 tokens"):
        tokenize([Document("g", "here", text="x")], lambda text: [1], list, 9)
    assert tokenize([Document("g", "here", text="x")], lambda text: [1], list, 9, minimum=1)[0].ids == (1,)
