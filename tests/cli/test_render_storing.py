from dataclasses import replace
from datetime import timedelta

import pytest

from replicate.channel import DaemonInfo
from replicate.cli.render.storing import (
    describe_unreadable,
    disk_usage_json,
    render_disk_usage,
    render_failures,
    render_status,
    status_json,
)
from replicate.query import DaemonStatus, Failure
from replicate.usage import DiskUsage, DiskUsageReport, EncodedBytes, UnreadableSnapshot


@pytest.fixture
def idle(now):
    return DaemonStatus(
        daemon=DaemonInfo(pid=7, version="0.1.0", protocol=1, started=now - timedelta(hours=2)),
        pending=0,
        active=0,
        failed=0,
        bytes_pending=0,
        active_id="",
        active_bytes_done=0,
        active_bytes_total=0,
        bytes_per_second=0.0,
        spool_bytes=0,
        failures=(),
        waiting_because="",
        mounts=0,
        failed_mounts=0,
        leased_files=0,
        leased_bytes=0,
    )


@pytest.fixture
def busy(idle, now):
    return replace(
        idle,
        pending=2,
        active=1,
        failed=1,
        bytes_pending=300 << 20,
        active_id="c1" + "0" * 62,
        active_bytes_done=10 << 20,
        active_bytes_total=100 << 20,
        bytes_per_second=float(10 << 20),
        spool_bytes=1 << 30,
        failures=(Failure("c2" + "0" * 62, "ee" + "0" * 62, ("model.pt",), "torn", now),),
        waiting_because="disk full\n",
        mounts=2,
    )


def test_an_idle_daemon(idle, view):
    assert render_status(idle, view) == (
        "Daemon:  running (pid 7, version 0.1.0, started 2 hours ago)\n"
        "Queue:   empty, everything is stored\n"
        "Spool:   0 B\n"
        "Mounts:  0\n"
    )


def test_a_busy_daemon_says_how_long_and_what_failed(busy, view):
    assert render_status(busy, view) == (
        "Daemon:   running (pid 7, version 0.1.0, started 2 hours ago)\n"
        "Queue:    3 items to store (300.0 MiB), 10.0 MiB/s, about 30s left\n"
        "Storing:  c200000, 10.0 MiB of 100.0 MiB\n".replace("c2", "c1")
        + "Held up:  disk full\\n\n"
        "Spool:    1.0 GiB\n"
        "Mounts:   2\n"
        "\n"
        "Failed\n"
        "c200000  model.pt (just now)\n"
        "    torn\n"
        "`replicate rm c200000` forgets what failed\n"
    )


def test_leased_files_are_shown_when_there_are_any(idle, view):
    leased = replace(idle, leased_files=1200, leased_bytes=3 << 30)
    text = render_status(leased, view)
    assert "Leased:  1,200 files (3.0 GiB) where they are\n" in text
    assert status_json(leased)["leased"] == {"files": 1200, "bytes": 3 << 30}
    assert status_json(idle)["leased"] == {"files": 0, "bytes": 0}


def test_many_failures_name_a_few_to_forget(busy, view):
    text = render_failures(busy.failures * 5, view)
    assert "`replicate rm c200000 c200000 c200000 …` forgets" in text


def test_status_json_has_the_keys_of_the_contract(busy):
    data = status_json(busy)
    assert data["daemon"] == {
        "pid": 7,
        "version": "0.1.0",
        "protocol": 1,
        "started": "2026-11-23T10:00:00.000000Z",
    }
    assert data["queue"] == {
        "pending": 2,
        "active": 1,
        "failed": 1,
        "bytes_pending": 300 << 20,
        "bytes_per_second": float(10 << 20),
        "eta_s": 30.0,
    }
    assert data["failures"] == [
        {
            "id": "c2" + "0" * 62,
            "experiment_id": "ee" + "0" * 62,
            "path": "model.pt",
            "error": "torn",
            "at": "2026-11-23T12:00:00.000000Z",
        }
    ]


def test_status_json_of_an_idle_daemon_has_nulls(idle):
    data = status_json(idle)
    assert data["active"] is data["waiting_because"] is data["queue"]["eta_s"] is None
    assert data["failures"] == []


REPORT = DiskUsageReport(
    experiments=(
        DiskUsage("aa" + "0" * 62, 1234, logical_bytes=4096, unique_bytes=2048, stored_bytes=1024),
        DiskUsage("bb" + "0" * 62),
    ),
    total=DiskUsage(
        snapshots=1234,
        logical_bytes=4096,
        unique_bytes=2048,
        stored_bytes=1536,
        base_bytes=512,
        metadata_bytes=100,
        encodings={
            "raw": EncodedBytes(512, 512),
            "zstd": EncodedBytes(0, 0),
            "delta": EncodedBytes(1536, 512),
        },
    ),
    unreferenced_bytes=7,
)


