"""The native engine: our own loop on /dev/fuse, without a library of C.

`session` is one mount from beginning to end; `loop` has the threads that take requests and write answers,
`requests` says which of them does what, `operations` what is answered, `openings` how each open file is
read, and `passthrough` lets the kernel read it by itself. `protocol` and `answers` are the bytes, `device`
mounts and unmounts.
"""

from __future__ import annotations

import os

from replicated.mount.engine.choosing import EngineState
from replicated.mount.engine.libfuse import check_device, check_program
from replicated.mount.engine.native.passthrough import find_obstacle
from replicated.mount.engine.native.session import serve

__all__ = ["check", "serve"]


def check() -> EngineState:
    """Whether this user can mount with this engine, and whether files can be passed through."""
    findings = [check_device()]
    if os.geteuid() != 0:
        findings.append(check_program())
    for finding in findings:
        if not finding.ok:
            return EngineState("native", False, finding.detail, finding.hint)
    return EngineState("native", True, find_obstacle() or "files can be passed through")
