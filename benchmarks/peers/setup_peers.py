"""Environments and converted models of the peers: made once, recognised when they are there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

HERE = Path(__file__).parent
# A machine whose package index serves CUDA builds of torch says QCOMPILE_TORCH='torch==2.13.0+cpu'
TORCH = os.environ.get("QCOMPILE_TORCH")


@dataclass(frozen=True)
class Environment:
    """What one virtual environment holds: requirements, variables of their builds, and what is taken out again."""

    name: str
    requirements: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def stamp(self) -> str:
        """Changes when what is to be installed changes."""
        return hashlib.sha256(json.dumps([self.requirements, self.variables, self.without, TORCH]).encode()).hexdigest()


@dataclass(frozen=True)
class Peer:
    """One engine with one kind of weights."""

    name: str
    engine: str
    environment: Environment
    bits: int
    convert: tuple[tuple[str, ...], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A peer that can be run, or why it cannot.

    Attributes:
        command: What starts its process.
        model: Its directory.
        size_bytes: Of the model's files.
        problem: Why it is not run.
    """

    name: str
    bits: int
    command: tuple[str, ...]
    model: str
    options: dict[str, Any]
    size_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Ours:
    """A model that qcompile compiled."""

    name: str
    directory: str

    def prepared(self, python: str) -> Prepared:
        """Return it beside the peers."""
        directory = Path(self.directory).resolve()
        command = (python, str(HERE / "engine_qcompile.py"))
        if not (directory / "qcompile.json").is_file():
            return Prepared(
                f"qcompile-{self.name}", 0, command, str(directory), {}, 0, f"{directory}: no compiled model"
            )
        size = sum(p.stat().st_size for p in directory.glob("*.onnx*"))
        return Prepared(f"qcompile-{self.name}", 0, command, str(directory), {}, size)


def read_peers(path: Path) -> dict[str, Peer]:
    """Read peers.toml; the engine's environment has the engine's name."""
    record = tomllib.loads(path.read_text(encoding="utf-8"))
    environments = {
        name: Environment(name, tuple(e["requirements"]), e.get("variables", {}), tuple(e.get("without", ())))
        for name, e in record["environments"].items()
    }
    return {
        name: Peer(
            name,
            p["engine"],
            environments[p["engine"]],
            p["bits"],
            tuple(tuple(step) for step in p.get("convert", ())),
            p.get("options", {}),
        )
        for name, p in record["peers"].items()
    }


def prepare(peer: Peer, checkpoint: Path, work: Path, say: Callable[[str], None]) -> Prepared:
    """Install and convert; a failure is kept as the reason why the peer is not run."""
    model = work / "models" / peer.name
    python = work / f"venv-{peer.environment.name}" / "bin" / "python"
    command = (str(python), str(HERE / f"engine_{peer.engine}.py"))
    problem, size = "", 0
    try:
        install(peer.environment, python, say)
        if peer.convert:
            convert(peer, checkpoint, model, python, work, say)
        size = model_bytes(model if peer.convert else checkpoint)
    except (OSError, subprocess.SubprocessError) as error:
        problem = why(error)
        say(f"{peer.name}: not run: {problem}")
    return Prepared(peer.name, peer.bits, command, str(model), peer.options, size, problem)


def install(environment: Environment, python: Path, say: Callable[[str], None]) -> None:
    """Make a virtual environment with exactly these requirements, unless it is there.

    Raises:
        subprocess.SubprocessError: pip failed.
    """
    root = python.parent.parent
    stamp = root / ".installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == environment.stamp:
        return
    say(f"installing {environment.name}")
    shutil.rmtree(root, ignore_errors=True)
    venv.create(root, with_pip=True)
    wanted = [TORCH if TORCH and r.startswith("torch==") else r for r in environment.requirements]
    variables = {**os.environ, **environment.variables}
    # torch first, so that no later requirement chooses another build
    for part in ([r for r in wanted if r.startswith("torch")], wanted):
        if part:
            run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *part], env=variables)
    if environment.without:
        run([str(python), "-m", "pip", "uninstall", "-q", "-y", *environment.without])
    stamp.write_text(environment.stamp, encoding="utf-8")


def convert(peer: Peer, checkpoint: Path, model: Path, python: Path, work: Path, say: Callable[[str], None]) -> None:
    """Convert the checkpoint, unless that was done; an unfinished directory is made anew.

    Raises:
        subprocess.SubprocessError: A step failed.
    """
    done = model / ".converted"
    stamp = json.dumps([str(checkpoint), peer.convert])
    if done.is_file() and done.read_text(encoding="utf-8") == stamp:
        return
    say(f"converting {peer.name}")
    shutil.rmtree(model, ignore_errors=True)
    model.parent.mkdir(parents=True, exist_ok=True)
    places = {
        "python": str(python), "bin": str(python.parent), "checkpoint": str(checkpoint), "model": str(model),
        "work": str(work), "here": str(HERE),
    }  # fmt: skip
    for step in peer.convert:
        run([part.format(**places) for part in step])
    done.write_text(stamp, encoding="utf-8")


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    """Run a command to its end; its output is kept for the reason."""
    subprocess.run(command, check=True, capture_output=True, text=True, env=env)


def why(error: Exception) -> str:
    """Return a failure as one line: the last thing the command said."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in (error.stderr or error.stdout or "").splitlines() if line.strip()]
        own = [line for line in lines if "CalledProcessError" not in line]  # that only says that a step's step failed
        told = [line for line in own if "error" in line.lower()] or own or ["no message"]
        return f"{Path(str(error.cmd[0])).name} {' '.join(map(str, error.cmd[1:4]))}: {told[-1]}"[:300]
    return " ".join(str(error).split())[:300]


def model_bytes(directory: Path) -> int:
    """Return the size of a model's graph and weights; tokenizers and configurations are not counted."""
    suffixes = {".onnx", ".data", ".onnx_data", ".bin", ".xml", ".gguf", ".safetensors"}
    files = [p for p in directory.rglob("*") if p.is_file() and p.suffix in suffixes]
    return sum(p.stat().st_size for p in files if "tokenizer" not in p.name)


if __name__ == "__main__":
    sys.exit("run.py is the script to start")
