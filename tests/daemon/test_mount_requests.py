"""What clients may ask of a mount, and what becomes of what they left out."""

import math
import os

import pytest

from replicate._pb import daemon_pb2 as pb
from replicate.errors import InvalidArgument
from replicated.messages import decode_mount_options, decode_owner
from replicated.mount.options import MountOptions
from replicated.processes import identify


def test_what_is_left_out_is_chosen_here():
    assert decode_mount_options(pb.MountRequest()) == MountOptions()


def test_what_is_said_is_taken_over():
    request = pb.MountRequest(
        engine="mfusepy",
        passthrough="off",
        allow_other=True,
        timeout_s=2.5,
        cache_bytes=0,
        prefetch="*.pt",
        persist=True,
    )
    assert decode_mount_options(request) == MountOptions("mfusepy", "off", True, 2.5, 0, "*.pt", True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", "other"),
        ("passthrough", "maybe"),
        ("timeout_s", -1.0),
        ("timeout_s", math.nan),
        ("timeout_s", math.inf),
        ("prefetch", "a\0b"),
    ],
)
def test_nonsense_is_refused(field, value):
    with pytest.raises(InvalidArgument):
        decode_mount_options(pb.MountRequest(**{field: value}))


def test_an_owner_that_cannot_be_found_is_none():
    us = identify(os.getpid())
    owner = pb.Process(pid=us.pid, start_ticks=us.start_ticks, boot_id=us.boot_id)
    assert decode_owner(pb.MountRequest(owner=owner)) == us
    owner.start_ticks += 1
    assert decode_owner(pb.MountRequest(owner=owner)) is None
    assert decode_owner(pb.MountRequest()) is None
