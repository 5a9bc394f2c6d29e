"""How a mount ends."""

import errno
import os
import signal
import subprocess
from contextlib import suppress

import pytest

from replicated.mount.life.mountinfo import find_mounted

proves = pytest.mark.proves

DEADLINE_S = 30


@pytest.fixture
def served(serve, stored, engine, ending, tmp_path):
    _, snapshots, identifier, _ = stored
    served = serve(tmp_path, snapshots, identifier, variant=engine)
    yield served
    ending(served)


@proves("S-70")
def test_the_process_ends_when_it_is_unmounted(served):
    assert served.unmount() == 0
    assert find_mounted(os.fsencode(served.directory)) is None


@proves("S-70")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_unmounts(served, number):
    os.listdir(served.directory)
    served.process.send_signal(number)
    assert served.process.wait(DEADLINE_S) == 0
    assert find_mounted(os.fsencode(served.directory)) is None


@proves("S-71")
def test_a_mount_in_use_is_not_unmounted(served):
    with open(served.directory / "big", "rb") as file:
        done = subprocess.run(["fusermount3", "-u", "--", served.directory], capture_output=True)
        assert done.returncode != 0
        assert b"busy" in done.stderr
        assert file.read(3)
    assert served.unmount() == 0


@proves("S-72")
def test_what_is_open_can_be_read_after_a_lazy_unmount(served, big):
    with open(served.directory / "big", "rb", buffering=0) as file:
        subprocess.run(["fusermount3", "-u", "-z", "--", served.directory], check=True)
        assert os.listdir(served.directory) == []
        assert os.pread(file.fileno(), 100, 4_000_000) == big[4_000_000:4_000_100]
    assert served.process.wait(DEADLINE_S) == 0


@proves("S-70")
def test_what_is_open_when_the_process_ends_cannot_be_read_any_more(served):
    descriptor = os.open(served.directory / "big", os.O_RDONLY)
    served.process.terminate()
    assert served.process.wait(DEADLINE_S) == 0
    with pytest.raises(OSError) as raised:
        os.pread(descriptor, 100, 4_000_000)
    assert raised.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    with suppress(OSError):
        # Closing asks the process as well, with some engines.
        os.close(descriptor)
