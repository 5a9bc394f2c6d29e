"""That the protocol loses nothing, whatever happens when, and that each of its rules is needed for that."""

from dataclasses import replace

import pytest
from collecting.protocol import Actor, Collector, Rules, State, Store, Writer, find_loss


def garbage(*actors: Actor) -> State:
    """A pack that nothing needs, before somebody wants to store just what it holds."""
    names = frozenset({"a"})
    return Store(packs=names, listed=names), actors


def two_copies(*actors: Actor) -> State:
    """Two packs with the same, of which a snapshot needs one."""
    names = frozenset({"a", "b"})
    return Store(packs=names, listed=names, records=frozenset({"old"})), actors


def empty(*actors: Actor) -> State:
    return Store(), actors


RULES = Rules()
STARTS = {
    "a writer and a collector": garbage(Writer("w"), Collector("c", "a")),
    "a writer and two collectors of the same pack": garbage(
        Writer("w"), Collector("c", "a"), Collector("d", "a")
    ),
    "two writers and a collector": garbage(Writer("w"), Writer("v"), Collector("c", "a")),
    "a writer and collectors of what he is putting": garbage(
        Writer("w"), Collector("c", "a"), Collector("d", "w0")
    ),
    "collectors of both copies": two_copies(Collector("c", "a"), Collector("d", "b")),
    "a writer and collectors of both copies": two_copies(
        Writer("w"), Collector("c", "a"), Collector("d", "b")
    ),
    "an upload that is collected before it is announced": empty(
        Writer("w"), Collector("c", "w0"), Collector("d", "w1")
    ),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_nothing_is_ever_lost(start: State) -> None:
    assert find_loss(start, RULES) is None


BROKEN = {
    "nobody tells anybody anything": replace(RULES, announces=False, checks=False, condemns=False),
    "writers check before they commit, and announce nothing": replace(RULES, announces=False),
    "writers check first and announce then": replace(RULES, announces_before_it_checks=False),
    "writers announce and do not check": replace(RULES, checks=False),
    "collectors condemn nothing": replace(RULES, condemns=False, looks_for_lost_packs=False),
    "collectors list before they condemn": replace(RULES, lists_after_condemning=False),
    "collectors list records before announcements": replace(RULES, lists_announcements_first=False),
    "collectors count copies that others have condemned": replace(
        RULES, counts_only_what_nobody_condemned=False
    ),
    "names of packs are used again": replace(RULES, has_unique_names=False),
    "what is condemned is forgotten": replace(RULES, forgets_condemned=True, looks_for_lost_packs=False),
}


@pytest.mark.parametrize("rules", BROKEN.values(), ids=BROKEN)
def test_without_any_one_of_the_rules_something_can_be_lost(rules: Rules) -> None:
    if not rules.lists_after_condemning:
        # Then what it sees before counts.
        starts = [
            (
                store,
                tuple(
                    replace(a, step="look at announcements") if isinstance(a, Collector) else a
                    for a in actors
                ),
            )
            for store, actors in STARTS.values()
        ]
    else:
        starts = list(STARTS.values())
    assert any(find_loss(start, rules) is not None for start in starts)


def test_a_loss_is_shown_step_by_step() -> None:
    way = find_loss(STARTS["a writer and a collector"], BROKEN["nobody tells anybody anything"])
    assert way is not None
    assert way[0] == STARTS["a writer and a collector"]
    assert way[-1][0].records == {"w"}
    assert not way[-1][0].packs & way[-1][0].listed
