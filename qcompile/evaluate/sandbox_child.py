"""The sandboxed side: started alone (`python -I -S`), imports nothing of qcompile.

Standard input holds the program as JSON; the file descriptor named by the first argument takes the report.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

TYPE_CHECKING = False  # the child starts often: typing is not worth its milliseconds
if TYPE_CHECKING:
    from typing import Any

_CLONE_NEWNET, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_THREAD = 0x40000000, 0x08000000, 0x10000000, 0x00010000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_ALLOW, _DENY, _NO_SUCH_CALL, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock: the same numbers on both machines
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # access bits of the file system by Landlock ABI; 16 from ABI 5 on
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# System calls refused: processes, exec, signals to others, sockets (asyncio's socketpair reaches nobody), every change
# of the file system, kernel control.
_X86_64 = {
    "arch": 0xC000003E,
    "clone": 56,
    "open": ((2, 1), (257, 2)),  # (number, index of the flags argument)
    "denied": (
        *(29, 41, 57, 58, 59, 62, 76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 101, 129, 132, 133),
        *(155, 160, 161, 163, 164, 165, 166, 167, 168, 169, 170, 171, 172, 173, 175, 176, 188, 189, 190, 197, 198),
        *(199, 200, 227, 234, 235, 240, 248, 249, 250, 258, 259, 260, 261, 263, 264, 265, 266, 268, 272, 280, 285),
        *(297, 298, 302, 304, 308, 310, 311, 313, 316, 319, 321, 322, 323),
    ),
}
_AARCH64 = {
    "arch": 0xC00000B7,
    "clone": 220,
    "open": ((56, 2),),
    "denied": (
        *(5, 6, 7, 14, 15, 16, 33, 34, 35, 36, 37, 38, 39, 40, 41, 45, 46, 47, 51, 52, 53, 54, 55, 88, 89, 97, 105),
        *(106, 112, 117, 129, 130, 131, 138, 142, 161, 162, 164, 170, 180, 194, 198, 217, 218, 219, 221, 224),
        *(225, 240, 241, 261, 265, 268, 270, 271, 273, 276, 279, 280, 281, 282),
    ),
}
# The same numbers on both: pidfd_send_signal, io_uring_*, open_tree … fsmount, pidfd_open, pidfd_getfd, mount_setattr,
# fchmodat2, setxattrat, removexattrat.
_DENIED_EVERYWHERE = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 442, 452, 463, 466)
_CLONE3, _OPENAT2 = 435, 437

_BLOCKED_EVENTS = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.link", "os.symlink"),
    *("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "os.kill", "os.killpg"),
    *(
        "subprocess.Popen",
        "pty.spawn",
        "socket.connect",
        "socket.bind",
        "socket.sendto",
        "socket.sendmsg",
        "shutil.rmtree",
    ),
    *("syslog.openlog", "os.utime", "os.setxattr", "os.removexattr", "os.putenv", "os.mknod", "os.mkfifo"),
    *("sys._current_frames", "gc.get_objects", "gc.get_referrers", "sys.addaudithook"),
)


def _limit(limits: dict[str, float]) -> None:
    cpu = int(limits["cpu_s"])
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, int(limits["memory_bytes"])),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 64),
    ):
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (soft, soft + (kind == resource.RLIMIT_CPU)))


def _unshare(libc: ctypes.CDLL) -> list[str]:
    """Leave the network and IPC namespaces; True network isolation even where seccomp is missing."""
    try:
        is_done = libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC) == 0
    except AttributeError:  # not Linux
        is_done = False
    return ["namespaces"] if is_done else []


def _seccomp(libc: ctypes.CDLL) -> list[str]:
    table = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(platform.machine())
    if table is None or not sys.platform.startswith("linux") or sys.maxsize <= 2**32:
        return []
    code = _filter(table)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return []
    return ["seccomp"] if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) == 0 else []


def _filter(table: "dict[str, Any]") -> bytes:
    """The BPF program: (code, jump if true, jump if false, constant), eight bytes each; jumps count instructions."""

    def op(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, constant)

    steps = [op(_LD, 4), op(_JEQ, table["arch"], 1, 0), op(_RET, _KILL), op(_LD, 0)]
    steps += [op(_JGE, 0x40000000, 0, 1), op(_RET, _KILL)]  # the x32 numbers of x86-64
    for number in (*table["denied"], *_DENIED_EVERYWHERE):
        steps += [op(_JEQ, number, 0, 1), op(_RET, _DENY)]
    for number in (_CLONE3, _OPENAT2):  # libc falls back to clone and openat, whose arguments can be looked at
        steps += [op(_JEQ, number, 0, 1), op(_RET, _NO_SUCH_CALL)]
    steps += [op(_JEQ, table["clone"], 0, 4), op(_LD, 16), op(_JSET, _CLONE_THREAD, 1, 0), op(_RET, _DENY)]
    steps += [op(_RET, _ALLOW)]
    for number, argument in table["open"]:
        steps += [op(_JEQ, number, 0, 4), op(_LD, 16 + 8 * argument), op(_JSET, _WRITE_FLAGS, 0, 1)]
        steps += [op(_RET, _DENY), op(_RET, _ALLOW)]
    return b"".join([*steps, op(_RET, _ALLOW)])


def _landlock(libc: ctypes.CDLL, readable: "list[str]") -> "list[str]":
    """Let files be read below `readable` only and written nowhere; from ABI 4 on also no TCP, from 6 on no signals."""
    libc.syscall.restype = ctypes.c_long
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1) if sys.platform.startswith("linux") else -1
    if abi < 1:
        return []
    rights = struct.pack("QQQ", (1 << _FILE_RIGHTS.get(abi, 16)) - 1, 3 * (abi >= 4), 3 * (abi >= 6))
    rights = rights[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = libc.syscall(_CREATE_RULESET, rights, ctypes.c_size_t(len(rights)), 0)
    if rules < 0:
        return []
    for path in readable:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", access, place), 0)
        os.close(place)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    is_done = libc.syscall(_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return ["landlock"] if is_done else []


def _readable() -> "list[str]":
    """What Python itself reads: its library, shared libraries, time zones, its working directory."""
    places = [os.path.dirname(os.__file__), *(path for path in sys.path if os.path.isabs(path)), os.getcwd()]
    places += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    places += ["/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]
    return sorted({os.path.realpath(place) for place in places})


def _install_hook(readable: "list[str]") -> None:
    """Refuse by name what the kernel refuses too, and hold where the kernel cannot.

    Everything the hook needs is bound here: the code under test may replace builtins and our globals.
    """
    blocked, realpath, fsdecode = frozenset(_BLOCKED_EVENTS), os.path.realpath, os.fsdecode
    inside = tuple(place.rstrip("/") + "/" for place in readable)
    integer, instance, refused, write_flags = int, isinstance, PermissionError, _WRITE_FLAGS

    def hook(event: str, arguments: "tuple[Any, ...]") -> None:
        if event in blocked or event.startswith("ctypes."):
            raise refused(f"{event} is not allowed here")
        if event == "socket.__new__" and arguments[1] != 1:  # asyncio needs its AF_UNIX pair
            raise refused("sockets are not allowed here")
        if event not in ("open", "os.listdir", "os.scandir", "os.chdir") or instance(arguments[0], integer):
            return
        if event == "open" and instance(arguments[2], integer) and arguments[2] & write_flags:
            raise refused("opening a file for writing is not allowed here")
        if not (realpath(fsdecode("." if arguments[0] is None else arguments[0])) + "/").startswith(inside):
            raise refused("reading files is not allowed here")

    sys.addaudithook(hook)


def _run(code: str, tests: "list[str]") -> str:
    """Execute the code and the tests; returns the reason of the first failure, empty when all passed.

    What decides is bound before the code runs: it may have replaced builtins when its tests begin.
    """
    module = type(sys)("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look the module of a class up by its name
    namespace = module.__dict__
    steps = [("the code", code, "<answer>")]
    steps += [(f"test {number}", test, f"<test {number}>") for number, test in enumerate(tests, 1)]
    execute, translate, describe, failure = exec, compile, _describe, BaseException
    for where, source, name in steps:
        try:
            execute(translate(source, name, "exec"), namespace)
        except failure as error:  # SystemExit and KeyboardInterrupt are failures here too
            return where + ": " + describe(error)
    return ""


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")


def _end_with_parent(libc: ctypes.CDLL) -> None:
    """Who watches the time may be killed: nobody would be left to end code that sleeps. Namespaces of its own undo this."""
    if sys.platform.startswith("linux"):
        libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)  # SIGKILL


def _close_doors(limits: "dict[str, float]", without: "list[str]") -> "list[str]":
    """Set the limits and every layer this kernel has; returns their names."""
    _limit(limits)
    readable = _readable()
    libc = ctypes.CDLL(None, use_errno=True)
    doors = [] if "namespaces" in without else _unshare(libc)
    doors += [] if "landlock" in without else _landlock(libc, readable)
    _end_with_parent(libc)
    doors += [] if "seccomp" in without else _seccomp(libc)
    for name in ("ctypes", "_ctypes"):  # a new import of it meets the hook
        sys.modules.pop(name, None)
    globals().pop("ctypes", None)
    if "hook" not in without:
        _install_hook(readable)
    return [*doors, "rlimits", *([] if "hook" in without else ["audit hook"])]


def main() -> None:
    """Shut the doors, run, report."""
    report_fd = int(sys.argv[1])
    program = json.loads(sys.stdin.buffer.read())
    nonce = program.pop("nonce")
    nothing = os.open(os.devnull, os.O_RDONLY)  # the program held the nonce: it must not be read again
    os.dup2(nothing, 0)
    os.close(nothing)

    def line(**record: object) -> bytes:
        return json.dumps({"nonce": nonce, **record}).encode() + b"\n"

    doors = _close_doors(program["limits"], program["without"])
    write, leave = os.write, os._exit
    success, failure = line(passed=True), line(passed=False, reason="")
    write(report_fd, line(isolation="+".join(doors)))
    reason = _run(program["code"], program["tests"])
    sys.stdout = sys.__stdout__ or sys.stdout
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        pass
    in_hex = reason.encode("utf-8", "backslashreplace").hex().encode()
    write(report_fd, failure.replace(b'"reason": "', b'"reason": "' + in_hex) if reason else success)
    leave(0)


main()
