import json
import re

import numpy as np
import pytest

from qcompile.calibration.self_written import WritingSettings, self_written_texts
from qcompile.calibration.text import CalibrationText, built_in_texts, read_texts, token_rows
from qcompile.errors import QuantError


def rows_of(texts, tokenizer, num_tokens=10**6, row_length=64, source="a file", context=2048):
    return token_rows(
        texts,
        tokenizer,
        num_tokens=num_tokens,
        row_length=row_length,
        vocab_size=512,
        context=context,
        source=source,
    )


def lines(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_plain_text_is_cut_into_rows_that_hold_all_of_it(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox. 你好，世界！\n" * 40, encoding="utf-8")
    rows = rows_of(read_texts(path), tokenizer)
    ids = np.concatenate(rows.rows)
    assert ids.tolist() == tokenizer.encode(path.read_text(encoding="utf-8"))
    assert {len(row) for row in rows.rows[:-1]} == {64}
    assert rows.num_tokens == len(ids)
    assert rows.notes == (f"a file: {len(ids)} tokens, 1000000 were asked for; all of them are used",)


def test_more_text_than_needed_gives_rows_from_all_over_it(tokenizer):
    text = CalibrationText("t", text="\n".join(f"line {i} of the long document" for i in range(3000)))
    rows = rows_of([text], tokenizer, num_tokens=640)
    assert rows.num_tokens == 640
    assert rows.notes == ()
    decoded = [tokenizer.decode(row.tolist()) for row in rows.rows]
    numbers = [int(found.group(1)) for part in decoded if (found := re.search(r"(\d+) of the", part))]
    assert numbers[0] == 0
    assert max(numbers) > 2500
    assert sum(1000 < n < 2000 for n in numbers) >= 2


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 1000])
def test_never_more_tokens_than_asked_for(tokenizer, num_tokens):
    texts = [CalibrationText("t", text="some words here " * n) for n in (3, 50, 7, 90, 1, 40)]
    everything = rows_of(texts, tokenizer).num_tokens
    assert rows_of(texts, tokenizer, num_tokens=num_tokens).num_tokens == min(num_tokens, everything)


def test_prompts_and_conversations_go_through_the_chat_template(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "Hi"},
        {"prompt": "Hi", "answer": "Hello"},
        {"messages": messages},
        {"text": "Hi"},
        '"Hi"',
        {"ids": [5, 6, 7]},
        "",
    )
    rows = rows_of(read_texts(path), tokenizer, row_length=256)
    rendered = [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows.rows]
    assert rendered[0].endswith("<|im_start|>assistant\n")
    assert "<|im_start|>user\nHi<|im_end|>" in rendered[0]
    assert rendered[1] == rendered[2]
    assert "Hello<|im_end|>" in rendered[1]
    assert not rendered[1].endswith("<|im_start|>assistant\n")
    assert rendered[3] == rendered[4] == "Hi"
    assert rows.rows[5].tolist() == [5, 6, 7]


def test_a_long_conversation_is_cut_at_the_context_and_counted(tokenizer):
    long = CalibrationText("t", messages=({"role": "user", "content": "word " * 500},))
    rows = rows_of([long, CalibrationText("t", text="Hi")], tokenizer, row_length=600, context=100)
    assert len(rows.rows[0]) == 100
    assert rows.notes[0] == "1 conversations longer than the context of 100 tokens were cut there"
    assert len(rows_of([long], tokenizer, row_length=300).rows) > 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "file is empty"),
        (b" \n\n", "file is empty"),
        (b"abc\xff", r"not UTF-8: byte 0xff at offset 3"),
    ],
)
def test_files_that_hold_no_text_are_refused(tmp_path, content, reason):
    path = tmp_path / "c.txt"
    path.write_bytes(content)
    with pytest.raises(QuantError, match=reason):
        read_texts(path)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", r"c.jsonl:2: not JSON"),
        ("[" * 100_000, r"c.jsonl:2: not JSON"),
        ({"question": "x"}, r"c.jsonl:2: an object with .* is wanted, got question"),
        ([1, 2], r"c.jsonl:2: a text or an object .* got list"),
        ({"text": 5}, r'c.jsonl:2: "text" is not a string'),
        ({"messages": []}, r'c.jsonl:2: "messages" is not a list of messages, one at least'),
        ({"ids": [1, "2"]}, r'c.jsonl:2: "ids" is not a list of token numbers, one at least'),
        ({"ids": [True]}, r'c.jsonl:2: "ids" is not a list of token numbers'),
    ],
)
def test_lines_that_are_no_document_are_named(tmp_path, record, reason):
    path = lines(tmp_path / "c.jsonl", {"text": "fine"}, record)
    with pytest.raises(QuantError, match=reason):
        read_texts(path)


def test_the_ending_counts_in_any_case_and_json_is_refused(tmp_path):
    path = lines(tmp_path / "c.JSONL", {"text": "one"}, {"text": "two"})
    assert [document.text for document in read_texts(path)] == ["one", "two"]
    with pytest.raises(QuantError, match=r"c.json: .json is not read; write one document a line and name it .jsonl"):
        read_texts(path.rename(tmp_path / "c.json"))


def test_texts_that_cannot_be_tokenized_are_named(tokenizer, tmp_path):
    with pytest.raises(QuantError, match=r"missing.txt: cannot be read: No such file"):
        read_texts(tmp_path / "missing.txt")
    with pytest.raises(QuantError, match="f:3: token 512 is not of the model, which has 0 to 511"):
        rows_of([CalibrationText("f:3", ids=(512,))], tokenizer)
    with pytest.raises(QuantError, match="f:4: message 0"):
        rows_of([CalibrationText("f:4", messages=({"content": "x"},))], tokenizer)
    with pytest.raises(QuantError, match="not one token"):
        rows_of([CalibrationText("f:5", text="")], tokenizer)


def test_the_built_in_texts_are_of_four_kinds_and_need_no_apology(tokenizer):
    texts = built_in_texts()
    assert len(texts) == 40
    assert sum(t.messages is not None for t in texts) == 10
    assert sum(any("一" <= c <= "鿿" for c in t.text or "") for t in texts) >= 10
    assert sum("def " in (t.text or "") or "return" in (t.text or "") for t in texts) >= 5
    assert rows_of(texts, tokenizer, source="builtin").notes == ()


def test_the_model_writes_its_own_texts_once(directories, tmp_path):
    settings = WritingSettings(num_tokens=200, max_new_tokens=12, batch_size=4)
    progress = []
    texts = self_written_texts(
        directories["fused"], settings=settings, cache=tmp_path, say=lambda *step: progress.append(step)
    )
    assert progress
    assert sum(len(t.ids) for t in texts) >= 200
    assert all(0 <= i < 512 for t in texts for i in t.ids)
    kept = list(tmp_path.iterdir())
    assert len(kept) == 1
    again = self_written_texts(directories["fused"], settings=settings, cache=tmp_path, say=lambda *s: 1 / 0)
    assert again == texts
    kept[0].write_text("[[1, ")
    assert self_written_texts(directories["fused"], settings=settings, cache=tmp_path) == texts


def test_an_answer_is_asked_for_and_not_repeated(directories, tmp_path, tokenizer):
    conversation = CalibrationText(
        "c", messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "secret answer"})
    )
    settings = WritingSettings(num_tokens=1, max_new_tokens=4, batch_size=1)
    text = self_written_texts(directories["fused"], [conversation], settings, cache=tmp_path)[0]
    decoded = tokenizer.decode(text.ids, skip_special_tokens=False)
    assert "Hi<|im_end|>" in decoded
    assert "secret" not in decoded
