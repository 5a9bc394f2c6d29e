"""A training that reads fifty thousand small files again and again, shuffled, with two workers."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring.figures import SECONDS, Figure
from measuring.workspace import Workspace
from storing.tools import DATA

from mounting import page_cache
from mounting.comparing import MEMORY, Measured, by_turns, compare, compare_alone, memory_figures
from mounting.scale import Scale
from mounting.servers import Saved, Variant, forget_cache

_SMALLEST, _LARGEST = 2_000, 8_000
_EPOCHS = ("first epoch", "second epoch")
_TARGET = 1.3
_TIMEOUT_S = 1800.0
_CPU = "CPU of both"


class Loader:
    """The program that reads, in a Python that has torch if there is one."""

    def __init__(self, peers: Path) -> None:
        own = peers / "torch" / "bin" / "python"
        self._command = [sys.executable, Path(__file__).with_name("loader.py")]
        if importlib.util.find_spec("torch"):
            self._command.append("--torch")
        elif own.exists():
            self._command = [own, self._command[1], "--torch"]
        is_torch = "--torch" in self._command
        self.description = "PyTorch's own" if is_torch else "of the same pattern, as PyTorch is not installed"

    def read(self, directory: Path, files: int, epochs: int) -> list[float]:
        """The seconds of each epoch, in which so many files must have been read."""
        command = [*self._command, f"--epochs={epochs}", directory]
        ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=_TIMEOUT_S)
        said = json.loads(ran.stdout)
        if said["files"] != files:
            raise SystemExit(f"error: {said['files']} files in {directory}, {files} were saved")
        return list(said["seconds"])


def make(workspace: Workspace, scale: Scale) -> None:
    """The files, in directories of a hundred."""
    workspace.make_tree(workspace.project / DATA, scale.epoch_files, _SMALLEST, _LARGEST)


def measure(scale: Scale, saved: Saved, variants: Sequence[Variant], loader: Loader) -> list[Figure]:
    """Two epochs in a new mount, ours as it is made without options, and with those of `variants`."""
    print(f"loader: {loader.description}; before the first epoch nothing is cached by us", flush=True)
    measured = Measured()
    chosen = [Variant("replicate"), *(variant for variant in variants if variant.options)]
    servers = [saved.native, *(saved.ours(variant) for variant in chosen), *saved.peers]
    for server in by_turns("epochs", servers, scale.rounds):
        forget_cache()
        page_cache.warm(server.backing())
        with server.mounted() as mount:
            before = mount.cpu_seconds()
            seconds = loader.read(mount.directory, scale.epoch_files, len(_EPOCHS))
            for epoch, elapsed in zip(_EPOCHS, seconds, strict=True):
                measured.add(server.name, epoch, elapsed)
            if mount.pid:
                measured.add(server.name, _CPU, mount.cpu_seconds() - before)
                measured.add(server.name, MEMORY, mount.peak_bytes())
    ours = [variant.name for variant in chosen]
    case = f"loader, {scale.epoch_files:,} files"
    first, second = _EPOCHS
    return [
        *compare(f"{case}: {first}", measured.of(first), ours),
        *compare(f"{case}: {second}", measured.of(second), ours, targets=dict.fromkeys(ours, _TARGET)),
        *compare_alone(f"… {_CPU}", measured.of(_CPU), ours, SECONDS),
        *memory_figures(case, measured, ours),
    ]
