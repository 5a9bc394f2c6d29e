"""What a request to a store that is far away takes, for ours and for the peer alike."""

import time

#: Until the first byte comes: an object store in the same region.
_FIRST_BYTE_S = 0.02
#: Of one connection.
_BYTES_PER_S = 100e6
#: Who is given bytes one after the other waits for so many at once.
PIECE_BYTES = 256 << 10


def wait_for(size_bytes: int) -> None:
    """Sleep as long as a request takes that gives so many bytes."""
    time.sleep(_FIRST_BYTE_S + size_bytes / _BYTES_PER_S)


def wait_for_more(size_bytes: int) -> None:
    """Sleep as long as so many more bytes of the same request take."""
    time.sleep(size_bytes / _BYTES_PER_S)


def describe() -> str:
    return f"{_FIRST_BYTE_S * 1000:.0f} ms a request, {_BYTES_PER_S / 1e6:.0f} MB/s a connection"
