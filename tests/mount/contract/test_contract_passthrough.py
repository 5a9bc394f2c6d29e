"""Files that the kernel reads by itself."""

import pytest

proves = pytest.mark.proves


def bytes_read_by(process):
    """What a process has read so far, from wherever."""
    with open(f"/proc/{process.pid}/io") as file:
        return int(next(line.split()[1] for line in file if line.startswith("rchar:")))


@proves("S-39")
def test_a_whole_file_in_the_cache_is_read_without_the_process(serve, stored, ending, big, tmp_path):
    _, snapshots, identifier, _ = stored
    served = serve(tmp_path, snapshots, identifier, variant="native-passthrough")
    assert served.report == {"engine": "native", "passthrough": True, "reason": ""}
    with open(served.directory / "big", "rb") as file:
        before = bytes_read_by(served.process)
        assert file.read() == big
        assert bytes_read_by(served.process) - before < len(big) // 20
    # Small ones are not worth it.
    assert (served.directory / "sub/needle.txt").read_bytes() == b"a needle in a haystack\n"
    ending(served)


@proves("S-39")
@pytest.mark.parametrize("variant", ["native-without-open", "mfusepy", "fusepy"])
def test_who_passes_nothing_through_says_so_and_reads_the_same_file(
    variant, serve, stored, ending, big, tmp_path
):
    _, snapshots, identifier, _ = stored
    served = serve(tmp_path, snapshots, identifier, variant=variant, plain=True)
    assert not served.report["passthrough"]
    assert served.report["reason"]
    before = bytes_read_by(served.process)
    assert (served.directory / "big").read_bytes() == big
    assert bytes_read_by(served.process) - before >= len(big)
    ending(served)
