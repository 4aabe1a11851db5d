import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from qcompile.cli.main import cli
from tests.optimized import export_tiny, optimize_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quality")
    source = export_tiny(directory)
    optimize_tiny(source, directory / "int8", "fuse", "int8")
    return source, directory / "int8"


def run(*arguments):
    return CliRunner().invoke(cli, ["quality", *(str(a) for a in arguments)])


def test_tables(models):
    result = run(*models, "--tokens", 100, "--greedy", 4)
    assert result.exit_code == 0, result.output
    for word in ("ppl A", "mean KL", "top-1", "english", "chinese", "all", "first divergence: layer 0"):
        assert word in result.stdout


def test_json(models):
    record = json.loads(run(*models, "--tokens", 100, "--greedy", 4, "--json").stdout)
    assert record["overall"]["num_tokens"] == 100
    assert set(record["groups"]) == {"english", "chinese", "code", "arithmetic"}
    assert sum(g["num_tokens"] for g in record["groups"].values()) == 100
    assert len(record["layers"]["blocks"]) == 4
    assert record["greedy"]["mean_same"] <= 4
    assert record["text"]["source"] == "built-in"


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_page_and_picture(models, tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": "<script>alert(1)</script> " * 8, "group": "<b>&"}), encoding="utf-8")
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    assert run(*models, "--data", data, "--html", page, "--greedy", 0).exit_code == 0
    text = page.read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(text)
    assert not [t for t, _ in tags.seen if t == "script"]
    assert not [a for _, a in tags.seen for v in (a.get("src"), a.get("href")) if v]
    assert "&lt;b&gt;&amp;" in text or "mean KL" in text
    assert sum(t == "svg" for t, _ in tags.seen) >= 2
    assert run(*models, "--tokens", 50, "--chart", picture, "--greedy", 0, "--no-layers").exit_code == 0
    root = ET.fromstring(picture.read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "5000"], "context 5000: the models hold at most 2048"),
        (["--context", "10", "--stride", "11"], "wanted 2 <= context and 1 <= stride <= context"),
        (["--data", "absent.txt"], "absent.txt: cannot be read"),
        (["--prompts", "absent.txt"], "absent.txt: cannot be read"),
        (["--prompts", "p.txt", "--greedy", "0"], "p.txt: prompts are for greedy answers, which --greedy 0 leaves out"),
        (
            ["--html", "no/such/place.html"],
            "no/such/place.html: cannot be written: there is no folder no/such; make it first",
        ),
        (["--chart", "chart.png"], "chart.png: wanted a name that ends in .html or .svg"),
    ],
)
def test_bad_input_is_one_line(models, arguments, message):
    result = run(*models, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--context", "1"], ["--greedy", "-1"], ["--chunk", "0"]])
def test_usage_errors(models, arguments):
    assert run(*models, *arguments).exit_code == 2


def test_a_model_that_is_not_there(models, tmp_path):
    result = run(models[0], tmp_path / "nothing")
    assert result.exit_code == 1
    assert "nothing: no such file or directory" in result.stderr
