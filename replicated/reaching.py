"""How the buckets of repositories are reached: the variables that calls of users brought, in memory only.

The daemon's own environment is that of the shell in which it happened to be started, so what a user's call
brings counts instead, the newest for each repository. Nothing here is written down, logged or shown.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from replicate.access import is_variable, scheme_of


class Access:
    """The variables by repository. Thread-safe; the lock is a leaf."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._variables: dict[str, Mapping[str, str]] = {}

    def __repr__(self) -> str:
        return "Access(…)"  # no traceback or log shows what it holds

    def note(self, url: str, variables: Mapping[str, str]) -> bool:
        """Take over what a call brought for a repository; whether that is news."""
        if scheme_of(url) is None:
            return False
        with self._lock:
            if self._variables.get(url) == variables:
                return False
            self._variables[url] = dict(variables)
            return True

    def environment(self, url: str) -> Mapping[str, str] | None:
        """What counts for a repository; None: nothing was brought, so this process's own environment."""
        with self._lock:
            return self._variables.get(url)

    def is_missing(self, url: str) -> bool:
        """Whether nobody has said yet how the bucket of a repository is reached."""
        return scheme_of(url) is not None and self.environment(url) is None


def process_environment(variables: Mapping[str, str] | None) -> dict[str, str] | None:
    """The environment for a process that is to reach a bucket with these variables and no others of the kind.

    None, which means this process's own, when there are none.
    """
    if variables is None:
        return None
    kept = {name: value for name, value in os.environ.items() if not is_variable(name)}
    return {**kept, **variables}
