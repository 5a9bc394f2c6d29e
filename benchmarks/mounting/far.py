"""A store that is far away, nothing cached: an epoch over small files, and a big file in order.

Simulated, as there is no store for buckets yet: ours is the local store, which waits at each request and
counts it (`serve_far.py`); rclone reads the same files out of a bucket on the loopback interface that waits
as long (`bucket.py`), with the times that the listing tells (`--use-server-modtime`), or it would ask for
those of each file.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from measuring.figures import TIMES, Figure, format_megabytes, format_rate
from measuring.peers import Peers
from measuring.workspace import Workspace
from storing.tools import DATA

from mounting import latency, page_cache
from mounting.bucket import BUCKET, Bucket
from mounting.comparing import MEMORY, Measured, by_turns, compare, compare_rates, memory_figures
from mounting.epochs import Loader
from mounting.reading import read_in_order
from mounting.scale import Scale
from mounting.serve_far import COUNTS
from mounting.servers import Foreground, Mount, Rclone, Saved

# ruff: noqa: D102  (`Server` describes the methods)

_FILES, _BIG = "files", "big"
_FILE = "big.bin"
_SMALLEST, _LARGEST = 2_000, 8_000
_EPOCH, _REQUESTS, _READ, _READ_REQUESTS = "epoch", "requests", "read", "requests of it"
_FASTER = 1.0


class FarReplicate(Foreground):
    """The process of a mount of ours, with nothing cached, on a store that is far away."""

    name = "replicate"

    def __init__(self, workspace: Workspace, experiment_id: str) -> None:
        super().__init__(workspace.root)
        self._state = workspace.root / "far"
        self._counts = self._state / "counts"
        self._repository = workspace.repository
        self._experiment_id = experiment_id

    def backing(self) -> Sequence[Path]:
        return [self._repository]

    @property
    def requests(self) -> int:
        """How many its store has been asked since it was mounted."""
        return int(COUNTS.unpack(self._counts.read_bytes())[0])

    @contextmanager
    def mounted(self) -> Iterator[Mount]:
        (self._state / "register").mkdir(parents=True)
        self._counts.write_bytes(bytes(COUNTS.size))
        try:
            with super().mounted() as mount:
                yield mount
        finally:
            shutil.rmtree(self._state)

    def _command(self, directory: Path) -> Sequence[str | Path]:
        return [
            sys.executable,
            Path(__file__).with_name("serve_far.py"),
            self._counts,
            self._state,
            f"file://{self._repository}",
            self._experiment_id,
            directory,
        ]


class FarRclone(Rclone):
    """rclone on a bucket that is far away."""

    def __init__(self, program: Path, workspace: Workspace) -> None:
        super().__init__(program, workspace.root, f":s3:{BUCKET}", "--use-server-modtime")
        self._project = workspace.project
        self._bucket: Bucket | None = None

    def backing(self) -> Sequence[Path]:
        return [self._project / DATA]

    @property
    def requests(self) -> int:
        """How many the bucket has answered since it was mounted."""
        return self._bucket.requests if self._bucket else 0

    @contextmanager
    def mounted(self) -> Iterator[Mount]:
        self._bucket = Bucket(self._project)
        try:
            with super().mounted() as mount:
                yield mount
        finally:
            self._bucket.stop()

    def _surroundings(self) -> dict[str, str]:
        assert self._bucket is not None, "it listens while it is mounted"
        return {
            "RCLONE_S3_PROVIDER": "Other",
            "RCLONE_S3_ENDPOINT": self._bucket.url,
            "RCLONE_S3_ACCESS_KEY_ID": "benchmark",
            "RCLONE_S3_SECRET_ACCESS_KEY": "benchmark",
            # Its client for buckets takes no certificates but its own, and there is no TLS here.
            "AWS_CA_BUNDLE": "",
        }


def make(workspace: Workspace, scale: Scale) -> None:
    """Small files in directories of a hundred, and a big one."""
    workspace.make_tree(workspace.project / DATA / _FILES, scale.far_files, _SMALLEST, _LARGEST)
    (workspace.project / DATA / _BIG).mkdir()
    workspace.write_file(workspace.project / DATA / _BIG / _FILE, scale.far_file_bytes)


def measure(workspace: Workspace, scale: Scale, saved: Saved, peers: Peers, loader: Loader) -> list[Figure]:
    """An epoch of the loader in a new mount, then the big file in another one."""
    print(f"simulated: a store that is far away ({latency.describe()}), for us and for rclone", flush=True)
    ours = FarReplicate(workspace, saved.experiment_id)
    servers: list[FarReplicate | FarRclone] = [ours]
    if program := peers.find_command("rclone", "rclone"):
        servers.append(FarRclone(program, workspace))
    measured = Measured()
    for server in by_turns("far away", servers, scale.rounds):
        page_cache.warm(server.backing())
        with server.mounted() as mount:
            [elapsed] = loader.read(mount.directory / _FILES, scale.far_files, 1)
            measured.add(server.name, _EPOCH, elapsed)
            measured.add(server.name, _REQUESTS, server.requests)
            peak = mount.peak_bytes()
        with server.mounted() as mount:
            measured.add(server.name, _READ, read_in_order(mount.directory / _BIG / _FILE))
            measured.add(server.name, _READ_REQUESTS, server.requests)
            measured.add(server.name, MEMORY, max(peak, mount.peak_bytes()))
    mine = [ours.name]
    case = f"far away (simulated), first epoch over {scale.far_files:,} files"
    big = f"far away (simulated), {format_megabytes(scale.far_file_bytes)} in order"
    return [
        *compare(case, measured.of(_EPOCH), mine, TIMES, peer_target=_FASTER),
        *compare("… requests", measured.of(_REQUESTS), mine, TIMES, peer_target=_FASTER, unit=_format_count),
        *compare_rates(big, measured.of(_READ), mine, format_rate, peer_target=_FASTER),
        *compare("… requests", measured.of(_READ_REQUESTS), mine, unit=_format_count, peer_target=_FASTER),
        *memory_figures("far away", measured, mine),
    ]


def _format_count(count: float) -> str:
    return f"{count:,.0f}"
