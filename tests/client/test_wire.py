"""Records survive the wire, whatever is in them; what is not valid there is refused."""

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate import errors, records, wire
from replicate._pb import daemon_pb2 as pb
from replicate.errors import InvalidArgument

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
#: Paths hold any bytes but NUL; in Python, bytes that are not UTF-8 are surrogates.
paths = st.binary(max_size=20).map(lambda data: wire.decode_path(data.replace(b"\0", b"/")))
ids = st.binary(min_size=32, max_size=32).map(bytes.hex)
#: Nanoseconds in 64 bits reach from 1678 to 2262.
times = st.datetimes(datetime(1678, 1, 1), datetime(2262, 1, 1), timezones=st.just(timezone.utc))
uint64 = st.integers(0, 2**64 - 1)
steps = st.integers(0, records.MAX_STEP)


def values(floats):
    scalars = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | floats | text
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=6,
    )


any_values = st.dictionaries(text, values(st.floats()), max_size=5)
#: Without NaN, so that whole records can be compared.
mappings = st.dictionaries(text, values(st.floats(allow_nan=False)), max_size=3)

systems = st.builds(
    records.System,
    os=text,
    cpu=text,
    cpu_count=st.integers(0, 2**32 - 1),
    memory_bytes=uint64,
    gpus=st.lists(st.builds(records.Gpu, name=text, memory_bytes=uint64), max_size=3).map(tuple),
    driver=text,
)
experiments = st.builds(
    records.ExperimentRecord,
    id=ids,
    created=times,
    name=text,
    tags=st.lists(text, max_size=3).map(tuple),
    user=text,
    host=text,
    command=paths,
    paths=st.lists(paths, max_size=3).map(tuple),
    params=mappings,
    python_version=text,
    python_packages=st.dictionaries(text, text, max_size=3),
    system=systems,
    git=st.none() | st.builds(records.GitState, commit=text, branch=text, dirty=st.booleans(), diff=text),
    replicate_version=text,
    process=st.none()
    | st.builds(records.ProcessIdentity, pid=st.integers(0, 2**63 - 1), start_ticks=uint64, boot_id=text),
)
primary_metrics = st.builds(records.PrimaryMetric, name=text, goal=st.sampled_from(records.GOALS))
states = st.sampled_from(["captured", "stored", "failed"])
checkpoints = st.builds(
    records.CheckpointRecord,
    id=ids,
    experiment_id=ids,
    created=times,
    step=steps,
    paths=st.lists(paths, max_size=3).map(tuple),
    metrics=mappings,
    primary_metric=st.none() | primary_metrics,
    state=states,
    error=text,
)
summaries = st.builds(
    records.ExperimentSummary,
    record=experiments,
    status=st.sampled_from(["running", "stopped", "failed", "killed", "unknown"]),
    state=states,
    error=text,
    # The very moment of the epoch means "not ended" on the wire.
    ended=st.none() | times.filter(lambda time: time.timestamp() != 0),
    checkpoint_count=uint64,
    latest=st.none() | checkpoints,
    best=st.none() | checkpoints,
    duration_s=st.none() | st.floats(0, 1e12),
)
entries = st.builds(
    records.FileEntry,
    path=paths,
    type=st.sampled_from(["file", "directory", "symlink"]),
    mode=st.integers(0, 0o7777),
    size=uint64,
    mtime_ns=st.integers(-(2**63), 2**63 - 1),
    hash=st.just("") | ids,
    target=paths,
)


def sent(message):
    """The message as it arrives at the other end."""
    return type(message).FromString(message.SerializeToString())


def same(value):
    """A value in a form in which NaN equals NaN, and 1 neither equals 1.0 nor True."""
    return repr(value)


@given(any_values)
def test_values_arrive_as_they_were_in_the_same_order(mapping):
    assert same(wire.decode_mapping(sent(wire.encode_mapping(mapping)))) == same(mapping)


@given(any_values)
def test_whatever_is_validated_can_be_sent(mapping):
    validated = records.validate_mapping(mapping, "params")
    assert same(wire.decode_mapping(sent(wire.encode_mapping(validated)))) == same(mapping)


