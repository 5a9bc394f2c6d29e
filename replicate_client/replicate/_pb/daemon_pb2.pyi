from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorDetail(_message.Message):
    __slots__ = ("code", "message", "hint", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    hint: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol", "version", "pid", "started_ns")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    pid: int
    started_ns: int
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., pid: _Optional[int] = ..., started_ns: _Optional[int] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ("pending",)
    PENDING_FIELD_NUMBER: _ClassVar[int]
    pending: int
    def __init__(self, pending: _Optional[int] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("null", "boolean", "integer", "big_integer", "number", "text", "list", "map")
    NULL_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    BIG_INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    null: bool
    boolean: bool
    integer: int
    big_integer: str
    number: float
    text: str
    list: ValueList
    map: ValueMap
    def __init__(self, null: bool = ..., boolean: bool = ..., integer: _Optional[int] = ..., big_integer: _Optional[str] = ..., number: _Optional[float] = ..., text: _Optional[str] = ..., list: _Optional[_Union[ValueList, _Mapping]] = ..., map: _Optional[_Union[ValueMap, _Mapping]] = ...) -> None: ...

class ValueList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class ValueMap(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[ValueEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[ValueEntry, _Mapping]]] = ...) -> None: ...

class ValueEntry(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: Value
    def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class PrimaryMetric(_message.Message):
    __slots__ = ("name", "goal")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GOAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    goal: str
    def __init__(self, name: _Optional[str] = ..., goal: _Optional[str] = ...) -> None: ...

class Git(_message.Message):
    __slots__ = ("commit", "branch", "dirty", "diff")
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    DIRTY_FIELD_NUMBER: _ClassVar[int]
    DIFF_FIELD_NUMBER: _ClassVar[int]
    commit: str
    branch: str
    dirty: bool
    diff: str
    def __init__(self, commit: _Optional[str] = ..., branch: _Optional[str] = ..., dirty: bool = ..., diff: _Optional[str] = ...) -> None: ...

class Gpu(_message.Message):
    __slots__ = ("name", "memory_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    memory_bytes: int
    def __init__(self, name: _Optional[str] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class System(_message.Message):
    __slots__ = ("os", "cpu", "cpu_count", "memory_bytes", "gpus", "driver")
    OS_FIELD_NUMBER: _ClassVar[int]
    CPU_FIELD_NUMBER: _ClassVar[int]
    CPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    os: str
    cpu: str
    cpu_count: int
    memory_bytes: int
    gpus: _containers.RepeatedCompositeFieldContainer[Gpu]
    driver: str
    def __init__(self, os: _Optional[str] = ..., cpu: _Optional[str] = ..., cpu_count: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., gpus: _Optional[_Iterable[_Union[Gpu, _Mapping]]] = ..., driver: _Optional[str] = ...) -> None: ...

class Process(_message.Message):
    __slots__ = ("pid", "start_ticks", "boot_id")
    PID_FIELD_NUMBER: _ClassVar[int]
    START_TICKS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    start_ticks: int
    boot_id: str
    def __init__(self, pid: _Optional[int] = ..., start_ticks: _Optional[int] = ..., boot_id: _Optional[str] = ...) -> None: ...

class Experiment(_message.Message):
    __slots__ = ("id", "created_ns", "name", "tags", "user", "host", "command", "paths", "params", "python_version", "python_packages", "system", "git", "replicate_version", "process")
    class PythonPackagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PYTHON_VERSION_FIELD_NUMBER: _ClassVar[int]
    PYTHON_PACKAGES_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    GIT_FIELD_NUMBER: _ClassVar[int]
    REPLICATE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    id: str
    created_ns: int
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    user: str
    host: str
    command: bytes
    paths: _containers.RepeatedScalarFieldContainer[bytes]
    params: ValueMap
    python_version: str
    python_packages: _containers.ScalarMap[str, str]
    system: System
    git: Git
    replicate_version: str
    process: Process
    def __init__(self, id: _Optional[str] = ..., created_ns: _Optional[int] = ..., name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., user: _Optional[str] = ..., host: _Optional[str] = ..., command: _Optional[bytes] = ..., paths: _Optional[_Iterable[bytes]] = ..., params: _Optional[_Union[ValueMap, _Mapping]] = ..., python_version: _Optional[str] = ..., python_packages: _Optional[_Mapping[str, str]] = ..., system: _Optional[_Union[System, _Mapping]] = ..., git: _Optional[_Union[Git, _Mapping]] = ..., replicate_version: _Optional[str] = ..., process: _Optional[_Union[Process, _Mapping]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("id", "experiment_id", "created_ns", "step", "paths", "metrics", "primary_metric", "state", "error", "part", "world_size", "waits_for")
    ID_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_METRIC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    id: str
    experiment_id: str
    created_ns: int
    step: int
    paths: _containers.RepeatedScalarFieldContainer[bytes]
    metrics: ValueMap
    primary_metric: PrimaryMetric
    state: str
    error: str
    part: Part
    world_size: int
    waits_for: str
    def __init__(self, id: _Optional[str] = ..., experiment_id: _Optional[str] = ..., created_ns: _Optional[int] = ..., step: _Optional[int] = ..., paths: _Optional[_Iterable[bytes]] = ..., metrics: _Optional[_Union[ValueMap, _Mapping]] = ..., primary_metric: _Optional[_Union[PrimaryMetric, _Mapping]] = ..., state: _Optional[str] = ..., error: _Optional[str] = ..., part: _Optional[_Union[Part, _Mapping]] = ..., world_size: _Optional[int] = ..., waits_for: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("rank", "world_size", "is_detected", "is_expected", "attempt", "patience_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    IS_DETECTED_FIELD_NUMBER: _ClassVar[int]
    IS_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    world_size: int
    is_detected: bool
    is_expected: bool
    attempt: str
    patience_s: float
    def __init__(self, rank: _Optional[int] = ..., world_size: _Optional[int] = ..., is_detected: bool = ..., is_expected: bool = ..., attempt: _Optional[str] = ..., patience_s: _Optional[float] = ...) -> None: ...

class ExperimentSummary(_message.Message):
    __slots__ = ("experiment", "status", "state", "error", "ended_ns", "checkpoint_count", "latest", "best", "duration_s", "stall_s")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ENDED_NS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_COUNT_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    status: str
    state: str
    error: str
    ended_ns: int
    checkpoint_count: int
    latest: Checkpoint
    best: Checkpoint
    duration_s: float
    stall_s: float
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ..., status: _Optional[str] = ..., state: _Optional[str] = ..., error: _Optional[str] = ..., ended_ns: _Optional[int] = ..., checkpoint_count: _Optional[int] = ..., latest: _Optional[_Union[Checkpoint, _Mapping]] = ..., best: _Optional[_Union[Checkpoint, _Mapping]] = ..., duration_s: _Optional[float] = ..., stall_s: _Optional[float] = ...) -> None: ...

class Capture(_message.Message):
    __slots__ = ("project_directory", "paths", "ignore", "mode", "mapped", "rung", "queue_limit_bytes", "spool_limit_bytes", "upload_limit_bytes_s", "warn_above_bytes")
    PROJECT_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MAPPED_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPOOL_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_LIMIT_BYTES_S_FIELD_NUMBER: _ClassVar[int]
    WARN_ABOVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    project_directory: bytes
    paths: _containers.RepeatedScalarFieldContainer[bytes]
    ignore: _containers.RepeatedScalarFieldContainer[bytes]
    mode: str
    mapped: _containers.RepeatedScalarFieldContainer[bytes]
    rung: str
    queue_limit_bytes: int
    spool_limit_bytes: int
    upload_limit_bytes_s: int
    warn_above_bytes: int
    def __init__(self, project_directory: _Optional[bytes] = ..., paths: _Optional[_Iterable[bytes]] = ..., ignore: _Optional[_Iterable[bytes]] = ..., mode: _Optional[str] = ..., mapped: _Optional[_Iterable[bytes]] = ..., rung: _Optional[str] = ..., queue_limit_bytes: _Optional[int] = ..., spool_limit_bytes: _Optional[int] = ..., upload_limit_bytes_s: _Optional[int] = ..., warn_above_bytes: _Optional[int] = ...) -> None: ...

class CreateExperimentRequest(_message.Message):
    __slots__ = ("repository", "experiment", "capture")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    repository: str
    experiment: Experiment
    capture: Capture
    def __init__(self, repository: _Optional[str] = ..., experiment: _Optional[_Union[Experiment, _Mapping]] = ..., capture: _Optional[_Union[Capture, _Mapping]] = ...) -> None: ...

class CreateCheckpointRequest(_message.Message):
    __slots__ = ("repository", "checkpoint", "capture", "stall_ns", "missed_because")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    STALL_NS_FIELD_NUMBER: _ClassVar[int]
    MISSED_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    repository: str
    checkpoint: Checkpoint
    capture: Capture
    stall_ns: int
    missed_because: str
    def __init__(self, repository: _Optional[str] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., capture: _Optional[_Union[Capture, _Mapping]] = ..., stall_ns: _Optional[int] = ..., missed_because: _Optional[str] = ...) -> None: ...

class CaptureReply(_message.Message):
    __slots__ = ("file_count", "size_bytes", "warnings", "state", "waiting_because", "unusual")
    FILE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WAITING_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    UNUSUAL_FIELD_NUMBER: _ClassVar[int]
    file_count: int
    size_bytes: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    state: str
    waiting_because: str
    unusual: Additions
    def __init__(self, file_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., state: _Optional[str] = ..., waiting_because: _Optional[str] = ..., unusual: _Optional[_Union[Additions, _Mapping]] = ...) -> None: ...

class Additions(_message.Message):
    __slots__ = ("size_bytes", "file_count", "largest")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILE_COUNT_FIELD_NUMBER: _ClassVar[int]
    LARGEST_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    file_count: int
    largest: _containers.RepeatedCompositeFieldContainer[Addition]
    def __init__(self, size_bytes: _Optional[int] = ..., file_count: _Optional[int] = ..., largest: _Optional[_Iterable[_Union[Addition, _Mapping]]] = ...) -> None: ...

class Addition(_message.Message):
    __slots__ = ("path", "size_bytes", "small_files")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SMALL_FILES_FIELD_NUMBER: _ClassVar[int]
    path: bytes
    size_bytes: int
    small_files: int
    def __init__(self, path: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., small_files: _Optional[int] = ...) -> None: ...

class EndExperimentRequest(_message.Message):
    __slots__ = ("repository", "experiment_id", "status", "ended_ns", "is_exiting", "stall_ns")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ENDED_NS_FIELD_NUMBER: _ClassVar[int]
    IS_EXITING_FIELD_NUMBER: _ClassVar[int]
    STALL_NS_FIELD_NUMBER: _ClassVar[int]
    repository: str
    experiment_id: str
    status: str
    ended_ns: int
    is_exiting: bool
    stall_ns: int
    def __init__(self, repository: _Optional[str] = ..., experiment_id: _Optional[str] = ..., status: _Optional[str] = ..., ended_ns: _Optional[int] = ..., is_exiting: bool = ..., stall_ns: _Optional[int] = ...) -> None: ...

class EndExperimentReply(_message.Message):
    __slots__ = ("pending", "bytes_pending", "failed", "waiting_because")
    PENDING_FIELD_NUMBER: _ClassVar[int]
    BYTES_PENDING_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    WAITING_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    pending: int
    bytes_pending: int
    failed: int
    waiting_because: str
    def __init__(self, pending: _Optional[int] = ..., bytes_pending: _Optional[int] = ..., failed: _Optional[int] = ..., waiting_because: _Optional[str] = ...) -> None: ...

class ResumeExperimentRequest(_message.Message):
    __slots__ = ("target", "process", "at_ns")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    AT_NS_FIELD_NUMBER: _ClassVar[int]
    target: Target
    process: Process
    at_ns: int
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., process: _Optional[_Union[Process, _Mapping]] = ..., at_ns: _Optional[int] = ...) -> None: ...

class JoinExperimentRequest(_message.Message):
    __slots__ = ("repository", "experiment_id", "member_id", "rank", "world_size", "attempt", "process", "at_ns")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    AT_NS_FIELD_NUMBER: _ClassVar[int]
    repository: str
    experiment_id: str
    member_id: str
    rank: int
    world_size: int
    attempt: str
    process: Process
    at_ns: int
    def __init__(self, repository: _Optional[str] = ..., experiment_id: _Optional[str] = ..., member_id: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., attempt: _Optional[str] = ..., process: _Optional[_Union[Process, _Mapping]] = ..., at_ns: _Optional[int] = ...) -> None: ...

class JoinExperimentReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Target(_message.Message):
    __slots__ = ("repository", "id")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    repository: str
    id: str
    def __init__(self, repository: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class Resolution(_message.Message):
    __slots__ = ("summary", "checkpoint", "named_experiment", "chosen")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    NAMED_EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    summary: ExperimentSummary
    checkpoint: Checkpoint
    named_experiment: bool
    chosen: str
    def __init__(self, summary: _Optional[_Union[ExperimentSummary, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., named_experiment: bool = ..., chosen: _Optional[str] = ...) -> None: ...

class ListExperimentsRequest(_message.Message):
    __slots__ = ("repository", "filters", "sort", "limit", "only_ids")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    SORT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    ONLY_IDS_FIELD_NUMBER: _ClassVar[int]
    repository: str
    filters: _containers.RepeatedScalarFieldContainer[str]
    sort: str
    limit: int
    only_ids: bool
    def __init__(self, repository: _Optional[str] = ..., filters: _Optional[_Iterable[str]] = ..., sort: _Optional[str] = ..., limit: _Optional[int] = ..., only_ids: bool = ...) -> None: ...

class SummaryBatch(_message.Message):
    __slots__ = ("summaries", "ids")
    SUMMARIES_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    summaries: _containers.RepeatedScalarFieldContainer[bytes]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, summaries: _Optional[_Iterable[bytes]] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("path", "type", "mode", "size", "mtime_s", "mtime_nanos", "hash", "target")
    PATH_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MTIME_S_FIELD_NUMBER: _ClassVar[int]
    MTIME_NANOS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    path: bytes
    type: str
    mode: int
    size: int
    mtime_s: int
    mtime_nanos: int
    hash: bytes
    target: bytes
    def __init__(self, path: _Optional[bytes] = ..., type: _Optional[str] = ..., mode: _Optional[int] = ..., size: _Optional[int] = ..., mtime_s: _Optional[int] = ..., mtime_nanos: _Optional[int] = ..., hash: _Optional[bytes] = ..., target: _Optional[bytes] = ...) -> None: ...

class FileBatch(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[FileEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[FileEntry, _Mapping]]] = ...) -> None: ...

class ListFilesRequest(_message.Message):
    __slots__ = ("target", "path")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    target: Target
    path: bytes
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., path: _Optional[bytes] = ...) -> None: ...

class ReadFileRequest(_message.Message):
    __slots__ = ("target", "path", "offset", "length")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    target: Target
    path: bytes
    offset: int
    length: int
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., path: _Optional[bytes] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class FileData(_message.Message):
    __slots__ = ("data", "entry")
    DATA_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    entry: FileEntry
    def __init__(self, data: _Optional[bytes] = ..., entry: _Optional[_Union[FileEntry, _Mapping]] = ...) -> None: ...

class DiffFilesRequest(_message.Message):
    __slots__ = ("left", "right")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    left: Target
    right: Target
    def __init__(self, left: _Optional[_Union[Target, _Mapping]] = ..., right: _Optional[_Union[Target, _Mapping]] = ...) -> None: ...

class FileChange(_message.Message):
    __slots__ = ("left", "right")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    left: FileEntry
    right: FileEntry
    def __init__(self, left: _Optional[_Union[FileEntry, _Mapping]] = ..., right: _Optional[_Union[FileEntry, _Mapping]] = ...) -> None: ...

class FileChangeBatch(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[FileChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[FileChange, _Mapping]]] = ...) -> None: ...

class CheckoutRequest(_message.Message):
    __slots__ = ("target", "output_directory", "path", "force", "delete", "dry_run", "cache_bytes")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    target: Target
    output_directory: bytes
    path: bytes
    force: bool
    delete: bool
    dry_run: bool
    cache_bytes: int
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., output_directory: _Optional[bytes] = ..., path: _Optional[bytes] = ..., force: bool = ..., delete: bool = ..., dry_run: bool = ..., cache_bytes: _Optional[int] = ...) -> None: ...

class CheckoutAction(_message.Message):
    __slots__ = ("verb", "path")
    VERB_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    verb: str
    path: bytes
    def __init__(self, verb: _Optional[str] = ..., path: _Optional[bytes] = ...) -> None: ...

class CheckoutEvent(_message.Message):
    __slots__ = ("resolution", "files_total", "bytes_total", "files_done", "bytes_done", "actions")
    RESOLUTION_FIELD_NUMBER: _ClassVar[int]
    FILES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FILES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    resolution: Resolution
    files_total: int
    bytes_total: int
    files_done: int
    bytes_done: int
    actions: _containers.RepeatedCompositeFieldContainer[CheckoutAction]
    def __init__(self, resolution: _Optional[_Union[Resolution, _Mapping]] = ..., files_total: _Optional[int] = ..., bytes_total: _Optional[int] = ..., files_done: _Optional[int] = ..., bytes_done: _Optional[int] = ..., actions: _Optional[_Iterable[_Union[CheckoutAction, _Mapping]]] = ...) -> None: ...

class MountRequest(_message.Message):
    __slots__ = ("target", "directory", "engine", "passthrough", "allow_other", "timeout_s", "cache_bytes", "prefetch", "persist", "owner")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PASSTHROUGH_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OTHER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    target: Target
    directory: bytes
    engine: str
    passthrough: str
    allow_other: bool
    timeout_s: float
    cache_bytes: int
    prefetch: str
    persist: bool
    owner: Process
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., directory: _Optional[bytes] = ..., engine: _Optional[str] = ..., passthrough: _Optional[str] = ..., allow_other: bool = ..., timeout_s: _Optional[float] = ..., cache_bytes: _Optional[int] = ..., prefetch: _Optional[str] = ..., persist: bool = ..., owner: _Optional[_Union[Process, _Mapping]] = ...) -> None: ...

class PrefetchProgress(_message.Message):
    __slots__ = ("files_done", "files_total", "bytes_done", "bytes_total", "is_finished", "error")
    FILES_DONE_FIELD_NUMBER: _ClassVar[int]
    FILES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    IS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int
    is_finished: bool
    error: str
    def __init__(self, files_done: _Optional[int] = ..., files_total: _Optional[int] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., is_finished: bool = ..., error: _Optional[str] = ...) -> None: ...

class MountInfo(_message.Message):
    __slots__ = ("id", "directory", "pid", "experiment_id", "repository", "engine", "passthrough", "engine_reason", "persist", "restarts", "prefetch", "error", "is_given_up")
    ID_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PASSTHROUGH_FIELD_NUMBER: _ClassVar[int]
    ENGINE_REASON_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    IS_GIVEN_UP_FIELD_NUMBER: _ClassVar[int]
    id: str
    directory: bytes
    pid: int
    experiment_id: str
    repository: str
    engine: str
    passthrough: bool
    engine_reason: str
    persist: bool
    restarts: int
    prefetch: PrefetchProgress
    error: str
    is_given_up: bool
    def __init__(self, id: _Optional[str] = ..., directory: _Optional[bytes] = ..., pid: _Optional[int] = ..., experiment_id: _Optional[str] = ..., repository: _Optional[str] = ..., engine: _Optional[str] = ..., passthrough: bool = ..., engine_reason: _Optional[str] = ..., persist: bool = ..., restarts: _Optional[int] = ..., prefetch: _Optional[_Union[PrefetchProgress, _Mapping]] = ..., error: _Optional[str] = ..., is_given_up: bool = ...) -> None: ...

class EngineState(_message.Message):
    __slots__ = ("name", "is_usable", "detail", "hint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IS_USABLE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    is_usable: bool
    detail: str
    hint: str
    def __init__(self, name: _Optional[str] = ..., is_usable: bool = ..., detail: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class ProbeMountingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeMountingReply(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineState]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineState, _Mapping]]] = ...) -> None: ...

class ListMountsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MountList(_message.Message):
    __slots__ = ("mounts",)
    MOUNTS_FIELD_NUMBER: _ClassVar[int]
    mounts: _containers.RepeatedCompositeFieldContainer[MountInfo]
    def __init__(self, mounts: _Optional[_Iterable[_Union[MountInfo, _Mapping]]] = ...) -> None: ...

class UnmountRequest(_message.Message):
    __slots__ = ("directory", "id", "all")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    directory: bytes
    id: str
    all: bool
    def __init__(self, directory: _Optional[bytes] = ..., id: _Optional[str] = ..., all: bool = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("repository",)
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    repository: str
    def __init__(self, repository: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("id", "experiment_id", "paths", "error", "at_ns")
    ID_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    AT_NS_FIELD_NUMBER: _ClassVar[int]
    id: str
    experiment_id: str
    paths: _containers.RepeatedScalarFieldContainer[bytes]
    error: str
    at_ns: int
    def __init__(self, id: _Optional[str] = ..., experiment_id: _Optional[str] = ..., paths: _Optional[_Iterable[bytes]] = ..., error: _Optional[str] = ..., at_ns: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("daemon", "pending", "active", "failed", "bytes_pending", "active_id", "active_bytes_done", "active_bytes_total", "bytes_per_second", "spool_bytes", "failures", "waiting_because", "mounts", "failed_mounts", "leased_files", "leased_bytes", "repositories", "waiting_parts")
    DAEMON_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PENDING_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SPOOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    WAITING_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    MOUNTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_MOUNTS_FIELD_NUMBER: _ClassVar[int]
    LEASED_FILES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPOSITORIES_FIELD_NUMBER: _ClassVar[int]
    WAITING_PARTS_FIELD_NUMBER: _ClassVar[int]
    daemon: HelloReply
    pending: int
    active: int
    failed: int
    bytes_pending: int
    active_id: str
    active_bytes_done: int
    active_bytes_total: int
    bytes_per_second: float
    spool_bytes: int
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    waiting_because: str
    mounts: int
    failed_mounts: int
    leased_files: int
    leased_bytes: int
    repositories: _containers.RepeatedCompositeFieldContainer[RepositoryStanding]
    waiting_parts: _containers.RepeatedCompositeFieldContainer[WaitingPart]
    def __init__(self, daemon: _Optional[_Union[HelloReply, _Mapping]] = ..., pending: _Optional[int] = ..., active: _Optional[int] = ..., failed: _Optional[int] = ..., bytes_pending: _Optional[int] = ..., active_id: _Optional[str] = ..., active_bytes_done: _Optional[int] = ..., active_bytes_total: _Optional[int] = ..., bytes_per_second: _Optional[float] = ..., spool_bytes: _Optional[int] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., waiting_because: _Optional[str] = ..., mounts: _Optional[int] = ..., failed_mounts: _Optional[int] = ..., leased_files: _Optional[int] = ..., leased_bytes: _Optional[int] = ..., repositories: _Optional[_Iterable[_Union[RepositoryStanding, _Mapping]]] = ..., waiting_parts: _Optional[_Iterable[_Union[WaitingPart, _Mapping]]] = ...) -> None: ...

class WaitingPart(_message.Message):
    __slots__ = ("id", "experiment_id", "waits_for")
    ID_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    id: str
    experiment_id: str
    waits_for: str
    def __init__(self, id: _Optional[str] = ..., experiment_id: _Optional[str] = ..., waits_for: _Optional[str] = ...) -> None: ...

class RepositoryStanding(_message.Message):
    __slots__ = ("repository", "pending", "active", "bytes_pending", "waiting_because", "hint", "waiting_since_ns", "retry_at_ns")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PENDING_FIELD_NUMBER: _ClassVar[int]
    WAITING_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    WAITING_SINCE_NS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AT_NS_FIELD_NUMBER: _ClassVar[int]
    repository: str
    pending: int
    active: int
    bytes_pending: int
    waiting_because: str
    hint: str
    waiting_since_ns: int
    retry_at_ns: int
    def __init__(self, repository: _Optional[str] = ..., pending: _Optional[int] = ..., active: _Optional[int] = ..., bytes_pending: _Optional[int] = ..., waiting_because: _Optional[str] = ..., hint: _Optional[str] = ..., waiting_since_ns: _Optional[int] = ..., retry_at_ns: _Optional[int] = ...) -> None: ...

class WaitStoredRequest(_message.Message):
    __slots__ = ("ids", "timeout_s", "repository")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    timeout_s: float
    repository: str
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., timeout_s: _Optional[float] = ..., repository: _Optional[str] = ...) -> None: ...

class RemoveRequest(_message.Message):
    __slots__ = ("repository", "ids", "dry_run", "force")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    repository: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    dry_run: bool
    force: bool
    def __init__(self, repository: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ..., dry_run: bool = ..., force: bool = ...) -> None: ...

class RemovedItem(_message.Message):
    __slots__ = ("id", "kind", "checkpoint_count", "step", "experiment_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_COUNT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    checkpoint_count: int
    step: int
    experiment_id: str
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., checkpoint_count: _Optional[int] = ..., step: _Optional[int] = ..., experiment_id: _Optional[str] = ...) -> None: ...

class RemoveReply(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[RemovedItem]
    def __init__(self, items: _Optional[_Iterable[_Union[RemovedItem, _Mapping]]] = ...) -> None: ...

class DiskUsageRequest(_message.Message):
    __slots__ = ("repository", "ids")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    repository: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, repository: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class DiskUsage(_message.Message):
    __slots__ = ("id", "logical_bytes", "unique_bytes", "stored_bytes", "snapshots", "base_bytes", "metadata_bytes", "encodings")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIQUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    BASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    METADATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    id: str
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    snapshots: int
    base_bytes: int
    metadata_bytes: int
    encodings: _containers.RepeatedCompositeFieldContainer[EncodedBytes]
    def __init__(self, id: _Optional[str] = ..., logical_bytes: _Optional[int] = ..., unique_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., snapshots: _Optional[int] = ..., base_bytes: _Optional[int] = ..., metadata_bytes: _Optional[int] = ..., encodings: _Optional[_Iterable[_Union[EncodedBytes, _Mapping]]] = ...) -> None: ...

class EncodedBytes(_message.Message):
    __slots__ = ("encoding", "plain_bytes", "stored_bytes")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PLAIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    encoding: str
    plain_bytes: int
    stored_bytes: int
    def __init__(self, encoding: _Optional[str] = ..., plain_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class UnreadableSnapshot(_message.Message):
    __slots__ = ("id", "experiment_id", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    experiment_id: str
    error: str
    def __init__(self, id: _Optional[str] = ..., experiment_id: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class DiskUsageReply(_message.Message):
    __slots__ = ("experiments", "total", "unreferenced_bytes", "unreadable")
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNREFERENCED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    experiments: _containers.RepeatedCompositeFieldContainer[DiskUsage]
    total: DiskUsage
    unreferenced_bytes: int
    unreadable: _containers.RepeatedCompositeFieldContainer[UnreadableSnapshot]
    def __init__(self, experiments: _Optional[_Iterable[_Union[DiskUsage, _Mapping]]] = ..., total: _Optional[_Union[DiskUsage, _Mapping]] = ..., unreferenced_bytes: _Optional[int] = ..., unreadable: _Optional[_Iterable[_Union[UnreadableSnapshot, _Mapping]]] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("repository", "dry_run")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    repository: str
    dry_run: bool
    def __init__(self, repository: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class CollectEvent(_message.Message):
    __slots__ = ("step", "done", "total", "report")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    step: str
    done: int
    total: int
    report: CollectReport
    def __init__(self, step: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., report: _Optional[_Union[CollectReport, _Mapping]] = ...) -> None: ...

class CollectReport(_message.Message):
    __slots__ = ("packs", "size_bytes", "kept_packs", "kept_bytes", "unneeded_bytes", "spared_bytes", "announced", "announced_age_s")
    PACKS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_PACKS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNNEEDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_AGE_S_FIELD_NUMBER: _ClassVar[int]
    packs: int
    size_bytes: int
    kept_packs: int
    kept_bytes: int
    unneeded_bytes: int
    spared_bytes: int
    announced: int
    announced_age_s: float
    def __init__(self, packs: _Optional[int] = ..., size_bytes: _Optional[int] = ..., kept_packs: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., unneeded_bytes: _Optional[int] = ..., spared_bytes: _Optional[int] = ..., announced: _Optional[int] = ..., announced_age_s: _Optional[float] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("repository", "store")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    repository: str
    store: bool
    def __init__(self, repository: _Optional[str] = ..., store: bool = ...) -> None: ...

class ProbeStep(_message.Message):
    __slots__ = ("name", "ok", "detail", "hint", "outcome", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    ok: bool
    detail: str
    hint: str
    outcome: str
    value: str
    def __init__(self, name: _Optional[str] = ..., ok: bool = ..., detail: _Optional[str] = ..., hint: _Optional[str] = ..., outcome: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[ProbeStep]
    def __init__(self, steps: _Optional[_Iterable[_Union[ProbeStep, _Mapping]]] = ...) -> None: ...
