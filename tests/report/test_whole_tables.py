"""Tables keep their numbers where there is no wide terminal."""

import io

import pytest
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qcompile.report.whole_tables import print_whole

NUMBERS = [str(100_000 + i) for i in range(12)]
REMARK = " ".join(f"word{i}" for i in range(30))


def printed(width: int, *parts: Table | Text) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_whole(console, Group(*parts))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def numbers_and_words() -> Table:
    table = Table(box=None)
    table.add_column("name", no_wrap=True)
    for number in NUMBERS:
        table.add_column(f"n{number}", justify="right")
    table.add_column("remarks")
    table.add_row("a" * 30, *NUMBERS, REMARK)
    return table


@pytest.mark.parametrize("width", [20, 80, 400])
def test_no_number_is_cut_and_no_word_is_lost(width: int) -> None:
    lines = printed(width, numbers_and_words())
    assert lines[1].split()[:13] == ["a" * 30, *NUMBERS]
    assert [word for word in " ".join(lines).split() if word.startswith("word")] == REMARK.split()


def test_words_are_folded_to_the_width_there_is() -> None:
    assert len(printed(400, numbers_and_words())) == 2
    assert max(map(len, printed(250, numbers_and_words()))) <= 250


def test_a_line_is_not_broken() -> None:
    assert printed(30, Text(f"note: {REMARK}")) == [f"note: {REMARK}"]


def test_a_table_that_fits_and_a_text_are_as_rich_prints_them() -> None:
    table = Table(box=None)
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_row("nodes", "12")
    assert [line.rstrip() for line in printed(30, table, Text("so it is"))] == [
        " what   count",
        " nodes     12",
        "so it is",
    ]
