"""What other processes use, read from /proc: memory and processor time of the daemon and of the peers."""

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_SAMPLE_S = 0.05
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Family:
    """A process and everything below it; a process is looked at once, so that asking again is cheap."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def pids(self, root: int) -> list[int]:
        """Those that are alive now, `root` first."""
        alive = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._parents = {pid: parent for pid, parent in self._parents.items() if pid in alive}
        for pid in alive - self._parents.keys():
            with suppress(OSError):
                self._parents[pid] = int(_stat(pid)[1])
        children = defaultdict(list)
        for pid, parent in self._parents.items():
            children[parent].append(pid)
        found = [root] if root in alive else []
        for pid in found:
            found += children[pid]
        return found


def cpu_seconds(pids: list[int]) -> float:
    """Processor time that they have used so far, with their children that have ended."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            ticks += sum(map(int, _stat(pid)[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process has had at one moment; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


class MemorySampler:
    """The largest sum of resident memory of a process and its children, for each label, every 50 ms.

    A thread of its own; `label` says what is going on. Pages that processes share count for each of them.
    `find_pid` says which process it is now, and raises `OSError` or `ValueError` when there is none.
    """

    def __init__(self, find_pid: Callable[[], int]) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self._find_pid = find_pid
        self._label = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def label(self, label: str) -> None:
        """Count what is sampled from now on under this label; nothing is sampled without one."""
        self._label = label

    def start(self) -> None:
        """Begin to sample, whether there is a process or not."""
        self._thread.start()

    def stop(self) -> None:
        """Sample no more."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        family = Family()
        while not self._ended.wait(_SAMPLE_S):
            label = self._label
            if not label:
                continue  # looking at all processes costs some time of a processor
            with suppress(OSError, ValueError):  # none just now
                pids = family.pids(self._find_pid())
                self.peaks[label] = max(self.peaks[label], sum(map(_resident_bytes, pids)))


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
