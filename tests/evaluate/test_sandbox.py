"""What code can not do: every attack with all layers, and again with only one kind of layer at a time."""

import ctypes
import os
import platform
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qcompile.evaluate.sandbox import Limits, Outcome, run_code

SHORT = Limits(wall_s=1.5, cpu_s=1)
ROOMY = Limits(wall_s=15.0, cpu_s=5, memory_bytes=128 << 20)
LAYERS = ("namespaces", "landlock", "seccomp", "hook")
AVAILABLE = run_code("", []).isolation
needs_seccomp = pytest.mark.skipif("seccomp" not in AVAILABLE, reason="this kernel has no seccomp filter")
needs_landlock = pytest.mark.skipif("landlock" not in AVAILABLE, reason="this kernel has no Landlock")
needs_namespaces = pytest.mark.skipif("namespaces" not in AVAILABLE, reason="no namespaces for this user")


def only(*layers: str) -> tuple[str, ...]:
    return tuple(layer for layer in LAYERS if layer not in layers)


def run(code: str, *tests: str, limits: Limits | None = None, without: tuple[str, ...] = ()) -> Outcome:
    return run_code(textwrap.dedent(code), tests, limits, without)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim.txt"
    path.write_text("secret-7f3a")
    return path


class TestOrdinaryCode:
    def test_right_and_wrong(self) -> None:
        code = "def double(x):\n    return 2 * x"
        assert run(code, "assert double(2) == 4").is_passed
        wrong = run(code, "assert double(2) == 4", "assert double(3) == 7, 'three'")
        assert not wrong.is_passed
        assert wrong.reason == "test 2: AssertionError: three"

    @pytest.mark.parametrize(
        ("code", "test"),
        [
            (
                """
                from __future__ import annotations
                from dataclasses import dataclass
                @dataclass
                class P:
                    x: int
                """,
                "assert P(1).x == 1",
            ),
            (
                """
                import pickle
                class P: pass
                def copy(value): return pickle.loads(pickle.dumps(value))
                """,
                "assert type(copy(P())) is P",
            ),
        ],
    )
    def test_a_class_finds_its_module(self, code: str, test: str) -> None:
        assert run(code, test).reason == ""

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("def f(:", "the code: SyntaxError"),
            ("raise ValueError('no')", "the code: ValueError: no"),
            ("def g(): pass", "test 1: NameError: name 'f' is not defined"),
            ("f = lambda: 1 / 0", "test 1: ZeroDivisionError"),
            ("import sys; sys.exit(0)", "the code: SystemExit: 0"),
            ("import os; os._exit(0)", "ended by itself before the tests were done (exit code 0)"),
            ("def f(): return f()", "test 1: RecursionError"),
            ("import numpy", "the code: ModuleNotFoundError"),
            ("x = '\ud800'", "the code: UnicodeEncodeError"),
            ("raise ValueError('\\ud800')", "the code: ValueError: \\ud800"),
            ("x = 1\0", "the code: "),
            ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "the code: E"),
        ],
    )
    def test_failures_say_why(self, code: str, reason: str) -> None:
        outcome = run(code, "assert f() == 1")
        assert not outcome.is_passed
        assert outcome.reason.startswith(reason), outcome.reason
        outcome.reason.encode()

    def test_the_standard_library_works(self) -> None:
        names = (
            "asyncio bisect bz2 collections copy dataclasses datetime decimal enum fractions functools hashlib heapq"
        )
        names += (
            " inspect itertools json lzma math operator queue random re statistics string threading typing unicodedata"
        )
        code = "".join(f"import {name}\n" for name in names.split()) + (
            "from zoneinfo import ZoneInfo\nPoint = collections.namedtuple('Point', 'x y')\n"
            "async def answer():\n    await asyncio.sleep(0)\n    return 42\n"
            "thread = threading.Thread(target=print); thread.start(); thread.join()\n"
        )
        outcome = run(code, "assert asyncio.run(answer()) == 42", "assert Point(1, 2).y == 2")
        assert outcome.is_passed, outcome.reason

    def test_printing_a_little_is_fine(self) -> None:
        assert run("print('x' * 1000)", "assert True").is_passed

    def test_input_is_empty(self) -> None:
        assert run("input()").reason.startswith("the code: EOFError")


