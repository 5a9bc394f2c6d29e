"""A machine of a user: a project, a home and a daemon, whose repositories lie in a bucket.

The daemon, the store process and the mounts are those of users. `processor_seconds` are all of theirs.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from measuring.processes import Family, cpu_seconds
from measuring.workspace import Workspace

import replicate
from object_storing.bucket import BUCKET, Bucket

_REPLICATE = Path(sys.executable).with_name("replicate")
_TIMEOUT_S = 3600.0


class Machine(Workspace):
    """See the module's text; what was stored on it is not forgotten until `forget`."""

    def __init__(self, directory: str | None, bucket: Bucket) -> None:
        super().__init__(directory)
        #: Where its repositories lie.
        self.bucket = bucket

    def reach(self, *, is_counted: bool) -> None:
        """Let the next daemon, and whoever is started from here, reach the bucket in this way."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(self.bucket.surroundings(is_counted=is_counted))

    def forget(self, *, is_counted: bool) -> None:
        """Begin anew as a machine that has never seen a repository, with a daemon that has just started.

        It has stored something in a repository of its own: everything that is loaded once is loaded.
        """
        self.stop_daemon()
        shutil.rmtree(self._home, ignore_errors=True)
        self.bucket.empty("warm")
        self.reach(is_counted=is_counted)
        warm = self.project / "warm.bin"
        warm.write_bytes(os.urandom(4 << 20))
        self.end(self.save(self.url("warm"), warm.name))
        warm.unlink()
        self.settle()

    @staticmethod
    def url(prefix: str) -> str:
        """The URL of a repository in the bucket."""
        return f"s3://{BUCKET}/{prefix}"

    def save(self, url: str, path: str) -> replicate.Experiment:
        """A new run with these files; returns when they are stored."""
        project = replicate.Project(repository=url, directory=self.project)
        experiment = project.experiments.create(path=path, quiet=True)
        replicate.flush()
        return experiment

    @staticmethod
    def end(experiment: replicate.Experiment) -> None:
        """End a run; returns when that is recorded."""
        experiment.stop()
        replicate.flush()

    def processor_seconds(self) -> float:
        """Of this process, the daemon and its children so far."""
        own = time.process_time()
        with suppress(OSError, ValueError):
            return own + cpu_seconds(Family().pids(self.find_daemon()))
        return own

    def run(self, url: str, *arguments: str | Path) -> bytes:
        """What `replicate` prints."""
        command: Sequence[str | Path] = [_REPLICATE, "--repository", url, *arguments]
        ran = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S)
        if ran.returncode:
            said = ran.stderr.decode(errors="replace").strip()
            raise SystemExit(f"error: `replicate {arguments[0]}` has failed: {said}")
        return ran.stdout
