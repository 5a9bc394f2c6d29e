"""The mounts that come back after a restart of the machine: one JSON file each among the user's state.

The register is lost with the run directory, this is not. A mount is kept here from the moment it could be
used until `replicate umount` ends it; whatever else ends it, the next daemon mounts it again. Used by `table`
and, through `leased_snapshots`, by whoever removes data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from replicate.home import Home, make_private
from replicated.mount.life.registry import MountOrder, decode_order, encode, read_registrations

_LOG = logging.getLogger(__name__)


def keep_order(directory: Path, order: MountOrder) -> None:
    """Keep a mount; on return it survives a power cut."""
    make_private(directory)
    file = _file(directory, order.name)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="ascii") as opened:
        opened.write(encode(order))
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)
    _sync(directory)


def forget_order(directory: Path, name: str) -> None:
    """Keep a mount no longer; it may not have been kept."""
    try:
        _file(directory, name).unlink()
    except FileNotFoundError:
        return
    _sync(directory)


def kept_orders(directory: Path) -> Iterator[MountOrder]:
    """The mounts that are kept. One that cannot be read is told in the log, left as it is, and skipped."""
    for file in sorted(directory.glob("*.json")):
        try:
            order = decode_order(file.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            _LOG.warning("the mount that %s keeps cannot be read: %s", file, error)
            continue
        if order.name == file.stem:
            yield order


def leased_snapshots(home: Home, repository: str) -> frozenset[str]:
    """The snapshots of a repository (its URL) that are mounted or will be again: not to be collected.

    Also those of a mount that is being mounted again at this moment, or was given up and not ended.
    """
    orders = [registration.order for registration in read_registrations(home.mounts)]
    orders += kept_orders(home.lasting_mounts)
    return frozenset(
        snapshot_id
        for order in orders
        if order.repository == repository
        for snapshot_id in order.snapshot_ids
    )


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.json"


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