def test_disk_usage_says_what_saved_space(view):
    assert render_disk_usage(REPORT, view) == (
        "EXPERIMENT  SNAPSHOTS  LOGICAL   UNIQUE   STORED  DEDUP  COMPRESSION\n"
        "aa00000         1,234  4.0 KiB  2.0 KiB  1.0 KiB    50%          50%\n"
        "bb00000             0      0 B      0 B      0 B      -            -\n"
        "total           1,234  4.0 KiB  2.0 KiB  1.5 KiB    50%          25%\n"
        "\n"
        "ENCODING     UNIQUE  STORED  SAVED\n"
        "raw           512 B   512 B     0%\n"
        "delta       1.5 KiB   512 B    67%\n"
        "bases only        -   512 B      -\n"
        "\n"
        "Deduplication saved 2.0 KiB (50%); compression saved 512 B (25%)\n"
        "The repository takes 1.6 KiB: 1.5 KiB of contents, 100 B of metadata, 7 B that nothing refers to\n"
    )


def test_disk_usage_is_honest_when_nothing_was_saved(view):
    usage = DiskUsage(snapshots=1, logical_bytes=10, unique_bytes=10, stored_bytes=10)
    text = render_disk_usage(DiskUsageReport(total=usage), view)
    assert "\nDeduplication saved nothing; compression saved nothing\n" in text
    assert text.endswith("The repository takes 10 B: 10 B of contents, 0 B of metadata\n")


def test_disk_usage_is_honest_when_bases_take_more_than_deltas_save(view):
    usage = DiskUsage(snapshots=1, logical_bytes=1000, unique_bytes=1000, stored_bytes=1200, base_bytes=900)
    text = render_disk_usage(DiskUsageReport(total=usage), view)
    assert " 1000 B  1.2 KiB     0%         -20%\n" in text
    assert "Deduplication saved nothing; what is left takes 200 B more, with the bases of deltas\n" in text


def test_the_last_row_is_the_repository_when_only_some_experiments_are_shown(view):
    assert "\nrepository      1,234" in render_disk_usage(REPORT, view, chosen=True)


def test_disk_usage_without_experiments_says_what_nothing_refers_to(view):
    empty = DiskUsageReport(total=DiskUsage(metadata_bytes=100), unreferenced_bytes=2048)
    assert render_disk_usage(empty, view) == (
        "The repository takes 2.1 KiB: 0 B of contents, 100 B of metadata, 2.0 KiB that nothing refers to\n"
    )
    assert render_disk_usage(DiskUsageReport(), view) == ""


def test_disk_usage_of_files_whose_experiment_is_lost_has_a_row(view):
    usage = DiskUsage(snapshots=1, logical_bytes=10, unique_bytes=10, stored_bytes=10)
    assert "\ntotal               1     10 B" in render_disk_usage(DiskUsageReport(total=usage), view)


def test_disk_usage_json_has_the_total_at_the_top():
    data = disk_usage_json(REPORT)
    assert (data["logical_bytes"], data["unique_bytes"], data["stored_bytes"]) == (4096, 2048, 1536)
    assert (data["metadata_bytes"], data["unreferenced_bytes"], data["repository_bytes"]) == (100, 7, 1643)
    assert data["encodings"]["delta"] == {"plain_bytes": 1536, "stored_bytes": 512}
    assert data["unreadable"] == []
    assert data["experiments"][0] == {
        "id": "aa" + "0" * 62,
        "logical_bytes": 4096,
        "unique_bytes": 2048,
        "stored_bytes": 1024,
        "saved_by_deduplication_bytes": 2048,
        "saved_by_compression_bytes": 1024,
        "encodings": {
            name: {"plain_bytes": 0, "stored_bytes": 0} for name in ("raw", "zstd", "planes", "delta")
        },
        "base_bytes": 0,
        "metadata_bytes": 0,
        "snapshots": 1234,
    }


def test_snapshots_that_are_left_out_are_named_by_what_they_are_of():
    experiment, checkpoint = "ee" + "0" * 62, "cc" + "0" * 62
    unreadable = (
        UnreadableSnapshot(checkpoint, experiment, "torn"),
        UnreadableSnapshot(experiment, experiment, "torn"),
        UnreadableSnapshot(checkpoint, "", "torn"),
    )
    assert [describe_unreadable(snapshot) for snapshot in unreadable] == [
        "checkpoint cc00000 of ee00000",
        "experiment ee00000, what `init` saved,",
        "snapshot cc00000",
    ]
    data = disk_usage_json(replace(REPORT, unreadable=unreadable[2:]))
    assert data["unreadable"] == [{"id": checkpoint, "experiment_id": None, "error": "torn"}]
