"""`qcompile serve` under load: right answers, flat memory, bounded waiting, throughput, and kill -9.

    python benchmarks/serve_load.py [COMPILED_DIR] [--clients 64] [--seconds 180] [--json FILE]

Without a directory the bundled reasoner is exported and fused. The server is a process of its own on 127.0.0.1; all
traffic stays on this machine and is bounded in time and number. Four parts:

* load: clients ask prompts of mixed lengths, streaming or not; every fifth leaves before the end, every twentieth
  sends something malformed. Each complete answer is compared with the greedy answer of an engine that serves one
  request at a time and reuses nothing.
* throughput: 1 client and 16 clients take turns on the same prompts.
* kill: the server is killed under load and started again; the hashes of the model's files are compared.
* memory: the server's resident set, once a second during the load; flat means that the largest of the last quarter
  is within 5 % of the largest of the second quarter.

Prints a table and, as its last line, JSON. Exit code 1 when an answer was wrong or lost.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import Manifest, check_file

ROOT = Path(__file__).parents[1]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NAME = "served"
SYSTEM = "You solve small problems. Think first, then give the answer in one line."
LENGTHS = (8, 16, 32, 64, 128)
MAX_REQUESTS = 200_000
JSON_TYPE = {"content-type": "application/json"}


@dataclass
class Question:
    """One prompt and the answer it must get."""

    body: dict[str, Any]
    want: str


@dataclass
class Tally:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, str]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    rss_mb: list[float] = field(default_factory=list)


class ServerProcess:
    """`qcompile serve` as a process."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "qcompile.cli.main", "serve", str(directory), "--model-name", NAME]
        command += ["--port", "0", "--json", "--threads", str(options.threads), "--max-wait", str(options.max_wait)]
        command += ["--max-batch-size", str(options.batch_size), "--max-queue", str(options.clients)]
        started = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        self.ready_s = time.perf_counter() - started
        self.url = json.loads(line)["url"].removesuffix("/v1")

    def rss_mb(self) -> float:
        """Return the resident set in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


def questions(directory: Path, cases: Path, count: int, threads: int) -> list[Question]:
    """Return prompts of mixed lengths with their greedy answers, one at a time and nothing reused."""
    rng = random.Random(0)
    texts = [json.loads(line)["prompt"] for line in cases.read_text(encoding="utf-8").splitlines()]
    found = []
    with Engine(directory, threads, 1, reuse_prefixes=False) as alone:
        for text in rng.sample(texts, min(count, len(texts))):
            filler = " ".join(rng.choices(texts, k=rng.choice((0, 0, 1, 3))))
            messages = [{"role": "user", "content": f"{filler}\n{text}".strip()}]
            if rng.random() < 0.5:
                messages.insert(0, {"role": "system", "content": SYSTEM})
            most = rng.choice(LENGTHS)
            prompt = alone.encode_chat(messages)
            if len(prompt) + most >= alone.max_model_len:
                continue
            want = alone.generate([prompt], SamplingParams(max_new_tokens=most))[0].text
            body = {"model": NAME, "messages": messages, "max_tokens": most, "temperature": 0}
            found.append(Question(body, want))
    return found


def malformed(rng: random.Random) -> tuple[str, bytes, int]:
    """Return a path, a body and the status it must get."""
    good = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
    return rng.choice(
        [
            (CHAT, b"{", 400),
            (CHAT, b'{"model": "\xff"}', 400),
            (CHAT, json.dumps({**good, "max_tokens": -1}).encode(), 400),
            (CHAT, json.dumps({**good, "model": "another"}).encode(), 404),
            (CHAT, json.dumps({**good, "no_such_field": 1}).encode(), 400),
            (CHAT, json.dumps({**good, "messages": [{"role": "user", "content": "word " * 20000}]}).encode(), 400),
            (TEXT, json.dumps({"model": NAME, "prompt": "a" * 3_000_000}).encode(), 413),
            ("/v1/nowhere", b"{}", 404),
        ]
    )


async def ask(client: httpx.AsyncClient, question: Question, tally: Tally, *, streams: bool) -> None:
    """Ask once and compare."""
    started = time.perf_counter()
    if not streams:
        answer = await client.post(CHAT, json=question.body)
        if answer.status_code != 200:
            tally.outcomes[f"refused {answer.status_code}"] += 1
            return
        record = answer.json()
        text, tokens = record["choices"][0]["message"]["content"], record["usage"]["completion_tokens"]
    else:
        text, tokens = "", 0
        body = {**question.body, "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", CHAT, json=body) as stream:
            if stream.status_code != 200:
                tally.outcomes[f"refused {stream.status_code}"] += 1
                return
            async for chunk in _chunks(stream):
                if not text and not tokens and chunk["choices"]:
                    tokens = 1
                    tally.ttft_s.append(time.perf_counter() - started)
                text += chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
                tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
    tally.tokens += tokens
    tally.outcomes["right" if text == question.want else "wrong"] += 1
    if text != question.want:
        tally.wrong.append({"got": text, "want": question.want})


async def _chunks(stream: httpx.Response) -> Any:
    async for line in stream.aiter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise httpx.RemoteProtocolError(chunk["error"]["message"])
            yield chunk


async def leave(client: httpx.AsyncClient, question: Question, tally: Tally, rng: random.Random) -> None:
    """Ask and go away before the end."""
    if rng.random() < 0.5:
        try:
            await client.post(CHAT, json=question.body, timeout=rng.uniform(0.02, 0.5))
            tally.outcomes["was faster than the leaving client"] += 1
        except httpx.TimeoutException:
            tally.outcomes["left"] += 1
        return
    async with client.stream("POST", CHAT, json={**question.body, "stream": True}) as stream:
        count = 0
        async for _ in _chunks(stream):
            count += 1
            if count > 2:
                break
    tally.outcomes["left"] += 1


async def one_client(number: int, url: str, asked: list[Question], tally: Tally, end: float) -> None:
    """Send requests until the time is over."""
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        while time.perf_counter() < end and tally.outcomes.total() < MAX_REQUESTS:
            question, kind = rng.choice(asked), rng.random()
            try:
                if kind < 0.05:
                    path, body, status = malformed(rng)
                    answer = await client.post(path, content=body, headers=JSON_TYPE)
                    is_right = answer.status_code == status and "message" in answer.json()["error"]
                    tally.outcomes["malformed, refused" if is_right else f"malformed, {answer.status_code}"] += 1
                elif kind < 0.25:
                    await leave(client, question, tally, rng)
                else:
                    await ask(client, question, tally, streams=rng.random() < 0.5)
            except httpx.HTTPError as error:
                tally.outcomes[f"lost: {type(error).__name__}"] += 1


async def under_load(server: ServerProcess, asked: list[Question], clients: int, seconds: float) -> Tally:
    """Return what that many clients saw in that time."""
    tally = Tally()
    end = time.perf_counter() + seconds
    tasks = [asyncio.create_task(one_client(i, server.url, asked, tally, end)) for i in range(clients)]
    while time.perf_counter() < end:
        tally.rss_mb.append(server.rss_mb())
        await asyncio.sleep(1)
    await asyncio.gather(*tasks)
    return tally


async def throughput(url: str, asked: list[Question], clients: int, seconds: float) -> float:
    """Return the tokens per second that so many clients get together, every answer counted whole."""
    tally, waiting = Tally(), iter(asked * 1000)
    started = time.perf_counter()

    async def client_loop() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
            while time.perf_counter() < started + seconds:
                await ask(client, next(waiting), tally, streams=False)

    await asyncio.gather(*(client_loop() for _ in range(clients)))
    return tally.tokens / (time.perf_counter() - started)


async def killed(server: ServerProcess, asked: list[Question]) -> None:
    """Kill the server while 16 clients ask."""
    tally = Tally()
    end = time.perf_counter() + 3
    tasks = [asyncio.create_task(one_client(i, server.url, asked, tally, end)) for i in range(16)]
    await asyncio.sleep(1.5)
    await asyncio.to_thread(server.end, signal.SIGKILL)
    await asyncio.gather(*tasks)


def check_files(directory: Path) -> int:
    """Return how many files of the model still have their hash; raises ManifestError for one that has not."""
    manifest = Manifest.load(directory)
    entries = [*manifest.files, *(entry for graph in manifest.graphs for entry in (graph.file, *graph.data))]
    for entry in entries:
        check_file(directory, entry)
    return len(entries)


def flatness(rss_mb: list[float]) -> float:
    """Return how much the largest of the last quarter is above the largest of the second, as a fraction."""
    quarter = max(1, len(rss_mb) // 4)
    return max(rss_mb[-quarter:]) / max(rss_mb[quarter : 2 * quarter] or rss_mb) - 1


def quantile(values: list[float], fraction: float) -> float:
    """Return the value that this fraction does not exceed."""
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))] if values else 0.0


def bundled(folder: Path) -> Path:
    """Export and fuse the bundled reasoner."""
    command = [sys.executable, "-m", "qcompile.cli.main"]
    subprocess.run([*command, "export", str(ROOT / "models/reasoner/weights"), "-o", str(folder / "r")], check=True)
    subprocess.run([*command, "optimize", str(folder / "r"), "--passes", "fuse", "-o", str(folder / "f")], check=True)
    return folder / "f"


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts and return their results."""
    asked = questions(directory, options.cases, options.questions, options.threads)
    server = ServerProcess(directory, options)
    tally = asyncio.run(under_load(server, asked, options.clients, options.seconds))
    speeds: dict[int, list[float]] = {1: [], 16: []}
    for _ in range(options.turns):
        for clients, found in speeds.items():
            found.append(asyncio.run(throughput(server.url, asked, clients, options.turn_seconds)))
    asyncio.run(killed(server, asked))
    num_whole_files = check_files(directory)
    again = ServerProcess(directory, options)
    exit_code = again.end()
    one, many = (statistics.median(found) for found in speeds.values())
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "clients": options.clients,
        "seconds": options.seconds,
        "outcomes": dict(tally.outcomes),
        "wrong": tally.wrong[:5],
        "tokens_per_s_under_load": round(tally.tokens / options.seconds, 1),
        "ttft_p50_s": round(quantile(tally.ttft_s, 0.5), 3),
        "ttft_p99_s": round(quantile(tally.ttft_s, 0.99), 3),
        "ttft_bound_s": options.max_wait,
        "rss_after_warm_up_mb": round(tally.rss_mb[len(tally.rss_mb) // 4], 1),
        "rss_last_mb": round(tally.rss_mb[-1], 1),
        "rss_growth": round(flatness(tally.rss_mb), 4),
        "tokens_per_s_1_client": [round(speed, 1) for speed in speeds[1]],
        "tokens_per_s_16_clients": [round(speed, 1) for speed in speeds[16]],
        "speedup": round(many / one, 2),
        "ready_s": round(server.ready_s, 2),
        "ready_after_kill_s": round(again.ready_s, 2),
        "files_whole_after_kill": num_whole_files,
        "exit_code_after_sigterm": exit_code,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compiled", type=Path, nargs="?")
    parser.add_argument("--cases", type=Path, default=ROOT / "models/reasoner/test.jsonl")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-wait", type=float, default=60)
    parser.add_argument("--turns", type=int, default=3, help="Of 1 and of 16 clients.")
    parser.add_argument("--turn-seconds", type=float, default=10)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="Also write the JSON to this file.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.compiled or bundled(Path(folder)), options)
    for name, value in result.items():
        if name != "wrong":
            print(f"{name:26} {value}")
    print(json.dumps(result, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result, ensure_ascii=False, indent=2), encoding="utf-8")
    if any(name == "wrong" or name.startswith(("lost", "malformed, 2")) for name in result["outcomes"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
