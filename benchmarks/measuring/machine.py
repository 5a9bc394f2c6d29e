"""What the numbers depend on."""

import os
import platform
from pathlib import Path

import replicate


def describe_machine(directory: Path) -> dict[str, object]:
    """Processor, memory, file system and versions, as they are printed above the figures."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    device = os.stat(directory).st_dev
    place = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "processor": names[0].partition(": ")[2] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "kernel": platform.release(),
        "file system": next((mount[mount.index("-") + 1] for mount in mounts if mount[2] == place), "?"),
        "python": platform.python_version(),
        "replicate": replicate.__version__,
        "load": os.getloadavg()[0],
        **{name: value for name, value in os.environ.items() if name == "REPLICATE_CAPTURE_RUNG"},
    }
