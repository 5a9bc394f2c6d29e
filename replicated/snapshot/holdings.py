"""Which files are held, for which snapshots, and which of them are leased: tables and nothing else.

Owned by `held`, which calls everything here with its lock. The invariant: a file is leased exactly while its
descriptor is not -1, and a snapshot holds a file exactly while it is among the file's owners.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from replicated.snapshot.held_copies import Owner
from replicated.snapshot.slots import Slots

_Identity: TypeAlias = "tuple[int, int, int, int, int]"


class Holding(NamedTuple):
    """One held file of a snapshot."""

    #: Unique within the snapshot, from 0.
    number: int
    #: Taken under the lease: this is the file that will be stored.
    info: os.stat_result


@dataclass(slots=True, eq=False)
class HeldFile:
    """One file that is held, for one snapshot or more."""

    #: -1 once the lease is given up. Who is busy with the file may use it without the lock.
    descriptor: int
    info: os.stat_result
    #: None for a copy from before a restart, and once it is given back.
    slot: int | None
    #: When the lease was taken, by `time.monotonic`.
    held_at: float = 0.0
    owners: set[Owner] = field(default_factory=set)
    #: A thread copies it: the owners that it had stay until the end of that.
    is_busy: bool = False
    #: Until when what is read is believed; None while no writer waits.
    deadline: float | None = None
    #: Each owner has a complete copy.
    is_copied: bool = False
    #: Why nobody will have one.
    lost: str = ""

    @property
    def is_leased(self) -> bool:
        """Whether the file is kept from changing by its lease."""
        return self.descriptor >= 0


@dataclass(slots=True)
class _Snapshot:
    files: dict[int, HeldFile] = field(default_factory=dict)
    next_number: int = 0


class Holdings:
    """The tables of all held files."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._snapshots: dict[str, _Snapshot] = {}
        #: By descriptor; `leases` gets those in a signal. Others may look at it without the lock.
        self.leased: dict[int, HeldFile] = {}
        self.leased_bytes = 0
        self._by_identity: dict[_Identity, HeldFile] = {}

    def add_leased(self, held: HeldFile) -> None:
        """A lease has been taken; an owner follows."""
        self.leased[held.descriptor] = held
        self.leased_bytes += held.info.st_size
        self._by_identity[_identity(held.info)] = held

    def add_owner(self, held: HeldFile, snapshot: str, number: int | None = None) -> int:
        """Hold a file for a snapshot: under the number given, or else the next one, which is returned."""
        of_snapshot = self._snapshots.setdefault(snapshot, _Snapshot())
        if number is None:
            number = of_snapshot.next_number
        of_snapshot.next_number = max(of_snapshot.next_number, number + 1)
        of_snapshot.files[number] = held
        held.owners.add((snapshot, number))
        return number

    def find(self, snapshot: str, number: int) -> HeldFile | None:
        """The file of that number."""
        return self.of_snapshot(snapshot).get(number)

    def find_leased(self, info: os.stat_result) -> HeldFile | None:
        """A leased file that had this stat when it was held."""
        return self._by_identity.get(_identity(info))

    def of_snapshot(self, snapshot: str) -> dict[int, HeldFile]:
        """The files of a snapshot by number; a copy."""
        found = self._snapshots.get(snapshot)
        return dict(found.files) if found else {}

    def disown(self, snapshot: str, number: int | None) -> list[HeldFile]:
        """Hold a file, or all (None), for this snapshot no more; returns those that were held for it."""
        of_snapshot = self._snapshots.get(snapshot)
        if of_snapshot is None:
            return []
        if number is None:
            del self._snapshots[snapshot]
        disowned = []
        for which in list(of_snapshot.files) if number is None else [number]:
            held = of_snapshot.files.pop(which, None)
            if held is not None:
                held.owners.discard((snapshot, which))
                disowned.append(held)
        return disowned

    def flag(self, held: HeldFile) -> None:
        """Let what is read from a leased file from now on not be believed."""
        assert held.slot is not None
        self._slots.flag(held.slot)

    def end_lease(self, held: HeldFile) -> int:
        """Take a leased file out of the tables; the caller closes what this returns.

        That lets the writers go on, so the flag of the slot is set here, before.
        """
        self.flag(held)
        descriptor, held.descriptor = held.descriptor, -1
        del self.leased[descriptor]
        self.leased_bytes -= held.info.st_size
        if self._by_identity.get(_identity(held.info)) is held:
            del self._by_identity[_identity(held.info)]
        return descriptor

    def give_back_slot(self, held: HeldFile) -> None:
        """Nobody reads this file any more, whose lease has ended."""
        if held.slot is not None:
            self._slots.give_back(held.slot)
            held.slot = None


def _identity(info: os.stat_result) -> _Identity:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
