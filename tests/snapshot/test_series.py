"""When tensors are stored as differences, and to what."""

import hypothesis
import hypothesis.strategies as st
import pytest

from replicated.chunk.codec import DELTA, PLANES, RAW
from replicated.chunk.tensor import PIECE_BYTES
from replicated.packer import Stored
from replicated.snapshot.series import MAX_ALONE, Series, State

SIZE = 100_000
ALONE = 0.84


def chunk(number: int, piece: int = 0) -> bytes:
    return b"%16d%16d" % (number, piece)


class Checkpoints:
    """One series of tensors of these sizes; each is stored as the series wants it."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.state: bytes | None = None
        self.number = 0
        self.is_complete = False
        self.is_alike = False

    def add(self, *ratios: float | str | None) -> list[bytes]:
        """The bases that were asked for; for each tensor: what a difference takes, None if it gains nothing.

        "known" is a tensor that the repository has.
        """
        series = self.begin()
        bases = []
        piece = 0
        for size, ratio in zip(self.sizes, ratios, strict=True):
            while size > 0:
                length = min(size, PIECE_BYTES)
                bases.append(series.base_of(piece))
                stored = None
                if ratio != "known":
                    is_difference = bases[-1] != b"" and ratio is not None
                    codec, taken = (DELTA, ratio) if is_difference else (PLANES, ALONE)
                    stored = Stored(codec, length, int(length * taken))
                series.note(piece, chunk(self.number, piece), stored)
                size -= PIECE_BYTES
                piece += 1
        assert self.is_complete
        self.number += 1
        return bases

    def begin(self) -> Series:
        self.is_complete = False
        before = None if self.state is None else State.unpack(self.state)
        return Series(self.sizes, before, self.complete)

    def complete(self, state: bytes, is_alike: bool) -> None:
        assert not self.is_complete
        self.is_complete = True
        self.state = state
        self.is_alike = is_alike


def keyframes(ratios: list[float | None]) -> list[int]:
    """Those of the checkpoints of one tensor that were stored without a base."""
    checkpoints = Checkpoints(SIZE)
    return [number for number, ratio in enumerate(ratios) if checkpoints.add(ratio) == [b""]]


# Bases


def test_the_first_checkpoint_has_no_base_and_is_the_base_of_the_next() -> None:
    checkpoints = Checkpoints(SIZE, 2 * PIECE_BYTES + 1)
    assert checkpoints.add(0.5, 0.5) == [b""] * 4
    assert checkpoints.add(0.5, 0.5) == [chunk(0, piece) for piece in range(4)]
    assert checkpoints.add(0.5, 0.5) == [chunk(0, piece) for piece in range(4)]


def test_a_base_is_never_a_difference() -> None:
    checkpoints = Checkpoints(SIZE)
    differences = set()
    for number in range(100):
        (base,) = checkpoints.add(0.5 + number % 7 * 0.04)
        assert base not in differences
        if base:
            differences.add(chunk(number))
    assert 50 < len(differences) < 100


def test_pieces_of_one_tensor_may_have_bases_of_different_age() -> None:
    checkpoints = Checkpoints(2 * PIECE_BYTES)
    checkpoints.add(0.5)
    series = checkpoints.begin()
    series.note(0, chunk(1, 0), Stored(DELTA, PIECE_BYTES, PIECE_BYTES // 2))
    series.note(1, chunk(1, 1), Stored(RAW, PIECE_BYTES, PIECE_BYTES))
    assert checkpoints.add(0.5) == [chunk(0, 0), chunk(1, 1)]


def test_bases_do_not_change_while_a_file_is_stored() -> None:
    checkpoints = Checkpoints(SIZE, SIZE)
    checkpoints.add(0.5, 0.5)
    series = checkpoints.begin()
    series.note(0, chunk(1, 0), Stored(RAW, SIZE, SIZE))
    assert [series.base_of(0), series.base_of(1)] == [chunk(0, 0), chunk(0, 1)]
    assert not checkpoints.is_complete


def test_tensors_that_the_repository_has_keep_their_bases() -> None:
    checkpoints = Checkpoints(SIZE, SIZE)
    checkpoints.add(0.5, 0.5)
    for _ in range(20):
        assert checkpoints.add("known", 0.6)[0] == chunk(0, 0)
    assert checkpoints.add(0.5, 0.5)[0] == chunk(0, 0)


def test_a_tensor_that_the_repository_had_from_the_beginning_is_its_own_base() -> None:
    checkpoints = Checkpoints(SIZE)
    assert checkpoints.add("known") == [b""]
    assert checkpoints.add(0.5) == [chunk(0)]
    assert checkpoints.add(0.5) == [chunk(0)]


def test_a_base_of_other_people_that_is_a_difference_itself_costs_no_patience() -> None:
    checkpoints = Checkpoints(SIZE)
    checkpoints.add("known")
    assert checkpoints.add(None) == [chunk(0)]
    assert checkpoints.add(0.5) == [chunk(1)]


# Keyframes


def test_there_is_no_new_keyframe_while_differences_stay_as_they_are() -> None:
    assert keyframes([0.5] * 1000) == [0]


def test_there_is_a_new_keyframe_after_a_difference_that_took_more_than_the_average() -> None:
    # .84, .60: average .72; .70: average .713; .72: average .715.
    assert keyframes([None, 0.60, 0.70, 0.72, 0.60, 0.70]) == [0, 4]


def test_all_tensors_have_keyframes_of_their_own() -> None:
    checkpoints = Checkpoints(SIZE, SIZE)
    for ratio in (0.60, 0.60, 0.70, 0.72):
        checkpoints.add(ratio, 0.5)
    assert checkpoints.add(0.60, 0.5) == [b"", chunk(0, 1)]


def test_what_the_repository_has_of_a_tensor_does_not_count() -> None:
    checkpoints = Checkpoints(SIZE)
    for ratio in (0.60, 0.60, "known", 0.70, "known", 0.72, "known"):
        checkpoints.add(ratio)
    assert checkpoints.add(0.60) == [b""]


#: By the age of the keyframe; measured on a small transformer, with a checkpoint every 10 steps.
FP32_WEIGHTS = [0.678, 0.702, 0.716, 0.726, 0.734, 0.740, 0.745, 0.750, 0.754, 0.758]
BF16_WEIGHTS = [0.354, 0.402, 0.429, 0.448, 0.464, 0.476, 0.487, 0.496, 0.504, 0.512]


def cost_of(differences: list[float], period: int, alone: float) -> float:
    """What a checkpoint takes when every `period`-th one is stored on its own."""
    return (alone + sum(differences[: period - 1])) / period


@pytest.mark.parametrize(("differences", "alone"), [(FP32_WEIGHTS, 0.835), (BF16_WEIGHTS, 0.671)])
def test_with_differences_as_in_training_no_other_period_is_much_better(
    differences: list[float], alone: float
) -> None:
    taken: list[float] = []
    checkpoints = Checkpoints(SIZE)
    age = 0
    for number in range(100):
        series = checkpoints.begin()
        age = age + 1 if series.base_of(0) else 0
        taken.append(differences[age - 1] if age else alone)
        series.note(0, chunk(number), Stored(DELTA if age else PLANES, SIZE, int(SIZE * taken[-1])))
    best = min(cost_of(differences, period, alone) for period in range(1, 11))
    assert sum(taken) / 100 < best * 1.005


# Tensors without resemblance


def test_tensors_whose_differences_gain_nothing_are_tried_ever_more_rarely() -> None:
    tried = set(range(60)) - set(keyframes([None] * 60))
    assert tried == {1, 2, 4, 7, 12, 21, 30, 39, 48, 57}
    assert len(range(13, 21)) == MAX_ALONE


def test_a_tensor_that_is_tried_again_is_compared_with_the_checkpoint_just_before() -> None:
    checkpoints = Checkpoints(SIZE)
    for _ in range(12):
        checkpoints.add(None)
    assert checkpoints.add(None) == [chunk(11)]


def test_a_difference_that_gains_something_restores_patience() -> None:
    checkpoints = Checkpoints(SIZE)
    for _ in range(12):
        checkpoints.add(None)
    assert checkpoints.add(0.5) == [chunk(11)]
    assert checkpoints.add(None) == [chunk(11)]
    assert checkpoints.add(0.5) == [chunk(13)]


def test_most_bytes_decide_whether_differences_gain_something() -> None:
    checkpoints = Checkpoints(2 * PIECE_BYTES + SIZE)
    checkpoints.add(None)
    for number in range(1, 10):
        series = checkpoints.begin()
        bases = [series.base_of(piece) for piece in range(3)]
        assert all(bases), "it is tried each time"
        for piece, size in ((0, PIECE_BYTES), (1, PIECE_BYTES), (2, SIZE)):
            codec = PLANES if piece == 0 else DELTA
            series.note(piece, chunk(number, piece), Stored(codec, size, size // 2))


def test_files_are_alike_when_they_are_in_some_tensor() -> None:
    checkpoints = Checkpoints(SIZE, 20 * SIZE)
    checkpoints.add(0.5, 0.5)
    assert checkpoints.is_alike, "it has nothing to be unlike"
    checkpoints.add(0.5, None)
    assert checkpoints.is_alike
    checkpoints.add(None, None)
    assert not checkpoints.is_alike
    checkpoints.add("known", "known")
    assert checkpoints.is_alike


# Other tensors


def test_what_lies_between_tensors_that_are_the_same_may_change() -> None:
    before = Checkpoints(SIZE, 5000, PIECE_BYTES + 1, SIZE)
    before.add(0.5, 0.5, 0.5, 0.5)
    after = Checkpoints(SIZE, 5001, 4096, PIECE_BYTES + 1, SIZE)
    after.state = before.state
    expected = [chunk(0, 0), b"", b"", chunk(0, 2), chunk(0, 3), chunk(0, 4)]
    assert after.add(0.5, 0.5, 0.5, 0.5, 0.5) == expected


@pytest.mark.parametrize("sizes", [(4096,), (SIZE, SIZE, SIZE, SIZE), (SIZE,)])
def test_tensors_may_be_added_and_removed(sizes: tuple[int, ...]) -> None:
    before = Checkpoints(SIZE, SIZE)
    before.add(0.5, 0.5)
    after = Checkpoints(*sizes)
    after.state = before.state
    bases = after.add(*[0.5] * len(sizes))
    assert set(bases) <= {b"", chunk(0, 0), chunk(0, 1)}
    assert (bases[0] == b"") == (sizes[0] != SIZE)
    assert after.add(*[0.5] * len(sizes))[0] != b""


sizes = st.lists(st.sampled_from([4096, 5000, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES]), min_size=1)
ratios = st.sampled_from([None, "known", 0.0, 0.3, 0.8, 1.0])


@hypothesis.given(sizes, sizes, st.data())
def test_bases_belong_to_pieces_of_tensors_of_the_same_size(
    before: list[int], after: list[int], data: st.DataObject
) -> None:
    first, second = Checkpoints(*before), Checkpoints(*after)
    for _ in range(3):
        first.add(*[data.draw(ratios) for _ in before])
    second.state = first.state

    def pieces(of: list[int]) -> list[tuple[int, int]]:
        return [(size, start) for size in of for start in range(0, size, PIECE_BYTES)]

    bases = second.add(*[data.draw(ratios) for _ in after])
    for piece, base in zip(pieces(after), bases, strict=True):
        assert base == b"" or pieces(before)[int(base[16:])] == piece


@pytest.mark.parametrize("length", [0, 3, 4, 23, 24, 55, 57, 1000])
def test_what_is_not_a_state_is_refused(length: int) -> None:
    checkpoints = Checkpoints(SIZE)
    checkpoints.add(0.5)
    assert checkpoints.state is not None
    state = (checkpoints.state + bytes(1000))[:length]
    with pytest.raises(ValueError, match="not a state"):
        State.unpack(state)
