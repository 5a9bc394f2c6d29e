"""Trees of small files that change by name, by content and by time alone: no snapshot has anything stale."""

import mmap
import os
from random import Random

import pytest
from rig import writers
from rig.file_systems import NAMES
from rig.oracle import compare, describe, using
from rig.sites import IS_LONG, SEED, rounds

import replicate

#: From so many files on, a tree is watched, and what has no events is not even listed.
WATCHED = 2100


@pytest.mark.parametrize("name", NAMES if IS_LONG else ("ext4", "btrfs"))
def test_trees_that_are_attacked_are_saved_as_they_were(make_site, name):
    site = make_site(name)
    site.train(workload="tree", rounds=rounds(6))
    assert set(site.judge().values()) == {"stored"}


def test_a_tree_that_is_large_enough_to_be_watched_is_saved_as_it_was(site):
    site.train(workload="tree", tree_files=WATCHED, rounds=rounds(3))
    assert set(site.judge().values()) == {"stored"}


def test_trees_that_are_attacked_after_init_are_saved_as_they_were(site, tmp_path):
    """Each `init` saves the tree anew: with nothing known at first, then with everything known."""
    tree = site.project / "tree"
    make_tree(tree, 200)
    made = []
    with site.recording():
        project = replicate.Project(repository=site.url, directory=str(site.project))
        for number in range(rounds(5)):
            random = Random(f"{SEED}/{number}")
            expected = describe(site.project, ["tree"])
            attack = random.choice(writers.TREE_WRITERS)
            with project.experiments.create(path="tree", quiet=True) as experiment:
                attack(tree, random)
            made.append((attack.__name__, experiment.id, expected))
        replicate.flush(timeout=120)
    with using(site.reader_home):
        for number, (attack, identifier, expected) in enumerate(made):
            out = tmp_path / f"out-{number}"
            project.experiments.get(identifier).checkout(str(out), quiet=True)
            assert list(compare(expected, out, ["tree"], f"then {attack}")) == []


@pytest.mark.parametrize("count", [200, WATCHED])
def test_edits_through_a_name_outside_the_tree_are_saved(site, count):
    """Nothing in the directory of the file tells of them but the file itself."""
    tree, other = site.project / "tree", site.project / "other name"
    make_tree(tree, count)
    os.link(tree / "7", other)
    assert_changes_are_saved(site, lambda random: other.write_bytes(writers.content(random, 1000)))


@pytest.mark.parametrize("count", [200, WATCHED])
def test_stores_through_a_mapping_that_the_script_keeps_are_saved(site, count):
    """They give no event, and most of them no new time either."""
    tree = site.project / "tree"
    make_tree(tree, count)
    (tree / "7").write_bytes(bytes(5000))

    with (tree / "7").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:

        def store(random):
            mapped[random.randrange(5000)] = 1 + random.randrange(255)

        assert_changes_are_saved(site, store)


def make_tree(tree, count):
    tree.mkdir()
    for number in range(count):
        (tree / f"{number}").write_bytes(b"x")


def assert_changes_are_saved(site, change):
    """Of the file `7`, through calls without a pause and through calls each of which is stored first."""
    random = Random(SEED)
    with site.recording() as experiment:
        contents = []
        for number in range(8):
            change(random)
            contents.append((site.project / "tree" / "7").read_bytes())
            experiment.checkpoint("tree", quiet=True)
            if number > 3:
                replicate.flush(timeout=120)
        replicate.flush(timeout=120)
        assert [one.open("tree/7").read() for one in experiment.checkpoints] == contents
