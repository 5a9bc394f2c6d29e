"""The handshake of writers and collectors as a small model, of which all interleavings are tried.

One chunk, which a writer may find in packs or put into a new one. Every step of an actor is one request to
the store; between any two of them any other actor may do any number of his, or none of them ever again: so
whoever is frozen or killed anywhere is among what is tried. `Rules` can break each rule of the protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

Names = frozenset[str]
NONE: Names = frozenset()
#: So often a writer begins anew; then he gives up, which is safe.
TRIES = 1


@dataclass(frozen=True)
class Rules:
    """What the protocol asks for."""

    announces: bool = True
    announces_before_it_checks: bool = True
    checks: bool = True
    #: Packs that are put again get other names.
    has_unique_names: bool = True
    condemns: bool = True
    lists_after_condemning: bool = True
    lists_announcements_first: bool = True
    #: A copy that anybody has condemned does not count.
    counts_only_what_nobody_condemned: bool = True
    forgets_condemned: bool = False
    #: Whether it looks at index objects before it commits, beside what is condemned.
    looks_for_lost_packs: bool = True


@dataclass(frozen=True)
class Store:
    packs: Names = NONE
    listed: Names = NONE
    condemned: Names = NONE
    announced: Names = NONE
    records: Names = NONE


@dataclass(frozen=True)
class Writer:
    name: str
    step: str = "learn"
    known: Names = NONE
    tries: int = 0


@dataclass(frozen=True)
class Collector:
    name: str
    #: The pack that it would like to delete: any, whatever it was chosen for.
    target: str
    #: What is seen before it condemns is no more than an idea of what might go, and left out.
    step: str = "condemn"
    is_needed: bool = False
    condemned: Names = NONE
    listed: Names = NONE
    decided: bool = False


Actor = Writer | Collector
State = tuple[Store, tuple[Actor, ...]]


def is_safe(store: Store) -> bool:
    """Whether all that was committed can be read."""
    return not store.records or bool(store.packs & store.listed)


def successors(state: State, rules: Rules) -> Iterator[State]:
    store, actors = state
    for position, actor in enumerate(actors):
        step = _write if isinstance(actor, Writer) else _collect
        for changed, moved in step(store, actor, rules):  # type: ignore[arg-type]
            yield changed, (*actors[:position], moved, *actors[position + 1 :])


def find_loss(start: State, rules: Rules) -> list[State] | None:
    """A shortest way to a state in which something committed is lost; None when there is none."""
    came_from: dict[State, State | None] = {start: None}
    layer = [start]
    while layer:
        after: list[State] = []
        for state in layer:
            if not is_safe(state[0]):
                way: list[State] = []
                at: State | None = state
                while at is not None:
                    way.append(at)
                    at = came_from[at]
                return way[::-1]
            for following in successors(state, rules):
                if following not in came_from:
                    came_from[following] = state
                    after.append(following)
        layer = after
    return None


def _write(store: Store, me: Writer, rules: Rules) -> Iterator[tuple[Store, Writer]]:
    if me.step == "learn":
        known = store.listed - (store.condemned if rules.condemns else NONE)
        yield store, replace(me, step="put pack" if not known else _after_data(rules), known=known)
    elif me.step == "put pack":
        name = f"{me.name}{me.tries}" if rules.has_unique_names else "a"
        yield (
            replace(store, packs=store.packs | {name}),
            replace(me, step="list pack", known=frozenset({name})),
        )
    elif me.step == "list pack":
        yield replace(store, listed=store.listed | me.known), replace(me, step=_after_data(rules))
    elif me.step == "announce":
        after = "check" if rules.checks and rules.announces_before_it_checks else "commit"
        yield replace(store, announced=store.announced | {me.name}), replace(me, step=after)
    elif me.step == "check":
        lost = me.known - store.listed if rules.looks_for_lost_packs else NONE
        # Who puts a pack again under its old name has to rely on what he has put himself.
        is_own = me.tries > 0 and not rules.has_unique_names
        if (me.known & store.condemned and not is_own) or lost:
            if me.tries < TRIES:
                yield store, replace(me, step="learn", tries=me.tries + 1)
        else:
            is_announced = not rules.announces or rules.announces_before_it_checks
            yield store, replace(me, step="commit" if is_announced else "announce")
    elif me.step == "commit":
        yield replace(store, records=store.records | {me.name}), replace(me, step="withdraw")
    elif me.step == "withdraw":
        yield replace(store, announced=store.announced - {me.name}), replace(me, step="done")


def _after_data(rules: Rules) -> str:
    if rules.announces and (rules.announces_before_it_checks or not rules.checks):
        return "announce"
    return "check" if rules.checks else "commit"


def _collect(store: Store, me: Collector, rules: Rules) -> Iterator[tuple[Store, Collector]]:
    first, second = (
        ("announcements", "records") if rules.lists_announcements_first else ("records", "announcements")
    )
    if me.step == "condemn":
        condemned = store.condemned | {me.target} if rules.condemns else store.condemned
        after = "list condemned" if rules.lists_after_condemning else "decide"
        yield replace(store, condemned=condemned), replace(me, step=after, is_needed=me.is_needed)
    elif me.step == "look at announcements":
        yield store, replace(me, step="look at records", is_needed=bool(store.announced))
    elif me.step == "look at records":
        is_needed = me.is_needed or bool(store.records)
        yield store, replace(me, step="look at packs", is_needed=is_needed)
    elif me.step == "look at packs":
        yield store, replace(me, step="condemn", condemned=store.condemned, listed=store.listed)
    elif me.step == "list condemned":
        yield store, replace(me, step="list packs", condemned=store.condemned)
    elif me.step == "list packs":
        yield store, replace(me, step=f"list {first}", listed=store.listed)
    elif me.step == "list announcements":
        after = "decide" if second == "announcements" else "list records"
        yield store, replace(me, step=after, is_needed=me.is_needed or bool(store.announced))
    elif me.step == "list records":
        after = "decide" if second == "records" else "list announcements"
        yield store, replace(me, step=after, is_needed=me.is_needed or bool(store.records))
    elif me.step == "decide":
        others = me.listed - {me.target}
        if rules.counts_only_what_nobody_condemned:
            others -= me.condemned
        if not me.is_needed or others:
            yield store, replace(me, step="take out of the index", decided=True)
    elif me.step == "take out of the index":
        yield replace(store, listed=store.listed - {me.target}), replace(me, step="delete")
    elif me.step == "delete":
        after = "forget" if rules.forgets_condemned else "done"
        yield replace(store, packs=store.packs - {me.target}), replace(me, step=after)
    elif me.step == "forget":
        yield replace(store, condemned=store.condemned - {me.target}), replace(me, step="done")
