"""What the library asks the daemon to freeze, and how."""

import mmap

import pytest

import replicate
from replicate import mappings
from replicate.errors import ReplicateError


@pytest.fixture
def capture_of(project, server, written):
    """What was asked for, by an experiment and then by its checkpoint of a file."""
    server()
    (project / "model.pt").write_bytes(b"model")

    def ask(path="model.pt"):
        with replicate.init(path, quiet=True) as experiment:
            experiment.checkpoint(path)
        begun, made, _ = written()[-3:]
        return begun.capture, made.capture

    return ask


def test_without_files_nothing_is_asked_for(capture_of, monkeypatch):
    monkeypatch.setattr(mappings, "_query", None)  # is not looked at
    assert all(capture.ByteSize() == 0 for capture in capture_of(None))


def test_files_that_are_mapped_are_named(capture_of, project):
    with open(project / "data", "w+b") as file:
        file.write(b"data")
        file.flush()
        with mmap.mmap(file.fileno(), 0):
            assert [list(capture.mapped) for capture in capture_of()] == [[b"data"]] * 2
    assert [list(capture.mapped) for capture in capture_of()] == [[]] * 2


@pytest.mark.parametrize("rung", ["lease", "reflink", "memory", "copy"])
def test_a_rung_is_passed_on(capture_of, monkeypatch, rung):
    monkeypatch.setenv("REPLICATE_CAPTURE_RUNG", rung)
    assert [capture.rung for capture in capture_of()] == [rung] * 2
    monkeypatch.setenv("REPLICATE_CAPTURE_RUNG", "")
    assert [capture.rung for capture in capture_of()] == [""] * 2


def test_a_rung_that_does_not_exist_is_refused_and_takes_no_step(capture_of, monkeypatch):
    with replicate.init(quiet=True) as experiment:
        monkeypatch.setenv("REPLICATE_CAPTURE_RUNG", "rent")
        message = "REPLICATE_CAPTURE_RUNG must be one of lease, reflink, memory, copy, or not set: 'rent'"
        for call in (experiment.checkpoint, replicate.init):
            with pytest.raises(ValueError, match=message) as caught:
                call("model.pt")
            assert isinstance(caught.value, ReplicateError)
        assert experiment.checkpoint().step == 0


def test_a_rung_that_does_not_exist_is_noticed_by_every_init(capture_of, written, monkeypatch):
    capture_of()
    before = written()
    monkeypatch.setenv("REPLICATE_CAPTURE_RUNG", "rent")
    for resume, joined in ((None, ""), ("latest", ""), (None, "1234")):
        monkeypatch.setenv("REPLICATE_EXPERIMENT_ID", joined)
        with pytest.raises(ValueError, match="REPLICATE_CAPTURE_RUNG must be one of"):
            replicate.init(resume=resume)
    assert written() == before


def test_the_limits_of_the_project_are_passed_on(capture_of, project):
    (project / "replicate.yaml").write_text(
        "queue_limit: 1GB\nspool_limit: 2MiB\nupload_limit: 50MB/s\nwarn_above: 3GB\ncapture: copy\n"
    )
    for capture in capture_of():
        assert (capture.queue_limit_bytes, capture.spool_limit_bytes) == (10**9, 2 << 20)
        assert capture.upload_limit_bytes_s == 50 * 10**6
        assert capture.warn_above_bytes == 3 * 10**9
        assert capture.mode == "copy"


def test_without_limits_the_daemon_chooses(capture_of):
    for capture in capture_of():
        assert capture.queue_limit_bytes == capture.spool_limit_bytes == capture.upload_limit_bytes_s == 0
