"""What the file system of a descriptor can be relied on for: leases, notification, holes, nearness.

Asked by `snapshot`, `store.local` and `mount`. Facts about kinds of file
systems and nothing else: what is not on a list here is not relied on, because a network file system grants
a lease or a watch and then changes behind it.
"""

from __future__ import annotations

import ctypes
from typing import Final

# Kinds as statfs(2) tells them, from linux/magic.h and, where they are not in the kernel, their sources.
_EXT: Final = 0xEF53
_XFS: Final = 0x58465342
_BTRFS: Final = 0x9123683E
_TMPFS: Final = 0x01021994
_OVERLAY: Final = 0x794C7630
_F2FS: Final = 0xF2F52010
_BCACHEFS: Final = 0xCA451A4E
_ZFS: Final = 0x2FC12FC1
_NILFS: Final = 0x3434
_JFS: Final = 0x3153464A
_NTFS3: Final = 0x7366746E
_EXFAT: Final = 0x2011BAB0
_FAT: Final = 0x4D44
_RAMFS: Final = 0x858458F6
_SQUASHFS: Final = 0x73717368
_EROFS: Final = 0xE0F5E1E2
_ISO: Final = 0x9660
_UDF: Final = 0x15013346

#: All who can change a file of these are on this machine, and pass the kernel's one check for leases.
_HONOURS_LEASES: Final = frozenset({_EXT, _XFS, _BTRFS, _TMPFS, _OVERLAY, _F2FS, _BCACHEFS, _ZFS})
#: Whatever is created, removed, renamed or written in a directory of these is told to who watches it.
_TELLS_CHANGES: Final = _HONOURS_LEASES
#: `SEEK_DATA` and `st_blocks` know what was written just now. ZFS has called data that was not on disk yet a
#: hole (OpenZFS up to 2.1.13 and 2.2.1), and counts no block for it.
_TELLS_HOLES: Final = frozenset({_EXT, _XFS, _BTRFS, _TMPFS, _OVERLAY, _F2FS, _BCACHEFS})
#: Two files of one of these can have blocks in common (reflink).
_SHARES_BLOCKS: Final = frozenset({_XFS, _BTRFS, _BCACHEFS})
#: What is on these is on a disk of this machine or in its memory. What goes through FUSE may be anywhere.
_NEAR: Final = _HONOURS_LEASES | {
    _NILFS, _JFS, _NTFS3, _EXFAT, _FAT, _RAMFS, _SQUASHFS, _EROFS, _ISO, _UDF,
}  # fmt: skip

_STATFS_BYTES: Final = 256
_libc = ctypes.CDLL(None, use_errno=True)


def honours_leases(descriptor: int) -> bool:
    """Whether a lease on a file of this file system keeps everybody from changing it."""
    return _kind(descriptor) in _HONOURS_LEASES


def tells_changes(descriptor: int) -> bool:
    """Whether inotify on a directory of this file system misses no change that goes through a system call."""
    return _kind(descriptor) in _TELLS_CHANGES


def tells_holes(descriptor: int) -> bool:
    """Whether what this file system calls a hole holds nothing but zeros, and all else has blocks."""
    return _kind(descriptor) in _TELLS_HOLES


def times_tell_of_stores(descriptor: int) -> bool:
    """Whether the times of a file change when somebody maps it, stores into it and unmaps it.

    On tmpfs a page that was read through the mapping before takes stores without a fault, and so without
    a change of times.
    """
    return _kind(descriptor) != _TMPFS


def is_near(descriptor: int) -> bool:
    """Whether reading from this file system asks no other machine."""
    return _kind(descriptor) in _NEAR


def is_stacked(descriptor: int) -> bool:
    """Whether this file system lies on another one, which counts against how many may be stacked."""
    return _kind(descriptor) == _OVERLAY


def may_share_blocks(source: int, destination: int) -> bool:
    """Whether it is worth a try to make one file a reflink of the other."""
    kind = _kind(source)
    return kind in _SHARES_BLOCKS and kind == _kind(destination)


def _kind(descriptor: int) -> int | None:
    """The `f_type` of the file system; None when it cannot be told.

    Not remembered by device number: those of tmpfs, overlays and network mounts are used again.
    """
    answer = (ctypes.c_ulong * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_ulong)))()
    if _libc.fstatfs(ctypes.c_int(descriptor), answer) != 0:
        return None
    # The first field, as wide as a long wherever this was tried. Where it is not (s390x), what is read
    # is on no list.
    return int(answer[0]) & 0xFFFFFFFF
