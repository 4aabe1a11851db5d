"""ACL is initialized once in a process and finalized once, after everything else: whoever needs it takes a share.

A finalized ACL cannot be initialized again, so the last share to go only gives back the device; the process finalizes
when it ends. If something else in the process (torch_npu) initialized ACL, it also finalizes it.
"""

import atexit
import importlib
import threading
from collections import Counter
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from .acl_errors import meaning
from .errors import SessionError

_REPEATED = 100002


class _Share:
    """How one `acl` module stands."""

    def __init__(self) -> None:
        self.users = 0
        self.devices: Counter[int] = Counter()  # who uses which
        self.is_ours = False
        self.is_ready = False


_lock = threading.Lock()
_shares: "WeakKeyDictionary[ModuleType, _Share]" = WeakKeyDictionary()


@atexit.register
def _finalize_all() -> None:
    for acl in list(_shares):
        finalize_acl(acl)


def take_acl() -> Any:
    """Return the initialized module `acl`; give it back with `release_acl`.

    Raises:
        SessionError: It is not installed, or cannot be initialized.
    """
    try:
        acl: Any = importlib.import_module("acl")
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SessionError(
            f"the Python module `acl` cannot be imported ({reason}); on a machine with an Ascend NPU run `source "
            "set_env.sh` of CANN first; `qcompile doctor` tells what is missing"
        ) from None
    with _lock:
        share = _shares.setdefault(acl, _Share())
        if not share.is_ready:
            code = acl.init()
            if code not in (0, _REPEATED):
                raise SessionError(f"acl.init: {code}, {meaning(code)}: {acl.get_recent_err_msg() or 'no message'}")
            share.is_ready, share.is_ours = True, code == 0
        share.users += 1
    return acl


def release_acl(acl: Any) -> None:
    """Give a share back."""
    with _lock:
        _shares[acl].users -= 1


def take_device(acl: Any, device_id: int) -> None:
    """Open a device, or share it: resetting it ends every session on it, so only the last one does.

    Raises:
        SessionError: It cannot be opened.
    """
    with _lock:
        devices = _shares[acl].devices
        code = 0 if devices[device_id] else acl.rt.set_device(device_id)
        if code != 0:
            message = acl.get_recent_err_msg() or "no message"
            raise SessionError(f"acl.rt.set_device({device_id}): {code}, {meaning(code)}: {message}")
        devices[device_id] += 1


def release_device(acl: Any, device_id: int) -> int:
    """Give a device back; returns ACL's code."""
    with _lock:
        devices = _shares[acl].devices
        devices[device_id] -= 1
        return 0 if devices[device_id] else int(acl.rt.reset_device(device_id))


def finalize_acl(acl: Any) -> None:
    """Finalize, if this module initialized it and nobody uses it; harmless when repeated."""
    with _lock:
        share = _shares.get(acl)
        if share is not None and share.is_ready and share.is_ours and share.users == 0:
            share.is_ready = False
            acl.finalize()
