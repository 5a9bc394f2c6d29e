"""What the kernel is asked for so that it reads plain files by itself, and stops doing so.

Files are registered with the device of a mount (Linux 6.9, and the rights of root). What is passed through
can only be taken back by taking the inode away from everybody who uses it, which `spoil` does. Which files
are passed through, and when, is the matter of `openings`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from typing import Final

from replicated.mount.engine.native import protocol
from replicated.mount.engine.native.device import Device

_MIN_KERNEL: Final = (6, 9)
_CAP_SYS_ADMIN = 21
#: From linux/exportfs.h: a handle of two words of inode and one of generation, high word first.
_HANDLE_TYPE = 0x81
#: length, type, inode, generation.
_HANDLE = struct.Struct("=IiIII")


class Passthrough:
    """The right to pass files through, of one mount that has it."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def probe(self) -> str:
        """Why the kernel does not let us; empty when it does."""
        try:
            self.register(-1)
        except OSError as error:
            # It looks at the descriptor only after it has looked at us.
            if error.errno != errno.EBADF:
                return f"the kernel refuses to pass files through: {error.strerror}"
        return ""

    def register(self, descriptor: int) -> int:
        """An id under which the kernel reads this file until it is unregistered."""
        # What cannot be written to is copied, and the id would be lost with the copy.
        argument = bytearray(protocol.BACKING_OPEN.pack(descriptor, 0, 0))
        backing_id: int = fcntl.ioctl(self._device.descriptor, protocol.IOC_BACKING_OPEN, argument)
        return backing_id

    def unregister(self, backing_id: int) -> None:
        """Let the kernel close a file once nobody has it open any more."""
        argument = bytearray(protocol.BACKING_CLOSE.pack(backing_id))
        with suppress(OSError):
            fcntl.ioctl(self._device.descriptor, protocol.IOC_BACKING_CLOSE, argument)

    def spoil(self, inode: int, generation: int) -> bool:
        """Let everybody who uses an inode get EIO from now on; whether it is so.

        It makes the kernel ask for the attributes of the inode. While this runs they must be answered with
        a type that the inode does not have, and this must not be the thread that answers.
        """
        body = protocol.INVAL_INODE_OUT.pack(inode, -1, 0)
        header = protocol.ANSWER_HEADER.pack(
            protocol.ANSWER_HEADER.size + len(body), protocol.NOTIFY_INVAL_INODE, 0
        )
        try:
            os.writev(self._device.descriptor, [header, body])
            descriptor = self._open_inode(inode, generation)
        except OSError as error:
            # It is not in the kernel's memory: there is nobody who uses it.
            return error.errno in (errno.ENOENT, errno.ESTALE)
        try:
            os.fstat(descriptor)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _open_inode(self, inode: int, generation: int) -> int:
        """A descriptor of an inode itself, whatever its name, that is not an open file."""
        import ctypes  # here, because hardly any mount ever needs it

        library = ctypes.CDLL(None, use_errno=True)
        handle = _HANDLE.pack(12, _HANDLE_TYPE, inode >> 32, inode & 0xFFFFFFFF, generation)
        top = os.open(self._device.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            descriptor: int = library.open_by_handle_at(top, handle, os.O_PATH)
        finally:
            os.close(top)
        if descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return descriptor


def find_obstacle() -> str:
    """What keeps this process from passing files through, as far as it shows before mounting."""
    if _kernel_version() < _MIN_KERNEL:
        return f"passing files through needs Linux {'.'.join(map(str, _MIN_KERNEL))}"
    if not _has_capability(_CAP_SYS_ADMIN):
        return "passing files through needs root (CAP_SYS_ADMIN)"
    return ""


def _kernel_version() -> tuple[int, ...]:
    release = os.uname().release.split(".")
    with suppress(ValueError, IndexError):
        return int(release[0]), int(release[1].partition("-")[0])
    return 0, 0


def _has_capability(number: int) -> bool:
    with suppress(OSError, ValueError), open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False
