"""A store that is away, full or slow, a full spool, no descriptors: calls say so, and nothing is wrong."""

import re
import resource
import threading
from random import Random

import pytest
from rig import writers
from rig.daemons import no_new_descriptors, processes_of
from rig.oracle import describe
from rig.sites import SEED, rounds
from rig.troubles import fill

LARGE = (5_000_000,) * 8
SMALL_SPOOL_BYTES = 32 << 20
NO_SPACE = re.compile("space|full").search


@pytest.mark.parametrize("trouble", ["repository away", "store stopped"])
def test_files_that_are_attacked_while_nothing_can_be_stored_are_stored_later(site, trouble):
    site.train(rounds=rounds(6), rungs=("", "lease", "memory"), trouble=trouble)
    assert set(site.judge().values()) == {"stored"}


def test_files_that_are_attacked_while_the_repository_is_full_are_stored_later(make_site, make_tmpfs):
    site = make_site(repository=make_tmpfs(256 << 20) / "repository")
    site.train(rounds=rounds(6), rungs=("", "lease", "memory"), trouble="repository full")
    assert set(site.judge().values()) == {"stored"}


@pytest.mark.parametrize(
    ("mode", "rungs"), [("auto", ("", "lease", "memory", "copy")), ("copy", ("", "memory", "copy"))]
)
def test_a_checkpoint_too_large_for_the_spool_is_right_or_refused(make_site, make_tmpfs, mode, rungs):
    """Leases need no room until somebody writes to what they hold; what needs room and has none says so."""
    site = make_site(home=make_tmpfs(SMALL_SPOOL_BYTES) / "home")
    (site.project / "replicate.yaml").write_text(f"capture: {mode}\n")
    site.train(rounds=rounds(6), rungs=rungs, sizes=LARGE)
    states = site.judge(may_fail=NO_SPACE)
    assert "failed" in states.values()
    assert saves_a_file(site)


def test_a_full_home_refuses_checkpoints_until_it_has_space_again(make_site, make_tmpfs):
    place = make_tmpfs(SMALL_SPOOL_BYTES)
    site = make_site(home=place / "home")
    files = site.project / "files"
    files.mkdir()
    (files / "model").write_bytes(writers.content(Random(SEED), 3_000_000))
    with site.recording() as experiment:
        before = experiment.checkpoint("files", quiet=True).wait(60)
        fill(place / "filler")
        refused = [experiment.checkpoint("files", metrics={"note": "x" * 60_000}) for _ in range(30)]
        (place / "filler").unlink()
        expected = describe(site.project, ["files"])
        after = experiment.checkpoint("files", quiet=True)
        assert site.differences(before, expected) == []
        assert site.differences(after, expected) == []
        assert any(one.state == "failed" and NO_SPACE(one.error) for one in refused)


def test_ten_thousand_files_are_leased_and_saved_as_they_were(site):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 20_000:
        pytest.skip("this user may not open 20,000 files, of which leases take half")
    files = make_files(site, 10_000, size=100)
    with site.recording("lease") as experiment:
        expected = describe(site.project, ["files"])
        checkpoint = experiment.checkpoint("files", quiet=True)
        attack(files[::7], writers.rewrite)
        assert site.differences(checkpoint, expected) == []


def test_files_for_which_there_are_no_descriptors_are_not_leased_and_saved_all_the_same(site):
    files = make_files(site, 150, size=(1 << 20) + 1)
    site.start_daemon(descriptors=120)
    with site.recording() as experiment:
        expected = describe(site.project, ["files"])
        checkpoint = experiment.checkpoint("files", quiet=True)
        attack(files[::3], writers.rewrite)
        assert site.differences(checkpoint, expected) == []


def test_leases_for_which_there_are_no_descriptors_are_refused(site):
    make_files(site, 150, size=100)
    site.start_daemon(descriptors=120)
    with site.recording("lease") as experiment:
        checkpoint = experiment.checkpoint("files")
    assert checkpoint.state == "failed"
    assert "lease" in checkpoint.error
    assert saves_a_file(site)


def test_a_daemon_that_lost_its_descriptors_goes_on_when_it_has_them_again(site):
    files = make_files(site, 50, size=20_000)
    with site.recording() as experiment:
        experiment.checkpoint("files", quiet=True).wait(60)
        (pid,) = processes_of(site.home, b"serve")
        with no_new_descriptors(pid):
            attack(files, writers.rewrite)
            expected = describe(site.project, ["files"])
            meanwhile = experiment.checkpoint("files", quiet=True)
            attack(files, writers.rewrite)
        assert saves_a_file(site)
        if meanwhile.state != "failed":
            assert site.differences(meanwhile, expected) == []


def make_files(site, count, size):
    """Files that take no space, of a size, in directories of a hundred."""
    files = [site.project / "files" / f"{number // 100}" / f"{number}" for number in range(count)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            opened.write(file.name.encode())
            opened.truncate(size)
    return files


def attack(files, writer):
    """From four threads at once."""

    def work(mine):
        for file in mine:
            writer(file, Random(file.name))

    threads = [threading.Thread(target=work, args=(files[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def saves_a_file(site):
    """Whether a new run records as if nothing had been."""
    (site.project / "small").write_bytes(b"small")
    with site.recording() as experiment:
        return experiment.checkpoint("small", quiet=True).wait(60).open("small").read() == b"small"
