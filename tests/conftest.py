"""What holds for all tests.

Triton reads TRITON_INTERPRET when it is imported, and transformers imports it: so it is said before anything else.
"""

import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

# A busy machine is slow in making examples and in running them; neither says anything about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A suite that a shell started in the background ignores SIGINT, one under nohup SIGHUP, and so would the processes that
# tests start to interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