def test_the_deepest_value_that_is_accepted_can_be_sent_within_everything_else():
    value = 1
    for _ in range(records.MAX_VALUE_DEPTH - 1):
        value = {"k": value}
    metrics = records.validate_mapping({"k": value}, "metrics")
    checkpoint = records.CheckpointRecord("a" * 64, "b" * 64, records.utc_now(), 0, metrics=metrics)
    record = records.ExperimentRecord("b" * 64, records.utc_now(), params=metrics)
    summary = records.ExperimentSummary(record, "running", "stored", best=checkpoint)
    message = pb.Resolution(summary=wire.encode_summary(summary))
    assert wire.decode_summary(sent(message).summary) == summary


@given(experiments)
def test_experiments_arrive_as_they_were(record):
    assert wire.decode_experiment(sent(wire.encode_experiment(record))) == record


@given(checkpoints)
def test_checkpoints_arrive_as_they_were(record):
    assert wire.decode_checkpoint(sent(wire.encode_checkpoint(record))) == record


@given(summaries)
def test_summaries_arrive_as_they_were(summary):
    assert wire.decode_summary(sent(wire.encode_summary(summary))) == summary


@given(entries, st.none() | entries)
def test_files_and_their_changes_arrive_as_they_were(left, right):
    assert wire.decode_file_entry(sent(wire.encode_file_entry(left))) == left
    change = records.FileChange(left.path, left, right)
    assert wire.decode_file_change(sent(wire.encode_file_change(change))) == change


@given(times)
def test_times_keep_their_microseconds(time):
    assert wire.decode_time(wire.encode_time(time)) == time


def test_times_of_other_zones_are_the_same_moment():
    time = datetime(2026, 11, 23, 6, 30, tzinfo=timezone(timedelta(hours=1)))
    assert wire.decode_time(wire.encode_time(time)) == time


def test_times_that_are_no_times_are_refused():
    with pytest.raises(InvalidArgument, match="time out of range"):
        wire.decode_time(2**63 - 1 << 40)


@pytest.mark.parametrize("kind", errors._BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_errors_arrive_as_the_class_that_was_raised(kind):
    arrived = wire.decode_error(wire.encode_error(kind("what", hint="do", fields={"id": "x"})))
    assert type(arrived) is kind
    assert (arrived.message, arrived.hint, arrived.fields) == ("what", "do", {"id": "x"})


def test_an_error_of_a_newer_version_arrives_as_the_base_class():
    detail = pb.ErrorDetail(code="not_invented_yet", message="what")
    arrived = wire.decode_error(detail.SerializeToString())
    assert type(arrived) is errors.ReplicateError
    assert str(arrived) == "what"


def test_bytes_of_paths_that_are_not_text_are_shown_in_errors():
    error = errors.PathMissing("no such file: \udcff", fields={"path": "\udcff"})
    assert wire.decode_error(wire.encode_error(error)).message == "no such file: \\xff"


@pytest.mark.parametrize(
    "message",
    [
        pb.Checkpoint(id="x", experiment_id="a" * 64, state="stored"),
        pb.Checkpoint(id="a" * 64, experiment_id="", state="stored"),
        pb.Checkpoint(id="a" * 64, experiment_id="a" * 64, state="lost"),
        pb.Checkpoint(
            id="a" * 64,
            experiment_id="a" * 64,
            state="stored",
            primary_metric=pb.PrimaryMetric(name="loss", goal="best"),
        ),
        pb.Checkpoint(
            id="a" * 64,
            experiment_id="a" * 64,
            state="stored",
            metrics=pb.ValueMap(entries=[pb.ValueEntry(key="k", value=pb.Value())]),
        ),
        pb.Checkpoint(
            id="a" * 64,
            experiment_id="a" * 64,
            state="stored",
            metrics=pb.ValueMap(entries=[pb.ValueEntry(key="k", value=pb.Value(big_integer="1e9"))]),
        ),
    ],
)
def test_messages_that_are_not_valid_records_are_refused(message):
    with pytest.raises(InvalidArgument):
        wire.decode_checkpoint(message)


def test_a_change_of_nothing_is_refused():
    with pytest.raises(InvalidArgument):
        wire.decode_file_change(pb.FileChange())
