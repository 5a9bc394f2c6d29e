"""Where a project is and which repository it has: file, environment, defaults, and what can be wrong."""

import os
from pathlib import Path

import pytest

from replicate.config import find_project, resolve_repository
from replicate.errors import ConfigError


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("REPLICATE_REPOSITORY", "REPLICATE_PROJECT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(directory, text, name="replicate.yaml"):
    file = directory / name
    file.write_text(text)
    return file


def test_nothing_has_to_be_configured(directory):
    project = find_project()
    assert project.directory == directory
    assert project.repository == f"file://{directory}/.replicate"
    assert (project.repository_origin, project.capture, project.ignore) == ("default", "auto", ())
    assert project.file is None


@pytest.mark.parametrize("name", ["replicate.yaml", "replicate.yml"])
def test_the_file_in_the_nearest_parent_counts(directory, monkeypatch, name):
    file = write(directory, "repository: s3://bucket/prefix/\ncapture: copy\nignore: ['*.log', tmp/]\n", name)
    below = directory / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    project = find_project()
    assert (project.directory, project.file) == (directory, file)
    assert (project.repository, project.repository_origin) == ("s3://bucket/prefix", "config")
    assert (project.capture, project.ignore) == ("copy", ("*.log", "tmp/"))


def test_an_empty_file_marks_a_project(directory):
    write(directory, "# nothing yet\n")
    assert find_project().repository == f"file://{directory}/.replicate"


def test_a_given_directory_is_not_searched_upwards(directory):
    write(directory, "repository: file://elsewhere\n")
    below = directory / "below"
    below.mkdir()
    assert find_project(below).repository == f"file://{below}/.replicate"


def test_the_environment_beats_the_file_and_arguments_beat_both(directory, monkeypatch):
    write(directory, "repository: file://one\n")
    monkeypatch.setenv("REPLICATE_REPOSITORY", "file://two")
    assert find_project().repository == f"file://{directory}/two"
    project = find_project(repository="file:///three")
    assert (project.repository, project.repository_origin) == ("file:///three", "argument")


def test_the_environment_names_the_project_directory(directory, monkeypatch):
    below = directory / "below"
    below.mkdir()
    monkeypatch.setenv("REPLICATE_PROJECT_DIR", str(below))
    assert find_project().directory == below


def test_a_project_directory_that_is_none_is_an_error(directory):
    with pytest.raises(ConfigError, match="nowhere"):
        find_project(directory / "nowhere")


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_valid_one(directory):
    file = write(directory, "ignore: []\nrepositry: file://x\n")
    with pytest.raises(ConfigError) as caught:
        find_project()
    assert caught.value.message == f"{file}:2: unknown key `repositry`"
    assert "did you mean `repository`?" in caught.value.hint
    assert caught.value.fields == {"file": str(file), "line": "2", "key": "repositry"}


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("repository: [a]\n", 1, "must be a URL"),
        ("\nrepository: ftp://host/x\n", 2, "not a repository URL"),
        ("repository: 'file://'\n", 1, "no path"),
        ("capture: fast\n", 1, "must be auto or copy"),
        ("ignore: {a: b}\n", 1, "list of patterns"),
        ("ignore: [1]\n", 1, "list of patterns"),
        ("capture: auto\ncapture: copy\n", 2, "twice"),
        ("capture: auto\n  ignore: [\n", 2, "not valid YAML"),
        ("- a\n", 1, "key: value"),
        ("capture: !!python/name:os.system\n", 1, "not !!python/name:os.system"),
        ("capture: copy\nrepository: !!python/object:os.system x\n", 2, "not !!python/object:os.system"),
        ("ignore: !!python/tuple [a]\n", 1, "not !!python/tuple"),
        ("repository: 2026-99-99\n", 1, "not 2026-99-99"),
        ("ignore: &a [*a]\n", 1, "not [a list]"),
        ("\n\x01\n", 2, "not valid YAML: special characters are not allowed"),
        ("\nignore: " + 5000 * "[", 2, "nested too deeply"),
        ('\nignore: ["\\ud800"]\n', 2, "`ignore` holds a lone surrogate"),
        ('repository: "file://\\ud800"\n', 1, "`repository` holds a lone surrogate"),
        ("? [a]\n: b\n", 1, "unknown key `['a']`"),
        ("? {a: b}\n: b\n", 1, "unknown key `a mapping`"),
        ("1: b\n", 1, "unknown key `1`"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("\nqueue_limit: much\n", 2, "`queue_limit`: not a size such as 20GB"),
        ("spool_limit: [1]\n", 1, "`spool_limit`: not a size such as 20GB"),
        ("spool_limit: {a: b}\n", 1, "`spool_limit`: not a size such as 20GB"),
        ("spool_limit: true\n", 1, "`spool_limit`: not a size such as 20GB"),
        ("spool_limit: 0\n", 1, "`spool_limit`: must be from 1 byte"),
        ("queue_limit: -5GB\n", 1, "`queue_limit`: not a size such as 20GB"),
        ("queue_limit: 5GB/s\n", 1, "`queue_limit`: not a size such as 20GB"),
        ("upload_limit: fast\n", 1, "`upload_limit`: not a rate such as 50MB/s"),
        ("warn_above: never\n", 1, "`warn_above`: not a size such as 20GB"),
        ("warn_above: on\n", 1, "`warn_above`: not a size such as 20GB, 512MiB or 1000000: on"),
        ("warn_above: 0\n", 1, "`warn_above`: must be from 1 byte"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(directory, text, line, problem):
    file = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        find_project()
    assert caught.value.message.startswith(f"{file}:{line}: ")
    assert problem in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [("20GB", 20 * 10**9), ("512MiB", 512 << 20), ("1000000", 10**6), ("1.5e", 15 * 10**17), ("", 0)],
)
def test_limits_are_sizes(directory, written, size_bytes):
    write(directory, f"queue_limit: {written}\nspool_limit: {written}\nupload_limit: {written}\n")
    project = find_project()
    assert (project.queue_limit, project.spool_limit, project.upload_limit) == (size_bytes,) * 3


@pytest.mark.parametrize(
    ("written", "shown"),
    [('""', "''"), ('"x y"', "'x y'"), ("-5GB", "'-5GB'"), ("{a: b}", "a mapping"), ("[a, 1]", "['a', 1]")],
)
@pytest.mark.parametrize("key", ["queue_limit", "upload_limit"])
def test_what_is_no_size_is_shown_as_it_was_written(directory, key, written, shown):
    write(directory, f"{key}: {written}\n")
    with pytest.raises(ConfigError) as caught:
        find_project()
    assert caught.value.message.endswith(f" or 1000000: {shown}")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("", 10 * 10**9),
        ("warn_above:\n", 10 * 10**9),
        ("warn_above: 2TB\n", 2 * 10**12),
        ("warn_above: 1\n", 1),
        ("warn_above: off\n", 0),
        ("warn_above: 'off'\n", 0),
        ("warn_above: no\n", 0),
    ],
)
def test_what_is_unusual_can_be_said_and_switched_off(directory, text, size_bytes):
    write(directory, text)
    assert find_project().warn_above == size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("", 10 * 10**9),
        ("cache_size: 512MiB\n", 512 << 20),
        ("cache_size: off\n", 0),
    ],
)
def test_what_mounts_may_keep_can_be_said_and_switched_off(directory, text, size_bytes):
    write(directory, text)
    assert find_project().cache_size == size_bytes


