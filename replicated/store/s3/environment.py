"""Credentials as the caller would have them: the variables of the cloud SDKs from where the user called us.

The daemon was started in one environment and asked from another, with another AWS_PROFILE, say. botocore
looks at `os.environ` in many places (profile, region, endpoint, roles, containers), and takes no other
mapping for all of them. So while it makes a client, or renews credentials, the variables of this process are
those of the caller, under one lock for the whole process. That is a moment, but where it asks a server for
credentials: others who want clients or new credentials wait for that; those who use credentials that they
have do not. A process started by another thread in that moment may inherit the variables of the caller: it
belongs to the same user.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Final

# Those of the process itself are hidden: half of one set of credentials and half of another are none.
_OURS: Final = ("AWS_", "BOTO_")
_lock = threading.RLock()


@contextlib.contextmanager
def environment_of(caller: Mapping[str, str] | None) -> Iterator[None]:
    """What botocore reads inside is the environment of the caller; None: that of this process."""
    with _lock:
        if caller is None:
            yield
            return
        hidden = {name for name in os.environ if name.startswith(_OURS) or name in caller}
        saved = {name: os.environ[name] for name in hidden}
        try:
            for name in hidden:
                del os.environ[name]
            os.environ.update(caller)
            yield
        finally:
            for name in caller:
                os.environ.pop(name, None)
            os.environ.update(saved)
