import os
import sys
from pathlib import Path

import pytest

from replicate.cli.commands.doctor import render_finding, summarize
from replicate.cli.diagnosis import (
    Finding,
    check_journal_place,
    check_name_clash,
    check_run_directory,
    check_space,
    file_system_type,
    run_check,
)
from replicate.home import Home, find_home

MOUNT_INFO = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:5 / /dev rw - devtmpfs udev rw
24 22 0:40 / /mnt/with\\040space rw shared:2 master:1 - nfs4 server:/x rw
25 22 0:41 / /mnt rw - xfs /dev/vdb rw
26 22 0:42 / /stacked rw - ext4 /dev/vdc rw
27 22 0:43 / /stacked rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/nowhere/at/all", "ext4"),
        ("/dev/null", "devtmpfs"),
        ("/devices", "ext4"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_longest_mount(path, kind):
    assert file_system_type(Path(path), MOUNT_INFO) == kind


def test_mount_points_with_spaces_and_covered_mounts(tmp_path):
    spaced = tmp_path / "with space"
    spaced.mkdir()
    escaped = str(spaced).replace(" ", "\\040")
    info = (
        MOUNT_INFO
        + f"30 22 0:50 / {escaped} rw - nfs4 s:/x rw\n31 22 0:51 / {escaped} rw - fuse.sshfs s rw\n"
    )
    assert file_system_type(spaced / "below", info) == "fuse.sshfs"


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "state", tmp_path / "cache", tmp_path / "run", tmp_path / "logs")


def test_a_run_directory_that_lets_others_in_fails(home):
    home.run.mkdir(mode=0o777)
    os.chmod(home.run, 0o777)
    findings = run_check("Run directory", lambda: check_run_directory(home))
    assert [f.outcome for f in findings] == ["fail"]
    assert "0777" in findings[0].detail and findings[0].hint == f"chmod 700 {home.run}"


def test_a_missing_run_directory_is_in_order(home):
    assert check_run_directory(home)[0].outcome == "ok"


def test_a_socket_path_longer_than_the_kernel_takes_is_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICATE_HOME", str(tmp_path / ("x" * 200)))
    assert check_run_directory(find_home())[0].outcome == "ok"


def test_the_journal_on_shared_memory_is_a_warning(home):
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("this machine has no /dev/shm")
    finding = check_journal_place(Home(shm / "state", home.cache, home.run, home.logs))[0]
    assert finding.outcome == "warn" and "tmpfs" in finding.detail


def test_space_is_measured_at_the_nearest_directory(tmp_path):
    finding = check_space("Disk space", tmp_path / "not" / "yet")[0]
    assert finding.detail.endswith(f"free at {tmp_path}")


def install(directory, name, version):
    metadata = directory / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_other_package_called_replicate_is_found(tmp_path, monkeypatch):
    assert check_name_clash()[0].outcome == "ok"
    install(tmp_path, "replicate", "1.0.4")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    finding = check_name_clash()[0]
    assert finding.outcome == "fail"
    assert finding.detail.endswith("replicate 1.0.4")
    assert "pip uninstall replicate" in finding.hint


def test_a_check_that_the_system_refuses_is_a_finding_and_not_a_crash():
    def refuse():
        raise PermissionError(13, "Permission denied", "/x")

    assert run_check("Thing", refuse) == [Finding("Thing", "fail", "Permission denied: /x")]


def test_findings_read_well_without_colour(view):
    assert render_finding(Finding("FUSE", "fail", "missing\x1b", "install it"), view) == (
        "fail  FUSE: missing\\x1b\n      install it\n"
    )
    assert render_finding(Finding("FUSE", "ok", "there"), view) == "ok    FUSE: there\n"


def test_the_summary_counts():
    assert summarize([Finding("a", "ok", "")]) == "Everything is in order"
    findings = [Finding("a", "fail", ""), Finding("b", "warn", ""), Finding("c", "warn", "")]
    assert summarize(findings) == "1 problem, 2 warnings"
