"""What `init` records about the process and the machine, beside what the user hands in.

Everything here is best effort: a part that cannot be found out is left empty, none raises, and each is
bounded in time (commands that are run get two seconds, beside each other). Called once an experiment.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from replicate.packages import imported_distributions
from replicate.records import GitState, Gpu, ProcessIdentity, System
from replicate.worktree import git_state

_NVIDIA_SMI_TIMEOUT_S = 2.0
_NVIDIA_PROC = Path("/proc/driver/nvidia")
#: Longer command lines are cut; the system allows 2 MiB.
_MAX_COMMAND_LENGTH = 64 << 10

_Result = TypeVar("_Result")
#: The processors, and the version of their driver.
_Graphics: TypeAlias = "tuple[tuple[Gpu, ...], str]"


@dataclass(frozen=True, slots=True)
class Environment:
    """The fields of an `ExperimentRecord` that nobody hands in."""

    user: str
    host: str
    command: str
    python_version: str
    python_packages: dict[str, str]
    system: System
    git: GitState | None
    process: ProcessIdentity


def collect(directory: Path) -> Environment:
    """Everything about this process; `directory` is the project's, for Git."""
    git: _Background[GitState | None] = _Background(lambda: git_state(directory), None)
    graphics: _Background[_Graphics] = _Background(_graphics, ((), ""))
    packages: dict[str, str] = _attempt(imported_distributions, {})
    gpus, driver = graphics.result()
    return Environment(
        user=_printable(_attempt(getpass.getuser, "") or str(os.getuid())),
        host=_printable(os.uname().nodename),
        command=_attempt(command_line, "")[:_MAX_COMMAND_LENGTH],
        python_version=platform.python_version(),
        python_packages={_printable(name): _printable(version) for name, version in packages.items()},
        system=System(
            os=_printable(_attempt(_operating_system, "")),
            cpu=_printable(_attempt(_processor, "")),
            cpu_count=_attempt(lambda: len(os.sched_getaffinity(0)), os.cpu_count() or 0),
            memory_bytes=_attempt(lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 0),
            gpus=gpus,
            driver=driver,
        ),
        git=git.result(),
        process=identify_process(),
    )


def identify_process() -> ProcessIdentity:
    """This process, told apart from an earlier one with its pid."""
    return ProcessIdentity(
        pid=os.getpid(),
        start_ticks=_attempt(_start_ticks, 0),
        boot_id=_attempt(lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), ""),
    )


def command_line() -> str:
    """How this process was started, as a shell would take it, beginning with the script."""
    arguments: list[str] = [str(argument) for argument in getattr(sys, "argv", [])]
    script = arguments[0] if arguments else ""
    if "ipykernel" in script or "colab_kernel" in script:
        main = sys.modules.get("__main__")
        notebook = os.environ.get("JPY_SESSION_NAME") or str(vars(main).get("__vsc_ipynb_file__", ""))
        return shlex.join(["jupyter", notebook] if notebook else ["jupyter"])
    if script == "-c":
        return shlex.join(["python", *sys.orig_argv[1:]])
    spec: object = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        # Set for `python -m`; a package is run by its module __main__.
        name = str(getattr(spec, "name", "")).removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *arguments[1:]])
    return shlex.join(arguments) if script else "python"


class _Background(Generic[_Result]):
    """Something slow that is done beside other things; it must end by itself."""

    def __init__(self, function: Callable[[], _Result], default: _Result) -> None:
        self._result = default
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, args=(function,), daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:
            # Python 3.12 begins no thread while it exits: then here and now.
            self._thread = None
            self._run(function)

    def _run(self, function: Callable[[], _Result]) -> None:
        self._result = _attempt(function, self._result)

    def result(self) -> _Result:
        """Its result, or the default when it failed."""
        if self._thread is not None:
            self._thread.join()
        return self._result


def _attempt(function: Callable[[], _Result], default: _Result) -> _Result:
    try:
        return function()
    except Exception:  # a part that cannot be found out must never stop a training run
        return default


def _printable(text: str) -> str:
    """Text for protobuf, which takes only UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _start_ticks() -> int:
    # The second field, the name of the command, may hold spaces and parentheses.
    return int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])


def _operating_system() -> str:
    system = os.uname()
    kernel = f"{system.sysname} {system.release} {system.machine}"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return kernel
    return f"{release.get('PRETTY_NAME', release.get('NAME', ''))} ({kernel})"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    return platform.machine()


def _graphics() -> _Graphics:
    """Nvidia's graphics processors and their driver's version; nothing on a machine without."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        try:
            return _parse_nvidia_smi(_ask_nvidia_smi(command))
        except (OSError, ValueError, subprocess.SubprocessError):
            pass
    return _read_nvidia_proc(_NVIDIA_PROC)


def _ask_nvidia_smi(command: str) -> str:
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        [command, *query],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=_NVIDIA_SMI_TIMEOUT_S,
        check=True,
    )
    return done.stdout.decode(errors="replace")


def _parse_nvidia_smi(output: str) -> _Graphics:
    gpus: list[Gpu] = []
    driver = ""
    for line in filter(None, map(str.strip, output.splitlines())):
        name, memory_mib, driver = (field.strip() for field in line.rsplit(",", 2))
        # "[N/A]" where memory is shared with the processor
        gpus.append(Gpu(name, int(memory_mib) << 20 if memory_mib.isdecimal() else 0))
    return tuple(gpus), driver


def _read_nvidia_proc(directory: Path) -> _Graphics:
    """The same from the driver's files, which do not tell the memory."""
    gpus = []
    for file in sorted(directory.glob("gpus/*/information")):
        model = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(errors="replace"), re.MULTILINE)
        gpus.append(Gpu(model.group(1) if model else "", 0))
    try:
        version = (directory / "version").read_text(errors="replace")
    except OSError:
        return tuple(gpus), ""
    found = re.search(r"Kernel Module.*?\s(\d+[\d.]+)", version)
    return tuple(gpus), found.group(1) if found else ""
