"""Several watchers are told the same, and one that fails disturbs nobody."""

from replicated.mount.reading.watching import Watchers


class Listener:
    def __init__(self, failing=()):
        self.heard = []
        self._failing = failing

    def _hear(self, name, *details):
        self.heard.append((name, *details))
        if name in self._failing:
            raise KeyError(name)

    def on_open(self, inode, node):
        self._hear("open", inode, node)

    def on_read(self, inode, node, offset, length, is_sequential):
        self._hear("read", inode, node, offset, length, is_sequential)

    def on_release(self, inode, node):
        self._hear("release", inode, node)


def tell(watchers):
    watchers.on_open(7, "node")
    watchers.on_read(7, "node", 0, 100, True)
    watchers.on_release(7, "node")


EVERYTHING = [("open", 7, "node"), ("read", 7, "node", 0, 100, True), ("release", 7, "node")]


def test_all_watchers_are_told_everything():
    first, second = Listener(), Listener()
    tell(Watchers(first, second))
    assert first.heard == second.heard == EVERYTHING


def test_a_watcher_that_fails_is_told_nothing_more_and_the_others_all(caplog):
    for failing in ("open", "read", "release"):
        good, bad = Listener(), Listener({failing})
        watchers = Watchers(bad, good)
        tell(watchers)
        tell(watchers)
        assert good.heard == EVERYTHING * 2
        assert [name for name, *_ in bad.heard][-1] == failing
        assert len(bad.heard) <= 3
    assert len(caplog.records) == 3
    caplog.clear()
