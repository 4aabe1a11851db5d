"""The peers' harness without any peer: its arithmetic, its order, and what it says about what fails."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
sys.path.insert(0, str(PEERS))

import protocol  # noqa: E402
import results  # noqa: E402
import setup_peers  # noqa: E402
from measure import Job, Plan, answer_of, measure_all  # noqa: E402
from setup_peers import Environment, Ours, Peer, Prepared, model_bytes, prepare, read_peers, why  # noqa: E402

from tests.quality.numpy_qwen import kl_per_row  # noqa: E402

sys.path.remove(str(PEERS))

JOB = Job("checkpoint", 2, "logits", {"short": [[1, 2]], "long": [[1, 2, 3]], "chat": [[4]]}, [[1, 2, 3], [4, 5]])


def prepared(name, problem=""):
    return Prepared(name, 8, ("python", "engine.py"), f"models/{name}", {}, 1000, problem)


def plan(*names, rounds=2, broken=()):
    peers = tuple(prepared(n, "no wheel" if n in broken else "") for n in names)
    return Plan(JOB, peers, "reference", rounds)


class FakeEngine:
    """Logits that depend on the token; answers that count up."""

    def __init__(self, noise=0.0, pieces=2):
        self.noise, self.pieces = noise, pieces

    def generate(self, prompts, count):
        tokens = list(range(count))
        return protocol.Timing(0.5, 2.0, len(prompts) * (count - 1), tokens)

    def logits(self, ids):
        for start in range(0, len(ids), self.pieces):
            yield np.stack([logits_of(i, self.noise) for i in ids[start : start + self.pieces]])


def logits_of(token, noise):
    rng = np.random.default_rng(token)
    return (rng.standard_normal(50) + noise * rng.standard_normal(50)).astype(np.float32)


def test_quality_is_kl_against_the_reference(tmp_path):
    job = {"texts": [[3, 1, 4, 1, 5], [9, 2]], "logits": str(tmp_path / "reference.f32")}
    assert protocol.write_reference(FakeEngine(pieces=3), job) == {"tokens": 7}
    assert (tmp_path / "reference.f32").stat().st_size == 7 * 50 * 4
    assert protocol.quality(FakeEngine(pieces=1), job) == {"tokens": 7, "mean_kl": 0.0, "p99_kl": 0.0, "top1": 1.0}
    seen = protocol.quality(FakeEngine(noise=0.5), job)
    a, b = (np.stack([logits_of(i, n) for i in (3, 1, 4, 1, 5, 9, 2)]).astype(np.float64) for n in (0.0, 0.5))
    assert seen["mean_kl"] == pytest.approx(kl_per_row(a, b).mean())
    assert seen["p99_kl"] == pytest.approx(np.percentile(kl_per_row(a, b), 99))
    assert seen["top1"] == (a.argmax(1) == b.argmax(1)).mean()


def test_an_engine_that_gives_too_few_rows_is_an_error(tmp_path):
    job = {"texts": [[3, 1, 4]], "logits": str(tmp_path / "reference.f32")}
    protocol.write_reference(FakeEngine(), job)
    engine = FakeEngine()
    engine.logits = lambda ids: iter([logits_of(1, 0.0)[None]])
    with pytest.raises(ValueError, match="1 rows of logits, the reference has 3"):
        protocol.quality(engine, job)


def test_speed():
    prompts = {"short": [[1] * 10] * 4, "long": [[1] * 40], "chat": [[1], [2]]}
    job = {"prompts": prompts, "count": 9, "batch_count": 5, "answer_count": 3}
    assert protocol.speed(FakeEngine(), job) == {
        "short_prefill": 20.0, "short_decode": 4.0, "long_prefill": 80.0, "long_decode": 4.0,
        "batch_prefill": 80.0, "batch_decode": 8.0, "answers": [[0, 1, 2], [0, 1, 2]],
    }  # fmt: skip


def test_the_stopwatch_counts_tokens_after_the_first(monkeypatch):
    times = iter([10.0, 11.0, 14.0])
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: next(times))
    watch = protocol.Stopwatch(3)
    for token in (7, 8, 9):
        watch.step(token)
    assert watch.timing() == protocol.Timing(1.0, 3.0, 6, [7, 8, 9])


def test_peers_take_turns_and_the_first_changes():
    steps = [(task, n, p.name) for task, n, p in plan("reference", "a", "b", rounds=3).steps()]
    assert steps[:4] == [("reference", 0, "reference"), *[("quality", 0, n) for n in ("reference", "a", "b")]]
    assert [name for task, _, name in steps if task == "speed"] == [
        "reference", "a", "b", "a", "b", "reference", "b", "reference", "a",
    ]  # fmt: skip


def test_without_a_reference_there_is_speed_only():
    steps = [task for task, _, _ in plan("reference", "a", broken=("reference",)).steps()]
    assert steps == ["speed", "speed"]


def fake_runner(calls):
    def run(command, job):
        calls.append((job["task"], job["model"]))
        if job["model"].endswith("bad"):
            return {"error": "ended with 1: boom"}
        if job["task"] == "speed":
            figures = dict.fromkeys(("short_prefill", "long_prefill", "short_decode", "long_decode"), 10.0 + len(calls))
            answers = [[1, 2, 3], [4, 5, 6]] if job["model"].endswith("reference") else [[1, 2, 9], [4, 5, 6]]
            return {**figures, "batch_decode": 5.0, "answers": answers, "load_s": 1.0, "peak_rss_bytes": 1 << 20}
        return {"tokens": 5, "mean_kl": 0.25, "p99_kl": 0.5, "top1": 0.75}

    return run


def test_a_run_that_was_stopped_goes_on(tmp_path):
    log, calls = tmp_path / "results.jsonl", []
    everything = measure_all(plan("reference", "a"), log, fake_runner(calls), lambda text: None)
    assert len(calls) == len(everything) == 7
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join(lines[:4]) + '\n{"task": "spe', encoding="utf-8")
    again = measure_all(plan("reference", "a"), log, fake_runner(calls), lambda text: None)
    assert len(calls) == 7 + 3
    assert len(again) == 7
    other = Plan(
        JOB.__class__("other", 2, "logits", JOB.prompts, JOB.texts), plan("reference", "a").peers, "reference", 2
    )
    assert len(measure_all(other, log, fake_runner(calls), lambda text: None)) == 7


def test_the_table_shows_what_was_not_run(tmp_path):
    todo = plan("reference", "a", "bad", "absent", broken=("absent",))
    samples = measure_all(todo, tmp_path / "log", fake_runner([]), lambda text: None)
    rows = results.summarize(todo.peers, samples, "reference")
    by_name = {row["name"]: row for row in rows}
    assert by_name["a"]["same_tokens"] == [2, 3]
    assert by_name["a"]["quality"]["mean_kl"] == 0.25
    assert by_name["a"]["rounds"] == 2
    assert by_name["bad"]["problem"] == "quality: ended with 1: boom; speed: ended with 1: boom"
    assert by_name["absent"]["problem"] == "no wheel"
    machine = {"cpu": "x", "threads": 2, "onnxruntime": "1"}
    table = results.markdown({"machine": machine, "peers": rows, "warning": None})
    assert "- absent not run: no wheel" in table
    assert "- bad not run: quality: ended with 1: boom" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 4


@pytest.mark.parametrize(
    ("stdout", "stderr", "wanted"),
    [
        ('noise\nRESULT {"a": 1}\nlate noise\n', "", {"a": 1}),
        ("", "Traceback\nImportError: no module\n\n", {"error": "ended with 3: ImportError: no module"}),
        ("", "", {"error": "ended with 3: no message"}),
    ],
)
def test_answers(stdout, stderr, wanted):
    assert answer_of(3, stdout, stderr) == wanted


def test_what_peers_toml_says_can_be_done():
    peers = read_peers(PEERS / "peers.toml")
    assert {p.engine for p in peers.values()} == {"transformers", "genai", "openvino", "optimum", "llama"}
    places = {k: k for k in ("python", "bin", "checkpoint", "model", "work", "here")}
    for peer in peers.values():
        assert (PEERS / f"engine_{peer.engine}.py").is_file()
        for step in peer.convert:
            assert all(part.format(**places) for part in step)
    assert peers["llama-Q8_0"].environment.variables["CMAKE_ARGS"]
    pinned = [r for p in peers.values() for r in p.environment.requirements if "==" in r]
    assert len(pinned) > 10


def test_a_peer_that_cannot_be_installed_is_kept_with_the_reason(tmp_path, monkeypatch):
    def fail(command, env=None):
        raise subprocess.CalledProcessError(
            1, command, stderr="WARNING: x\nERROR: No matching distribution found for y\n"
        )

    monkeypatch.setattr(setup_peers, "run", fail)
    monkeypatch.setattr(setup_peers.venv, "create", lambda root, with_pip: Path(root).mkdir(parents=True))
    peer = Peer("y", "genai", Environment("y", ("y==1",)), 8)
    done = prepare(peer, tmp_path, tmp_path, lambda text: None)
    assert "ERROR: No matching distribution found for y" in done.problem
    assert "\n" not in done.problem


def test_environments_and_models_are_made_once(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(setup_peers, "run", lambda command, env=None: commands.append(command))
    monkeypatch.setattr(setup_peers.venv, "create", lambda root, with_pip: Path(root).mkdir(parents=True))
    monkeypatch.setattr(setup_peers, "TORCH", "torch==1+cpu")

    def made(command, env=None):
        commands.append(command)
        if command[0] == "convert":
            Path(command[1]).mkdir(parents=True)
            (Path(command[1]) / "model.onnx").write_bytes(b"12345")

    monkeypatch.setattr(setup_peers, "run", made)
    peer = Peer("y", "genai", Environment("y", ("torch==1", "y==1"), {}, ("z",)), 8, (("convert", "{model}"),))
    first = prepare(peer, tmp_path, tmp_path, lambda text: None)
    assert (first.problem, first.size_bytes) == ("", 5)
    assert commands[0][-1] == "torch==1+cpu"
    assert commands[1][-2:] == ["torch==1+cpu", "y==1"]
    assert commands[2][2:4] == ["pip", "uninstall"]
    assert commands[2][-1] == "z"
    assert len(commands) == 4
    assert prepare(peer, tmp_path, tmp_path, lambda text: None) == first
    assert len(commands) == 4


def test_ours_without_a_model_says_so(tmp_path):
    assert "no compiled model" in Ours("int8", str(tmp_path)).prepared("python").problem
    (tmp_path / "qcompile.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.onnx").write_bytes(b"123")
    (tmp_path / "model.onnx.data").write_bytes(b"4567")
    done = Ours("int8", str(tmp_path)).prepared("python")
    assert (done.name, done.size_bytes, done.problem) == ("qcompile-int8", 7, "")


def test_sizes_leave_tokenizers_out(tmp_path):
    for name, size in (("openvino_model.bin", 7), ("openvino_tokenizer.bin", 100), ("config.json", 50), ("m.gguf", 3)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert model_bytes(tmp_path) == 10


def test_reasons_are_one_line():
    error = subprocess.CalledProcessError(1, ["/x/python", "-m", "pip"], stderr="a\nsome error here\nlast\n")
    assert why(error) == "python -m pip: some error here"
    nested = "ERROR: no compiler\nTraceback\nsubprocess.CalledProcessError: Command x returned 1\n"
    assert why(subprocess.CalledProcessError(1, ["python"], stderr=nested)).endswith(": ERROR: no compiler")
    assert why(OSError("no\nspace")) == "no space"


def test_our_engine_answers(tmp_path):
    """The one engine that is always there, as a process: logits equal to themselves, tokens of the right number."""
    from tests.optimized import export_tiny

    model = export_tiny(tmp_path)
    command = [sys.executable, str(PEERS / "engine_qcompile.py")]
    texts, logits = [[1, 2, 3, 4, 5]], str(tmp_path / "logits")
    base = {"model": str(model), "threads": 1, "texts": texts, "logits": logits, "options": {}}
    for task in ("reference", "quality"):
        done = subprocess.run(
            command, input=json.dumps({**base, "task": task}), capture_output=True, text=True, check=True
        )
        answer = answer_of(0, done.stdout, done.stderr)
    assert (answer["tokens"], answer["mean_kl"], answer["top1"]) == (5, 0.0, 1.0)
    prompts = {"short": [[1, 2, 3], [4, 5, 6]], "long": [[7] * 9], "chat": [[1]]}
    job = {**base, "task": "speed", "prompts": prompts, "count": 5, "batch_count": 4, "answer_count": 6}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
    answer = answer_of(0, done.stdout, done.stderr)
    assert len(answer["answers"][0]) == 6
    assert answer["batch_decode"] > 0
