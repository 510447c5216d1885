"""Places where a test may kill this process, to prove that no instant is a bad one to die.

`TOLLBOOK_METERING_FAILPOINT=NAME` kills the process (SIGKILL) when it reaches NAME;
`NAME:N` when it reaches it for the N-th time. Unset, as in production, a failpoint is one comparison.
"""

from __future__ import annotations

import os
import signal

FAILPOINTS = (
    "after_lock",
    "after_read",
    "after_staging",
    "after_insert",
    "after_sequences",
    "before_commit",
    "after_commit",
    "after_trim",
)

_name, _, _count = os.environ.get("TOLLBOOK_METERING_FAILPOINT", "").partition(":")
_remaining = int(_count or 1)


def reach(name: str) -> None:
    """Die here if this is the chosen failpoint."""
    global _remaining
    if name == _name:
        _remaining -= 1
        if _remaining <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