def test_a_cache_of_no_size_is_refused_with_what_to_write_instead(directory):
    write(directory, "cache_size: 0\n")
    with pytest.raises(ConfigError) as caught:
        find_project()
    assert "`cache_size: off`" in str(caught.value)


@pytest.mark.parametrize("written", ["0", "-1", "never", "[off]"])
def test_who_wants_no_warning_of_sizes_is_told_how_to_switch_it_off(directory, written):
    write(directory, f"warn_above: {written}\n")
    with pytest.raises(ConfigError) as caught:
        find_project()
    assert "`warn_above: off`" in str(caught.value)


def test_an_upload_limit_may_be_a_rate(directory):
    write(directory, "upload_limit: 50MB/s\n")
    project = find_project()
    assert (project.queue_limit, project.spool_limit, project.upload_limit) == (0, 0, 50 * 10**6)


def test_a_file_that_is_not_text_is_an_error_naming_the_line(directory):
    (directory / "replicate.yaml").write_bytes(b"# a\n# \xff\n")
    with pytest.raises(ConfigError, match=r"replicate\.yaml:2: not UTF-8: byte 0xff"):
        find_project()


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("REPLICATE_REPOSITORY", "ftp://host/x", "not a repository URL"),
        ("REPLICATE_REPOSITORY", "file://", "the repository URL `file://` has no path"),
        ("REPLICATE_PROJECT_DIR", "nowhere", "the project directory is not a directory"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(directory, monkeypatch, variable, value, problem):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        find_project()
    assert caught.value.message.startswith(f"{variable}: {problem}")


def test_a_variable_is_not_blamed_for_the_file(directory, monkeypatch):
    file = write(directory, "repositry: x\n")
    monkeypatch.setenv("REPLICATE_PROJECT_DIR", str(directory))
    with pytest.raises(ConfigError) as caught:
        find_project()
    assert caught.value.message.startswith(f"{file}:1: ")


def test_a_working_directory_that_was_deleted_is_told(directory, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for arguments in ((), (None, "file:///x"), ("relative",)):
        with pytest.raises(ConfigError, match="the working directory does not exist any more"):
            find_project(*arguments)
    assert find_project(directory).directory == directory


def test_a_repository_that_is_no_text_is_refused_and_may_lie_elsewhere(tmp_path, monkeypatch):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.delenv("REPLICATE_REPOSITORY", raising=False)
    for url in (None, "file://x", f"file://{tmp_path}/%ff"):
        with pytest.raises(ConfigError, match=r"the path of the repository is not UTF-8: .*\\xff") as caught:
            find_project(repository=url)
        assert "REPLICATE_REPOSITORY" in caught.value.hint
    assert find_project(repository="file:///elsewhere").directory == odd


def test_arguments_of_other_types_are_refused(directory):
    with pytest.raises(TypeError, match="repository must be a URL, not 5"):
        find_project(repository=5)


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("file://.replicate", "file:///project/.replicate"),
        ("file:///absolute/../other", "file:///other"),
        ("file://with%20space", "file:///project/with space"),
        ("s3://bucket", "s3://bucket"),
        ("gs://bucket/prefix/", "gs://bucket/prefix"),
    ],
)
def test_repository_urls_have_one_absolute_form(tmp_path, url, resolved):
    assert resolve_repository(url, tmp_path) == resolved.replace("/project", str(tmp_path))


@pytest.mark.parametrize("url", ["", "/path", "ftp://secret:password@host", "file://", "file://a\0b"])
def test_other_repository_urls_are_refused_without_repeating_credentials(tmp_path, url):
    with pytest.raises(ConfigError) as caught:
        resolve_repository(url, tmp_path)
    assert "password" not in str(caught.value)
