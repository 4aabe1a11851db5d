"""ModelArts' packages: configuration by the schema, the service with every kind of body, the engine's server."""

import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from models.reasoner import data
from qcompile.cli.main import cli
from qcompile.package import check_modelarts, modelarts
from qcompile.package.check_contest import CheckRequest
from qcompile.package.check_engine import check_engine_files
from qcompile.package.check_modelarts import kind_of
from qcompile.package.clean_room import open_room
from qcompile.package.findings import Report
from qcompile.package.modelarts_config import check_config, engine_config, in_order, preset_config
from qcompile.package.service.answering import Answering
from qcompile.package.service.bodies import read_body
from qcompile.package.service.server import Server
from qcompile.package.wheels import read_wheel
from qcompile.runtime import RequestError
from tests.package.made_packages import make_wheel

WEIGHTS = Path(data.__file__).parent / "weights"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reasoner") / "portable"
    assert CliRunner().invoke(cli, ["export", str(WEIGHTS), "-o", str(path)]).exit_code == 0
    return path


@pytest.fixture
def packed(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    (tmp_path / "wheels").mkdir()
    wheel = read_wheel(make_wheel(tmp_path / "wheels", "tinydep"))
    monkeypatch.setattr(modelarts, "collect_wheels", lambda *_, **__: [wheel])

    def pack(*arguments: str) -> Path:
        words = ["package", str(exported), "-o", str(tmp_path / "out"), *arguments]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        return tmp_path / "out"

    return pack


# config.json


def config(tmp_path: Path) -> dict[str, Any]:
    return preset_config("PyTorch", "pytorch_2.1", [read_wheel(make_wheel(tmp_path, "tinydep"))])


def test_what_is_made_keeps_the_rules(tmp_path: Path) -> None:
    assert check_config(config(tmp_path), "config.json") == []
    assert check_config(engine_config(None), "config.json") == []
    assert check_config(engine_config("swr.region.example/group/image:v1"), "config.json") == []


@pytest.mark.parametrize(
    "change",
    [
        {"model_algorithm": "1st"},
        {"model_algorithm": "a" * 37},
        {"model_algorithm": "千问"},
        {"model_algorithm": "a<b"},
        {"model_type": "ONNX"},
        {"runtime": "has space"},
        {"metrics": {"f1": "0.9"}},
        {"apis": [{"url": "/v1", "method": "post", "request": {}, "response": {}}]},
        {"dependencies": [{"installer": "conda", "packages": [{"package_name": "a"}]}]},
        {"dependencies": [{"installer": "pip", "packages": [{"package_name": "a", "package_version": "1"}]}]},
        {"dependencies": [{"installer": "pip", "packages": [{"package_name": "a", "restraint": "EXACT"}]}]},
        {"dependencies": [{"installer": "pip", "packages": [{"package_name": "a>=1"}]}]},
        {"health": {"url": "/health", "protocol": "http", "timeout_seconds": "1"}},
        {"swr_location": "swr.example/x"},
        {"colour": "blue"},
    ],
    ids=str,
)
def test_a_broken_rule_is_named_with_a_cure(tmp_path: Path, change: dict[str, Any]) -> None:
    findings = check_config({**config(tmp_path), **change}, "model/config.json")
    assert findings
    assert all(finding.cure and finding.file == "model/config.json" for finding in findings)


@pytest.mark.parametrize("change", [{"runtime": "x"}, {"health": {"url": "/health"}}, {"dependencies": []}])
def test_an_image_has_rules_of_its_own(change: dict[str, Any]) -> None:
    assert check_config({**engine_config(None), **change}, "config.json")
    seconds = {**engine_config(None)["health"], "timeout_seconds": 10}
    assert check_config({**engine_config(None), "health": seconds}, "config.json")


def test_what_others_require_is_installed_first(tmp_path: Path) -> None:
    made = [
        make_wheel(tmp_path, "a", requires=["b"]),
        make_wheel(tmp_path, "b", requires=["c", "a"]),
        make_wheel(tmp_path, "c"),
    ]
    assert [wheel.name for wheel in in_order([read_wheel(path) for path in made])] == ["c", "b", "a"]


# packages


@pytest.mark.parametrize(
    ("engine", "placeholders"), [("PyTorch", ["placeholder.pth"]), ("MindSpore", ["placeholder.ckpt", "tmp.om"])]
)
def test_both_engines_answer_every_kind_of_body(
    packed: Callable[..., Path], engine: str, placeholders: list[str]
) -> None:
    out = packed("--target", "modelarts", "--engine", engine)
    assert kind_of(out) == kind_of(out / "model") == "modelarts"
    assert all((out / "model" / name).is_file() for name in placeholders)
    assert json.loads((out / "model" / "config.json").read_text())["model_type"] == engine
    report = check_modelarts.check_modelarts(CheckRequest(out, is_static=True), "modelarts")
    assert report.findings == []
    with open_room() as room:
        room.use_this_environment()
        (room.folder / "body.json").write_text(json.dumps({"prompt": "What is 2 + 3?", "max_new_tokens": 8}))
        arguments = [str(out / "model"), engine, str(room.folder / "body.json")]
        outcome = room.run(check_modelarts._CHILD, arguments, 120, is_isolated=False)
    answers = [json.loads(text) for text in outcome.answers]
    assert len(answers) == 3, outcome.log
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["usage"]["completion_tokens"] == 8
    assert answers[0]["finish_reason"] == "length"


def test_files_an_engine_insists_on(packed: Callable[..., Path]) -> None:
    out = packed("--target", "modelarts")
    (out / "model" / "placeholder.pth").unlink()
    (out / "model" / "with space.txt").touch()
    (out / "model" / "customize_service.py").rename(out / "model" / "service.py")
    report = check_modelarts.check_modelarts(CheckRequest(out), "modelarts")
    said = "\n".join(str(finding) for finding in report.findings)
    for word in (".pth or .pt", "holds a space", "customize_service.py: missing"):
        assert word in said
    (out / "model" / "config.json").write_text("{")
    report = check_modelarts.check_modelarts(CheckRequest(out, is_static=True), "modelarts")
    assert "not JSON" in str(report.findings[0])


def test_the_engine_folder_and_its_mistakes(packed: Callable[..., Path]) -> None:
    out = packed("--target", "modelarts-engine")
    assert kind_of(out) == "modelarts-engine"
    assert check_engine_files(out) == []
    (out / "requirements.txt").unlink()  # resolving takes its time, and is done
    text = (out / "Dockerfile").read_text()
    for old, new, said in (
        ("-u 1000", "-u 1001", "uid 1000"),
        ("EXPOSE 8080", "EXPOSE 80", "8080"),
        ("USER 1000:100", "USER root", "ends as user root"),
        ('CMD ["sh", "/home/mind/run.sh"]', 'CMD ["bash"]', "run.sh"),
    ):
        assert old in text
        (out / "Dockerfile").write_text(text.replace(old, new))
        assert any(said in finding.message for finding in check_engine_files(out)), said
    for old, new in (
        ("USER 1000:100", "user ma-user:ma-group"),
        ("EXPOSE 8080", "expose 8443 8080/tcp"),
        ("-u 1000", "--uid=1000"),
        ("getent group 100 >/dev/null || groupadd -g 100", "groupadd --gid 100"),
    ):
        assert old in text
        (out / "Dockerfile").write_text(text.replace(old, new))
        assert check_engine_files(out) == [], new
    (out / "Dockerfile").unlink()
    assert check_engine_files(out)


def test_an_output_that_exists_is_left_alone(packed: Callable[..., Path], exported: Path) -> None:
    out = packed("--target", "modelarts")
    result = CliRunner().invoke(cli, ["package", str(exported), "--target", "modelarts", "-o", str(out)])
    assert result.exit_code == 1
    assert "exists; delete it" in result.stderr


# requests


def test_bodies() -> None:
    record = {"prompt": "x", "max_new_tokens": 5, "temperature": 0.5}
    text = json.dumps(record)
    for body in (record, text, text.encode(), {"file": {"request.json": io.BytesIO(text.encode())}}):
        (job,) = read_body(body).jobs
        assert (job.prompt, job.options) == ("x", {"max_new_tokens": 5, "temperature": 0.5})
    several = read_body({"data": {"req_data": [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}]}})
    assert several.is_list
    assert [job.prompt for job in several.jobs] == ["a", ""]


