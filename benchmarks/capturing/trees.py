"""What `init(path=".")` costs for many files, against one pass in C over the same tree in the same round."""

import os

from measuring.figures import SECONDS, TIMES, Figure
from measuring.workspace import TreePass, Workspace, progress, timed

from capturing.scale import Scale

_TIMES_OF_PASS = 2.5
_WITH_NOTIFICATION_S = 0.02


def measure_first(workspace: Workspace, scale: Scale) -> list[Figure]:
    """Trees that this daemon and this repository have never seen."""
    passes = TreePass(workspace.root)
    figures = []
    for count, smallest, largest in scale.trees:
        case = f"{count:,} files of {smallest / 1000:.0f}–{largest / 1000:.0f} kB"
        progress(f"{case}: making them")
        workspace.make_tree(workspace.project, count, smallest, largest)
        walks: list[float] = []
        reads: list[float] = []
        empty: list[float] = []
        calls: list[float] = []
        stored: list[float] = []
        for round_number in range(scale.rounds):
            progress(f"{case}: round {round_number + 1} of {scale.rounds}")
            workspace.renew()
            workspace.memory.label(f"a tree of {count:,} files")
            passes.read(workspace.project)  # everything is in the page cache now
            walks.append(passes.walk(workspace.project))
            reads.append(passes.read(workspace.project))
            empty.append(_time_init(workspace, None))
            calls.append(_time_init(workspace, "."))
            stored.append(calls[-1] + timed(workspace.settle))
            workspace.memory.label("")
        workspace.empty_project()
        figures += [
            Figure(f"first init(), {case}", calls, TIMES, "C: open, read, close", reads, _TIMES_OF_PASS),
            Figure("… stored and on the disk", stored, TIMES, "C: nftw", walks),
            Figure("… init() without files", empty),
        ]
    return figures


def measure_unchanged(workspace: Workspace, scale: Scale) -> list[Figure]:
    """A tree that is stored already, by a daemon that has just started and by one that was told of changes.

    A daemon that was restarted knows of no change since, and has to look at every file.
    """
    count, smallest, largest = scale.unchanged_tree
    passes = TreePass(workspace.root)
    tree = workspace.project / "tree"
    progress(f"an unchanged tree of {count:,} files: making it")
    workspace.make_tree(tree, count, smallest, largest)
    workspace.renew()
    workspace.memory.label(f"a tree of {count:,} files")
    first = _time_init(workspace, "tree")
    workspace.settle()
    walks: list[float] = []
    walked: list[float] = []
    notified: list[float] = []
    changed: list[float] = []
    for round_number in range(scale.rounds):
        progress(f"an unchanged tree of {count:,} files: round {round_number + 1} of {scale.rounds}")
        workspace.restart_daemon()
        passes.walk(tree)
        walks.append(passes.walk(tree))
        for seconds in (walked, notified):
            seconds.append(_time_init(workspace, "tree"))
            workspace.settle()
        workspace.write_file(tree / "0000" / "000000.bin", 1000 + round_number)
        changed.append(_time_init(workspace, "tree"))
        workspace.settle()
    workspace.memory.label("")
    workspace.empty_project()
    os.sync()
    case = f"{count:,} unchanged files"
    return [
        Figure(f"first init(), {count:,} files", [first]),
        Figure(f"init(), {case}, daemon restarted", walked, TIMES, "C: nftw", walks, _TIMES_OF_PASS),
        Figure(f"init(), {case}, notified", notified, SECONDS, target=_WITH_NOTIFICATION_S),
        Figure("… and one of them changed", changed, TIMES, "C: nftw", walks),
    ]


def _time_init(workspace: Workspace, path: str | None) -> float:
    """Seconds of the call alone; the experiment is stopped afterwards."""
    begun = []
    seconds = timed(lambda: begun.append(workspace.begin(path)))
    begun[0].stop()
    return seconds
