"""The program that collects garbage for a daemon: `replicated gc-process`, started by `running`.

Marking takes processor time and memory, so it is done here at the lowest priority. It gets one order as JSON
on its standard input and answers with lines of JSON. It may be killed at any moment: the next one goes on.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from replicate.errors import ReplicateError
from replicated.collecting.collector import collect
from replicated.repository import Repository
from replicated.store import open_store

#: Progress is told so often.
_REPORT_S: Final = 0.2


def main() -> int:
    """Do what the order says; the exit status is 0 whenever the answer says what came of it."""
    order = json.load(sys.stdin)
    reported: tuple[str, float] = "", 0.0

    def report(step: str, done: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if step != reported[0] or now - reported[1] >= _REPORT_S:
            reported = step, now
            _say({"step": step, "done": done, "total": total})

    try:
        store = open_store(order["repository"], create=False)
        repository = Repository.open_on(store, cache=Path(order["cache"]), create=False)
        result = collect(
            repository,
            leased=order["leased"],
            is_dry_run=order["dry_run"],
            upload_age_s=order["upload_age_s"],
            on_progress=report,
        )
        repository.close()
    except ReplicateError as error:
        _say({"error": [error.code, error.message, error.hint, dict(error.fields)]})
    except BrokenPipeError:
        return 1  # nobody wants it any more
    except Exception:
        _say({"error": ["", traceback.format_exc()[-2000:], "", {}]})
    else:
        _say({"report": asdict(result)})
    return 0


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