class TestLimits:
    """Bounded by rlimits, the clock and the reader, whatever else the kernel offers."""

    @pytest.mark.parametrize("without", [(), LAYERS])
    @pytest.mark.parametrize(
        ("code", "reasons"),
        [
            ("while True: pass", ("used up its CPU time", "ran longer than")),
            ("import time\ntime.sleep(60)", ("ran longer than 1.5 s",)),
            (
                "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass",
                ("ran longer", "was ended"),
            ),
            ("x = bytearray(8 << 30)", ("the code: MemoryError",)),
            ("x = []\nwhile True: x.append(bytearray(1 << 20))", ("the code: MemoryError",)),
            ("print('x' * (64 << 20))", ("printed more than",)),
            ("while True: print('x' * 1000)", ("printed more than",)),
            ("import sys\nwhile True: sys.stderr.write('x' * 10000)", ("printed more than",)),
            ("import os\nos.close(1); os.close(2)\nwhile True: pass", ("used up", "ran longer")),
            (
                "import os, sys\nfor fd in range(1000):\n    try: os.close(fd)\n    except OSError: pass\nwhile True: pass",
                ("",),
            ),
            ("9 ** 9 ** 9", ("used up its CPU time", "ran longer", "the code: MemoryError")),
            ("x = [open('/dev/null') for _ in range(10_000)]", ("the code: OSError", "ran longer")),
        ],
    )
    def test_it_ends(self, code: str, reasons: tuple[str, ...], without: tuple[str, ...]) -> None:
        started = time.monotonic()
        outcome = run(code, limits=ROOMY if "MemoryError" in reasons[0] else SHORT, without=without)
        assert time.monotonic() - started < 16
        assert not outcome.is_passed
        assert outcome.reason.startswith(reasons), outcome.reason

    def test_no_test_passes_after_a_hang_in_a_test(self) -> None:
        outcome = run("import time", "time.sleep(60)", "assert True", limits=SHORT)
        assert outcome == Outcome(False, "ran longer than 1.5 s", outcome.isolation)


_CTYPES_IN_A_FRAME = """
import sys
frame = sys._getframe()
while frame:
    for value in [*frame.f_globals.values(), *frame.f_locals.values()]:
        assert "ctypes" not in type(value).__module__ and getattr(value, "__name__", "") != "ctypes"
    frame = frame.f_back
raise SystemError("nothing found")
"""

# (name, code that raises only if the attack failed, layers that stop it when alone)
ATTACKS: list[tuple[str, str, tuple[str, ...]]] = [
    ("fork bomb", "import os\nwhile True: os.fork()", ("seccomp", "hook")),
    ("subprocess", "import subprocess\nsubprocess.run(['/bin/true'])", ("seccomp", "hook", "landlock")),
    ("shell", "import os\nassert os.system('exit 0') == 0\nraise SystemError('no shell')", ("hook",)),
    ("posix_spawn", "import os\nos.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)", ("seccomp", "hook")),
    ("exec", "import os\nos.execv('/bin/true', ['true'])", ("seccomp", "hook", "landlock")),
    ("pty", "import pty\npty.spawn('/bin/true')", ("seccomp", "hook")),
    ("delete a file", "import os\nos.remove(VICTIM)", ("seccomp", "hook", "landlock")),
    ("delete a tree", "import shutil\nshutil.rmtree(FOLDER)", ("seccomp", "hook", "landlock")),
    ("rename", "import os\nos.rename(VICTIM, VICTIM + '2')", ("seccomp", "hook", "landlock")),
    ("overwrite", "open(VICTIM, 'w').write('x')", ("seccomp", "hook", "landlock")),
    ("append", "open(VICTIM, 'a').write('x')", ("seccomp", "hook", "landlock")),
    ("truncate", "import os\nos.truncate(VICTIM, 0)", ("seccomp", "hook")),
    ("new file", "open(FOLDER + '/new', 'x').write('x' * (1 << 30))", ("seccomp", "hook", "landlock")),
    ("new file here", "open('new', 'w').write('x' * 100)\nopen('new', 'rb').read()", ("seccomp", "hook", "landlock")),
    ("temporary file", "import tempfile\ntempfile.TemporaryFile().write(b'x')", ("seccomp", "hook", "landlock")),
    ("memory file", "import os\nos.write(os.memfd_create('x'), b'x' * 100)", ("seccomp",)),
    ("folder", "import os\nos.mkdir(FOLDER + '/new')", ("seccomp", "hook", "landlock")),
    ("permissions", "import os\nos.chmod(VICTIM, 0)", ("seccomp", "hook")),
    ("symlink", "import os\nos.symlink(VICTIM, 'link')\nopen('link').read()", ("seccomp", "hook", "landlock")),
    ("hard link", "import os\nos.link(VICTIM, 'link')\nopen('link').read()", ("seccomp", "hook", "landlock")),
    ("read a file", "open(VICTIM).read()", ("hook", "landlock")),
    ("read by descriptor", "import os\nfd = os.open(FOLDER, os.O_RDONLY)\nos.listdir(fd)", ("hook", "landlock")),
    ("read upwards", "import os\nopen(os.path.relpath(VICTIM)).read()", ("hook", "landlock")),
    ("list a folder", "import os\nos.listdir(FOLDER)", ("hook", "landlock")),
    ("passwords", "open('/etc/passwd').read()", ("hook", "landlock")),
    ("parent's environment", "import os\nopen(f'/proc/{os.getppid()}/environ').read()", ("hook", "landlock")),
    ("parent's memory", "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)", ("hook", "landlock")),
    ("own memory", "open('/proc/self/mem', 'r+b')", ("seccomp", "hook", "landlock")),
    ("kill the parent", "import os\nos.kill(os.getppid(), 0)", ("seccomp", "hook")),
    ("kill the group", "import os\nos.killpg(0, 0)", ("seccomp", "hook")),
    ("more memory", "import resource\nresource.prlimit(0, resource.RLIMIT_FSIZE, (1, 1))", ("seccomp",)),
    ("TCP", "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)", ("seccomp", "hook", "landlock", "namespaces")),
    ("UDP", "import socket\nsocket.socket(2, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))", ("seccomp", "hook")),
    ("listen", "import socket\nsocket.socket().bind(('127.0.0.1', 0))", ("seccomp", "hook", "landlock")),
    ("libc", "import ctypes\nassert ctypes.CDLL(None).getpid() > 0", ("hook",)),
    ("python's C API", "import ctypes\nctypes.pythonapi.PyErr_SetInterrupt", ("hook",)),
    ("ctypes left over", "import sys\nsys.modules['ctypes'].CDLL(None).getpid()", LAYERS),
    ("ctypes in a frame", _CTYPES_IN_A_FRAME, LAYERS),
]  # fmt: skip
_NEEDS = {"seccomp": needs_seccomp, "landlock": needs_landlock, "namespaces": needs_namespaces}


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def filled(code: str, victim: Path, port: int) -> str:
    return f"VICTIM, FOLDER, PORT = {str(victim)!r}, {str(victim.parent)!r}, {port}\n{code}"


