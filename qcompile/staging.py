"""Staging directories: next to their final place, locked while in use, swept when a killed run left one."""

import glob
import os
import shutil
import sys
import tempfile
from pathlib import Path

if sys.platform != "win32":  # there, stale directories stay until deleted by hand
    import fcntl

_SUFFIX = ".qcompile-tmp"


def claim_staging(final: Path) -> tuple[Path, int]:
    """Create and lock a staging directory beside `final`; returns it and the lock's file descriptor."""
    path = Path(tempfile.mkdtemp(prefix=_prefix(final), suffix=_SUFFIX, dir=final.parent))
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o777 & ~umask)
    lock = os.open(path, os.O_RDONLY)
    if sys.platform != "win32":
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return path, lock


def release_staging(lock: int) -> None:
    """Give up the lock of a directory that was moved into place or deleted."""
    os.close(lock)


def lock_directory(path: Path) -> int:
    """Lock a directory that stays where it is; `release_staging` gives the lock up.

    Raises:
        BlockingIOError: Another process has it.
    """
    lock = os.open(path, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError:
        pass  # some network file systems lock no directories: as before locks
    return lock


def discard_stale(final: Path) -> None:
    """Delete staging directories that killed runs left beside `final`; those in use are locked and stay."""
    if sys.platform == "win32":
        return
    for path in final.parent.glob(glob.escape(_prefix(final)) + "*" + _SUFFIX):
        if path.is_symlink() or not path.is_dir():
            continue
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _prefix(final: Path) -> str:
    return f".{final.name}."
