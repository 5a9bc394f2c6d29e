"""Which engines can serve a mount on this machine, and the one that will.

An engine is a module with a function `serve`, as `Engine` says. It is imported only once it has been
chosen: two of them load libraries of C. Called by `process` to serve, and by `rpc` to say what is there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from replicate.errors import MountFailed
from replicated.mount.engine.libfuse import (
    INSTALL_HINT,
    OLD_UNMOUNT_PROGRAM,
    UNMOUNT_PROGRAM,
    check_device,
    check_program,
    find_library,
    find_old_library,
)
from replicated.mount.options import ENGINES, EngineReport, MountOptions

if TYPE_CHECKING:
    from replicated.mount.filesystem import Filesystem

_PACKAGE = "replicated.mount.engine"


@dataclass(frozen=True, slots=True)
class EngineState:
    """What became of the question whether an engine can be used here."""

    #: One of `ENGINES`.
    name: str
    is_usable: bool
    #: What is missing, or what it can do here.
    detail: str
    #: What to do about it; empty when nothing can be done, or need be.
    hint: str = ""


class Engine(Protocol):
    """A way to serve a file system to the kernel."""

    def serve(
        self,
        filesystem: Filesystem,
        directory: bytes,
        *,
        source_name: str,
        options: MountOptions,
        on_mounted: Callable[[EngineReport], None],
    ) -> None:
        """Mount on `directory` and serve until it is unmounted or SIGTERM or SIGINT comes.

        To be called in the main thread. `on_mounted` is called once, in a thread of its own, when the
        kernel takes requests. `source_name` is what `mount` and `df` show as the device. Raises
        `MountFailed` when it cannot be mounted.
        """
        ...


def describe() -> list[EngineState]:
    """Every engine, in the order in which they are tried."""
    return [_CHECKS[name]() for name in ENGINES]


def choose(options: MountOptions) -> Engine:
    """The engine that `options` ask for. Raises `MountFailed` saying why it cannot be used."""
    refused = []
    for state in _candidates(options):
        if state.is_usable:
            return cast(Engine, importlib.import_module(f"{_PACKAGE}.{_MODULES[state.name]}"))
        refused.append(state)
    # With several, the one that is preferred says what to do.
    reasons = "; ".join(f"{state.name}: {state.detail}" for state in refused)
    raise MountFailed(f"no engine can mount here: {reasons}", hint=refused[0].hint)


def _candidates(options: MountOptions) -> Iterator[EngineState]:
    names = ENGINES if options.engine == "auto" else (options.engine,)
    for name in names:
        if options.passthrough == "on" and name != "native":
            yield EngineState(name, False, "it cannot pass files through", "leave out --passthrough")
        else:
            yield _CHECKS[name]()


def _check_native() -> EngineState:
    from replicated.mount.engine.native import check  # here, because the engines know this module

    return check()


def _check_mfusepy() -> EngineState:
    return _check_binding("mfusepy", "mfusepy", UNMOUNT_PROGRAM, find_library, "fuse3")


def _check_fusepy() -> EngineState:
    return _check_binding("fusepy", "fuse", OLD_UNMOUNT_PROGRAM, find_old_library, "libfuse2")


def _check_binding(
    distribution: str, module: str, program: str, find: Callable[[], str | None], package: str
) -> EngineState:
    """The state of an engine that speaks to the kernel through a library of C."""
    import importlib.metadata  # here, because it takes longer than all the rest

    for finding in (check_device(), check_program(program)):
        if not finding.ok:
            return EngineState(distribution, False, finding.detail, finding.hint)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    # Another distribution installs a module `fuse` as well, so the module alone says nothing.
    if not version or importlib.util.find_spec(module) is None:
        return EngineState(
            distribution, False, "the Python package is missing", f"install it (pip install {distribution})"
        )
    library = find()
    if library is None:
        return EngineState(distribution, False, "its library cannot be loaded", INSTALL_HINT.format(package))
    return EngineState(distribution, True, f"{distribution} {version}, {library}")


_MODULES = {"native": "native", "mfusepy": "mfusepy_engine", "fusepy": "fusepy_engine"}
_CHECKS: dict[str, Callable[[], EngineState]] = {
    "native": _check_native,
    "mfusepy": _check_mfusepy,
    "fusepy": _check_fusepy,
}