@pytest.mark.parametrize(
    "body",
    [
        None, 3, [], "{", b"\xff", "[1]", {}, {"prompt": ""}, {"prompt": 3}, {"prompt": "a", "messages": []}, {"messages": "x"},
        {"prompt": "a", "max_new_tokens": 0}, {"prompt": "a", "max_new_tokens": True}, {"prompt": "a", "max_new_tokens": "9"},
        {"prompt": "a", "colour": 1}, {"data": {"req_data": []}}, {"data": {"req_data": [7]}}, "x" * (2 << 20), "[" * 100_000,
    ],
    ids=lambda body: str(body)[:30],
)  # fmt: skip
def test_wrong_bodies_are_one_line(body: Any) -> None:
    with pytest.raises(RequestError) as caught:
        read_body(body)
    assert "\n" not in str(caught.value)


def test_a_request_ends_at_its_limit(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "compiled").symlink_to(exported)
    answering = Answering(tmp_path, time_limit_s=0.0)
    while not answering.is_ready:
        time.sleep(0.02)
    answer = answering.answer(answering.read({"prompt": "What is 2 + 3?", "max_new_tokens": 900}))
    assert answer["finish_reason"] == "time"
    assert answer["usage"]["completion_tokens"] <= 2
    late = answering.answer(answering.read({"prompt": "x", "temperature": -1}))
    assert late["error"]["type"] == "invalid_request"


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    answering = Answering(tmp_path)
    answer = answering.answer(answering.read({"prompt": "x"}))
    assert answer["error"]["type"] == "not_ready"
    assert "no qcompile.json" in answer["error"]["message"]


