"""`qcompile serve` beside llama.cpp's server on the same model: tokens per second for 1 client and for 16.

    python benchmarks/serve_vs_llama.py COMPILED_DIR MODEL.gguf --llama-server PATH [--turns 3] [--json FILE]

COMPILED_DIR and MODEL.gguf hold the same checkpoint with weights of the same width (int8 and Q8_0). `llama-server` is built
from llama.cpp's sources, for example those inside the source package of llama-cpp-python:

    cmake -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF && cmake --build build --target llama-server

Both servers stand on 127.0.0.1 with the same threads and as many slots, and are asked the same texts for the same number of
greedy tokens, end tokens ignored. They take turns, each turn beginning with the other one; a server that is not asked
sleeps. Two kinds of traffic: every prompt new, and every prompt behind one shared beginning (a system prompt), which
both servers keep. Prints a table and, as its last line, JSON.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from qcompile.runtime.host import default_threads

_READY_S = 180
_REQUEST_S = 300
_BEGINNING = "You are a careful assistant for Python programmers. Answer with short, working code. " * 12
_TASK = "Write a Python function that returns the sum of the first {} multiples of {}.\n\ndef "


class Peer(NamedTuple):
    """A server that answers, and its process."""

    name: str
    url: str
    process: "subprocess.Popen[bytes]"
    ready_s: float

    def rss_mb(self) -> float:
        """Return the resident set in MB, files that are mapped included."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compiled", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama-server", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=48, help="Of one answer.")
    parser.add_argument("--answers", type=int, default=2, help="Of one client in one turn.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="Also write the JSON to this file.")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(started(*command)) for command in commands(options)]
        for peer in peers:  # the first request of a server finds nothing warm
            asyncio.run(traffic(peer, 1, 1, options.tokens, "warm"))
        results = measure(peers, options)
        memory = {peer.name: {"ready_s": round(peer.ready_s, 2), "rss_mb": round(peer.rss_mb())} for peer in peers}
    report = {"cpu": cpu(), "threads": options.threads, "tokens": options.tokens, "servers": memory, "results": results}
    line = json.dumps(report, ensure_ascii=False)
    if options.json is not None:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def commands(options: argparse.Namespace) -> list[tuple[str, int, list[str]]]:
    """Return name, port and command of the two servers."""
    slots, threads = str(max(options.clients)), str(options.threads)
    ours, theirs = free_port(), free_port()
    context = str(1024 * max(options.clients))  # llama.cpp shares it among the slots
    qcompile = [
        sys.executable, "-m", "qcompile.cli.main", "serve", str(options.compiled), "--model-name", "m",
        "--port", str(ours), "--threads", threads, "--max-batch-size", slots, "--max-model-len", "1024",
    ]  # fmt: skip
    llama = [
        str(options.llama_server), "-m", str(options.gguf), "--host", "127.0.0.1", "--port", str(theirs),
        "-t", threads, "-tb", threads, "-np", slots, "-c", context, "--alias", "m",
    ]  # fmt: skip
    return [("qcompile", ours, qcompile), ("llama.cpp", theirs, llama)]


@contextlib.contextmanager
def started(name: str, port: int, command: list[str]) -> Iterator[Peer]:
    """Run a server until the block ends."""
    began, url = time.perf_counter(), f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(url):
            if process.poll() is not None or time.perf_counter() - began > _READY_S:
                raise SystemExit(f"{name} did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield Peer(name, url, process, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait(60)


def is_ready(url: str) -> bool:
    """Whether a server has its model and takes requests."""
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def measure(peers: list[Peer], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the servers take turns on every kind of traffic."""
    results = []
    for kind in ("new prompts", "shared beginning"):
        for clients in options.clients:
            speeds: dict[str, list[float]] = {peer.name: [] for peer in peers}
            for turn in range(options.turns):
                for peer in peers if turn % 2 == 0 else peers[::-1]:
                    label = f"{kind if kind != 'new prompts' else ''} {clients} {turn}".strip()
                    speeds[peer.name].append(
                        asyncio.run(traffic(peer, clients, options.answers, options.tokens, label, kind))
                    )
            results.append({"kind": kind, "clients": clients, "tokens_per_s": rounded(speeds)})
            print_row(results[-1])
    return results


async def traffic(peer: Peer, clients: int, answers: int, tokens: int, label: str, kind: str = "new prompts") -> float:
    """Return the tokens per second that all clients get together, prompts included in the time."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=peer.url, timeout=_REQUEST_S, trust_env=False, limits=limits) as client:

        async def one(number: int) -> int:
            got = 0
            for i in range(answers):
                task = _TASK.format(number * answers + i + 2, 3 + number)
                # a word that differs from turn to turn, in front: nothing of it can be in a cache
                text = (
                    f"{_BEGINNING}\n{label}: {task}" if kind == "shared beginning" else f"{label} {number}.{i}: {task}"
                )
                body = {"model": "m", "prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
                answer = await client.post("/v1/completions", json=body)
                answer.raise_for_status()
                got += answer.json()["usage"]["completion_tokens"]
            return got

        began = time.perf_counter()
        total = sum(await asyncio.gather(*(one(number) for number in range(clients))))
        seconds = time.perf_counter() - began
    if total != clients * answers * tokens:
        raise SystemExit(f"{peer.name}: {total} tokens, wanted {clients * answers * tokens}")
    return total / seconds


def rounded(speeds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return every turn's speed with two decimals."""
    return {name: [round(speed, 2) for speed in turns] for name, turns in speeds.items()}


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu() -> str:
    """Name the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_row(result: dict[str, Any]) -> None:
    """Print medians, with lowest and highest, as soon as they are there."""
    cells, medians = [], []
    for name, turns in result["tokens_per_s"].items():
        medians.append(statistics.median(turns))
        cells.append(f"{name} {medians[-1]:>7.1f} tokens/s ({min(turns):.1f} to {max(turns):.1f})")
    ratio = medians[0] / medians[1]
    print(
        f"{result['kind']:18} {result['clients']:>3} clients   {cells[0]:<42} {cells[1]:<42} {ratio:.2f}x", flush=True
    )


if __name__ == "__main__":
    main()
