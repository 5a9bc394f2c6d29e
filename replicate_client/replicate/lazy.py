"""Modules that are imported at their first use, because `import replicate` must cost nothing.

Loading protobuf takes some 60 ms and grpc 150 ms; a script that only imports the library, or a command
that only prints its help, pays for neither. Used for exactly those; everything else is imported plainly:

    if TYPE_CHECKING:
        from replicate import wire
    else:
        wire = LazyModule("replicate.wire")
"""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module: the first use of any attribute imports it. May be used from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value

    def __repr__(self) -> str:
        return f"<lazily imported module {self._name!r}>"
