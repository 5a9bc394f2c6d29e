"""The daemon's side of a collection: starts its process, and passes on what it says. Called by `rpc`."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from replicate.errors import InternalError, from_code
from replicated.collecting.collector import CollectReport
from replicated.reaching import process_environment

#: So often it is asked whether somebody still wants it.
_POLL_S: Final = 0.5
_COMMAND: Final = (sys.executable, "-m", "replicated", "gc-process")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a collection is."""

    step: str
    done: int
    total: int


def run_collection(
    repository: str,
    cache: Path,
    *,
    leased: Iterable[str],
    is_dry_run: bool,
    upload_age_s: float,
    environment: Mapping[str, str] | None,
    is_wanted: Callable[[], bool],
) -> Iterator[Progress | CollectReport]:
    """Collect garbage in a process of its own: its progress, and at last its report.

    Raises as `collect`. When nobody wants it any more, or the generator is closed, the process is killed.
    """
    order = {
        "repository": repository,
        "cache": str(cache),
        "leased": sorted(leased),
        "dry_run": is_dry_run,
        "upload_age_s": upload_age_s,
    }
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
                yield Progress(answer["step"], answer["done"], answer["total"])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _error(code: str, message: str, hint: str, fields: dict[str, Any]) -> Exception:
    if not code:
        return InternalError(f"collecting garbage failed: {message}")
    return from_code(code, message, hint, fields)
