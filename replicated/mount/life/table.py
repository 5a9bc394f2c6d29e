"""The daemon's view of mounts: has them started, finds them again, ends them, brings them back.

The truth is the register together with the kernel's list, so that nothing is lost when the daemon is
restarted. `supervising` says when a mount that died is brought back. All methods may be called from any
thread. Invariant: whoever starts, ends or cleans a mount has claimed its mount point.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from replicate.errors import MountFailed, NotFound
from replicate.home import Home, make_private
from replicate.ids import new_id, short
from replicate.records import ProcessIdentity
from replicated.mount.life.launching import launch, make_place
from replicated.mount.life.mountinfo import read_mountinfo
from replicated.mount.life.persisting import forget_order, keep_order, kept_orders
from replicated.mount.life.registry import (
    MountInfo,
    MountOrder,
    Registration,
    read_progress,
    read_registration,
    read_registrations,
    remove_registration,
    write_registration,
)
from replicated.mount.life.unmounting import clear_remains, detach_dead, unmount
from replicated.mount.options import MountOptions
from replicated.processes import current_boot_id, is_alive
from replicated.reaching import Access

_LOG = logging.getLogger(__name__)

#: How long one who ends or brings back a mount waits for another who does something with it.
_CLAIM_PATIENCE_S = 90.0


class MountTable:
    """The mounts of one home."""

    def __init__(self, home: Home, access: Access | None = None) -> None:
        """`access` tells how the buckets of what is mounted are reached."""
        self._home = home
        self._access = access or Access()
        # Guards what follows; a leaf; never held while a process is waited for.
        self._changed = threading.Condition()
        self._claimed: set[bytes] = set()
        #: Processes that were started here and have not been taken note of since they ended.
        self._children: set[int] = set()
        #: Why what is to come back could not be brought back so far, by name.
        self._troubles: dict[str, str] = {}
        self._tell: Callable[[str], None] = lambda name: None

    def mount(
        self,
        repository: str,
        experiment_id: str,
        checkpoint_id: str,
        snapshot_ids: Sequence[str],
        directory: Path,
        options: MountOptions | None = None,
        owner: ProcessIdentity | None = None,
    ) -> MountInfo:
        """Mount snapshots, later ones laid over earlier ones, on a directory; returns when it is usable.

        Without snapshots (and with empty ids) it is the whole repository, as `RepositoryView` shows it.
        The directory must be empty, or absent with its parent there: then it is made, and removed at the
        end. `repository` is an absolute URL, `checkpoint_id` is empty for the files of an experiment
        alone. The mount ends with `owner`, if there is one. Raises `MountFailed` saying what is in the way.
        """
        target = os.path.realpath(os.fsencode(directory))
        with self._claiming(target, patience_s=0):
            for earlier in self.registrations():
                if earlier.target == target and not is_running(earlier):
                    self._clean(earlier)
            self._make_register()
            order = MountOrder(
                name=f"{short(checkpoint_id or experiment_id) or 'all'}-{new_id()[:8]}",
                repository=repository,
                experiment_id=experiment_id,
                checkpoint_id=checkpoint_id,
                snapshot_ids=tuple(snapshot_ids),
                directory=os.fsdecode(target),
                made_directory=make_place(self._home, repository, target),
                options=options or MountOptions(),
                owner=owner,
            )
            try:
                if order.options.persist:
                    keep_order(self._home.lasting_mounts, order)
                registration = self._launch(Registration(order))
            except BaseException:
                self._clean(Registration(order))
                raise
        self._tell(order.name)
        return self._describe(registration)

    def list(self) -> Sequence[MountInfo]:
        """The mounts that can be used, and those that cannot although nobody ended them, by mount point."""
        with self._changed:
            claimed = set(self._claimed)
        ready = {mounted.directory for mounted in read_mountinfo() if mounted.is_ours} - claimed
        return [
            self._describe(registration, is_ready=registration.target in ready)
            for registration in self._registrations_and_kept()
            if is_shown(registration)
        ]

    def is_idle(self) -> bool:
        """Whether no mount is there and none is to come back."""
        return not any(is_running(r) or r.is_wanted_back for r in self.registrations())

    def unmount(
        self, *, directory: Path | None = None, identifier: str = "", everything: bool = False
    ) -> Sequence[MountInfo]:
        """Unmount what is mounted on a directory, or all mounts of an id (or prefix), or all; what it was.

        Returns when the processes are gone; none of them comes back. Raises `NotFound` when nothing fits
        (unless `everything`), and `MountFailed` naming who keeps a mount in use, after the others have
        been unmounted.
        """
        ended: list[MountInfo] = []
        failures: list[MountFailed] = []
        chosen = self._choose(directory, identifier, everything)
        # What is mounted inside another mount goes first.
        for registration in sorted(chosen, key=lambda registration: registration.target, reverse=True):
            try:
                ended.append(self.end(registration))
            except MountFailed as error:
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise MountFailed("; ".join(failure.message for failure in failures), hint=failures[0].hint)
        return ended[::-1]

    def end(self, registration: Registration) -> MountInfo:
        """Unmount one, for good; what it was. Raises `MountFailed` while it is in use."""
        with self._claiming(registration.target, patience_s=_CLAIM_PATIENCE_S):
            current = read_registration(self._home.mounts, registration.name) or registration
            info = self._describe(current)
            if current.process is not None and is_alive(current.process):
                unmount(current.target, current.process)
            self.reap()
            self._clean(current)
        return info

    # -- for the one who watches over them -----------------------------------------------------------

    def on_mounted(self, tell: Callable[[str], None]) -> None:
        """Have the names of mounts told that are made from now on; by the thread that made them."""
        self._tell = tell

    def find(self, name: str) -> Registration | None:
        """What the register holds under a name."""
        self.reap()
        return read_registration(self._home.mounts, name)

    def reap(self) -> None:
        """Take note of the end of processes that were started here, so that the system forgets them."""
        with self._changed:
            for pid in list(self._children):
                with suppress(ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG)[0] == 0:
                        continue
                self._children.discard(pid)

    def registrations(self) -> Sequence[Registration]:
        """Everything in the register, by mount point."""
        self.reap()
        found = read_registrations(self._home.mounts)
        return sorted(found, key=lambda registration: registration.target)

    def adopt(self) -> None:
        """Take over what another daemon left, and what is to come back after a restart of the machine.

        What died with the machine and was not to come back is forgotten; of our mounts that no register
        knows, those without a process are detached. For the daemon's start.
        """
        kept = {order.name: order for order in kept_orders(self._home.lasting_mounts)}
        for registration in self.registrations():
            if registration.name in kept:
                if registration.error:
                    # A new daemon tries anew.
                    write_registration(self._home.mounts, replace(registration, error=""))
                del kept[registration.name]
            elif _is_of_another_boot(registration) or not (
                is_running(registration) or is_shown(registration)
            ):
                with self._claiming(registration.target, patience_s=_CLAIM_PATIENCE_S):
                    self._clean(registration)
        if kept:
            self._make_register()
        for order in kept.values():
            write_registration(self._home.mounts, Registration(order))
        known = {registration.target for registration in self.registrations()}
        for mounted in read_mountinfo():
            if mounted.is_ours and mounted.directory not in known:
                detach_dead(mounted.directory)

    def bring_back(self, registration: Registration) -> None:
        """Mount what has lost its process again where it was; nothing, if it was ended meanwhile.

        Raises `MountFailed` when that is not possible: then it stays in the register.
        """
        with self._claiming(registration.target, patience_s=_CLAIM_PATIENCE_S):
            current = read_registration(self._home.mounts, registration.name)
            if current is None or is_running(current) or not current.is_wanted_back:
                return
            if not clear_remains(current.target):
                raise MountFailed(f"what died is still mounted on {current.order.directory}")
            # Users see the restarts of what they had; the first start after a reboot is none.
            restarts = current.restarts + (current.report is not None)
            order = current.order
            made = make_place(self._home, current.order.repository, current.target)
            order = replace(order, made_directory=made or order.made_directory)
            try:
                self._launch(replace(current, order=order, process=None, restarts=restarts))
            except BaseException as error:
                write_registration(self._home.mounts, replace(current, process=None))
                with self._changed:
                    self._troubles[current.name] = str(error)
                raise
            _LOG.info("mounted %s again", order.directory)

    def give_up(self, registration: Registration, reason: str) -> None:
        """Let a mount that has lost its process not come back, and say why until somebody ends it."""
        with self._claiming(registration.target, patience_s=_CLAIM_PATIENCE_S):
            current = read_registration(self._home.mounts, registration.name)
            if current is not None and not is_running(current):
                clear_remains(current.target)
                write_registration(self._home.mounts, replace(current, process=None, error=reason))

    # -- parts ---------------------------------------------------------------------------------------

    @contextmanager
    def _claiming(self, target: bytes, *, patience_s: float) -> Iterator[None]:
        with self._changed:
            if not self._changed.wait_for(lambda: target not in self._claimed, patience_s):
                raise MountFailed(
                    f"something is just being mounted or unmounted there: {os.fsdecode(target)}"
                )
            self._claimed.add(target)
        try:
            yield
        finally:
            with self._changed:
                self._claimed.discard(target)
                self._changed.notify_all()

    def _launch(self, registration: Registration) -> Registration:
        """Start a mount process; what it registered."""
        variables = self._access.environment(registration.order.repository)
        pid = launch(self._home, registration, variables)
        with self._changed:
            self._children.add(pid)
            self._troubles.pop(registration.name, None)
        registered = read_registration(self._home.mounts, registration.name)
        if registered is None:
            raise MountFailed(f"it was unmounted at once: {registration.order.directory}")
        return registered

    def _clean(self, registration: Registration) -> None:
        """Remove every trace of a mount that has no process any more."""
        clear_remains(registration.target)
        if registration.order.made_directory:
            with suppress(OSError):
                os.rmdir(registration.target)
        with self._changed:
            self._troubles.pop(registration.name, None)
        remove_registration(self._home.mounts, registration.name)
        forget_order(self._home.lasting_mounts, registration.name)

    def _describe(self, registration: Registration, *, is_ready: bool = True) -> MountInfo:
        progress = read_progress(self._home.mounts, registration.name)
        return registration.describe(progress, trouble=self._trouble(registration, is_ready))

    def _trouble(self, registration: Registration, is_ready: bool) -> str:
        if is_running(registration):
            return "" if is_ready else "it is just being mounted again, or unmounted"
        with self._changed:
            trouble = self._troubles.get(registration.name, "")
        if trouble:
            return f"it is tried again: {trouble}"
        if registration.process is not None:
            return "its process has died; it is mounted again at once"
        return "it was ended by other means than `replicate umount`, and comes back with the next daemon"

    def _registrations_and_kept(self) -> Sequence[Registration]:
        """What is in the register, and what is only kept for the next daemon."""
        registrations = self.registrations()
        names = {registration.name for registration in registrations}
        absent = [
            Registration(order) for order in kept_orders(self._home.lasting_mounts) if order.name not in names
        ]
        return sorted([*registrations, *absent], key=lambda registration: registration.target)

    def _make_register(self) -> None:
        make_private(self._home.mounts.parent)
        make_private(self._home.mounts)

    def _choose(self, directory: Path | None, identifier: str, everything: bool) -> Iterable[Registration]:
        registrations = [r for r in self._registrations_and_kept() if is_shown(r)]
        if everything:
            return registrations
        hint = "`replicate mounts` lists what is mounted"
        if directory is not None:
            target = _resolve(os.fsencode(directory))
            chosen = [r for r in registrations if r.target == target]
            if not chosen:
                raise NotFound(f"nothing of ours is mounted there: {os.fsdecode(target)}", hint=hint)
            return chosen
        chosen = [r for r in registrations if identifier and _is_meant(r.order, identifier)]
        if not chosen:
            raise NotFound(f"not mounted: {identifier}", hint=hint)
        return chosen


def is_running(registration: Registration) -> bool:
    """Whether the process of a mount lives."""
    return registration.process is not None and is_alive(registration.process)


def is_shown(registration: Registration) -> bool:
    """Whether users know of a mount: it was there, or was promised to come back. Else it just begins."""
    return bool(registration.error) or registration.is_wanted_back


def _is_of_another_boot(registration: Registration) -> bool:
    return registration.process is not None and registration.process.boot_id != current_boot_id()


def _is_meant(order: MountOrder, identifier: str) -> bool:
    return bool(order.shown_id) and (
        order.shown_id.startswith(identifier) or order.experiment_id.startswith(identifier)
    )


def _resolve(directory: bytes) -> bytes:
    """A mount point without links. It is not looked at itself: whoever serves it may not answer."""
    path = os.path.abspath(directory)
    if any(mounted.directory == path for mounted in read_mountinfo()):
        return path
    return os.path.realpath(path)