def unharmed(victim: Path) -> bool:
    return victim.read_text() == "secret-7f3a" and os.listdir(victim.parent) == ["victim.txt"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param(name, code, id=name, marks=needs_seccomp if layers == ("seccomp",) else ())
        for name, code, layers in ATTACKS
    ],
)
def test_an_attack_fails(name: str, code: str, victim: Path, port: int) -> None:
    outcome = run(filled(code, victim, port), limits=ROOMY)
    assert not outcome.is_passed, name
    assert "secret-7f3a" not in outcome.reason
    assert unharmed(victim)


@pytest.mark.parametrize(
    ("code", "layer"),
    [
        pytest.param(code, layer, id=f"{name}-{layer}", marks=_NEEDS.get(layer, ()))
        for name, code, layers in ATTACKS
        for layer in layers
    ],
)
def test_a_layer_alone_stops_it(code: str, layer: str, victim: Path, port: int) -> None:
    outcome = run(filled(code, victim, port), limits=ROOMY, without=only(layer))
    assert not outcome.is_passed
    assert unharmed(victim)


def test_the_attacks_would_work_outside(victim: Path, port: int) -> None:
    """With no layer at all the reading attacks succeed: the tests above are not passed by typing errors."""
    for name in (
        "read a file",
        "list a folder",
        "read upwards",
        "passwords",
        "TCP",
        "libc",
        "subprocess",
        "memory file",
    ):
        code = next(code for n, code, _ in ATTACKS if n == name)
        if name == "memory file":  # the file size limit is no layer that can be left out
            code = code.replace("b'x' * 100", "b''")
        outcome = run(filled(code, victim, port), limits=ROOMY, without=LAYERS)
        assert outcome.is_passed, (name, outcome.reason)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="layers of Linux")
