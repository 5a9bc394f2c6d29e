"""The daemon's side of a collection: starts its process, and passes on what it says. Called by `rpc`."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from replicate.errors import InternalError, from_code
from replicated.collecting.collector import CollectReport
from replicated.journal import Journal
from replicated.reaching import Access, process_environment
from replicated.repositories import OpenRepositories

#: So often it is asked whether somebody still wants it.
_POLL_S: Final = 0.5
#: The clocks of this machine and of a store may differ by so much.
_MARGIN_S: Final = 300.0
_COMMAND: Final = (sys.executable, "-m", "replicated", "gc-process")


@dataclass(frozen=True, slots=True)
class CollectProgress:
    """How far a collection is."""

    step: str
    done: int
    total: int


class Collecting:
    """Starts collections; called by `rpc`, from any thread."""

    def __init__(
        self,
        cache: Path,
        journal: Journal,
        repositories: OpenRepositories,
        access: Access,
        leased: Callable[[str], Iterable[str]],
    ) -> None:
        """`leased` gives the snapshots of a repository that are mounted here."""
        self._cache = cache
        self._leased = leased
        self._journal = journal
        self._repositories = repositories
        self._access = access

    def run(
        self, repository: str, *, is_dry_run: bool, is_wanted: Callable[[], bool]
    ) -> Iterator[CollectProgress | CollectReport]:
        """Collect garbage in a process of its own: its progress, and at last its report.

        Raises as `collect`. When nobody wants it any more, or the generator is closed, the process is killed.
        """
        self._repositories.get(repository)  # tells what is wrong with it better than another process
        now = time.time_ns()
        ages = [(now - job.created_ns) / 1e9 + _MARGIN_S for job in self._journal.captured(repository)]
        return _run(
            {
                "repository": repository,
                "cache": str(self._cache),
                "leased": sorted(self._leased(repository)),
                "dry_run": is_dry_run,
                # What is being stored now has no pack that is older.
                "upload_age_s": max(ages, default=0.0),
            },
            self._access.environment(repository),
            is_wanted,
        )


def _run(
    order: Mapping[str, Any], environment: Mapping[str, str] | None, is_wanted: Callable[[], bool]
) -> Iterator[CollectProgress | CollectReport]:
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=process_environment(environment),
        cwd="/",
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(_POLL_S):
                    if not is_wanted():
                        return
                    continue
                line = process.stdout.readline()
                if not line:
                    raise InternalError(
                        f"the process that collects garbage has ended with status {process.wait()}",
                        hint="nothing is lost; run `replicate gc` again",
                    )
                answer = json.loads(line)
                if "report" in answer:
                    yield CollectReport(**answer["report"])
                    return
                if "error" in answer:
                    raise _error(*answer["error"])
                yield CollectProgress(answer["step"], answer["done"], answer["total"])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _error(code: str, message: str, hint: str, fields: dict[str, Any]) -> Exception:
    if not code:
        return InternalError(f"collecting garbage failed: {message}")
    return from_code(code, message, hint, fields)
