"""What is known about file systems, where it needs no mounting; see test_held_on_file_systems.py."""

import os

import pytest

from replicated import file_systems


@pytest.mark.parametrize("path", ["/proc/self/status", "/sys/kernel", "/dev/pts"])
def test_a_file_system_on_no_list_is_relied_on_for_nothing(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert not file_systems.honours_leases(descriptor)
        assert not file_systems.tells_changes(descriptor)
        assert not file_systems.may_share_blocks(descriptor, descriptor)
        assert not file_systems.is_near(descriptor)
    finally:
        os.close(descriptor)


def test_a_descriptor_that_is_not_open_is_relied_on_for_nothing():
    descriptor = os.open("/", os.O_RDONLY)
    os.close(descriptor)
    assert not file_systems.honours_leases(descriptor)
    assert not file_systems.tells_changes(descriptor)
    assert not file_systems.may_share_blocks(descriptor, descriptor)


def test_files_in_memory_honour_leases_and_share_no_blocks():
    descriptor = os.memfd_create("file")
    try:
        assert file_systems.honours_leases(descriptor)
        assert file_systems.is_near(descriptor)
        assert not file_systems.may_share_blocks(descriptor, descriptor)
    finally:
        os.close(descriptor)
