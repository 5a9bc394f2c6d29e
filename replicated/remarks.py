"""What whoever answers a request has to say beside the answer: that it is not the newest, for example.

Whoever finds it out is many calls below the one who sends the answer, and is used where nobody listens too;
a request is answered by one thread, so what is remarked belongs to the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_listening = threading.local()


@contextmanager
def collecting() -> Iterator[list[str]]:
    """A list that gets what is remarked in this thread meanwhile, each sentence once."""
    before = getattr(_listening, "remarks", None)
    remarks: list[str] = []
    _listening.remarks = remarks
    try:
        yield remarks
    finally:
        _listening.remarks = before


def remark(sentence: str) -> None:
    """Say something beside the answer, if somebody listens."""
    remarks: list[str] | None = getattr(_listening, "remarks", None)
    if remarks is not None and sentence not in remarks:
        remarks.append(sentence)