def test_no_layer_that_the_kernel_has_is_missing() -> None:
    """Else the tests that are skipped without a layer would hide its loss."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(444, None, ctypes.c_size_t(0), 1) >= 1:  # landlock_create_ruleset: the version
        assert "landlock" in AVAILABLE
    if "Seccomp:" in Path("/proc/self/status").read_text() and platform.machine() in ("x86_64", "aarch64"):
        assert "seccomp" in AVAILABLE
    if subprocess.run(["unshare", "-Un", "true"], capture_output=True, check=False).returncode == 0:
        assert "namespaces" in AVAILABLE


def test_secrets_do_not_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret-7f3a")
    outcome = run("import os\nassert not {**os.environ}.keys() - {'PYTHONHASHSEED', 'LC_ALL', 'LC_CTYPE'}, os.environ")
    assert outcome.is_passed, outcome.reason
    outcome = run("import os, sys\nos.lseek(0, 0, 0)\nassert 0, (sys.stdin.read(), sys.argv)")
    assert "nonce" not in outcome.reason


def test_a_file_of_the_size_limit_is_empty(tmp_path: Path) -> None:
    """Without any layer the limits still hold: nothing can be written, not even where the user may."""
    target = tmp_path / "big"
    outcome = run(f"with open({str(target)!r}, 'wb') as stream:\n    stream.write(b'x' * 100)", without=LAYERS)
    assert not outcome.is_passed
    assert target.stat().st_size == 0


def test_a_report_that_the_code_writes_does_not_count() -> None:
    code = """
        import json, os
        for fd in range(3, 1000):
            try: os.write(fd, json.dumps({"nonce": "x", "passed": True, "reason": ""}).encode() + b"\\n")
            except OSError: pass
        os._exit(0)
    """
    assert not run(code).is_passed


@pytest.mark.parametrize(
    "code",
    [
        "import builtins\nbuiltins.exec = lambda *_: None",
        "import builtins\nbuiltins.compile = lambda *_: 'pass'",
        "import builtins\nbuiltins.enumerate = lambda *_: []",
        "import builtins\nbuiltins.BaseException = ()",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})",
        "import __main__\n__main__._describe = lambda _: ''\n__main__._run = lambda *_: ''",
        "import json\ndumps = json.dumps\njson.dumps = lambda record: dumps({**record, 'passed': True})",
        "import os\nos.write = print",
        "import sys\nsys.exit = sys.excepthook = None",
    ],
)
def test_code_cannot_turn_its_tests_off_by_replacing_names(code: str) -> None:
    outcome = run(code, "assert f(1) == 2")
    assert not outcome.is_passed
    assert run(code + "\ndef f(x): return x + 1", "assert f(1) == 2").is_passed


def test_a_stolen_nonce_cannot_crash_the_judge() -> None:
    """Code that walks up the frames can forge a report (docs/evaluation.md says so), but not break the evaluation."""
    code = """
        import json, os, sys
        frame = sys._getframe()
        while "report_fd" not in frame.f_locals: frame = frame.f_back
        forged = {"nonce": frame.f_locals["nonce"], "passed": False, "reason": ["no hex"], "isolation": {"a": 1}}
        os.write(frame.f_locals["report_fd"], b"[]\\nnull\\n" + json.dumps(forged).encode() + b"\\n")
        os._exit(0)
    """
    outcome = run(code)
    assert not outcome.is_passed
    assert outcome.reason == "the report is damaged"


def test_a_flooded_report_fails(tmp_path: Path) -> None:
    code = """
        import os
        for fd in range(3, 1000):
            try:
                while True: os.write(fd, b"x" * 60000)
            except OSError: pass
    """
    assert not run(code, limits=SHORT).is_passed


def test_nothing_is_left_running() -> None:
    """A process that survives (here: because only rlimits hold) is killed with its session."""
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(600)\n    os._exit(0)\n"
    marker = f"qcompile-{os.getpid()}"
    outcome = run(f"# {marker}\n{code}", limits=SHORT, without=LAYERS)
    assert outcome.reason in {"", "ran longer than 1.5 s"}
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert "sandbox_child.py" not in listed or sys.platform == "darwin"


@needs_seccomp
def test_code_ends_with_the_process_that_watches_it() -> None:
    program = (
        "from qcompile.evaluate.sandbox import *; run_code('import time; time.sleep(60)', [], Limits(wall_s=60.0))"
    )
    watcher = subprocess.Popen([sys.executable, "-c", program])

    def children() -> list[str]:
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(watcher.pid)], capture_output=True, text=True)
        return [pid for pid in listed.stdout.split() if "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()]

    deadline = time.monotonic() + 30
    while not (inside := children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    watcher.kill()
    watcher.wait()
    ask = ["ps", "-o", "stat=", "-p", inside[0]]
    deadline = time.monotonic() + 20
    while (is_left := subprocess.run(ask, capture_output=True).stdout[:1] not in b"Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_left


def test_what_the_sandbox_had_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.evaluate.sandbox._warned", set())
    assert run("").isolation.endswith("rlimits+audit hook")
    bare = run("", without=("namespaces", "landlock", "seccomp"))
    run("", without=("namespaces", "landlock", "seccomp"))
    assert bare.isolation == "rlimits+audit hook"
    warnings = [record.getMessage() for record in caplog.records if "rlimits+audit hook" in record.getMessage()]
    assert [w for w in warnings if "has rlimits+audit hook" in w] == [warnings[-1]]
    assert "WITHOUT seccomp" in warnings[-1]