@pytest.fixture
def address(exported: Path, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "compiled").symlink_to(exported)
    server = Server(0, Answering(tmp_path, time_limit_s=5))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.end()
    thread.join()
    server.server_close()


def ask(url: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, data=body), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_the_engines_server(address: str) -> None:
    while ask(f"{address}/health")[0] == 503:
        time.sleep(0.05)
    assert ask(f"{address}/health") == (200, {"status": "OK"})
    status, answer = ask(f"{address}/", b'{"prompt": "What is 2 + 3?", "max_new_tokens": 4}')
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    assert ask(f"{address}/", b"{")[0] == 400
    assert ask(f"{address}/", b"x" * (2 << 20))[0] == 413
    assert ask(f"{address}/nowhere", b"{}")[0] == 404
    assert ask(f"{address}/nowhere")[0] == 404


def test_a_burst_of_clients_loses_none_and_none_waits_past_the_limit(address: str) -> None:
    while ask(f"{address}/health")[0] == 503:
        time.sleep(0.05)

    def answer(number: int) -> tuple[int, float]:
        start = time.monotonic()
        body = {"prompt": f"Tell a story of {number}.", "max_new_tokens": 600, "temperature": 2, "seed": number}
        return ask(f"{address}/", json.dumps(body).encode())[0], time.monotonic() - start

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(answer, range(64)))
    assert {status for status, _ in answers} <= {200, 503}
    assert max(seconds for _, seconds in answers) < 9


def test_a_silent_connection_does_not_hold_up_the_end(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "compiled").symlink_to(exported)
    server = Server(0, Answering(tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1")
        start = time.monotonic()
        server.end()
        thread.join()
        server.server_close()
        assert time.monotonic() - start < 5


def test_a_length_that_is_no_number_is_answered(address: str) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: ²\r\n\r\n".encode("latin-1"))
        assert client.recv(4096).startswith(b"HTTP/1.1 411")


def test_report_counts() -> None:
    report = Report("modelarts")
    assert report.take("a", [])
    assert report.is_ok
    assert report.record()["passed"] == ["a"]
