"""What happens to files the instant `checkpoint` returns never shows: every writer, every rung."""

import mmap
import re
from random import Random

import pytest
from rig import writers
from rig.file_systems import CAN_REFLINK, NAMES
from rig.sites import IS_LONG, SEED, rounds

import replicate

RUNGS = ("", "lease", "memory", "copy", "reflink")
#: For what depends less on the file system.
TELLING = NAMES if IS_LONG else ("ext4", "btrfs")
LARGE = (0, 1, 4096, 1 << 20, (1 << 20) + 1, 5_000_000, 40_000_000)

long_only = pytest.mark.skipif(not IS_LONG, reason="long: set TORTURE_ROUNDS")


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_attacked_are_saved_as_they_were(make_site, name):
    site = make_site(name)
    site.train(rounds=rounds(10), rungs=RUNGS)
    expected = {"stored"} if name in CAN_REFLINK else {"stored", "failed"}
    assert set(site.judge().values()) == expected


def test_files_that_are_attacked_are_saved_as_they_were_without_privileges(site):
    site.train(rounds=rounds(6), rungs=("", "memory", "copy"))
    assert set(site.judge().values()) == {"stored"}


@pytest.mark.parametrize("name", TELLING)
def test_files_that_are_attacked_are_saved_as_they_were_with_capture_copy(make_site, name):
    site = make_site(name)
    (site.project / "replicate.yaml").write_text("capture: copy\n")
    site.train(rounds=rounds(4))
    assert set(site.judge().values()) == {"stored"}


@long_only
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", NAMES)
def test_large_files_that_are_attacked_are_saved_as_they_were_on_each_rung(make_site, name, rung):
    site = make_site(name)
    site.train(rounds=rounds(1), rungs=(rung,), sizes=LARGE)
    assert set(site.judge().values()) == {"failed" if rung in site.impossible else "stored"}


@long_only
@pytest.mark.parametrize("name", NAMES)
def test_files_are_saved_as_they_were_with_a_spool_on_another_file_system(make_site, tmp_path, name):
    site = make_site(name, home=tmp_path / "home")
    site.train(rounds=rounds(1), sizes=LARGE)
    assert set(site.judge().values()) == {"stored"}


@pytest.mark.parametrize(
    "writer", [writers.rewrite_keeping_times, writers.recreate_keeping_times, writers.replace_keeping_times]
)
def test_what_changes_between_two_calls_without_a_pause_is_saved_each_time(site, writer):
    """Same name, same size, same time of change, and often the same inode."""
    random = Random(SEED)
    files = {name: site.project / name for name in ("small", "large")}
    for file, size in zip(files.values(), (3, 3_000_000), strict=True):
        file.write_bytes(bytes(size))
    with site.recording() as experiment:
        contents = []
        for _ in range(rounds(12)):
            for file in files.values():
                writer(file, random)
            contents.append({name: file.read_bytes() for name, file in files.items()})
            experiment.checkpoint(list(files), quiet=True)
        replicate.flush(timeout=120)
        saved = [{name: one.open(name).read() for name in files} for one in experiment.checkpoints]
    wrong = [step for step, pair in enumerate(zip(saved, contents, strict=True)) if pair[0] != pair[1]]
    assert not wrong


@pytest.mark.parametrize("size", [5_000, 3_000_000])
@pytest.mark.parametrize("name", ["here", "tmpfs"])
def test_stores_through_a_mapping_that_is_gone_at_the_next_call_are_saved(make_site, name, size):
    """A page that is dirty already, or of tmpfs, takes stores that leave the times of the file alone."""
    site = make_site(name)
    file = site.project / "model"
    file.write_bytes(bytes(size))
    with site.recording() as experiment:
        contents = []
        for number in range(1, 9):
            with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
                for value in (number, -number):
                    mapped[7] = (mapped[7] + value) % 256
                    mapped[8] = (mapped[8] + 1) % 256
                    contents.append(mapped[:])
                    if value > 0:
                        experiment.checkpoint("model", quiet=True)
            experiment.checkpoint("model", quiet=True)
            if number > 4:
                # Known, and not only pending, when it is looked at next.
                replicate.flush(timeout=120)
        replicate.flush(timeout=120)
        saved = [one.open("model").read() for one in experiment.checkpoints]
    wrong = [step for step, pair in enumerate(zip(saved, contents, strict=True)) if pair[0] != pair[1]]
    assert not wrong


def test_the_judge_notices_whatever_differs(site):
    site.train(rounds=2)
    truth = site.chronicle.path.read_text()
    for lie in (
        re.sub(r'"[0-9a-f]{32}"', f'"{"0" * 32}"', truth, count=1),
        truth.replace('"kept/log.txt": ["file", 420', '"kept/log.txt": ["file", 416', 1),
        truth.replace('"kept/log.txt":', '"kept/another":', 1),
        truth.replace('"step": 1', '"step": 7'),
    ):
        assert lie != truth
        site.chronicle.path.write_text(lie)
        with pytest.raises((AssertionError, FileNotFoundError)):
            site.judge()
