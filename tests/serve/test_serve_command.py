"""`qcompile serve` as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from qcompile.cli.main import cli
from qcompile.runtime.manifest import Manifest, check_file

BODY: dict[str, Any] = {
    "model": "m",
    "prompt": "Hello",
    "max_tokens": 300,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


@contextmanager
def process(model: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [
        sys.executable,
        "-m",
        "qcompile.cli.main",
        "serve",
        str(model),
        "--port",
        "0",
        "--json",
        "--threads",
        "1",
    ]
    started = subprocess.Popen(
        [*command, "--model-name", "m", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line, started.stderr.read() if started.stderr else ""
        yield started, json.loads(line)["url"]
    finally:
        started.kill()
        started.communicate()


def test_sigterm_finishes_the_answer_and_exits_with_zero(model: Path) -> None:
    with process(model) as (started, url), httpx.Client(trust_env=False, timeout=30) as client:
        with client.stream("POST", f"{url}/completions", json=BODY) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert started.wait(20) == 0


def test_kill_under_load_and_start_again(model: Path) -> None:
    with (
        process(model) as (started, url),
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", f"{url}/completions", json=BODY) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        started.kill()
        with pytest.raises(httpx.TransportError):
            list(lines)
    manifest = Manifest.load(model)
    for entry in (*manifest.files, *(graph.file for graph in manifest.graphs)):
        check_file(model, entry)
    with process(model) as (_, url), httpx.Client(trust_env=False, timeout=30) as client:
        assert client.post(f"{url}/completions", json={**BODY, "stream": False}).status_code == 200


def test_the_token_comes_from_file_or_environment(model: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("from-file\n", encoding="utf-8")
    for options, token in ((("--api-key-file", str(key)), "from-file"), ((), "from-env")):
        with process(model, "--host", "0.0.0.0", *options, QCOMPILE_API_KEY="from-env") as (_, url):
            address = url.replace("0.0.0.0", "127.0.0.1") + "/models"
            with httpx.Client(trust_env=False) as client:
                assert client.get(address).status_code == 401
                assert client.get(address, headers={"authorization": f"Bearer {token}"}).status_code == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "no token is set"),
        (("--host", "::"), "no token is set"),
        (("--host", "203.0.113.7"), "no token is set"),
        (("--api-key-file", "no-such-file"), "no-such-file"),
    ],
)
def test_one_line_says_why_it_does_not_start(model: Path, options: tuple[str, ...], words: str) -> None:
    result = CliRunner(env={"QCOMPILE_API_KEY": ""}).invoke(cli, ["serve", str(model), "--port", "0", *options])
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_empty_name_is_refused(model: Path) -> None:
    result = CliRunner().invoke(cli, ["serve", str(model), "--port", "0", "--model-name", ""])
    assert result.exit_code == 2
    assert "--model-name is empty" in result.stderr


def test_a_taken_port_and_a_missing_model(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli, ["serve", str(model), "--port", port])
        assert (result.exit_code, "choose another --port" in result.stderr) == (1, True)
    result = CliRunner().invoke(cli, ["serve", str(tmp_path), "--port", "0"])
    assert (result.exit_code, "qcompile.json" in result.stderr) == (1, True)
