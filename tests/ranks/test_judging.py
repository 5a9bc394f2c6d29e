"""What is done about a checkpoint of which not all parts are there."""

import pytest

from replicate.records import Part
from replicated.parts import (
    ALONE_AFTER_S,
    ALONE_AMONG_OTHERS_AFTER_S,
    JOINED_PATIENCE_S,
    PATIENCE_S,
    Situation,
    judge,
    name_ranks,
)


def situation(
    present=(0,),
    members=None,
    *,
    size=3,
    rank=0,
    others_add=False,
    age_s=0.0,
    quiet_s=0.0,
    **part,
):
    return Situation(
        Part(rank, size, **part), frozenset(present), members or {}, others_add, age_s, quiet_s, "noon"
    )


JOINED = {1: "joined", 2: "joined"}


def test_it_waits_and_says_for_whom():
    assert judge(situation()) == ("wait", "waits for ranks 1 and 2 of 3 since noon")
    assert judge(situation((0, 2))).text == "waits for rank 1 of 3 since noon"
    assert judge(situation((1, 2), rank=1)).text == "waits for rank 0 of 3 since noon"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("killed", "rank 1 was killed without adding its files"),
        ("stopped", "rank 1 ended without adding its files"),
        ("failed", "rank 1 failed without adding its files"),
    ],
)
def test_a_rank_that_is_gone_is_not_waited_for(status, text):
    assert judge(situation((0, 2), {1: status, 2: "joined"})) == ("fail", text)


def test_a_rank_that_is_gone_may_have_added_its_files_before():
    assert judge(situation((0, 1), {1: "killed", 2: "joined"})).kind == "wait"


def test_silence_ends_it_earlier_for_ranks_that_never_joined():
    assert judge(situation(quiet_s=PATIENCE_S)) == (
        "fail",
        "the files of ranks 1 and 2 of 3 did not come within 30 minutes",
    )
    assert judge(situation(quiet_s=PATIENCE_S - 1)).kind == "wait"
    assert judge(situation(members=JOINED, quiet_s=PATIENCE_S)).kind == "wait"
    assert judge(situation(members=JOINED, quiet_s=JOINED_PATIENCE_S)).kind == "fail"
    assert judge(situation(members={1: "joined"}, quiet_s=PATIENCE_S)).kind == "fail"
    assert judge(situation((1,), rank=1, quiet_s=PATIENCE_S)).kind == "wait"
    # Rank 0, which records it, is the first that gives up.
    assert judge(situation((1,), rank=1, quiet_s=JOINED_PATIENCE_S)).kind == "wait"
    assert judge(situation((1,), rank=1, quiet_s=2 * JOINED_PATIENCE_S)).kind == "fail"


@pytest.mark.parametrize("members", [{}, JOINED])
def test_patience_can_be_chosen(members):
    assert judge(situation(members=members, quiet_s=4.0, patience_s=5.0)).kind == "wait"
    assert judge(situation(members=members, quiet_s=5.0, patience_s=5.0)) == (
        "fail",
        "the files of ranks 1 and 2 of 3 did not come within 5 s",
    )


def test_what_nobody_adds_to_is_that_of_rank_0():
    def after(age_s, members=None, **more):
        return judge(situation(members=members, age_s=age_s, is_detected=True, **more)).kind

    assert after(ALONE_AFTER_S - 1) == "wait"
    assert after(ALONE_AFTER_S) == "alone"
    assert after(ALONE_AFTER_S, JOINED) == "wait"
    assert after(ALONE_AMONG_OTHERS_AFTER_S, JOINED) == "alone"
    assert after(ALONE_AFTER_S, is_expected=True) == "wait"
    assert after(ALONE_AMONG_OTHERS_AFTER_S, is_expected=True) == "alone"


def test_ranks_that_ended_well_without_a_file_leave_it_to_rank_0():
    assert judge(situation(members={1: "stopped", 2: "stopped"}, is_detected=True)).kind == "alone"
    # One may still come.
    assert judge(situation(members={1: "stopped"}, is_detected=True)).kind == "wait"


@pytest.mark.parametrize(
    "changes",
    [
        {"is_detected": False},
        {"present": (0, 1)},
        {"others_add": True},
    ],
)
def test_what_others_add_to_is_never_shown_without_them(changes):
    told = {"is_detected": True, "age_s": 1e6, "members": JOINED, **changes}
    assert judge(situation(**told)).kind == "wait"


@pytest.mark.parametrize("status", ["killed", "failed"])
def test_a_rank_that_died_before_it_could_add_anything_is_missing(status):
    verdict = judge(situation(members={1: "joined", 2: status}, age_s=1e6, is_detected=True))
    assert verdict.kind == "fail" and "rank 2" in verdict.text


def test_many_ranks_are_counted():
    assert name_ranks([7]) == "rank 7"
    assert name_ranks([1, 2, 3]) == "ranks 1, 2 and 3"
    assert name_ranks(list(range(1, 20))) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more"
