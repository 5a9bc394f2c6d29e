"""What a request asks to freeze is checked before anything is looked at."""

import pytest

from replicate._pb import daemon_pb2 as pb
from replicate.errors import InvalidArgument
from replicated.messages import decode_capture, encode_captured
from replicated.snapshot.additions import Additions
from replicated.snapshot.capture import Captured

CAPTURE = {"project_directory": b"/project", "paths": [b"data", b"model.pt"]}


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"project_directory": b"project"}, "not an absolute path"),
        ({"paths": [b"data", b"/etc/passwd"]}, "not a path below the project directory"),
        ({"paths": [b"data/../../x"]}, "not a path below the project directory"),
        ({"paths": [b"a\0b"]}, "not a path below the project directory"),
        ({"mode": "move"}, "unknown capture mode: 'move'"),
        ({"rung": "teleport"}, "unknown rung: 'teleport'"),
    ],
)
def test_what_cannot_be_frozen_is_refused(wrong, problem):
    with pytest.raises(InvalidArgument, match=problem):
        decode_capture("a" * 64, pb.Capture(**{**CAPTURE, **wrong}))


def test_a_request_arrives_as_it_was_sent():
    request = decode_capture("a" * 64, pb.Capture(**CAPTURE, mode="copy", rung="memory", warn_above_bytes=7))
    assert (request.paths, request.durable, request.rung) == ((b"data", b"model.pt"), True, "memory")
    assert request.warn_above == 7


def test_what_is_unusual_is_in_the_answer_and_else_nothing():
    additions = Additions()
    additions.add_big(b"a/\xff", 30)
    additions.add_small(4, 20)
    additions.end_directory(b"")
    answer = encode_captured(Captured(5, 50, (), unusual=additions), "captured", "")
    assert (answer.unusual.size_bytes, answer.unusual.file_count) == (50, 5)
    assert [(one.path, one.size_bytes, one.small_files) for one in answer.unusual.largest] == [
        (b"a/\xff", 30, 0),
        (b".", 20, 4),
    ]
    assert not encode_captured(Captured(5, 50, ()), "captured", "").HasField("unusual")
